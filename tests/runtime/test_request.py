"""A request is made and checked once; whoever draws takes it whole."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import AimError, Bundle, Generator, Request, SamplingOptions
from aim_runtime.engines.base import Engine
from aim_runtime.images import save_png, was_drawn_with

from .tiny_bundle import TOKENS, copy_bundle


def test_names_seeds_options_and_memory_are_settled(generator: Generator) -> None:
    request = generator.request([2, "dog"], seed=2**64 - 2, top_k=3)
    assert (request.classes, request.seeds) == ((2, 1), (2**64 - 2, 2**64 - 1))
    assert request.options == generator.sampling.replace(top_k=3)
    assert request.batching == generator.plan(2)
    assert request.bundle_sha256 == generator.bundle.manifest_sha256
    assert (request.bundle, request.backend, len(request)) == ("tiny", "cpu", 2)


def test_it_is_drawn_as_its_classes_and_options_are(generator: Generator) -> None:
    options: Any = {"seed": 5, "cfg_scale": 3, "temperature": 0.7, "top_p": 0.9}
    expected = generator.generate([1, 0, 2], **options)
    request = generator.request([1, 0, 2], **options)
    for _ in range(2):
        found = generator.generate(request)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.array, expected.array)
        for index in range(3):
            assert found.settings(index) == expected.settings(index)
    *_, last = generator.stream(request, every=TOKENS)
    assert np.array_equal(last.tokens, expected.tokens)


def test_nothing_is_checked_or_planned_again(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = generator.request(["dog"])
    for owner, name in ((Engine, "plan"), (Generator, "class_index"), (Generator, "request")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it is settled already"))
    generator.generate(request)
    list(generator.stream(request))


def test_it_holds_values_alone(generator: Generator, tiny: Path) -> None:
    """So that it can wait in a queue, cross processes, and outlive the generator that made it."""
    with Generator.load(tiny, backend="cpu") as maker:
        request = maker.request(["dog", "cat"], seed=9)
    assert hash(request) == hash(generator.request(["dog", "cat"], seed=9))
    copy: Request = pickle.loads(pickle.dumps(request))
    assert copy == request
    assert np.array_equal(
        generator.generate(copy).tokens, generator.generate([1, 0], seed=9).tokens
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seeds = (1, 2)  # type: ignore[misc]
    with pytest.raises(AimError, match="closed"):
        maker.generate(request)


def test_its_batches_are_those_of_its_plan(tiny: Path, generator: Generator) -> None:
    plan = generator.plan(1)
    limit = (plan.total + 2 * plan.bytes_per_image + 1) / 2**20
    with Generator.load(tiny, backend="cpu", memory_limit_mb=limit) as small:
        request = small.request([0] * 7)
        assert request.batching.batch_size == 3
        assert list(request.batches()) == [slice(0, 3), slice(3, 6), slice(6, 7)]
        assert np.array_equal(small.generate(request).tokens, generator.generate([0] * 7).tokens)


@pytest.mark.parametrize("given", [{"seed": 0}, {"cfg_scale": 2.0}, {"top_k": 0}])
def test_options_beside_a_request_are_refused(generator: Generator, given: Any) -> None:
    request = generator.request([0], seed=3)
    (name,) = given
    for call in (generator.generate, generator.stream):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be left out"):
            call(request, **given)
        call(request, cfg_scale=None)  # which says nothing


def test_a_request_for_another_bundle_or_backend_is_refused(
    generator: Generator, tiny: Path, tmp_path: Path
) -> None:
    """Its numbers would mean other classes, its batches could be too large."""
    other = copy_bundle(tiny, tmp_path / "other")
    text = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"name": "tiny"', '"name": "other"'))
    with Generator.load(other, backend="cpu") as foreign:
        request = foreign.request([0])
    for wrong in (request, dataclasses.replace(generator.request([0]), backend="cuda")):
        for call in (generator.generate, generator.stream):
            with pytest.raises(ValueError, match="classes is a Request for the bundle") as caught:
                call(wrong)
            assert len(str(caught.value)) <= 300


def test_an_unknown_option_is_no_silence(generator: Generator) -> None:
    for options in ({"sead": 1}, {"sead": None}):
        with pytest.raises(TypeError, match="sead"):
            generator.generate([0], **options)  # type: ignore[arg-type]


def test_the_seeds_of_all_images_must_exist(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"seed is 18446744073709551615; .* for 2 images"):
        generator.request([0, 0], seed=2**64 - 1)
    with pytest.raises(ValueError, match="seed is -1; it must be a whole number from 0 to"):
        generator.request([0], seed=-1)


def test_a_png_tells_whether_a_request_would_draw_it_again(
    generator: Generator, tmp_path: Path
) -> None:
    request = generator.request([0, 1], seed=4)
    result = generator.generate(request)
    path = tmp_path / "a.png"
    save_png(result.images[1], path, result.settings(1))
    assert was_drawn_with(path, request.settings(1))
    assert request.settings(1).items() <= result.settings(1).items()
    assert not was_drawn_with(path, request.settings(0))
    others = generator.request([0, 1], seed=4, top_p=0.5), generator.request([0, 1], seed=5)
    assert not any(was_drawn_with(path, other.settings(1)) for other in others)
    assert not was_drawn_with(tmp_path / "absent.png", request.settings(1))


def test_the_manifest_recommends_what_requests_are_made_of(tiny: Path) -> None:
    """One type, one meaning: no conversion between a bundle's defaults and a request's options."""
    bundle = Bundle.open(tiny)
    assert bundle.manifest.sampling == SamplingOptions(2.0, 1.0, 0, 1.0)
    with Generator.load(tiny, backend="cpu") as generator:
        assert generator.sampling is generator.manifest.sampling
