"""What a person sees while a network trains: one line that rewrites itself, or lines in a log."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

# Seconds between the lines of `count`: on a terminal, where each replaces the last, and in a log.
_LIVE_S, _LINES_S = 0.5, 10.0


class Progress:
    """Loss, images per second and the time left, on standard error.

    Args:
        done: steps that earlier calls trained.
        total: steps of the whole training.
        unit: what `count` counts, for the speed ("images").
        quiet: show nothing (every process but the main one).
    """

    def __init__(self, done: int, total: int, unit: str = "images", quiet: bool = False) -> None:
        self.total = total
        self.unit = unit
        self.quiet = quiet
        self.live = sys.stderr.isatty()
        self._width = 0
        self._since = (time.monotonic(), done)

    def show(
        self,
        step: int,
        values: Mapping[str, float],
        count: int,
        limit_s: float,
        *,
        work: float = 0.0,
        more: Sequence[str] = (),
    ) -> float:
        """Show where training stands.

        Args:
            step: steps done.
            values: numbers to name.
            count: units a step.
            limit_s: seconds left at most, infinite without a time limit.
            work: floating-point operations a unit, where they are counted.
            more: further facts.

        Returns:
            Units per second since the last call.
        """
        now = time.monotonic()
        then, before = self._since
        self._since = (now, step)
        per_step = (now - then) / max(1, step - before)
        speed = count / per_step if per_step else 0.0
        left = min((self.total - step) * per_step, limit_s)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        fast = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        rate = [f"{speed * work / 1e12:.3g} TFLOP/s"] if work else []
        parts = [numbers, f"{fast} {self.unit}/s", *rate, *more, f"{duration(left)} left"]
        text = "  ".join([f"step {step}/{self.total}", *parts])
        if self.live:
            # A line that wraps cannot be rewritten.
            text = text[: shutil.get_terminal_size().columns - 1]
        self._print(text, stay=not self.live)
        return speed

    def count(self, done: int) -> None:
        """Show how many of the units there are in all are done, at most twice a second.

        On no terminal every ten seconds, and at the end.
        """
        now = time.monotonic()
        then, before = self._since
        if done == before and done >= self.total:  # said already
            return
        if now - then < (_LIVE_S if self.live else _LINES_S) and done < self.total:
            return
        self._since = (now, done)
        speed = (done - before) / max(now - then, 1e-9)
        fast = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        left = duration((self.total - done) / speed) if speed else "unknown time"
        text = f"{done:,} of {self.total:,} {self.unit}  {fast} {self.unit}/s  {left} left"
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]
        self._print(text, stay=not self.live or done >= self.total)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._print(text, stay=True)

    def _print(self, text: str, *, stay: bool) -> None:
        """Write over the line that rewrites itself; `stay`: the next one comes below."""
        if self.quiet:
            return
        start = "\r" if self.live and (self._width or not stay) else ""
        end = "\n" if stay else ""
        # A terminal that was closed, or a reader that has gone, is no reason to stop training; nor
        # is a signal's handler that speaks while something else does.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(f"{start}{text:<{self._width}}", end=end, file=sys.stderr, flush=True)
        self._width = 0 if stay else len(text)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
