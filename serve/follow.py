"""What happens to a job, as it happens, for whoever streams it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aim_runtime import AimError, Job
from aim_runtime.job import Previews
from aim_serve.pictures import Format
from aim_serve.previews import PartialPictures, PreviewDecoder

_PROGRESS_S = 0.1


@dataclass(frozen=True)
class Progress:
    """Work done and in all, as `Job.progress` counts it."""

    done: int
    total: int


async def follow(
    job: Job, decoder: PreviewDecoder, *, every: int, format: Format
) -> AsyncIterator[Progress | PartialPictures]:
    """What happens until the job ends, well or not; of what was missed meanwhile only the newest.

    Every `every` steps there is a preview; 0 is never. One at most is decoded ahead, so that a
    reader that stalls costs nothing more. Closing the iterator before the job has ended cancels it.
    """
    steps, shown = job.previews(every=1), [0] * len(job.request)

    def next_step() -> asyncio.Task[bool]:
        return asyncio.create_task(_step(steps))

    def next_preview() -> asyncio.Task[PartialPictures | None]:
        return asyncio.create_task(_preview(job, dues, decoder, shown, format))

    ended, step = asyncio.create_task(_end(job)), next_step()
    tasks: set[asyncio.Task[object]] = {ended, step}
    preview = None
    if every:
        dues = job.previews(every=every)
        preview = next_preview()
        tasks.add(preview)
    try:
        while True:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ended in done:
                return
            tasks -= done
            if step in done and step.result():
                yield Progress(*job.progress)
                step = next_step()
                tasks.add(step)
            if preview in done and (pictures := preview.result()):
                yield pictures
                preview = next_preview()
                tasks.add(preview)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end(job: Job) -> None:
    with contextlib.suppress(AimError):  # whoever follows awaits the job itself
        await job


async def _step(steps: Previews) -> bool:
    """Wait for the next step, for some time at least; False when there is none."""
    await asyncio.sleep(_PROGRESS_S)
    try:
        return await anext(steps, None) is not None
    except AimError:
        return False


async def _preview(
    job: Job, dues: Previews, decoder: PreviewDecoder, shown: list[int], format: Format
) -> PartialPictures | None:
    """The next preview that shows something new; None when there is none."""
    try:
        async for _ in dues:
            pictures = await decoder.newest(job, shown, format)
            if pictures is None or pictures.images:
                return pictures
    except (AimError, MemoryError):  # the job may end well all the same
        pass
    return None
