"""Who draws a sample: this process, as here, or the workers of a cluster (`sample_ray`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import aim_runtime
    from aim_runtime import Bundle, Result

Asked = Callable[[range], Mapping[str, Any]]
"""What is to be drawn for a batch: keywords of `Generator.request`."""
Drawn = Generator[tuple[range, list[bytes]]]
"""Batches as they are finished, with a PNG for each image."""


class Drawer(Protocol):
    """Draws batches of a sample.

    Attributes:
        bundle: what is drawn with.
        backend: what computes.
        precision: what it computes in.
        about: how many do it, for a label: "" for one, " on 8 workers".
    """

    bundle: Bundle
    backend: str
    precision: str
    about: str

    def batch_size(self, count: int, cfg_scale: float) -> int:
        """How many of `count` images are drawn together."""

    def draw(
        self, batches: Iterable[range], asked: Asked, progress: Callable[[float], None]
    ) -> Drawn:
        """Draw; `progress` is told how many images' work there is in batches not finished yet.

        Closing it stops what is being drawn.
        """


class OneMachine:
    """Draws batch after batch with one generator; see `Drawer`."""

    about = ""

    def __init__(self, generator: aim_runtime.Generator) -> None:
        self._generator = generator
        self.bundle = generator.bundle
        self.backend = generator.backend
        self.precision = generator.precision

    def batch_size(self, count: int, cfg_scale: float) -> int:
        """As many as the memory limit holds. Raises ValueError where it holds none."""
        return self._generator.plan(count, cfg_scale).batch_size

    def draw(
        self, batches: Iterable[range], asked: Asked, progress: Callable[[float], None]
    ) -> Drawn:
        """As `Drawer.draw`."""
        for batch in batches:

            def report(done: int, total: int, images: int = len(batch)) -> None:
                progress(images * done / total)

            yield batch, drawn(self._generator, asked(batch), report)


def drawn(
    generator: aim_runtime.Generator,
    asked: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> list[bytes]:
    """The images of a request, each as a PNG with its settings."""
    result = generator.generate(generator.request(**asked), progress=progress)
    return [_png(result, index) for index in range(len(result.seeds))]


def _png(result: Result, index: int) -> bytes:
    from aim_runtime.images import png_text

    file = io.BytesIO()
    result.images[index].save(file, format="PNG", pnginfo=png_text(result.settings(index)))
    return file.getvalue()
