"""Run the scan kernel in Triton's interpreter, in a process of its own.

The interpreter is chosen when a kernel is defined, so this cannot happen where others compile it.
``python interpreted_scan.py cases IN OUT`` runs one launch for each case in the .npz file IN;
``python interpreted_scan.py steps BUNDLE IN OUT`` runs a bundle's whole step with the kernel in
place of its scan nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run_interpreted(*arguments: str | Path) -> None:
    """Call this file in a process whose kernels are interpreted."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def launch(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One launch; outputs are full of NaN before."""
    import torch

    from aim_export.onnx.state_scan import OUTPUTS
    from aim_export.tensorrt.scan import PARAMETERS, ScanSizes, state_scan_kernel

    sizes = ScanSizes.of(inputs["conv_weight"].shape, inputs["ssm_state"].shape)
    rows = len(inputs["position"])
    shapes = sizes.shapes(rows)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors |= {name: torch.full(shapes[name], float("nan")) for name in OUTPUTS}
    state_scan_kernel[sizes.grid(rows)](
        *(tensors[name] for name in PARAMETERS), **sizes.constants()
    )
    return {name: tensors[name].numpy() for name in OUTPUTS}


def run_cases(source: str, target: str) -> None:
    with np.load(source) as stored:
        cases: dict[str, dict[str, np.ndarray]] = {}
        for key in stored:
            case, name = key.split(".")
            cases.setdefault(case, {})[name] = stored[key]
    results = {
        f"{case}.{name}": array
        for case, inputs in cases.items()
        for name, array in launch(inputs).items()
    }
    np.savez(target, **results)


def run_steps(bundle_dir: str, source: str, target: str) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    from aim_export.onnx.state_scan import INPUTS, OUTPUTS
    from aim_runtime import Bundle

    class StateScan(OpRun):
        op_domain = "aim"

        def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            arrays = [np.array(value) for value in inputs]  # writable, as torch wants them
            found = launch(dict(zip(INPUTS, arrays, strict=True)))
            return tuple(found[name] for name in OUTPUTS)

    bundle = Bundle.open(bundle_dir)
    graphs = {
        name: ReferenceEvaluator(onnx.load(bundle.path / spec.file), new_ops=[StateScan])
        for name, spec in bundle.manifest.graphs.items()
        if name != "decoder"
    }
    with np.load(source) as stored:
        tokens, classes = stored["tokens"], stored["classes"]
    rows, steps = tokens.shape
    prologue = bundle.manifest.graphs["prologue"].outputs
    feeds = dict(
        zip(
            [spec.name for spec in prologue],
            graphs["prologue"].run(None, {"class_id": classes}),
            strict=True,
        )
    )
    step = bundle.manifest.graphs["step"]
    for pair in bundle.manifest.state:
        # What a row's state holds before position 0 must not matter.
        feeds[pair.input] = np.full(step.input(pair.input).concrete_shape(rows), np.nan, np.float32)
    scores = []
    for position in range(steps):
        feeds["token"] = tokens[:, position - 1]
        feeds["position"] = np.full(rows, position)
        found = dict(
            zip([spec.name for spec in step.outputs], graphs["step"].run(None, feeds), strict=True)
        )
        scores.append(found["logits"])
        feeds |= {pair.input: found[pair.output] for pair in bundle.manifest.state}
    np.savez(target, logits=np.stack(scores, axis=1))


if __name__ == "__main__":
    {"cases": run_cases, "steps": run_steps}[sys.argv[1]](*sys.argv[2:])
