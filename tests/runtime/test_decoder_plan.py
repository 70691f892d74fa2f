"""A request is planned with the memory that the bundle's own decoder takes at most."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aim_runtime import Generator, plan_batches
from aim_runtime.onnx_graph.cost import Step, live_bytes, peak_bytes

from .tiny_bundle import copy_bundle, rehash

SIDE, CHANNELS, BLOCKS = 192, 64, 20
MIB = 2**20


@pytest.fixture
def long_decoder(tiny: Path, tmp_path: Path) -> Path:
    """A bundle whose decoder has many maps one after another, few of them at once, as real ones."""
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    graph = model.graph
    (image,) = graph.output
    for node in graph.node:
        node.output[:] = ["small" if name == image.name else name for name in node.output]
    for size, wanted in zip(image.type.tensor_type.shape.dim[1:], (SIDE, SIDE, 3), strict=True):
        size.dim_value = wanted
    rng = np.random.default_rng(0)
    for name, value in {
        "map_shape": np.array([1, CHANNELS, SIDE, SIDE]),
        "axes": np.array([1, 2, 3]),
        "weight": rng.standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32) / 99,
        "to_pixels": rng.standard_normal((3, CHANNELS, 1, 1)).astype(np.float32),
    }.items():
        graph.initializer.append(numpy_helper.from_array(value, name))

    def add(op_type: str, inputs: str, output: str, **attributes: object) -> None:
        graph.node.append(helper.make_node(op_type, inputs.split(), [output], **attributes))

    add("Cast", "small", "float", to=TensorProto.FLOAT)
    add("ReduceMean", "float axes", "grey")
    add("Expand", "grey map_shape", "x0")
    for index in range(BLOCKS):
        add("Conv", f"x{index} weight", f"change{index}")
        add("Sigmoid", f"change{index}", f"bent{index}")
        add("Add", f"x{index} bent{index}", f"x{index + 1}")
    add("Conv", f"x{BLOCKS} to_pixels", "planes")
    add("Transpose", "planes", "interleaved", perm=[0, 2, 3, 1])
    add("Cast", "interleaved", image.name, to=TensorProto.UINT8)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"] |= {"image_height": SIDE, "image_width": SIDE}
    manifest["graphs"]["decoder"]["outputs"][0]["shape"][1:] = [SIDE, SIDE, 3]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    rehash(bundle)
    return bundle


def test_values_that_nobody_reads_any_more_take_nothing() -> None:
    chain = [Step((i,), (i + 1,), (100,), 0) for i in range(5)]
    assert live_bytes(chain, frozenset({5})) == 200
    # A result and what is read at the end stay; what a step takes besides counts while it runs.
    kept = [*chain, Step((1, 5), (6,), (100,), 50)]
    assert live_bytes(kept, frozenset({2, 6})) == 100 * 4 + 50
    assert live_bytes(kept, frozenset({2, 6})) <= peak_bytes(kept, frozenset({2, 6}))


def test_a_decoder_that_takes_less_than_usual_is_planned_with_that(long_decoder: Path) -> None:
    with Generator.load(long_decoder, backend="cpu", threads=1) as generator:
        planned, usual = generator.plan(1).total, plan_batches(generator.manifest, 1).total
    a_map = 4 * CHANNELS * SIDE * SIDE
    assert 3 * a_map < planned < usual / 2
    fits = planned / MIB + 1
    with Generator.load(long_decoder, backend="cpu", memory_limit_mb=fits) as generator:
        assert generator.generate([1]).array.shape == (1, SIDE, SIDE, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_decoding_takes_no_more_than_planned(long_decoder: Path) -> None:
    code = f"""
    from pathlib import Path
    import numpy as np
    from aim_runtime import Bundle
    from aim_runtime.engines.onnxruntime.cpu import load

    def kib(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    engine = load(Bundle.open({str(long_decoder)!r}), threads=2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loaded = kib("VmRSS")
    engine.decode(np.zeros((1, engine.manifest.model.num_tokens), np.int64))
    print((kib("VmHWM") - loaded) * 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    taken = int(done.stdout)
    with Generator.load(long_decoder, backend="cpu", threads=1) as generator:
        planned = generator.plan(1).total
    assert planned / 4 < taken <= planned
