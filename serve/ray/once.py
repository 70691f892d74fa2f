"""A stream of events that may be begun again, told to a client that shall not notice."""

from __future__ import annotations

import json

_REPEATED = ("progress", "preview")
"""Events that tell how far it is: after a new beginning they begin again."""
FAILED = "aim.failed"
"""Type of the message in place of the rest of an answer, where the application raised."""
LAST = ("done", "error")
"""Events after which there is none; OpenAI's streams have no such."""


class Once:
    """Passes each event that counts once, however often the stream is begun again.

    Events are told apart by their names and by the image, and the partial image, that they are of.
    """

    def __init__(self) -> None:
        self._had: set[tuple[object, ...]] = set()
        self.ended = False

    def passes(self, chunk: bytes) -> bool:
        """Whether the client shall have `chunk`, one event or a comment."""
        if self.ended:
            return False
        name, _, data = chunk.partition(b"\ndata: ")
        if not name.startswith(b"event: "):
            return True
        kind = name.removeprefix(b"event: ").decode()
        if kind in _REPEATED:
            return True
        self.ended = kind in LAST
        about = json.loads(data)
        key = (kind, about.get("image_index"), about.get("partial_image_index"))
        if key in self._had:
            return False
        self._had.add(key)
        return True
