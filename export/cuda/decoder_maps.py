"""Feature maps of the decoder as they lie in memory, and how their statistics are cut up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Map:
    """A feature map in memory, of one image: where its pixels lie (see the kernels' module)."""

    buffer: str
    height: int
    width: int
    channels: int
    border: bool

    @property
    def cells(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def pitch(self) -> int:
        """Pixels in memory from one line to the next."""
        return self.width + 2 * self.border

    @property
    def pixels(self) -> int:
        """Pixels of an image in memory."""
        return (self.height + 2 * self.border) * self.pitch

    @property
    def first(self) -> int:
        """Where the first pixel lies."""
        return (self.pitch + 1) * self.border

    def as_constants(self, side: str, first: int | None = None) -> dict[str, int]:
        """The kernels' parameters `X_…` or `Y_…`."""
        return {
            f"{side}_PIXELS": self.pixels,
            f"{side}_PITCH": self.pitch,
            f"{side}_FIRST": self.first if first is None else first,
        }


@dataclass(frozen=True)
class Moments:
    """How the statistics of the map written last were cut up: see `norm_factors`."""

    places: int
    part: int
