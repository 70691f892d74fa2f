"""Work on many files at once with as much in memory as is being worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Calls that wait for each thread.
_AHEAD = 4


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map` in threads, its results in order.

    Unlike `concurrent.futures.Executor.map` it takes items only as results are taken, so a
    million of them cost no million of futures. When the caller stops, so does the work.
    """
    workers = max(1, workers)
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(rest, workers * _AHEAD)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
        finally:
            for future in waiting:
                future.cancel()
