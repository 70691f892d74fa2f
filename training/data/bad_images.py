"""What becomes of images that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aim_training.data.errors import ImageError, Name, shown

# Bad images that are said one by one; after them only the list grows.
_SAID = 3


class BadImages:
    """Either an error, or counted, said and listed in a file, one `path<TAB>reason` a line.

    Args:
        policy: `stop` makes the first bad image an error, `skip` goes on with another image of
            its class in its place.
        listing: file that bad images are added to, each once however often a run is resumed.
            Control characters in a name stand there as escapes.
        say: takes a line for the user; standard error when left out.
        quiet: say and write nothing (every process but the main one).

    Attributes:
        found: reasons by name, of the bad images met so far.
    """

    def __init__(
        self,
        policy: Literal["skip", "stop"] = "stop",
        listing: Path | None = None,
        say: Callable[[str], None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.policy = policy
        self.listing = listing
        self.quiet = quiet
        self.found: dict[Name, str] = {}
        self._listed: set[str] | None = None  # names in the file, once it was read
        self._say = say or _to_stderr

    @classmethod
    def of_run(
        cls, policy: Literal["skip", "stop"], run: Path, *, quiet: bool = False
    ) -> BadImages:
        """Those of a training, listed in its run folder."""
        return cls(policy, run / "bad-images.txt", quiet=quiet)

    def note(self, fault: ImageError) -> None:
        """Take up a bad image.

        Raises:
            ImageError: the policy is to stop.
        """
        if self.policy == "stop":
            raise fault
        if fault.path in self.found:
            return
        self.found[fault.path] = fault.reason
        if len(self.found) <= _SAID:
            where = f" (listed in {shown(self.listing)})" if self.listing else ""
            self.say(f"skipping an image{where}: {fault}")
        elif len(self.found) == _SAID + 1:
            self.say(
                "skipping more images" + (f"; see {shown(self.listing)}" if self.listing else "")
            )
        self._list(fault)

    def say(self, line: str) -> None:
        """Say a line about the images, in the main process."""
        if not self.quiet:
            self._say(line)

    def remark(self) -> str | None:
        """How many there were, None without any."""
        count = len(self.found)
        if not count:
            return None
        were = "image was" if count == 1 else "images were"
        return f"{count:,} {were} skipped" + (
            f"; {shown(self.listing)} lists them" if self.listing else ""
        )

    def _list(self, fault: ImageError) -> None:
        if self.listing is None or self.quiet:
            return
        name = shown(fault.path, sys.maxsize)
        try:
            if self._listed is None:
                self._listed = set()
                if self.listing.is_file():
                    lines = self.listing.read_text(encoding="utf-8", errors="replace").splitlines()
                    self._listed.update(line.partition("\t")[0] for line in lines)
            if name not in self._listed:
                self._listed.add(name)
                self.listing.parent.mkdir(parents=True, exist_ok=True)
                with self.listing.open("a", encoding="utf-8") as file:
                    file.write(f"{name}\t{fault.reason}\n")
        except OSError as error:  # no reason to end a training
            self.say(f"cannot write {shown(self.listing)}: {error.strerror}")
            self.listing = None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
