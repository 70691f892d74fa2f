"""How much memory a request takes, and how it is split to stay within a limit.

All of it follows from the manifest: nothing is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aim_runtime.arguments import instance, number, whole_number
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.memory import share_mib
from aim_runtime.quoting import shown

# The decoder's working memory in bytes for each pixel of the image. Measured on the published
# tokenizer (256x256): 243 MB, that is eight activations of 128 float32 channels at full resolution.
_DECODER_BYTES_PER_PIXEL = 8 * 128 * 4
# Inside a step, one layer's state exists in up to this many intermediate copies.
_STATE_TEMPORARIES = 3
# The sampler's copies of one image's scores: guided float32, weights, their order and sums.
_SAMPLER_BYTES_PER_SCORE = 4 + 4 * 8

# Where nobody sets a limit: one image that takes no more than that is drawn whatever is free, and
# no more images advance together than that, since more draw no faster.
_ALWAYS_MB = 1024
_ENOUGH_IMAGES = 64

_MAX_LIMIT_MB = 2**40  # an exbibyte
_LIMIT_ALLOWED = "a number above 0 of MiB, up to 2**40"


@dataclass(frozen=True)
class BatchPlan:
    """How a request is split to stay within the memory limit.

    Attributes:
        batch_size: Images advanced together.
        batches: How many such batches run, one after another.
        bytes_per_image: Working memory that each image of a batch takes.
        total: Working memory of the whole request, the decoder's included, on top of the model.
    """

    batch_size: int
    batches: int
    bytes_per_image: int
    total: int

    @classmethod
    def split(cls, n: int, largest: int, bytes_per_image: int, fixed: int) -> BatchPlan:
        """`n` images in the fewest batches of at most `largest`, `fixed` bytes on top of theirs.

        The batches are even: the last is not a small rest.
        """
        batches = -(-n // largest)
        size = -(-n // batches)
        return cls(size, batches, bytes_per_image, size * bytes_per_image + fixed)


def plan_batches(
    manifest: Manifest,
    n: int,
    cfg_scale: float | None = None,
    memory_limit_mb: float | None = None,
) -> BatchPlan:
    """How `n` images are batched within `memory_limit_mb` MiB, and the memory that takes.

    An image's share is, for each of its rows (two with guidance): the state twice (old and
    new), three copies of the largest state tensor inside the step, conditioning and scores;
    plus the sampler's copies of its scores. The decoder adds 4 KiB a pixel for the one image
    it works on. All are estimates of the peak, without the model itself and the results.

    These are the figures of the CPU and of ONNX Runtime; an engine on a GPU has its own `plan`, and
    one on the CPU that has read the decoder's graph may need less for it.
    `cfg_scale` is as in `SamplingOptions`; None takes the bundle's default. `memory_limit_mb` None
    means a quarter of what is free now (see `aim_runtime.memory`) for at most 64 images at a time,
    and 1024 for one image at least.
    Raises ValueError for arguments out of range, or when not even one image fits.
    """
    n = whole_number("n", n, 1, 2**31)
    instance("manifest", manifest, Manifest, "the manifest of a bundle")
    if memory_limit_mb is not None:
        memory_limit_mb = check_memory_limit(memory_limit_mb)
    options = manifest.sampling.replace(cfg_scale=cfg_scale)
    return batches_within(manifest, n, options.rows_per_image, memory_limit_mb, share_mib())


def batches_within(
    manifest: Manifest,
    n: int,
    rows_per_image: int,
    memory_limit_mb: float | None,
    share_mb: float,
    decoder_bytes: int | None = None,
) -> BatchPlan:
    """`plan_batches` for images of `rows_per_image` rows, with checked arguments.

    `share_mb` takes the place of a limit that nobody has set. `decoder_bytes` is what this decoder
    takes, where it is known; otherwise it follows from the image's size.
    """
    image, decoder = memory_needed(manifest, rows_per_image)
    decoder = decoder if decoder_bytes is None else decoder_bytes
    most = n
    if memory_limit_mb is None:
        memory_limit_mb = max(share_mb, min(_ALWAYS_MB, -(-(image + decoder) // 2**20)))
        most = _ENOUGH_IMAGES
    largest = min(most, int((memory_limit_mb * 2**20 - decoder) // image))
    if largest < 1:
        raise limit_too_low(memory_limit_mb, image + decoder)
    return BatchPlan.split(n, largest, image, decoder)


def images_within(plan: BatchPlan, images: int | None, usual: int) -> int:
    """`images` if `plan`, one for more than fit, allows so many at a time.

    None takes what is `usual`, or as many as fit. Raises ValueError when too many are asked for.
    """
    if images is None:
        return min(plan.batch_size, usual)
    images = whole_number("images", images, 1, 2**31)
    if images > plan.batch_size:
        fixed = plan.total - plan.batch_size * plan.bytes_per_image
        needed = -(-(images * plan.bytes_per_image + fixed) // 2**20)
        raise ValueError(
            f"images is {images}; the memory limit holds {plan.batch_size} at a time: load the "
            f"generator with memory_limit_mb={needed} or more"
        )
    return images


def limit_too_low(memory_limit_mb: float, needed: int) -> ValueError:
    """What to raise where one image needs `needed` bytes, more than the limit."""
    least = -(-needed // 2**20)
    return ValueError(
        f"memory_limit_mb is {shown(memory_limit_mb)}; one image of this model "
        f"needs {least}: give memory_limit_mb={least} or more"
    )


def memory_needed(manifest: Manifest, rows_per_image: int) -> tuple[int, int]:
    """The bytes that each image of a batch takes, and those of the decoder: see `plan_batches`."""
    model = manifest.model
    states = [manifest.graphs["step"].input(pair.input) for pair in manifest.state]
    row = (
        2 * manifest.state_bytes_per_row
        + _STATE_TEMPORARIES * max(spec.bytes_per_row for spec in states)
        + sum(spec.bytes_per_row for spec in manifest.conditioning)
        + 4 * model.vocab_size
    )
    image = rows_per_image * row + _SAMPLER_BYTES_PER_SCORE * model.vocab_size
    return image, _DECODER_BYTES_PER_PIXEL * model.image_height * model.image_width


def check_memory_limit(memory_limit_mb: float) -> float:
    """`memory_limit_mb` as a plain number. Raises ValueError unless it is one above 0."""
    above_0 = math.ulp(0.0)
    return number("memory_limit_mb", memory_limit_mb, above_0, _MAX_LIMIT_MB, _LIMIT_ALLOWED)
