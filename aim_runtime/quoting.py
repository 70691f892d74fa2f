"""Values out of a stranger's file in our sentences: short, printable, on one line."""

from __future__ import annotations


def quoted(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, cut to `limit` characters; nothing in it breaks the line."""
    if isinstance(value, str):
        value = value[: limit + 1]  # before every character of a long text is escaped
    return shortened(repr(value), limit)


def shortened(text: str, limit: int = 200) -> str:
    """`text` on one line, cut to `limit` characters, with "?" for what cannot be printed."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def sentence(text: str, limit: int = 300) -> str:
    """`text` on one printable line of at most `limit` characters, whatever path it quotes.

    Too long a line loses its middle: what is wrong stands in front, what to do about it at the end.
    """
    line = shortened(" ".join(text.split()), len(text))
    return line if len(line) <= limit else f"{line[: limit - 113]}...{line[-110:]}"
