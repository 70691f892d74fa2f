"""What the layers of a step compute, in float64, and launches of the persistent kernel on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.precision import Format
from aim_export.cuda.step_tensors import weight_table

Arrays = dict[str, np.ndarray]


def random_arrays(
    g: Geometry, precision: Format, buffers: Mapping[str, tuple[str, tuple[int, ...]]], seed: int
) -> Arrays:
    """Weights and buffers as if images were under way: all a layer reads is random."""
    random = np.random.default_rng(seed)
    found = {}
    tensors = {name: (t.dtype, t.shape) for name, t in weight_table(g, precision).tensors.items()}
    for name, (dtype, shape) in (tensors | dict(buffers)).items():
        values = random.standard_normal(shape)
        if name == "a":
            values = -1 - 15 * random.random(shape)
        elif name == "dt_bias":
            values = math.log(0.001) + random.random(shape) * math.log(100)
        elif name in ("d", "scale"):
            values = 1 + 0.1 * values
        elif name.endswith("_scales"):
            values = 0.002 * (1 + random.random(shape))
        elif name == "state_scale":
            values = 0.1 + random.random(shape)
        elif name == "past_decay":
            values = np.cumsum(-0.05 * random.random(shape), axis=-1)
        elif dtype == "int8":
            values = np.clip(np.round(values * 40), -127, 127)
        elif name in ("in_proj", "out_proj"):
            values *= 0.1
        elif name in ("ring", "state", "past_x", "past_b", "conv_weight", "shifted"):
            values *= 0.3
        found[name] = values.astype(dtype)
    return found


def words(arrays: Arrays) -> np.ndarray:
    """The word table (V, D), which is the head too, in float64."""
    table = arrays["word_table"].astype("f8")
    return table * arrays["word_table_scales"][:, None] if "word_table_scales" in arrays else table


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def step(g: Geometry, arrays: Arrays) -> Arrays:
    """What the head reads, and rows remember, after a step of `arrays`, in float64.

    Of `shares` what they add up to, (2, R). What enters a product is rounded to float16, as in the
    kernels.
    """
    a = {name: v.astype("f8") if v.dtype.kind == "f" else v.copy() for name, v in arrays.items()}
    at = arrays["position"].astype(int)
    where = np.maximum(at + g.position_offset - 1, 0)
    value = words(a)[arrays["token"]] + a["position_table"][where]
    value = np.where((at == 0)[:, None], a["class_embedding"], value)
    for layer in range(g.L):
        value = value + _layer(g, a, layer, value, at)
    hidden = value * a["scale"][g.L]
    sums = [np.sum(v * v, axis=-1) for v in (value, value * a["norm_f"])]
    return a | {"residual": value, "hidden": hidden, "shares": np.stack(sums)}


def scores(g: Geometry, arrays: Arrays, residual: np.ndarray) -> np.ndarray:
    """The head's (R, V), behind both norms and their modulation, in float64."""
    value = residual / rms(residual, g.norm_eps) * arrays["norm_f"]
    value = value / rms(value, g.norm_eps) * arrays["final_norm"]
    shift, scale = arrays["final_modulation"].astype("f8").transpose(1, 0, 2)
    return (value * (1 + scale) + shift) @ words(arrays).T


def _product(a: Arrays, name: str, layer: int, outputs: int, x: np.ndarray) -> np.ndarray:
    part = slice(layer * outputs, (layer + 1) * outputs)
    found = x.astype("f2").astype("f8") @ a[name][part].astype("f8").T
    return found * a[f"{name}_scales"][part] if f"{name}_scales" in a else found


def _layer(g: Geometry, a: Arrays, layer: int, value: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What a layer adds to the residual; writes what rows remember."""
    rows, inner = np.arange(len(at)), g.inner
    x = _product(a, "in_proj", layer, g.E, value * a["scale"][layer])
    x = x / rms(value, g.norm_eps) + a["shifted"][layer]
    z, mixed, dt = x[:, :inner], x[:, inner : inner + g.X], x[:, inner + g.X :]
    ring = a["ring"][layer]
    total = a["conv_bias"][layer] + a["conv_weight"][layer, g.K - 1] * mixed
    for back in range(1, g.K):
        past = np.where((at >= back)[:, None], ring[rows, (at - back) % g.K], 0)
        total = total + a["conv_weight"][layer, g.K - 1 - back] * past
    ring[rows, at % g.K] = mixed
    x, b, c = np.split(silu(total), [inner, inner + g.S], axis=1)
    dt = np.logaddexp(0, dt + a["dt_bias"][layer, : g.H])
    y = _scan(g, a, layer, at, x, b, c, dt) * silu(z)
    y = y.astype("f2").astype("f8")
    out = _product(a, "out_proj", layer, g.D, y) / rms(y, g.norm_eps)
    return a["gate"][layer] * out


def _scan(
    g: Geometry,
    a: Arrays,
    layer: int,
    at: np.ndarray,
    x: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    dt: np.ndarray,
) -> np.ndarray:
    """y of the token before the gate (R, I); puts the token into the chunk."""
    past_x, past_b, decay = (a[name][layer] for name in ("past_x", "past_b", "past_decay"))
    chunk, y = past_x.shape[1], np.zeros_like(x)
    heads = np.repeat(np.arange(g.H), g.P)
    for row, slot in enumerate(at % chunk):
        last = decay[row, :, slot - 1] if slot else np.zeros(g.H)
        state = a["state"][layer, row].astype("f8")
        if "state_scale" in a:
            state = state * a["state_scale"][layer, row][..., None]
        read = (state @ c[row]).reshape(-1) * np.exp(last)[heads] * (at[row] >= chunk)
        for then in range(slot):
            weight = np.exp(last - decay[row, :, then])[heads] * (past_b[row, then] @ c[row])
            read = read + weight * past_x[row, then]
        change = dt[row] * a["a"][layer, : g.H]
        y[row] = np.exp(change)[heads] * read
        y[row] += (dt[row][heads] * (b[row] @ c[row]) + a["d"][layer, : g.H][heads]) * x[row]
        past_x[row, slot], past_b[row, slot] = dt[row][heads] * x[row], b[row]
        decay[row, :, slot] = change + last
    return y
