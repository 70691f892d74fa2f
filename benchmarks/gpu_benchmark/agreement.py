"""Number formats against float32, with the model in the box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_benchmark.request import SETTINGS
from gpu_benchmark.sections import Keep

CPU_TOKENS = "cpu-tokens.npy"
COMPARED_AT_ONCE = 8


def cpu_tokens(path: str | None, images: int) -> NDArray[np.int64]:
    """The tokens (N, T) that the CPU draws of the first classes of a bundle."""
    from aim_runtime import Generator

    with Generator.load(path, backend="cpu") as generator:
        classes = [index % len(generator.class_names) for index in range(images)]
        settings: dict[str, Any] = SETTINGS
        return generator.generate(classes, **settings).tokens


def draw_on_cpu(keep: Keep, path: str, images: int, engines: Path, folder: str) -> None:
    """Put the CPU's tokens into `folder`: those that `prepare_all` drew, or new ones."""
    ready = engines / CPU_TOKENS
    tokens = np.load(ready)[:images] if ready.exists() else np.empty((0, 0))
    keep(on_this_machine=len(tokens) < images)
    if len(tokens) < images:
        tokens = cpu_tokens(path, images)
    np.save(Path(folder) / CPU_TOKENS, tokens)


def compare_formats(
    keep: Keep, path: str, backend: str, precision: str, images: int, folder: str
) -> None:
    """How near to the CPU and to float32 an engine is, over `images` of the bundle at `path`.

    Its tokens, drawn freely, are compared with the CPU's. Its scores, given the CPU's tokens, are
    compared with those of the first engine that came here, which left them in `folder`; with
    guidance and without.
    """
    from aim_runtime import Bundle, Generator
    from aim_runtime.engines.backends import load_engine

    engine = load_engine(Bundle.open(path), backend=backend, precision=precision)
    generator = Generator(Bundle.open(path), engine)
    classes = [index % len(generator.class_names) for index in range(images)]
    tokens = np.load(Path(folder) / CPU_TOKENS)  # (N, T)
    settings: dict[str, Any] = SETTINGS
    differs = generator.generate(classes, **settings).tokens != tokens
    label = f"{engine.backend} {engine.precision}"
    keep(
        label=label,
        compared=images,
        tokens=int(tokens.size),
        differing_tokens=int(differs.sum()),
        differing_images=int(differs.any(axis=1).sum()),
    )
    reference = Path(folder) / "reference"
    first = not reference.exists()
    reference.mkdir(exist_ok=True)
    sums: dict[str, float] = {}
    for start in range(0, images, COMPARED_AT_ONCE):
        part = slice(start, min(start + COMPARED_AT_ONCE, images))
        for kind, scale in (("plain", 1.0), ("guided", SETTINGS["cfg_scale"])):
            scores = generator.logits(tokens[part], classes[part], cfg_scale=scale)  # (n, T, V)
            file = reference / f"{kind}-{start}.npy"
            if first:
                np.save(file, scores)
                continue
            for name, value in differences(np.load(file), scores, part).items():
                sums[f"{name}_{kind}"] = sums.get(f"{name}_{kind}", 0.0) + value
    if first:
        (reference / "label").write_text(label)
    else:
        means = {name: value / tokens.size for name, value in sums.items()}
        keep(reference=(reference / "label").read_text(), **means)


def differences(
    true: NDArray[np.float32], other: NDArray[np.float32], seeds: slice
) -> dict[str, float]:
    """Sums over all places of what differs between scores (n, T, V) of the images of `seeds`.

    "kl" in nats at temperature 1; "argmax" and "draw" count the places where the best token and
    the token drawn with the same noise are the same.
    """
    from aim_runtime.noise import uniforms
    from aim_runtime.sampling import SamplingOptions, sample

    options = SamplingOptions(**SETTINGS)  # type: ignore[arg-type]
    noise = uniforms(range(seeds.start, seeds.stop), true.shape[1]).reshape(-1)
    one, two = (scores.reshape(-1, scores.shape[-1]) for scores in (true, other))
    return {
        "kl": float(divergence(one, two).sum()),
        "argmax": float((one.argmax(-1) == two.argmax(-1)).sum()),
        "draw": float((sample(one, noise, options) == sample(two, noise, options)).sum()),
    }


def divergence(true: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence in nats, of the softmaxes of scores (..., V): (...)."""

    def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
        shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
        normalised: NDArray[np.float64] = shifted - np.log(
            np.exp(shifted).sum(axis=-1, keepdims=True)
        )
        return normalised

    p, q = log_softmax(true), log_softmax(other)
    found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return found
