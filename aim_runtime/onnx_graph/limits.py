"""What running a bundle's graphs may take, by the geometry that its manifest declares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aim_runtime.batching import memory_needed
from aim_runtime.bundle.limits import model_parameters
from aim_runtime.bundle.manifest import GraphSpec, Manifest

# A decoder of c channels has (16 c)² parameters or more, and up to 13 activations of c float32
# channels at once.
_BYTES_A_PIXEL_AND_WIDTH = 5
# Its multiply-adds for each pixel: the published one has 1 million.
_DECODER_WORK_PER_PIXEL = 1 << 24
# Values as wide as the model that a step may make in each layer and at either end.
_ACTIVATIONS = 1 << 7
_WORK_A_PARAMETER = 1 << 4
# Of each stored weight, in what the engine folds and keeps: a float32, and on the way the whole
# number or half precision that it is made of, or that these are.
_FIXED_BYTES_A_WEIGHT = 8
# Of a decoder: products that take the place of its convolutions have matrices of seven times their
# weights, which are reshaped.
_DECODER_FIXED_BYTES_A_WEIGHT = 64
_FIXED_WORK_A_WEIGHT = 1 << 5
# Those matrices are 64 sums of nine weights each.
_DECODER_FIXED_WORK_A_WEIGHT = 1 << 7
_FREE_FIXED_BYTES = 1 << 20
_FREE_FIXED_WORK = 1 << 26


@dataclass(frozen=True)
class GraphLimits:
    """What running a graph may take: memory and work, a row and whatever the rows.

    Attributes:
        planned_row_bytes: Memory of a row that a request's plan covers whatever the graph: twice
            what it says.
        row_bytes: Memory of a row at most. What is above the plan's is planned for.
        fixed_bytes: Memory that does not grow with the rows.
        row_work: Operations for a row.
        fixed_work: Operations that do not grow with the rows.
    """

    planned_row_bytes: int
    row_bytes: int
    fixed_bytes: int
    row_work: int
    fixed_work: int


def graph_limits(manifest: Manifest, graph: GraphSpec, weights: int) -> GraphLimits:
    """The limits for `graph`, which has so many stored `weights`; what it is, its outputs say.

    Of the weights as many count as the manifest's geometry has: a byte of a file may hold two.
    """
    model = manifest.model
    row, decoder = memory_needed(manifest, rows_per_image=1)  # what a request is told that it takes
    outputs = {spec.name for spec in graph.outputs}
    fixed_bytes, fixed_work = _FIXED_BYTES_A_WEIGHT, _FIXED_WORK_A_WEIGHT
    if "image" in outputs:
        pixels = model.image_height * model.image_width
        width = _BYTES_A_PIXEL_AND_WIDTH * math.isqrt(model.decoder_parameters)
        planned = 2 * decoder
        row_bytes = max(planned, width * pixels)
        row_work = _DECODER_WORK_PER_PIXEL * pixels
        fixed_bytes, fixed_work = _DECODER_FIXED_BYTES_A_WEIGHT, _DECODER_FIXED_WORK_A_WEIGHT
        weights = min(weights, model.decoder_parameters)
    else:
        activations = (model.num_layers + 2) * _ACTIVATIONS * model.d_model
        planned = row_bytes = 2 * row + 4 * activations
        row_work = _WORK_A_PARAMETER * (model_parameters(model) + row)
        weights = min(weights, model_parameters(model))
    return GraphLimits(
        planned_row_bytes=planned,
        row_bytes=row_bytes,
        fixed_bytes=fixed_bytes * weights + _FREE_FIXED_BYTES,
        row_work=row_work,
        fixed_work=fixed_work * weights + _FREE_FIXED_WORK,
    )
