"""The weights of a plan: where the bundle's files hold them, what brings them to their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import triton

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import convert
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.precision import Format
from aim_export.cuda.step_tensors import OF_HEADS, aligned, weight_table
from aim_export.cuda.stored import StoredTensor
from aim_export.onnx.packed import nearest_rows
from aim_runtime.engines.cuda.plan import CAST_BLOCK, FOLDER, Part, Tensor, Weight

CONSTANTS_FILE = f"{FOLDER}constants.bin"
_ALIGNMENT = 256


class Constants:
    """Tensors that are derived rather than stored: one file, each on its own boundary.

    Equal tensors share a place, so that the plans of several formats can share the file.
    """

    def __init__(self) -> None:
        self._chunks: dict[bytes, int] = {}
        self._size = 0

    def add(self, values: np.ndarray) -> Weight:
        """Append `values`; returns the weight that reads them."""
        values = np.ascontiguousarray(values)
        raw = values.tobytes()
        padded = raw + b"\0" * (-len(raw) % _ALIGNMENT)
        if padded not in self._chunks:
            self._chunks[padded] = self._size
            self._size += len(padded)
        part = Part(CONSTANTS_FILE, self._chunks[padded], values.shape[0])
        dtype = str(values.dtype)
        return Weight(Tensor(dtype, values.shape), dtype, (part,))

    def to_bytes(self) -> bytes:
        """The file."""
        return b"".join(self._chunks)


def step_weights(
    geometry: Geometry,
    stored: Mapping[str, Mapping[str, StoredTensor]],
    precision: Format,
    constants: Constants,
) -> dict[str, Weight]:
    """The weights of prologue and step: matrices where the graphs keep them, the rest as constants.

    `stored` maps "prologue" and "step" to their graphs' tensors. Raises ValueError where one has
    another shape than the geometry says, or layers are of several types.
    """
    prologue, step = stored["prologue"], stored["step"]

    def by_layer(name: str) -> list[StoredTensor]:
        return [step[f"layer_{layer}.{name}"] for layer in range(geometry.L)]

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensor.values for tensor in by_layer(name)])

    modulation, vectors = _modulation(geometry, prologue)
    matrices = {
        "class_table": [prologue["class_table"]],
        "word_table": [step["word_table"]],
        "position_table": [step["position_table"]],
        "in_proj": by_layer("in_proj"),
        "out_proj": by_layer("out_proj"),
        "final": [prologue["final.weight"]],
        "modulation": modulation,
    }
    vectors |= {
        "final_bias": prologue["final.bias"].values,
        "norm_f": step["norm_f"].values,
        # The prologue multiplies shift, scale and gate by 1, the norm's weight and 1.
        "norm": prologue["modulation_factor"].values[:, 1],
        "final_norm": prologue["final_factor"].values[1],
    }
    vectors |= {name: stacked(name) for name in ("conv_weight", "conv_bias")}
    past = ((0, 0), (0, aligned(geometry.H) - geometry.H))
    vectors |= {name: np.pad(stacked(name), past) for name in OF_HEADS}
    found = {}
    table = weight_table(geometry, precision).tensors
    for name, tensor in table.items():
        if name in matrices and tensor.dtype == "int8":
            scales = f"{name}_scales"
            found[name], found[scales] = _quantised(
                name, tensor, matrices[name], constants, scales, table[scales]
            )
        elif name in matrices:
            found[name] = _matrix(name, tensor, matrices[name], constants)
        elif name in vectors:
            found[name] = constants.add(np.asarray(vectors[name], np.float32))
            _check_shape(name, tensor, found[name].tensor.shape)
    return found


def _modulation(
    geometry: Geometry, prologue: Mapping[str, StoredTensor]
) -> tuple[list[StoredTensor], dict[str, np.ndarray]]:
    """The modulation's matrix, and its bias and table: of each layer, or of groups of layers."""
    if "adaln_group.weight" in prologue:
        return [prologue["adaln_group.weight"]], {
            "modulation_bias": prologue["adaln_group.bias"].values,
            "modulation_table": prologue["scale_shift_table"].values,
        }
    layers = range(geometry.L)
    biases = [prologue[f"adaln.{layer}.bias"].values for layer in layers]
    return [prologue[f"adaln.{layer}.weight"] for layer in layers], {
        "modulation_bias": np.concatenate(biases),
        "modulation_table": np.zeros((geometry.L, 3, geometry.D), np.float32),
    }


def _quantised(
    name: str,
    tensor: Tensor,
    parts: Sequence[StoredTensor],
    constants: Constants,
    scales: str,
    factors: Tensor,
) -> tuple[Weight, Weight]:
    """The int8 weight `tensor` out of matrices of the bundle, and its `factors`, named `scales`.

    What lies as whole numbers and factors already stays as it is. Otherwise a kernel makes them
    when the weight is loaded.
    """
    if not any(part.rows for part in parts):
        return replace(_matrix(name, tensor, parts, constants), scales=scales), Weight(
            factors, factors.dtype, ()
        )
    rows = [part.rows or nearest_rows(part.values.astype(np.float32)) for part in parts]
    values = constants.add(np.concatenate([each.values for each in rows]))
    _check_shape(name, tensor, values.tensor.shape)
    return values, constants.add(np.concatenate([each.scale for each in rows]))


def _matrix(
    name: str, tensor: Tensor, parts: Sequence[StoredTensor], constants: Constants
) -> Weight:
    """The weight `tensor` out of matrices of the bundle, one after another.

    Where they lie in fewer bits than they are read in, it is one of the constants.
    """
    rows = sum(part.values.shape[0] for part in parts)
    _check_shape(name, tensor, (rows, *parts[0].values.shape[1:]))
    if any(part.rows for part in parts):
        made = constants.add(np.concatenate([part.values for part in parts]))
        return Weight(tensor, made.stored, made.parts)
    types = sorted({part.dtype for part in parts})
    if len(types) > 1:
        raise ValueError(f"the bundle's {name} is of several types: {', '.join(types)}")
    return Weight(tensor, parts[0].dtype, tuple(part.placed() for part in parts))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if shape != tensor.shape:
        raise ValueError(
            f"the bundle's {name} has the shape {list(shape)}; the kernels of its model want "
            f"{list(tensor.shape)}"
        )


def converted(
    weights: Mapping[str, Weight],
) -> tuple[dict[str, Weight], dict[str, KernelSpec]]:
    """`weights` with the kernels that bring them to their types, and these by the plan's names."""
    found: dict[str, Weight] = {}
    kernels: dict[str, KernelSpec] = {}
    for name, weight in weights.items():
        conversion = weight.conversion_name
        if conversion is None:
            found[name] = weight
            continue
        if weight.scales is not None:
            types: tuple[str, ...] = (weight.stored, weight.tensor.dtype, "float32")
            block = triton.next_power_of_2(weight.columns)
            constants = {"WIDTH": weight.columns, "BLOCK": block}
            function = convert.quantise
        else:
            types = (weight.stored, weight.tensor.dtype)
            constants = {"BLOCK": CAST_BLOCK}
            function = convert.cast
        kernels[conversion] = KernelSpec(function, types, tuple(constants.items()), num_stages=1)
        found[name] = replace(weight, conversion=kernels[conversion].id)
    return found, kernels
