"""Load and run one mutated graph after another, and say what became of each.

Started by `tests/fuzz/graphs.py`, which watches over it: whatever ends this process is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutations import mutated

from aim_runtime import AimError, Generator

GRAPHS = ("step.onnx", "decoder.onnx", "prologue.onnx")
MAX_SENTENCE = 300
_ADDRESS_SPACE = 4 << 30
# More than the untouched bundle takes. Its own need, and twice that, is below 2 MiB; the rest is
# what the allocators keep of hundreds of sessions (18 MiB after 300).
_MORE_MEMORY = 48 << 20


def outcome(folder: Path, file: str, data: bytes) -> str:
    """What became of the bundle with `data` as its graph `file`; "BAD ..." for a finding."""
    (folder / file).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        generator = Generator.load(folder, backend="cpu", threads=1)
    except AimError as error:
        kind = "refused unseen" if "no bundle may hold" in str(error) else "refused"
        return judged(str(error), str(folder), kind)
    except Exception:
        return "BAD " + traceback.format_exc()
    try:
        with generator:
            generator.generate([0, 2])
    except AimError as error:
        return judged(str(error), str(folder), "failed")
    except Exception:
        return "BAD " + traceback.format_exc()
    return "ran"


def judged(sentence: str, folder: str, kind: str) -> str:
    text = sentence.replace(folder, "")
    if not text.isprintable() or len(text) > MAX_SENTENCE:
        return f"BAD sentence: {sentence!r}"
    return kind


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(source: Path, folder: Path, first: int, count: int) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    honest = {file: (source / file).read_bytes() for file in GRAPHS}
    for file in GRAPHS:
        assert outcome(folder, file, honest[file]) == "ran"
    usual = memory()
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    for seed in range(first, first + count):
        file = GRAPHS[seed % 3]
        print(f"{seed} begins", flush=True)
        found = outcome(folder, file, mutated(honest[file], seed))
        if memory() > usual + _MORE_MEMORY:
            found = f"BAD memory: {(memory() - usual) >> 20} MiB more than usual ({found})"
            usual = memory()
        print(f"{seed} {json.dumps(found)}", flush=True)
        (folder / file).write_bytes(honest[file])
        shutil.copy(source / "manifest.json", folder / "manifest.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
