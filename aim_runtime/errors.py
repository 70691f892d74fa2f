"""The exceptions of the runtime; each carries one sentence meant for the person who reads it."""

from __future__ import annotations

from aim_runtime.quoting import sentence


class AimError(Exception):
    """Something outside the caller's arguments went wrong; the message is one clear sentence.

    It has at most 300 characters on one line, whatever path it quotes.
    """

    def __str__(self) -> str:
        return sentence(super().__str__())


class BundleError(AimError):
    """A bundle is missing, cut short, altered, malformed, unsafe or from a newer format."""


class BackendError(AimError):
    """A backend is unknown, cannot run here, or failed while running."""


class RequestCancelled(AimError):
    """The caller cancelled the request; the generator can be used again at once."""


class DeadlineExceeded(AimError):
    """The time that the caller gave a request is over."""


class QueueFull(AimError):
    """More images wait than may; try again later.

    Attributes:
        retry_after_s: In about how many seconds there will be room.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFull], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)
