"""How ONNX Runtime's threads wait for work: they look for it a moment, then sleep.

A step has hundreds of operators of some ten microseconds each, and a thread that sleeps between two
of them takes as long to wake. One that looks for work until there is some, as ONNX Runtime has it,
takes cores from whoever else has work on them: a step then lasts two to three times as long. So
long as here, the next operator is mostly there in time, and cores that others want are soon free.
"""

from __future__ import annotations

from collections.abc import Mapping

from aim_runtime.engines.onnxruntime.library import is_older

_MICROSECONDS = 10
# Versions before take no time, and look for a millisecond or more.
_VERSION = "1.26"


def waiting(version: str) -> Mapping[str, str]:
    """The entries of a session's configuration for ONNX Runtime `version`."""
    if is_older(version, _VERSION):
        return {"session.intra_op.allow_spinning": "0"}
    return {
        "session.intra_op.allow_spinning": "1",
        "session.intra_op.spin_duration_us": str(_MICROSECONDS),
    }
