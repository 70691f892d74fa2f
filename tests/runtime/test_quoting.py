"""What exceptions of other packages become in our sentences."""

from __future__ import annotations

import pytest

from aim_runtime.quoting import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("half installed"), "half installed"),
        (
            OSError("\n  libnvinfer.so.11: no such file  \nand more"),
            "libnvinfer.so.11: no such file",
        ),
        (RuntimeError(""), "RuntimeError"),
        (ImportError(" \n "), "ImportError"),
        (ValueError("\x1b[31mred\x07"), "?[31mred?"),
        (ValueError("x" * 999), "x" * 157 + "..."),
    ],
)
def test_an_error_is_one_line_that_can_be_printed(error: Exception, said: str) -> None:
    assert first_line(error) == said
