"""An output folder whose new files appear together, complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PROBE = bytes(4096)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder inside `folder`; what is put there moves up when the block ends.

    `folder` is made and tried out, by writing a few bytes, before anything is yielded: an output
    that cannot be written is found before the work, not after it. When the block fails, or Ctrl-C
    ends it, nothing stays behind: not the hidden folder, nor folders made here.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full. It names `folder`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    hidden: Path | None = None
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".aim-", dir=folder))
        probe = hidden / "probe"
        probe.write_bytes(_PROBE)
        probe.unlink()
        yield hidden
        for file in sorted(hidden.iterdir()):
            target = folder / file.name
            if not os.path.lexists(target):
                moved.append(target)
            os.replace(file, target)
        hidden.rmdir()
    except BaseException as error:
        for target in moved:
            target.unlink(missing_ok=True)
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        # The hidden name means nothing to the user, and image writers often give no name at all.
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(folder)) from error
        raise
