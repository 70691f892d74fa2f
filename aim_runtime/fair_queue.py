"""Images that wait for a slot, one at a time from each request in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aim_runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from aim_runtime.job import Job


class FairQueue:
    """Jobs with images that no slot has yet; used under the lock of their batcher.

    Higher priorities come first. Jobs of one priority take turns, an image a turn, so that one of
    64 images does not hold up one of a single image.
    """

    def __init__(self) -> None:
        self._turns: dict[int, dict[Job, int]] = {}  # by priority: jobs in turn, and their next
        self.images = 0

    def add(self, job: Job) -> None:
        """Let all images of `job` wait."""
        self._turns.setdefault(job.priority, {})[job] = 0
        self.images += len(job.request)

    def remove(self, job: Job) -> None:
        """Forget the images of `job` that still wait, if any do."""
        turns = self._turns.get(job.priority, {})
        if job in turns:
            self.images -= len(job.request) - turns.pop(job)
            if not turns:
                del self._turns[job.priority]

    def take(
        self, fits: Callable[[SamplingOptions], bool], overtaking: bool
    ) -> tuple[Job, int] | None:
        """The next image of all, as its job and number there; None if it does not fit.

        With `overtaking`, the next of those that do fit. Without it a small image cannot slip past
        a large one again and again.
        """
        for priority in sorted(self._turns, reverse=True):
            turns = self._turns[priority]
            for job in turns:
                if fits(job.request.options):
                    image = turns.pop(job)
                    self.images -= 1
                    if image + 1 < len(job.request):
                        turns[job] = image + 1  # behind all others
                    elif not turns:
                        del self._turns[priority]
                    return job, image
                if not overtaking:
                    return None
        return None
