"""Damaged checkpoints by the thousand, each of which must end in a network or in one sentence.

    python tests/training/fuzz_checkpoints.py --minutes 10

Mutants are read in forked children with limits on time and memory, many to a child. What counts as
a failure: a signal, a hang, memory beyond what the file holds, an exception other than
`CheckpointError`, a message of several lines or of more than 300 characters.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from aim_training.checkpoint import CheckpointError, load_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

# A case may take this long, and this much memory beyond what the process has.
SECONDS, MEBIBYTES = 10, 256
_PER_CHILD = 100

Mutation = Callable[[random.Random, bytes], bytes]


@dataclass
class Outcome:
    """What became of the mutants: how many of each kind, and those that failed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def seeds() -> list[bytes]:
    """Good checkpoints in every form that is read."""
    torch.manual_seed(0)
    model = AiM(ModelConfig(8, 2, 4, 8, 2, d_state=4, head_dim=8, adaln_groups=2)).initialise()
    tokenizer = VQTokenizer(TokenizerConfig(8, 2, 32, (1,), 4, encoder_blocks=1, decoder_blocks=1))
    state = {f"mamba.{name}": t.clone() for name, t in model.state_dict().items()}
    only = {"model": dict(model.state_dict())}
    training = {
        "ema": tokenizer.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": Namespace(lr=1e-4, path=Path("x")),
        "best": np.float32(2.0),
        "curve": np.zeros(3),
    }
    found = [save(state)]
    for content, options in (
        (only, {}),
        (training, {}),
        (only, {"_use_new_zipfile_serialization": False}),
        ({name: tensor.bfloat16() for name, tensor in state.items()}, {}),
    ):
        file = io.BytesIO()
        torch.save(content, file, **options)
        found.append(file.getvalue())
    return found


def scribbled(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, moved, repeated, cut out or cut off; most of them near the ends."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = _place(rng, len(found))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            edge = rng.choice((0, 1, 0x7F, 0xFF, 0x80))
            found[at : at + length] = bytes([edge]) * length
        elif kind == 2:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length * rng.choice((1, 8))]
        else:
            del found[_place(rng, len(found)) :]
    return bytes(found)


def repickled(rng: random.Random, data: bytes) -> bytes:
    """A zip of PyTorch's whose pickle is scribbled on, with all checksums right again."""
    if not data.startswith(b"PK"):
        return scribbled(rng, data)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w") as target:
        for info in source.infolist():
            member = source.read(info)
            if info.filename.endswith("data.pkl"):
                member = rng.choice((scribbled, _respelled))(rng, member)
            target.writestr(info.filename, member)
    return file.getvalue()


def redescribed(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with values of its header exchanged, and the header's length right."""
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > len(data):
        return scribbled(rng, data)
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 3))):
        entry = header[rng.choice(sorted(header))]
        key = rng.choice(("dtype", "shape", "data_offsets", "name"))
        entry[key] = rng.choice(_ODD_VALUES)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


_ODD_VALUES: tuple[object, ...] = (
    *(0, -1, 2**40, 2**63, 2**64, 10**30, 0.5, None, True, "F32", "F64", "I8", "BOOL", "F9"),
    *([], [0], [-1], [2**40, 2**40], [1, 1, 1, 1], [0, 4], [4, 0], [0, 2**62], [[]], [None] * 2),
    *([1] * 100, {}, {"a": 1}, "x" * 1000),
)
MUTATIONS: tuple[Mutation, ...] = (scribbled, repickled, redescribed)


def _respelled(rng: random.Random, pickle: bytes) -> bytes:
    """Instructions of a pickle put in, taken out or exchanged for others."""
    found = bytearray(pickle)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(found))
        instruction = rng.choice(
            b"().0125]}lqrtsuabcCdegGhHijJKLMNopPQRSTUVXBI\x80\x81\x85\x86\x87\x8a"
        )
        found[at : at + rng.randrange(2)] = bytes([instruction])
    return bytes(found)


def _place(rng: random.Random, size: int) -> int:
    """A position in a file, often close to its beginning or end, where its structure is."""
    near = rng.randrange(min(size, 4096) + 1)
    return rng.choice((near, size - near, rng.randrange(size + 1)))


def check(path: Path) -> str:
    """Read one checkpoint; "loaded", "refused", or what is wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    try:
        load_checkpoint(path)
        found = "loaded"
    except CheckpointError as error:
        message = str(error)
        found = "refused"
        if not message.isprintable() or not 10 < len(message) <= 300:
            found = f"message {message!r}"
    except BaseException:
        found = f"exception {traceback.format_exc()}"
    if time.monotonic() - started > SECONDS:
        found = f"it took {time.monotonic() - started:.0f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return f"it took {grown} MiB" if grown > MEBIBYTES else found


def campaign(seconds: float, seed: int, folder: Path) -> Outcome:
    """Mutants of all seeds until the time is up; at least one child's worth."""
    rng, outcome, whole = random.Random(seed), Outcome(), seeds()
    for data in whole:
        (folder / "whole").write_bytes(data)
        load_checkpoint(folder / "whole")  # PyTorch imports much on first use, and once only
        assert check(folder / "whole") == "loaded"
    until = time.monotonic() + seconds
    while not outcome.tried or time.monotonic() < until:
        mutants = [rng.choice(MUTATIONS)(rng, rng.choice(whole)) for _ in range(_PER_CHILD)]
        results = _in_child(mutants, folder, until)
        for mutant, result in zip(mutants, results, strict=False):
            kind = result.split()[0]
            outcome.counts[kind] += 1
            if kind not in ("loaded", "refused"):
                outcome.failures.append((result, mutant))
    return outcome


def _in_child(mutants: list[bytes], folder: Path, until: float) -> list[str]:
    """What `check` says of each, asked in a forked child; the last one may have killed it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            # Twice over: a case that hangs is stopped, and one that fills the memory fails.
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + (4 * MEBIBYTES << 20),) * 2)
            for mutant in mutants:
                if time.monotonic() > until + SECONDS:
                    break
                (folder / "mutant").write_bytes(mutant)
                signal.alarm(2 * SECONDS)
                os.write(writer, json.dumps(check(folder / "mutant")).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        results = [json.loads(line) for line in stream]
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return [*results, f"signal {-code}"] if code else results


def main() -> int:
    """Run a campaign from the command line; what failed is kept for a look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="for failures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = campaign(60 * options.minutes, options.seed, Path(folder))
    print(f"{outcome.tried} mutants: {dict(outcome.counts)}")
    for number, (what, mutant) in enumerate(outcome.failures):
        options.keep.mkdir(exist_ok=True)
        (options.keep / f"{number}.bin").write_bytes(mutant)
        print(f"{number}.bin: {what}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
