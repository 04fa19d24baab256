"""Synthetic histopathology with known truth: tissue, narrated videos, and a teacher that reads them."""
