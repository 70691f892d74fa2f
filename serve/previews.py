"""Pictures on their way: decoded for many clients without taking the time that steps need."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from aim_runtime import Job, Preview
from aim_runtime.result import UNDECIDED
from aim_serve.pictures import Format, encoded

# After a preview none is decoded for so many times what it took: steps keep two thirds of the time.
_REST = 2
# One preview has as many images as take about so long; where decoding is slow, one after another.
_LONGEST_S = 0.5


@dataclass(frozen=True)
class PartialPicture:
    """One image of a request, as far as it is.

    Attributes:
        index: Which of the request's.
        done_tokens: Tokens that are decided.
        b64_json: The picture in base64, gray where it is undecided.
    """

    index: int
    done_tokens: int
    b64_json: str


@dataclass(frozen=True)
class PartialPictures:
    """Images of a request that have changed since they were last shown."""

    done_tokens: int
    total_tokens: int
    images: list[PartialPicture]


class PreviewDecoder:
    """Decodes the newest state of one job after the other, in the order in which they ask."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turn = asyncio.Lock()
        self._free_at = 0.0
        self._picture_s = _LONGEST_S

    async def newest(self, job: Job, shown: list[int], format: Format) -> PartialPictures | None:
        """Images of `job` that have other than `shown` tokens by now, which it updates.

        Those come first that show least. None once all tokens are decided: the pictures themselves
        come soon.
        """
        async with self._turn:
            # Not the loop's clock: uvloop's stands still between two rounds of the loop.
            await asyncio.sleep(max(0.0, self._free_at - time.perf_counter()))
            preview = await anext(job.previews(every=1))
            if preview.done:
                return None
            counts = [int(count) for count in (preview.tokens != UNDECIDED).sum(axis=1)]
            changed = [i for i, count in enumerate(counts) if count and count != shown[i]]
            most = max(1, int(_LONGEST_S / self._picture_s))
            changed = sorted(sorted(changed, key=shown.__getitem__)[:most])
            began = time.perf_counter()
            pictures = await asyncio.get_running_loop().run_in_executor(
                self._executor, _decoded, preview, changed, format
            )
            took = time.perf_counter() - began
            self._free_at = time.perf_counter() + _REST * took
            if changed:
                self._picture_s = took / len(changed)
        for index in changed:
            shown[index] = counts[index]
        images = [
            PartialPicture(index, counts[index], picture)
            for index, picture in zip(changed, pictures, strict=True)
        ]
        return PartialPictures(preview.done_tokens, preview.total_tokens, images)


def _decoded(preview: Preview, images: list[int], format: Format) -> list[str]:
    """Some images of a preview; in a thread of its own."""
    some = dataclasses.replace(preview, tokens=preview.tokens[images])
    array: np.ndarray = some.array
    return [encoded(pixels, format) for pixels in array]
