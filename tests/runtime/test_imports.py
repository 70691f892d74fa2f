"""The runtime stays small: what it imports, checked in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "onnx", "onnxscript", "safetensors", "accelerate")

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_the_blocker_blocks() -> None:
    code = BLOCK + "try:\n    import onnx\nexcept ImportError as error:\n    print(error)"
    assert run(code) == "onnx is blocked"


def test_images_are_drawn_without_torch_and_onnx(tiny: Path) -> None:
    code = (
        BLOCK
        + """
import aim_runtime
with aim_runtime.Generator.load(sys.argv[1]) as gen:
    result = gen.generate(["dog", 2], seed=3)
    list(gen.stream([0]))
    gen.logits(result.tokens, [1, 2])
    print(result.array.shape, result.images[0].size)
"""
    )
    assert run(code, str(tiny)) == "(2, 6, 6, 3) (6, 6)"


def test_importing_the_package_imports_little() -> None:
    code = """
import sys
before = set(sys.modules)
import aim_runtime
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    imported = set(run(code).split())
    assert "numpy" in imported
    assert not imported & {*HEAVY, "onnxruntime", "PIL", "scipy", "click"}
    assert not imported & {"aim_export", "aim_training", "aim_cli"}


def test_everything_that_is_exported_exists() -> None:
    import aim_runtime

    assert sorted(aim_runtime.__all__) == list(aim_runtime.__all__)
    for name in aim_runtime.__all__:
        assert getattr(aim_runtime, name) is not None


def test_continuous_batching_is_imported_when_it_is_used() -> None:
    code = """
import sys
import aim_runtime
assert "aim_runtime.batcher" not in sys.modules
assert {"Batcher", "Job", "Generator"} <= set(dir(aim_runtime))
assert not hasattr(aim_runtime, "Nothing")
from aim_runtime import *
print(Batcher.__module__, Job.__module__, "asyncio" in sys.modules)
"""
    assert run(code) == "aim_runtime.batcher aim_runtime.job False"
