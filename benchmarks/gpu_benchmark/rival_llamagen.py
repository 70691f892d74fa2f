"""A rival: LlamaGen, the transformer of the same sizes over the same tokenizer."""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any

from gpu_benchmark.request import SETTINGS, repeated, to_host
from gpu_benchmark.sections import Keep

CLASSES, CODES, CODE_SIZE, TOKENS = 1000, 16384, 8, 256


def measure_llamagen(
    keep: Keep, checkout: str, size: str, batches: tuple[int, ...], repeats: int
) -> None:
    """Its sampling script with random weights: bf16, `torch.compile(mode="reduce-overhead")`.

    A number of images is compiled anew, which is timed apart ("compile_seconds").
    """
    import torch

    model, tokenizer = llamagen(checkout, size, "cuda")
    keep(torch=torch.__version__, what=f"GPT-{size}, torch.compile, bf16")
    rows: list[dict[str, Any]] = []
    for images in batches:
        torch.compiler.reset()
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        rows.append(llamagen_row(compiled, tokenizer, images, repeats))
        keep(rows=rows)
        torch.cuda.empty_cache()


def llamagen_row(model: Any, tokenizer: Any, images: int, repeats: int) -> dict[str, Any]:
    """Its figures for one number of images."""
    import torch
    from autoregressive.models.generate import generate

    device = next(tokenizer.parameters()).device
    classes = torch.arange(images, device=device) % CLASSES
    side = math.isqrt(TOKENS)
    shape = [images, CODE_SIZE, side, side]
    tokens = torch.zeros(images, TOKENS, dtype=torch.int64, device=device)

    def drawing() -> None:
        nonlocal tokens
        tokens = generate(model, classes, TOKENS, **SETTINGS)

    def decoding() -> None:
        with torch.inference_mode():
            to_host(tokenizer.decode_code(tokens, shape))

    def both() -> None:
        drawing()
        decoding()

    started = time.perf_counter()
    both()
    compiling = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = {
        "images": images,
        "seconds": statistics.median(repeated(both, repeats)),
        "decode_ms_per_image": statistics.median(repeated(decoding, repeats)) / images * 1e3,
        "compile_seconds": compiling,
    }
    if device.type == "cuda":
        row["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    return row


def llamagen(checkout: str, size: str, device: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a checkout of FoundationVision/LlamaGen, random weights."""
    import torch

    sys.path.insert(0, checkout)
    from autoregressive.models.gpt import GPT_models
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    side = math.isqrt(TOKENS)
    with torch.device(device):
        model = GPT_models[f"GPT-{size}"](
            vocab_size=CODES,
            block_size=side**2,
            num_classes=CLASSES,
            cls_token_num=1,
            model_type="c2i",
        )
        tokenizer = VQ_models["VQ-16"](codebook_size=CODES, codebook_embed_dim=CODE_SIZE)
    return (
        model.eval().to(device, torch.bfloat16),
        tokenizer.eval().to(device, torch.bfloat16),
    )
