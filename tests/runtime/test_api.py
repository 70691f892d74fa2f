"""Whatever is passed to a public call: it works, or one ValueError names the argument."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aim_runtime
from aim_runtime import (
    AimError,
    Batcher,
    BatchPlan,
    Bundle,
    Generator,
    Request,
    SamplingOptions,
    available_backends,
    contact_sheet,
    plan_batches,
    save_png,
)
from aim_runtime.quoting import shown

from .tiny_bundle import TOKENS


class Rude:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no\nname")

    def _refuse(self, *_: Any) -> Any:
        raise KeyError("no")

    __index__ = __float__ = __len__ = __fspath__ = __array__ = __bool__ = __eq__ = _refuse  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Long:
    def __repr__(self) -> str:
        return "line\n" * 1000


ANOTHERS = Request((0,), (0,), SamplingOptions(), BatchPlan(1, 1, 1, 1), "x\n" * 99, "", "cpu")
NUMBERS = [
    *(0, 1, 2, 3, -1, 10**9, 2**31, 2**63, 2**64 - 1, 2**64, 2**70, 10**400, 10**5000),
    *(0.0, 1.0, 0.5, -0.5, 1e-320, 5e-324, 1e308, 1e39, float("nan"), float("inf")),
    *(np.int64(1), np.uint64(2**64 - 1), np.uint8(2), np.float32(0.5), np.float16(1), np.bool_(1)),
    *(np.array(1), np.array(1.0), np.array([1]), np.array([1.0]), np.array([[1, 2]]), np.array([])),
    *(
        Decimal("0.5"),
        Fraction(1, 2),
        1j,
        True,
        False,
        np.datetime64("2020-01-01"),
        np.float64("nan"),
    ),
]
OTHERS = [
    *(None, "", "1", "0.5", "dog", "auto", "cpu", "\ud800", "a\nb\x1b[31m\u2028", "x" * 10**5),
    *(
        b"",
        b"1",
        b"\0",
        bytearray(b"1"),
        memoryview(b"1"),
        [],
        [1],
        [[1]],
        [None],
        ["dog", 2],
        (1, 2),
    ),
    *(
        {},
        {1: 2},
        {1, 2},
        frozenset(),
        range(3),
        range(10**9),
        object(),
        Rude(),
        Long(),
        print,
        len,
    ),
    *(
        Rude,
        Path("dog"),
        Path(),
        threading.Event(),
        SamplingOptions(),
        ANOTHERS,
        np.array("dog"),
        np.array(None),
    ),
    *(
        np.zeros((1, TOKENS), int),
        np.full((1, TOKENS), 2**63, np.uint64),
        [[0] * TOKENS],
        [[0], [0, 1]],
    ),
    *(
        np.zeros((1, TOKENS)),
        np.array(["dog", "cat"]),
        np.zeros(3, "V4"),
        slice(3),
        NotImplemented,
        ...,
    ),
]
VALUES = NUMBERS + OTHERS

Call = Callable[[Any], Any]


def drained(stream: Iterator[Any]) -> None:
    for _ in stream:
        pass


def cancelled(batcher: Batcher, classes: Any = 0, **arguments: Any) -> None:
    with batcher.submit(classes, **arguments):
        pass


def closed(batcher: Batcher, **arguments: Any) -> None:
    try:
        batcher.close(**arguments)
    finally:
        batcher.close()


def batcher_calls(
    gen: Generator, batcher: Batcher
) -> dict[str, tuple[str | tuple[str, ...], Call]]:
    """As `calls`."""
    ended = batcher.submit(0)
    ended.result()
    found: dict[str, tuple[str | tuple[str, ...], Call]] = {
        "Batcher generator": ("generator", lambda v: Batcher(v).close()),
        "Batcher images": ("images", lambda v: Batcher(gen, images=v).close()),
        "Batcher queue": ("queue", lambda v: Batcher(gen, images=1, queue=v).close()),
        "Batcher.close drain": ("drain", lambda v: closed(Batcher(gen, images=1), drain=v)),
        "Batcher.close timeout": ("timeout", lambda v: closed(Batcher(gen, images=1), timeout=v)),
        "submit classes": ("class", lambda v: cancelled(batcher, v)),
        "Job.previews every": ("every", lambda v: drained(batcher.submit(0).previews(v))),
        "Job.result timeout": ("timeout", ended.result),
    }
    for name in ("seed", "cfg_scale", "temperature", "top_k", "top_p", "priority", "deadline_s"):
        found[f"submit {name}"] = (name, lambda v, name=name: cancelled(batcher, **{name: v}))
    return found


def calls(gen: Generator, tiny: Path, out: Path) -> dict[str, tuple[str | tuple[str, ...], Call]]:
    """Every argument of every public call, by "call argument": what it is called, and the call."""
    bundle, image = gen.bundle, gen.generate(0).images[0]
    settings: dict[str, Call] = {
        name: (lambda v, name=name: {name: v})
        for name in ("seed", "cfg_scale", "temperature", "top_k", "top_p", "cancel")
    }
    found: dict[str, tuple[str | tuple[str, ...], Call]] = {
        "generate classes": ("class", gen.generate),
        "generate progress": (
            "progress",  # what a function raises is its own
            lambda v: gen.generate(0, progress=v if not callable(v) else lambda *_: None),
        ),
        "stream classes": ("class", lambda v: drained(gen.stream(v))),
        "stream every": ("every", lambda v: drained(gen.stream(0, every=v))),
        "logits tokens": ("tokens", lambda v: gen.logits(v, 0)),
        "logits classes": (
            ("class", "tokens"),
            lambda v: gen.logits(np.zeros((1, TOKENS), int), v),
        ),
        "logits cfg_scale": (
            "cfg_scale",
            lambda v: gen.logits(np.zeros((1, TOKENS), int), 0, cfg_scale=v),
        ),
        "request classes": ("class", gen.request),
        "class_index": ("class", gen.class_index),
        "class_number": ("index", gen.class_number),
        "plan n": ("n", gen.plan),
        "plan cfg_scale": ("cfg_scale", lambda v: gen.plan(1, v)),
        "plan_batches manifest": ("manifest", lambda v: plan_batches(v, 1)),
        "plan_batches n": ("n", lambda v: plan_batches(gen.manifest, v)),
        "plan_batches cfg_scale": ("cfg_scale", lambda v: plan_batches(gen.manifest, 1, v)),
        "plan_batches limit": ("memory_limit_mb", lambda v: plan_batches(gen.manifest, 1, None, v)),
        "Bundle path": ("path", Bundle.open),
        "load path": ("path", lambda v: Generator.load(v, backend="cpu", threads=1)),
        "Generator bundle": ("bundle", lambda v: Generator(v, gen._engine)),  # type: ignore[arg-type]
        "Generator engine": ("engine", lambda v: Generator(bundle, v)),
        "Generator limit": (
            "memory_limit_mb",
            lambda v: Generator(bundle, gen._engine, memory_limit_mb=v).plan(1),  # type: ignore[arg-type]
        ),
        "available_backends": ("bundle", available_backends),
        "contact_sheet images": ("images", contact_sheet),
        "contact_sheet columns": ("columns", lambda v: contact_sheet([image], v)),
        "save_png image": ("image", lambda v: save_png(v, out / "a.png")),
        "save_png settings": ("settings", lambda v: save_png(image, out / "a.png", v)),
    }
    for name, make in settings.items():
        found[f"generate {name}"] = (name, lambda v, make=make: gen.generate(0, **make(v)))
        # Its arguments are checked by the call, as those of `generate`: nothing needs to be drawn.
        found[f"stream {name}"] = (name, lambda v, make=make: gen.stream(0, **make(v)).close())
        if name != "cancel":
            found[f"request {name}"] = (name, lambda v, make=make: gen.request(0, **make(v)))
        if name not in ("seed", "cancel"):
            found[f"options {name}"] = (name, lambda v, make=make: SamplingOptions(**make(v)))
    for name in ("backend", "device", "precision", "threads", "memory_limit_mb"):
        found[f"load {name}"] = (name, lambda v, n=name: Generator.load(tiny, **_loading(n, v)))
    return found


def _loading(name: str, value: Any) -> dict[str, Any]:
    """Arguments of a load that starts no thread for what is tried."""
    return {"backend": "cpu", "threads": 1, name: value}


# What cannot be wrong about a value but about the world: a name that is not known here.
WORLD = {"Bundle path", "load path", "load backend", "load device", "load precision"}


@pytest.fixture
def batcher(generator: Generator) -> Iterator[Batcher]:
    with Batcher(generator, images=4) as made:
        yield made


def test_every_argument_works_or_names_itself(
    generator: Generator,
    batcher: Batcher,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where no path among the values leads anywhere
    wrong, tried, slowest = [], 0, (0.0, "")
    every_call = calls(generator, tiny, tmp_path) | batcher_calls(generator, batcher)
    for (what, (name, call)), value in itertools.product(every_call.items(), VALUES):
        if what.startswith("load") and tried % 3:  # these take longest
            tried += 1
            continue
        case = f"{what} = {shown(value)}"
        started, tried = time.process_time(), tried + 1
        try:
            call(value)
        except (ValueError, AimError) as error:
            said = str(error)
            expected = isinstance(error, ValueError) or (
                what in WORLD and isinstance(value, (str, Path))
            )
            if not expected or not (said.startswith(name) or what in WORLD):
                wrong.append(f"{case}: {type(error).__name__}: {said[:120]}")
            if len(said) > 300 or not said.isprintable():
                wrong.append(f"{case}: {len(said)} characters: {said[:200]!r}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(
                f"{case}: {type(error).__name__}: {error} ({where.name}:{where.lineno})"[:250]
            )
        slowest = max(slowest, (time.process_time() - started, case))
    assert not wrong, "\n".join([f"{len(wrong)} of {tried}", *wrong])
    assert tried > 2000
    assert slowest[0] < 5, slowest
    assert generator.generate(0).tokens.shape == (1, TOKENS)


def test_values_are_shown_on_one_short_line() -> None:
    for value, text in (
        ("dog", "'dog'"),
        ("a\nb", r"'a\nb'"),
        (2**64, "18446744073709551616"),
        (10**5000, "a value of type int"),
        (None, "None"),
        (np.array([1.0]), "array([1.])"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
    ):
        assert shown(value) == text
    assert "Rude" in shown(Rude())
    for value in ("x" * 10**6, b"x" * 10**6, [1] * 10**6, Long(), {1: "x" * 999}):
        assert 20 < len(shown(value)) <= 60
        assert "..." in shown(value)


def test_numbers_of_other_libraries_count(tiny: Path, generator: Generator) -> None:
    for limit in (np.int64(512), np.float32(512), np.array(512), Fraction(512), Decimal(512)):
        with Generator.load(tiny, memory_limit_mb=limit) as loaded:
            assert loaded.plan(1) == generator.plan(1)
    expected = generator.generate([1], seed=2, cfg_scale=2, temperature=0.5, top_k=3)
    found = generator.generate(
        np.array([1]),
        seed=np.uint64(2),
        cfg_scale=np.float32(2),
        temperature=Decimal("0.5"),
        top_k=np.int8(3),
    )
    assert np.array_equal(found.tokens, expected.tokens)
    for alone in (np.array(1), np.array("dog"), np.str_("dog"), np.array(["dog"])):
        assert generator.generate(alone).classes == (1,)


def test_totals_are_bounded_before_anything_is_made_of_them(generator: Generator) -> None:
    with pytest.raises(ValueError, match="classes has more than 1048576 items"):
        generator.generate(itertools.repeat(0))  # type: ignore[arg-type]
    assert generator.plan(2**31).batches > 1


def test_more_images_than_fit_are_refused_before_the_first_is_drawn(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(shape: tuple[int, ...], dtype: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("aim_runtime.arguments.np.empty", no_memory)
    monkeypatch.setattr(generator._engine, "draw", lambda *_: pytest.fail("it draws"))
    with pytest.raises(ValueError, match=r"classes has 2 items; their results take 0.0 GiB"):
        generator.generate([0, 1])


def test_a_class_that_is_unknown_is_found_out_quickly(tiny: Path) -> None:
    """However long it is, and however many there are."""
    gen = Generator.load(tiny, threads=1)
    gen.class_names = tuple(f"animal, mammal number {index}" for index in range(100_000))
    gen.class_index(1)
    for text in ("animal " * 10**5, "animal mammal", "\0" * 1000):
        started = time.thread_time()  # whatever else the machine does
        with pytest.raises(ValueError, match="is unknown: it must be a class name") as caught:
            gen.class_index(text)
        assert time.thread_time() - started < 1
        assert len(str(caught.value)) <= 300


def test_what_is_public_is_in_the_grid(generator: Generator, tiny: Path, tmp_path: Path) -> None:
    """A new call of the package must be tried too."""
    tried = {what.split()[0] for what in calls(generator, tiny, tmp_path)}
    methods = {name for name in vars(Generator) if not name.startswith("_")}
    assert methods - {"close"} <= tried
    functions = {name for name in aim_runtime.__all__ if name[0].islower()}
    assert functions - {"models_dir", "write_bundle"} <= tried
    assert Bundle.open(tiny).path == tiny
