"""What a large decoder takes to work in is planned, and goes back when the picture is there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# In MiB. For the model in the box, memory from the system value by value is 55 to 86; planned,
# 24 to 31 are enough.
_MOST_TO_WORK_IN = 44


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_decoding_takes_little_and_gives_it_back() -> None:
    code = """
    from pathlib import Path
    import numpy as np
    from aim_runtime import Bundle
    from aim_runtime.engines.onnxruntime import engine as engines
    from aim_runtime.engines.onnxruntime.cpu import load

    def mib(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    engines._KEPT_BYTES = 0  # as if it were a large one
    engine = load(Bundle.open(), threads=2)
    # Loading leaves nothing freed to work in: what the first image takes for good comes first.
    engine.decode(np.zeros((1, engine.manifest.model.num_tokens), np.int64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loaded = mib("VmRSS")
    for code in range(3):
        engine.decode(np.full((1, engine.manifest.model.num_tokens), code))
    print(mib("VmHWM") - loaded, mib("VmRSS") - loaded)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    peak, left = map(float, done.stdout.split())
    assert peak < _MOST_TO_WORK_IN
    assert left < peak / 2
