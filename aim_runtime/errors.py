"""The exceptions of the runtime; each carries one sentence meant for the person who reads it."""

from __future__ import annotations


class AimError(Exception):
    """Something outside the caller's arguments went wrong; the message is one clear sentence."""


class BundleError(AimError):
    """A bundle is missing, cut short, altered, malformed, unsafe or from a newer format."""


class BackendError(AimError):
    """A backend is unknown, cannot run here, or failed while running."""


class RequestCancelled(AimError):
    """The caller's cancel event was set; the generator can be used again at once."""
