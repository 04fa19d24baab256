"""Asking a text model over HTTP: the teacher and the judge. Never imports torch."""
