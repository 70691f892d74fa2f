"""Take values out of a stranger's JSON, each checked, or say in one sentence what is wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aim_runtime.errors import BundleError
from aim_runtime.quoting import shortened, shown


class CheckedJson:
    """Checks of values of one document, which messages call `subject` ("the manifest").

    Every method takes a value, where in the document it stands, and what it may be; it returns the
    value or raises a BundleError that names all three.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def parse(self, text: str, limit: int) -> Any:
        """The JSON document `text` of at most `limit` characters; no key twice, no NaN."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) != len(pairs):
                counts = Counter(key for key, _ in pairs)
                twice = next(key for key, count in counts.items() if count > 1)
                raise BundleError(
                    f"{self.subject} holds the key {_show(twice)} twice in one object"
                )
            return found

        def constant(name: str) -> Any:
            raise BundleError(f"{self.subject} holds {name}; numbers must be finite")

        if len(text) > limit:
            raise BundleError(
                f"{self.subject} has {len(text)} characters; at most {limit} are read"
            )
        try:
            return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        except RecursionError:
            raise BundleError(
                f"{self.subject} is not valid JSON: it is nested too deeply"
            ) from None
        except ValueError as error:  # also numbers with more digits than Python converts
            reason = str(error).splitlines()[0]
            raise BundleError(f"{self.subject} is not valid JSON: {reason}") from None

    def wrong(self, where: str, value: Any, allowed: str) -> BundleError:
        """The error that `where` holds `value` but must be `allowed`."""
        return BundleError(
            f"{self.subject}'s {shortened(where, 80)} is {_show(value)}; it must be {allowed}"
        )

    def fields(self, value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
        """An object with exactly these keys."""
        if not isinstance(value, dict):
            raise self.wrong(where, value, "an object")
        missing = [key for key in keys if key not in value]
        if missing:
            raise BundleError(f"{self.subject}'s {where} lacks the key {missing[0]!r}")
        unknown = [key for key in value if key not in keys]
        if unknown:
            raise BundleError(
                f"{self.subject}'s {where} has the unknown key {_show(unknown[0])}; "
                f"it may have {', '.join(keys)}"
            )
        return value

    def table(self, value: Any, where: str, pattern: re.Pattern[str], limit: int) -> dict[str, Any]:
        """An object of at most `limit` keys, all of which match `pattern`."""
        if not isinstance(value, dict) or len(value) > limit:
            raise self.wrong(where, value, f"an object of at most {limit} keys")
        for key in value:
            self.matching(key, f"{where} key", pattern, "a plain name")
        return value

    def items(self, value: Any, where: str, low: int, high: int) -> list[Any]:
        """A list of `low` to `high` items."""
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self.wrong(where, value, f"a list of {low} to {high} items")
        return value

    def integer(self, value: Any, where: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(where, value, f"a whole number from {low} to {high}")
        return value

    def boolean(self, value: Any, where: str) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            raise self.wrong(where, value, "true or false")
        return value

    def number(self, value: Any, where: str, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high:
            raise self.wrong(where, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def choice(self, value: Any, where: str, allowed: Sequence[str]) -> str:
        """One of the texts `allowed`."""
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(where, value, "one of " + ", ".join(repr(item) for item in allowed))
        return value

    def matching(self, value: Any, where: str, pattern: re.Pattern[str], allowed: str) -> str:
        """A text that matches `pattern` whole, in words `allowed`."""
        if not isinstance(value, str) or pattern.fullmatch(value) is None:
            raise self.wrong(where, value, allowed)
        return value


def _show(value: Any) -> str:
    """`value` as one short line for an error message."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(value)
