"""A site in Firefox, with the engine itself: the same pictures, with threads, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import Bundle, Generator
from aim_web import Package, write_site

from ..firefox import FIREFOX, Firefox, running
from .site_parts import Host, hosted

pytestmark = pytest.mark.skipif(FIREFOX is None, reason="there is no Firefox here")

# What a page drew, once its first group is done: pixels of red, green, blue and 255.
DRAWN = """
    for (let waited = 0; ; waited += 50) {
        const group = document.querySelector(".group");
        if (group?.dataset.state === "done") break;
        const told = document.querySelector("[data-state=failed]");
        if (told) throw new Error(told.innerText);
        if (waited > 100_000) throw new Error("it never came");
        await new Promise((resolve) => setTimeout(resolve, 50));
    }
    const picture = document.querySelector(".group img");
    await picture.decode();
    const { naturalWidth: width, naturalHeight: height } = picture;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    return {
        pixels: [...context.getImageData(0, 0, width, height).data],
        where: document.querySelector(".where").innerText,
        isolated: crossOriginIsolated,
    };
"""
KEPT = """
    for (let waited = 0; waited < 30_000; waited += 50) {
        const paths = [];
        for (const name of await caches.keys())
            for (const { url } of await (await caches.open(name)).keys()) paths.push(url);
        if (given.every((wanted) => paths.some((path) => path.endsWith(wanted)))) return true;
        await new Promise((resolve) => setTimeout(resolve, 50));
    }
    return false;
"""


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    with running(tmp_path_factory.mktemp("firefox") / "profile") as firefox:
        yield firefox


@pytest.fixture
def real(tmp_path: Path, tiny: Path, npm: Path) -> Iterator[Host]:
    """A host of the tiny bundle's site that sends no headers: the service worker sees to them."""
    package = Package.at(npm / "onnxruntime-web")
    write_site(Bundle.open(tiny), package, tmp_path / "site", webgpu=False)
    with hosted(tmp_path / "site") as host:
        host.isolates = False
        yield host


def test_draws_what_python_draws_and_again_without_a_network(
    firefox: Firefox, real: Host, tiny: Path
) -> None:
    firefox.open(f"{real.url}?class=dog&seed=3&draw=1")
    first = firefox.evaluate(DRAWN)
    assert first["isolated"] is True
    assert "threads" in first["where"]
    assert firefox.evaluate(KEPT, "step.weights", ".wasm", ".mjs") is True
    real.gone = True
    firefox.open(f"{real.url}?class=dog&seed=3&draw=1")
    again = firefox.evaluate(DRAWN)
    assert again["isolated"] is True
    assert again["pixels"] == first["pixels"]
    with Generator.load(tiny, backend="cpu", threads=1) as generator:
        wanted = generator.generate(["dog"], seed=3).array[0]
    height, width, _ = wanted.shape
    found = np.array(first["pixels"]).reshape(height, width, 4)
    difference = found[..., :3] - wanted.astype(int)
    assert np.abs(difference).max() <= 2  # the same tokens; decoders round each in its own way
