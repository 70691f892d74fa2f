"""The small parts: numbers, tables, bars, staged folders, options from dataclasses."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from aim_cli import human
from aim_cli.dataclass_options import options_from
from aim_cli.output import staged
from aim_cli.terminal import fields, progress_bar, speaks_unicode, table

from .conftest import tree


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0084, "8.4 ms"),
        (0.42, "0.42 s"),
        (9.996, "10.0 s"),
        (12.34, "12.3 s"),
        (99.97, "1 min 40 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7980, "2 h 13 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (36 << 20, "36 MiB"),
        (147.62e6 * 4, "563 MiB"),
        (3 << 40, "3072 GiB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert human.size(count) == text


def test_quantities_and_counts() -> None:
    assert [human.quantity(n) for n in (950, 94_500, 147.62e6, 1.3e9)] == [
        "950",
        "94.5 k",
        "148 M",
        "1.3 B",
    ]
    assert [human.count(1, "image"), human.count(16, "image")] == ["1 image", "16 images"]
    assert human.count(1000, "class") == "1,000 classes"
    assert [human.rate(r, "images") for r in (0.0421, 1.25, 1230)] == [
        "0.0421 images/s",
        "1.25 images/s",
        "1,230 images/s",
    ]


def test_tables_are_aligned() -> None:
    assert table([("a", "b"), ("long", "1"), ("x", "23")]) == (
        "a      b\n----  --\nlong   1\nx     23"
    )
    shown = click.unstyle(fields([("name", "one\ntwo"), ("x", "three")]))
    assert shown == "name  one\n      two\nx     three"


class Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    assert speaks_unicode(terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("Drawing", 10) as show:
        show(5)
        show(10)
    assert "█" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_a_log_file_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    assert not speaks_unicode(log)
    monkeypatch.setattr("sys.stderr", log)
    with progress_bar("Drawing", 10) as show:
        for done in range(10):
            show(done)
        show(10, "Decoding")
    assert log.getvalue() == "Drawing\nDecoding\n"


def test_staged_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out) as hidden:
        (hidden / "one").write_text("1")
        (hidden / "two").write_text("2")
        assert not (out / "one").exists()
    assert tree(tmp_path) == {"a", "a/b", "a/b/one", "a/b/two"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_text("stays")

    def fail() -> None:
        with staged(tmp_path) as hidden:
            (hidden / "old").write_text("new")
            (hidden / "other").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert tree(tmp_path) == {"old"}
    assert (tmp_path / "old").read_text() == "stays"


def test_a_failure_while_moving_takes_back_what_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from os import replace

    def move(source: Path, target: Path) -> None:
        if target.name == "two":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("aim_cli.output.os.replace", move)

    def fill() -> None:
        with staged(tmp_path / "out") as hidden:
            (hidden / "one").write_text("1")
            (hidden / "two").write_text("2")

    with pytest.raises(OSError, match=r"Input/output error.*out"):
        fill()
    assert tree(tmp_path) == set()


@dataclass(frozen=True)
class Options:
    size: int = field(metadata={"help": "Side."})
    rate: float = field(default=0.5, metadata={"help": "Speed."})
    flip: bool = field(default=True, metadata={"help": "Mirror."})
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "Which."})
    widths: tuple[int, ...] = field(default=(1, 2), metadata={"help": "Levels."})
    where: Path | None = field(default=None, metadata={"help": "Folder."})


def parse(*args: str) -> Any:
    found: list[Options] = []

    @click.command()
    @options_from(Options)
    def command(**values: Any) -> None:
        found.append(Options(**values))

    result = CliRunner().invoke(command, args)
    return found[0] if found else result.output


def test_options_from_a_dataclass() -> None:
    assert parse("--size", "4") == Options(4)
    given = "--size 4 --rate 2 --no-flip --kind b --widths 3,4,5 --where x"
    assert parse(*given.split()) == Options(4, 2.0, False, "b", (3, 4, 5), Path("x"))
    assert "Missing option '--size'" in parse()
    assert "not a list like" in parse("--size", "1", "--widths", "1;2")
    assert "'c' is not one of" in parse("--size", "1", "--kind", "c")
    shown = parse("--help")
    for words in ("Side.  [required]", "[default: 0.5]", "--flip / --no-flip", "[default: 1,2]"):
        assert words in shown


def test_lists_of_words_given_several_times_are_one() -> None:
    @dataclass(frozen=True)
    class Parts:
        freeze: tuple[Literal["head", "tail", "legs"], ...] = field(
            default=(), metadata={"help": "Parts."}
        )

    @click.command()
    @options_from(Parts)
    def command(freeze: tuple[str, ...]) -> None:
        click.echo(",".join(freeze) or "none")

    def output(*line: str) -> str:
        return CliRunner().invoke(command, line).output

    assert output() == "none\n"
    assert output("--freeze", "tail,head", "--freeze", "legs", "--freeze", "head") == (
        "tail,head,legs\n"
    )
    assert "'wing' is none of head, tail, legs" in output("--freeze", "head", "--freeze", "wing")


def test_an_annotation_without_a_command_line_form() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict, metadata={"help": "?"})

    with pytest.raises(TypeError, match="no command-line form"):
        options_from(Odd)(lambda: None)
