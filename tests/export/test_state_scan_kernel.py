"""The scan kernel, in Triton's interpreter, against its twin, the node's body and the golden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from aim_export.onnx.state_scan import DOMAIN, INPUTS, NAME, OUTPUTS, state_scan
from aim_training.config import ModelConfig

from .conftest import Exported, Golden
from .interpreted_scan import run_interpreted

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.tensorrt.scan import ScanSizes, state_scan_reference

# Published and trained geometries, then sizes that are no powers of two and the smallest ones.
GEOMETRIES = [
    (ScanSizes(heads=32, head_dim=64, d_state=128, conv_width=4), 2),
    (ScanSizes(heads=12, head_dim=64, d_state=64, conv_width=4), 3),
    (ScanSizes(heads=3, head_dim=5, d_state=6, conv_width=3), 4),
    (ScanSizes(heads=2, head_dim=4, d_state=3, conv_width=1), 2),
    (ScanSizes(heads=1, head_dim=1, d_state=1, conv_width=2), 1),
]


def random_inputs(sizes: ScanSizes, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs like a trained model's; the first row starts an image and has no state to read."""
    rng = np.random.default_rng(seed)
    shapes = sizes.shapes(rows)
    inputs: dict[str, np.ndarray] = {
        name: rng.standard_normal(shapes[name]).astype(np.float32)
        for name in INPUTS
        if name != "position"
    }
    inputs["position"] = np.array([0, 1, 255, 7], np.int64)[:rows]
    inputs["a"] = -rng.uniform(1, 16, shapes["a"]).astype(np.float32)
    # Steps from 1e-4 (where 1 + exp(dt) has few digits left) to beyond softplus's linear part.
    inputs["dt_bias"] = rng.uniform(-10, 25, shapes["dt_bias"]).astype(np.float32)
    inputs["conv_state"][0] = inputs["ssm_state"][0] = np.nan
    return inputs


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30))


@pytest.fixture(scope="module")
def launches(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Inputs and outputs of one launch a geometry."""
    folder = tmp_path_factory.mktemp("launches")
    cases = [random_inputs(sizes, rows, i) for i, (sizes, rows) in enumerate(GEOMETRIES)]
    np.savez(
        folder / "in.npz",
        **{f"{i}.{name}": a for i, c in enumerate(cases) for name, a in c.items()},
    )
    run_interpreted("cases", folder / "in.npz", folder / "out.npz")
    with np.load(folder / "out.npz") as stored:
        found = [{name: stored[f"{i}.{name}"] for name in OUTPUTS} for i in range(len(cases))]
    return list(zip(cases, found, strict=True))


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_kernel_writes_every_element_as_its_twin_does(
    case: int, launches: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
) -> None:
    inputs, found = launches[case]
    doubles = {n: a if n == "position" else a.astype(np.float64) for n, a in inputs.items()}
    expected = dict(zip(OUTPUTS, state_scan_reference(**doubles), strict=True))
    for name in OUTPUTS:
        assert found[name].shape == expected[name].shape
        assert np.isfinite(found[name]).all(), name  # NaN before, and in the first row's old state
        assert relative_error(found[name], expected[name]) <= 3e-6, name
    assert np.array_equal(found["next_conv_state"], expected["next_conv_state"])


def test_twin_computes_the_node(
    launches: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
) -> None:
    """The body that every other engine runs."""
    inputs = {name: np.nan_to_num(array) for name, array in launches[0][0].items()}
    sizes, rows = GEOMETRIES[0]
    config = ModelConfig(
        vocab_size=1,
        num_classes=1,
        num_tokens=1,
        num_layers=1,
        d_model=sizes.heads * sizes.head_dim // 2,
        head_dim=sizes.head_dim,
        d_state=sizes.d_state,
        conv_width=sizes.conv_width,
    )
    border = [
        [
            helper.make_tensor_value_info(
                name, onnx.TensorProto.INT64 if name == "position" else 1, sizes.shapes(rows)[name]
            )
            for name in names
        ]
        for names in (INPUTS, OUTPUTS)
    ]
    node = helper.make_node(NAME, INPUTS, OUTPUTS, domain=DOMAIN)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph([node], "scan", *border),
        functions=[state_scan(config)],
        opset_imports=opsets,
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for ours, theirs in zip(state_scan_reference(**inputs), session.run(None, inputs), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_kernel_in_the_step_reproduces_the_golden_logits(
    each_golden: Golden, exported: Exported, tmp_path: Path
) -> None:
    steps = 4  # enough to fill the convolution and read the state
    tokens = each_golden.tensors["codes"][:, :steps].numpy()
    classes = each_golden.tensors["cond"][:, 0].numpy()
    no_class = np.full_like(classes, exported.bundle.manifest.model.num_classes)
    np.savez(
        tmp_path / "in.npz",
        tokens=np.concatenate([tokens, tokens]),
        classes=np.concatenate([classes, no_class]),
    )
    run_interpreted("steps", exported.bundle.path, tmp_path / "in.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as stored:
        with_class, without = np.split(stored["logits"], 2)
    guided = without + each_golden.cfg_scale * (with_class - without)
    expected = each_golden.tensors["logits_step_cfg"][:, :steps].numpy()
    assert relative_error(guided, expected) <= 1e-5
