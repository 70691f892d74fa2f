"""The exception of the package."""

from __future__ import annotations

from aim_runtime.errors import AimError


class EvaluationError(AimError):
    """Nothing can be measured; the message is one sentence that says why and what to do."""
