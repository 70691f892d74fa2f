"""A rival: the published code, with its CUDA graph kept between calls and as shipped."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from gpu_benchmark.request import SETTINGS, repeated, to_host
from gpu_benchmark.sections import Keep


def measure_published(
    keep: Keep, checkout: str, mamba: str, size: str, batches: tuple[int, ...], repeats: int
) -> None:
    """The published code with random weights in bf16: its graph kept between calls, and as shipped.

    As shipped, `AiM.generate` drops the captured graph after every call.
    """
    import importlib.util

    import torch

    model = published_model(checkout, mamba, size)
    conv = importlib.util.find_spec("causal_conv1d") is not None
    keep(torch=torch.__version__, causal_conv1d=conv)
    rows: list[dict[str, Any]] = []
    for images in batches:
        with torch.inference_mode():
            row: dict[str, Any] = {"images": images}
            published_row(row, model, repeats)
        rows.append(row)
        keep(rows=rows)
        torch.cuda.empty_cache()


def published_row(row: dict[str, Any], model: Any, repeats: int) -> None:
    """Its figures for `row["images"]` images."""
    import torch

    images, T, C = row["images"], model.num_tokens, model.num_classes
    classes = (torch.arange(images, device="cuda") % C)[:, None]
    both = torch.cat([classes, torch.full_like(classes, C)])
    side = math.isqrt(T)
    drawn = both

    def shipped() -> None:
        to_host(model.generate(c=classes, **SETTINGS))

    def decode() -> None:
        to_host(model.decode_to_img(drawn, (images, model.num_embed_dim, side, side)))

    def kept() -> None:
        nonlocal drawn
        model.mamba.cfg_scale = SETTINGS["cfg_scale"]
        rest = {name: SETTINGS[name] for name in ("temperature", "top_k", "top_p")}
        rest |= {"max_length": T + 1, "cg": True}
        drawn = model.mamba.generate(input_ids=both, cond=both, **rest)[:images, 1:]
        decode()

    def steps() -> None:
        for at in range(1, T + 1):
            cache.run(both, torch.full_like(both, at), at, cond=both)
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    shipped()
    row["as_shipped_seconds"] = statistics.median(repeated(shipped, repeats))
    kept()
    row["seconds"] = statistics.median(repeated(kept, repeats))
    row["decode_ms_per_image"] = statistics.median(repeated(decode, repeats)) / images * 1e3
    row["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    cache = model.mamba._decoding_cache
    row["step_ms"] = statistics.median(repeated(steps, repeats)) / T * 1e3
    model.mamba._decoding_cache = None


def published_model(checkout: str, mamba: str, size: str, device: str = "cuda") -> Any:
    """The model class of the published checkout, random weights."""
    import torch

    models = published_code(checkout, mamba)
    torch.manual_seed(0)
    with torch.device(device):
        model = models.AiM_models[f"AiM-{size}"]()
    model.eval()
    return model.to(device, torch.bfloat16)


def published_code(checkout: str, mamba: str) -> Any:
    """The module `models.aim` of the published checkout.

    What its imports want but neither sampling nor a training step calls is stood in for where it is
    missing: names that newer versions of `transformers` dropped, and the parts of mamba_ssm for
    other models.
    """
    import importlib
    import types

    sys.path.insert(0, checkout)
    if mamba:
        # Its own __init__ imports every model that it has, with all that those need.
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(Path(mamba) / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
    for name, attributes in {
        "transformers.generation": (
            "GreedySearchDecoderOnlyOutput",
            "SampleDecoderOnlyOutput",
            "TextStreamer",
        ),
        "transformers.utils": ("WEIGHTS_NAME", "CONFIG_NAME"),
        "transformers.utils.hub": ("cached_file",),
    }.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            sys.modules[name] = module
            sys.modules.setdefault("transformers", types.ModuleType("transformers"))
        for attribute in attributes:
            if not hasattr(module, attribute):
                setattr(module, attribute, types.SimpleNamespace)
    return importlib.import_module("models.aim")
