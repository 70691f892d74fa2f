"""What an export raises on purpose."""

from __future__ import annotations


class ExportError(Exception):
    """A checkpoint cannot become a bundle; the message is one sentence for the user."""


class EnginesUnavailable(ExportError):
    """This machine cannot build the engines asked for; whatever else was asked for can be done."""
