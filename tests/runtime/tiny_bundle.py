"""A tiny valid bundle, written with onnx.helper, whose recurrence is easy to follow.

V=16 tokens, T=9 positions (3x3), C=3 classes, 6x6 pixels. The state depends on every token,
position and class seen so far, so that a state mixed up between rows, steps or requests changes the
logits. The numbers mean nothing; they are seeded and the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aim_runtime.bundle import write_bundle
from aim_runtime.bundle.manifest import (
    GraphSpec,
    Manifest,
    ModelCard,
    SamplingOptions,
    StatePair,
    TensorSpec,
)

VOCAB, TOKENS, CLASSES, WIDTH, LAYERS = 16, 9, 3, 8, 2
SIDE, PATCH = 3, 2  # 3x3 tokens of 2x2 pixels
CLASS_NAMES = ("cat, feline", "dog", "red panda")

_ONNX_TYPES = {
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
}


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, dtype, ("rows", *shape))


PROLOGUE = GraphSpec(
    "prologue.onnx",
    "prologue.weights",
    (spec("class_id", "int64"),),
    (
        spec("class_embedding", "float32", WIDTH),
        spec("modulation", "float32", LAYERS, 3, WIDTH),
        spec("final_modulation", "float32", 2, WIDTH),
    ),
)
STEP = GraphSpec(
    "step.onnx",
    "step.weights",
    (
        spec("token", "int64"),
        spec("position", "int64"),
        *PROLOGUE.outputs,
        spec("ssm_state_0", "float32", WIDTH),
        spec("conv_state_0", "float32", 2, WIDTH),
    ),
    (
        spec("logits", "float32", VOCAB),
        spec("next_ssm_state_0", "float32", WIDTH),
        spec("next_conv_state_0", "float32", 2, WIDTH),
    ),
)
DECODER = GraphSpec(
    "decoder.onnx",
    "decoder.weights",
    (spec("tokens", "int64", TOKENS),),
    (spec("image", "uint8", SIDE * PATCH, SIDE * PATCH, 3),),
)


def tiny_manifest() -> Manifest:
    """The manifest of the tiny bundle, without its files."""
    return Manifest(
        name="tiny",
        description="A recurrence for tests.",
        license="MIT",
        model=ModelCard(
            d_model=WIDTH,
            num_layers=1,
            d_state=1,
            head_dim=WIDTH,
            conv_width=3,
            vocab_size=VOCAB,
            num_classes=CLASSES,
            num_tokens=TOKENS,
            image_height=SIDE * PATCH,
            image_width=SIDE * PATCH,
            position_offset=0,
            parameters=1000,
            decoder_parameters=100,
            conditioning="adaln",
        ),
        graphs={"prologue": PROLOGUE, "step": STEP, "decoder": DECODER},
        state=(
            StatePair("ssm_state_0", "next_ssm_state_0"),
            StatePair("conv_state_0", "next_conv_state_0"),
        ),
        sampling=SamplingOptions(cfg_scale=2.0, temperature=1.0, top_k=0, top_p=1.0),
        class_names=CLASS_NAMES,
        precision="fp32",
        provenance={"exported_by": "tests", "parity": {"max_error": 0.0}},
    )


def write_tiny_bundle(out: Path) -> Path:
    """Write the tiny bundle as the folder `out` and return it."""
    source = out.with_name(out.name + "-source")
    source.mkdir(parents=True)
    rng = np.random.default_rng(7)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    _save(
        source,
        PROLOGUE,
        {
            "classes": normal(CLASSES + 1, WIDTH),
            "to_modulation": normal(WIDTH, LAYERS * 3 * WIDTH, scale=0.3),
            "to_final": normal(WIDTH, 2 * WIDTH, scale=0.3),
            "modulation_shape": np.array([-1, LAYERS, 3, WIDTH]),
            "final_shape": np.array([-1, 2, WIDTH]),
        },
        [
            ("Gather", ["classes", "class_id"], ["class_embedding"], {}),
            ("MatMul", ["class_embedding", "to_modulation"], ["flat_modulation"], {}),
            ("Reshape", ["flat_modulation", "modulation_shape"], ["modulation"], {}),
            ("MatMul", ["class_embedding", "to_final"], ["flat_final"], {}),
            ("Reshape", ["flat_final", "final_shape"], ["final_modulation"], {}),
        ],
    )
    _save(
        source,
        STEP,
        {
            "words": normal(VOCAB, WIDTH),
            "places": normal(TOKENS + 1, WIDTH, scale=0.5),
            "mix": normal(WIDTH, WIDTH, scale=0.5),
            "head": normal(WIDTH, VOCAB, scale=0.3),
            "zero": np.array(0, np.int64),
            "zero_f": np.array(0, np.float32),
            "decay": np.array(0.8, np.float32),
            "axis_1": np.array([1]),
            "axis_2": np.array([2]),
            "axes_12": np.array([1, 2]),
            "from_0": np.array([0]),
            "from_1": np.array([1]),
            "to_1": np.array([1]),
            "to_2": np.array([2]),
        },
        [
            # Position 0: the class is the input and the old state counts as zero.
            ("Equal", ["position", "zero"], ["starts"], {}),
            ("Unsqueeze", ["starts", "axis_1"], ["starts_1"], {}),
            ("Unsqueeze", ["starts_1", "axis_2"], ["starts_2"], {}),
            ("Gather", ["words", "token"], ["word"], {}),
            ("Gather", ["places", "position"], ["place"], {}),
            ("Add", ["word", "place"], ["later_input"], {}),
            ("Where", ["starts_1", "class_embedding", "later_input"], ["x"], {}),
            ("Where", ["starts_1", "zero_f", "ssm_state_0"], ["old_ssm"], {}),
            ("Where", ["starts_2", "zero_f", "conv_state_0"], ["old_conv"], {}),
            # conv: drop the oldest of two entries, append the new one
            ("Slice", ["old_conv", "from_1", "to_2", "axis_1"], ["kept"], {}),
            ("Unsqueeze", ["x", "axis_1"], ["x_1"], {}),
            ("Concat", ["kept", "x_1"], ["next_conv_state_0"], {"axis": 1}),
            ("ReduceSum", ["old_conv", "axis_1"], ["conv_sum"], {"keepdims": 0}),
            # state = 0.8 * state + tanh((x + conv) @ mix + modulation)
            ("ReduceSum", ["modulation", "axes_12"], ["shift"], {"keepdims": 0}),
            ("Add", ["x", "conv_sum"], ["u"], {}),
            ("MatMul", ["u", "mix"], ["mixed"], {}),
            ("Add", ["mixed", "shift"], ["shifted"], {}),
            ("Tanh", ["shifted"], ["update"], {}),
            ("Mul", ["old_ssm", "decay"], ["decayed"], {}),
            ("Add", ["decayed", "update"], ["next_ssm_state_0"], {}),
            ("ReduceSum", ["final_modulation", "axis_1"], ["final_shift"], {"keepdims": 0}),
            ("Add", ["next_ssm_state_0", "final_shift"], ["y"], {}),
            ("MatMul", ["y", "head"], ["logits"], {}),
        ],
    )
    _save(
        source,
        DECODER,
        {
            "palette": rng.integers(0, 256, (VOCAB, 3)).astype(np.float32),
            "grid": np.array([-1, SIDE, 1, SIDE, 1, 3]),
            "tiles": np.array([1, 1, PATCH, 1, PATCH, 1]),
            "pixels": np.array([-1, SIDE * PATCH, SIDE * PATCH, 3]),
        },
        [
            ("Gather", ["palette", "tokens"], ["colours"], {}),
            ("Reshape", ["colours", "grid"], ["patches"], {}),
            ("Tile", ["patches", "tiles"], ["tiled"], {}),
            ("Reshape", ["tiled", "pixels"], ["image_float"], {}),
            ("Cast", ["image_float"], ["image"], {"to": TensorProto.UINT8}),
        ],
    )
    write_bundle(tiny_manifest(), source, out)
    return out


def zip_bundle(folder: Path, path: Path) -> Path:
    """Pack the bundle `folder` into the .zip `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def copy_bundle(folder: Path, out: Path) -> Path:
    """A copy of the bundle `folder` that a test may damage."""
    return Path(shutil.copytree(folder, out))


def rehash(folder: Path) -> None:
    """Make the manifest's sizes and checksums those of the files as they are now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _save(
    folder: Path,
    graph: GraphSpec,
    constants: dict[str, np.ndarray],
    nodes: list[tuple[str, list[str], list[str], dict[str, object]]],
) -> None:
    """Write one graph: float tables as external data, the small rest inside the graph."""
    blob = bytearray()
    initializers = []
    for name, array in constants.items():
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if tensor.data_type == TensorProto.FLOAT and array.ndim:
            blob += bytes(-len(blob) % 64)
            where = {"location": graph.weights, "offset": len(blob), "length": array.nbytes}
            blob += array.astype("<f4").tobytes()
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)

    def info(item: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(item.name, _ONNX_TYPES[item.dtype], list(item.shape))

    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ins, outs, **attrs) for op, ins, outs, attrs in nodes],
            graph.file.removesuffix(".onnx"),
            [info(item) for item in graph.inputs],
            [info(item) for item in graph.outputs],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    (folder / graph.file).write_bytes(model.SerializeToString())
    (folder / graph.weights).write_bytes(bytes(blob))
