"""What goes wrong with a request, as OpenAI's clients read it: a status and `{"error": {...}}`."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_STATUS_OF = {  # names of Triton and of gRPC
    "INVALID_ARG": 400,
    "NOT_FOUND": 404,
    "DEADLINE_EXCEEDED": 504,
    "UNAVAILABLE": 503,
}


class ApiError(Exception):
    """An error that the client is told.

    Attributes:
        status: of HTTP.
        message: for the client's user.
        param: the field at fault.
        code: for programs.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of an event in a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Those that go with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A field that is wrong: 400."""
    return ApiError(400, message, param, code)


def unknown_model(name: str) -> ApiError:
    """A model that is not served, or not to this client: 404."""
    message = f"The model {name!r:.200} does not exist or you do not have access to it."
    return ApiError(404, message, "model", "model_not_found")


def full(message: str, seconds: int = 1) -> ApiError:
    """A bound on requests or tokens is reached: 429."""
    return ApiError(429, message, None, "rate_limit_exceeded", seconds)


def of_engine(status: str, message: str) -> ApiError:
    """What the engine model, or the way to it, answered."""
    if status == "UNAVAILABLE" and message.rstrip(".").endswith("again later"):  # a full queue
        return full(message)
    number = _STATUS_OF.get(status, 500)
    if number == 503:
        return ApiError(503, f"The engine cannot be reached now: {message}", None, None, 2)
    if number == 400 and message.startswith(("the prompt has", "the request has")):
        return invalid(None, message, "context_length_exceeded")
    code = "model_not_found" if number == 404 else None
    return ApiError(number, message, "model" if number == 404 else None, code)
