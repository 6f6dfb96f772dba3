"""The errors a request can meet, by name.

Every one of them concerns a single request: the engine goes on serving the others.
"""


class RequestError(ValueError):
    """Base of what a request can be refused or ended with; the message is meant for the user."""


class InvalidRequestError(RequestError):
    """A field of the request is of the wrong type, out of range or contradicts another one."""


class UnknownModelError(RequestError):
    """The zoo holds no model of the requested name."""


class PromptTooLongError(RequestError):
    """The prompt alone, or with its max_tokens, exceeds what the model or the engine can hold."""


class OverloadedError(RequestError):
    """A queue is at its bound; the same request may succeed later."""


class SamplingError(RequestError):
    """No token could be chosen for one row of a step's logits.

    `row` is the index of that row among the logits of the step.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class NonFiniteLogitsError(SamplingError):
    """A row of logits holds NaN or +inf (or -inf only): the model or its weights are broken."""
