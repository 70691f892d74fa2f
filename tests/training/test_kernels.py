"""The training kernels on a machine without a GPU: in Triton's interpreter, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aim_training.kernels import dual
from aim_training.kernels.language import launchable

triton = pytest.importorskip("triton", reason="Triton, which the kernels are written in")

# float32 in the interpreter, whose products are exact.
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    # What a kernel becomes is decided when its module is imported: a process of its own.
    found = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kernel_errors.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    result: dict[str, dict[str, float]] = json.loads(found.stdout)
    return result


@pytest.mark.parametrize("kernel", ["add_norm", "mixer", "cross_entropy"])
def test_outputs_and_gradients_are_those_of_the_plain_form(
    kernel: str, errors: dict[str, dict[str, float]]
) -> None:
    assert len(errors[kernel]) >= 2
    for name, error in errors[kernel].items():
        assert error <= TOLERANCE, name


def test_tensors_of_a_cpu_and_of_double_precision_take_the_plain_form() -> None:
    assert not launchable(torch.zeros(1))
    assert not launchable(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_sums", ["*bf16", "*bf16", "*fp32", "*fp32", "*fp32", "*bf16", "i32"]),
        (
            "_sums_backward_scores",
            ["*bf16"] * 3 + ["*fp32", "*fp32", "*bf16", "*fp32", "*fp32", "i32"],
        ),
        ("_sums_backward_x", ["*bf16"] * 3 + ["*fp32"] * 3 + ["*bf16", "*fp32", "*fp32", "i32"]),
    ],
)
def test_the_sums_compile_for_tensor_cores(name: str, arguments: list[str]) -> None:
    """At AiM-L's sizes, with the options of the launch, and in an H100's shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = getattr(dual, name)
    sizes = {"CHANNELS": 2304, "HEADS": 32, "P": 64, "BLOCK": 64, "PRECISION": "tf32"}
    names = [parameter.name for parameter in kernel.params]
    given = iter(arguments)
    signature = {n: "constexpr" if n in sizes else next(given) for n in names}
    source = ASTSource(
        kernel,
        signature,
        {(i,): sizes[n] for i, n in enumerate(names) if n in sizes},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes},
    )
    options = getattr(dual, name.upper().replace("_SUMS", "") or "_FORWARD")
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 << 10
