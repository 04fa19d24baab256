"""What can go wrong with a question, each fault with its own HTTP status, code and next step."""

from __future__ import annotations

from typing import Any

from medllava.errors import DataError, ImageTooLarge, MedllavaError, PromptTooLong, is_out_of_memory

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A question that is not answered: an HTTP status, a code for programs and a sentence for people."""

    def __init__(
        self, status: int, code: str, message: str, *, retry_after_s: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after_s, self.param = retry_after_s, param
        self.request_id: str | None = None

    def body(self) -> dict[str, Any]:
        """The error as the OpenAI API writes it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refused:
    """The fault behind an exception of the model: out of memory, too long a prompt, unusable data, or a defect here."""
    if isinstance(error, Refused):
        return error
    if is_out_of_memory(error):
        return Refused(
            507, "out_of_memory",
            "The model ran out of memory on this question. Shorten the conversation or the answer (max_tokens), or"
            " start the worker with --load-4bit or on a device with more memory.",
        )
    if isinstance(error, PromptTooLong):
        return Refused(400, "context_length_exceeded", str(error))
    if isinstance(error, ImageTooLarge):
        return Refused(413, "image_too_large", str(error))
    if isinstance(error, DataError):
        return Refused(400, "invalid_request", str(error))
    if isinstance(error, MedllavaError):
        return Refused(500, "model_error", str(error))
    return Refused(
        500, "internal_error",
        f"The model failed on this question ({type(error).__name__}); the worker's log holds the traceback.",
    )
