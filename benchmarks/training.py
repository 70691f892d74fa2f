"""Measure training steps of the model on an NVIDIA GPU, the published network beside it.

    python benchmarks/training.py --model L:64,B:64,XL:64 --published AiM --mamba mamba

A step is what `aim train model` does with a batch: forward, cross-entropy over all tokens,
backward, clipping, fused AdamW, the average of the weights; bf16 autocast, random codes, networks
of the published sizes with random weights. The published network goes through the same step with
its own layers and PyTorch's cross-entropy. Every figure comes from a process of its own, so that a
fault in one costs no other, and the JSON file is written after each.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
from gpu_benchmark.rival_published import published_code
from gpu_benchmark.sections import Keep, in_process

from aim_cli.dataclass_options import CommaSeparated

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SECTIONS = (
    "rate",
    "errors",
    "kernels",
    "tune",
    "speed",
    "eager",
    "memory",
    "scaling",
    "sharded",
    "tokenizer",
    "published",
    "curves",
    "profile",
)
# Steps before those that are timed, the first of which compiles.
WARM_UP = 4
# What PyTorch may take of cards of 40 and of 24 GB, GiB: some is the driver's and NCCL's.
CARD_40_GIB, CARD_24_GIB = 36.0, 21.0
# One small geometry for curves in float32.
SMALL = {"d_model": 256, "num_layers": 4, "vocab_size": 512, "num_classes": 10, "num_tokens": 256}


@click.command()
@click.option(
    "--model",
    "models",
    type=CommaSeparated(str),
    default="L:64",
    show_default=True,
    help="Published sizes and images a step.",
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--tokenizer-images",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images of 256 by 256 pixels a step of the tokenizer.",
)
@click.option("--published", type=click.Path(path_type=Path), help="A checkout of hp-l33/AiM.")
@click.option("--mamba", type=click.Path(path_type=Path), help="A checkout of state-spaces/mamba.")
@click.option(
    "--section", "sections", type=CommaSeparated(str), default="rate,speed", show_default=True
)
@click.option("--limit", type=float, default=120.0, show_default=True, help="Seconds a process.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    models: tuple[str, ...],
    steps: int,
    tokenizer_images: int,
    published: Path | None,
    mamba: Path | None,
    sections: tuple[str, ...],
    limit: float,
    target: Path | None,
) -> None:
    """Measure this machine's GPU."""
    if unknown := set(sections) - set(SECTIONS):
        raise click.BadParameter(f"{unknown.pop()!r} is none of {', '.join(SECTIONS)}.")
    checkouts = (str(published), str(mamba or "")) if published else None
    shared = tempfile.mkdtemp()
    found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="seconds")}

    def add(name: str, function: Callable[..., None], *args: Any, **how: Any) -> None:
        with tempfile.TemporaryDirectory() as fresh:
            # As on a machine that has never trained; the others share what they compile.
            os.environ["TRITON_CACHE_DIR"] = fresh if name in ("speed", "eager") else shared
            result = in_process(function, *args, limit_s=limit, **how)
        found.setdefault(name, []).append(result)
        click.echo(f"{name}: {json.dumps(result)[:6000]}")
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(found, indent=1), encoding="utf-8")

    sized = [(size, int(images)) for size, images in (model.split(":") for model in models)]
    if "rate" in sections:
        add("rate", measure_rate)
    if "errors" in sections:
        add("errors", measure_errors)
    if "kernels" in sections:
        add("kernels", measure_kernels)
    if "tune" in sections:
        add("tune", measure_variants)
    for size, images in sized:
        if "speed" in sections:
            add("speed", measure_ours, size, images, steps, True)
        if "eager" in sections:
            add("eager", measure_ours, size, images, steps, False)
        if "memory" in sections:
            for at_once, again in ((None, False), (None, True), (images // 4, False)):
                add("memory", measure_less_memory, size, images, steps, at_once, again)
        if "scaling" in sections:
            for processes, share in ((1, images), (gpus(), images), (gpus(), images // gpus())):
                add("scaling", measure_several, size, share, steps, processes)
        if "sharded" in sections:
            for how in (
                {"sharded": True, "most_gib": CARD_40_GIB},
                {"sharded": True, "most_gib": CARD_24_GIB, "checkpoint_activations": True},
                {"sharded": True},
                {"sharded": False},
            ):
                add("sharded", measure_several, size, images, steps, gpus(), **how)
        if "published" in sections and checkouts:
            add("published", measure_published_step, *checkouts, size, images, steps)
        if "profile" in sections:
            add("profile", measure_profile, size, images)
    if "tokenizer" in sections:
        for compiled in (False, True):
            add("tokenizer", measure_tokenizer, tokenizer_images, steps, compiled)
    if "curves" in sections and checkouts:
        for precision in ("bfloat16", "float32"):
            add("curves", measure_curves, *checkouts, precision, 200)


# -- whole steps ----------------------------------------------------------------------------------


class Step:
    """A training step of a network on random codes.

    Args:
        network: to be trained.
        loss: of codes (B, T) and classes (B,), by the network.
        bf16: under autocast.
        graph: loss and gradients as `aim train model` has them, as a CUDA graph.
        at_once: images at once, where it is one.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        bf16: bool = True,
        graph: bool = False,
        at_once: int | None = None,
    ) -> None:
        import torch

        from aim_training.batch_gradients import BatchGradients
        from aim_training.ema import Ema

        def cast(codes: Tensor, classes: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                return loss(codes, classes)

        self.network, self.loss = network, cast
        moments = 2 * sum(p.nbytes for p in network.parameters())
        self.gradients = (
            BatchGradients(network, cast, at_once=at_once, reserve=lambda: moments, say=click.echo)
            if graph
            else None
        )
        self.ema = Ema(network, 0.9999)
        parameters = list(network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self, codes: Tensor, classes: Tensor) -> Tensor:
        """The loss before the step."""
        import torch

        if self.gradients is not None:
            loss = self.gradients(codes, classes)
        else:
            loss = self.loss(codes, classes)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.network)
        return loss.detach()


def our_step(
    network: Any, bf16: bool = True, graph: bool = True, at_once: int | None = None
) -> Step:
    """As `aim train model` takes it."""
    from aim_training.kernels.cross_entropy import cross_entropy

    def loss(codes: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(network(codes, classes), codes)

    return Step(network, loss, bf16, graph, at_once)


def published_step(network: Any, bf16: bool = True) -> Step:
    """As the published trainer takes it: `AiM.forward` and PyTorch's cross-entropy."""
    import torch.nn.functional as F

    def loss(codes: Tensor, classes: Tensor) -> Tensor:
        logits = network(codes[:, :-1], cond=classes[:, None]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    return Step(network, loss, bf16)


def our_network(size: str, **options: Any) -> Any:
    """A published size whose layers all take part, on the GPU."""
    import torch

    from aim_training.config import PRESETS
    from aim_training.model import AiM

    torch.manual_seed(0)
    return open_gates(AiM(PRESETS[size], **options).cuda().initialise())


def open_gates(network: Any) -> Any:
    """The published initialisation closes the gates of AiM-B; no layer would have a gradient."""
    import torch

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN" in name:
                parameter.normal_(0.0, 0.02)
    return network


def published_network(checkout: str, mamba: str, **config: Any) -> Any:
    """The published network; without causal-conv1d its mixers take the path that needs none."""
    import importlib.util

    import torch

    models = published_code(checkout, mamba)
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = models.MambaLMHeadModel(models.MambaConfig(**config))
    if importlib.util.find_spec("causal_conv1d") is None:
        for layer in network.backbone.layers:
            layer.mixer.use_mem_eff_path = False
    return network.cuda()


PUBLISHED_CONFIG: dict[str, dict[str, Any]] = {
    "B": {"d_model": 768, "n_layer": 24},
    "L": {"d_model": 1024, "n_layer": 48, "adaln_group": True, "num_groups": 4},
    "XL": {"d_model": 1536, "n_layer": 48, "adaln_group": True, "num_groups": 4},
}


def measure_ours(keep: Keep, size: str, images: int, steps: int, graph: bool) -> None:
    """Our network."""
    import torch

    torch.set_float32_matmul_precision("high")
    keep(what="ours" if graph else "ours, kernels started one by one", model=size, images=images)
    network = our_network(size)
    measure_step(keep, our_step(network, graph=graph), images, steps)


def measure_less_memory(
    keep: Keep, size: str, images: int, steps: int, at_once: int | None, again: bool
) -> None:
    """Our network in parts, or with its activations computed again."""
    import torch

    torch.set_float32_matmul_precision("high")
    keep(model=size, images=images, asked_at_once=at_once, checkpoint_activations=again)
    step = our_step(our_network(size, checkpoint_activations=again), at_once=at_once)
    measure_step(keep, step, images, steps)
    assert step.gradients is not None
    keep(at_once=step.gradients.at_once)


def gpus() -> int:
    """How many there are, asked of another process: this one is to hold none."""
    return int(in_process(count_gpus)["gpus"])


def count_gpus(keep: Keep) -> None:
    """How many GPUs PyTorch sees."""
    import torch

    keep(gpus=torch.cuda.device_count())


def measure_several(
    keep: Keep,
    size: str,
    share: int,
    steps: int,
    processes: int,
    *,
    sharded: bool = False,
    most_gib: float | None = None,
    checkpoint_activations: bool = False,
) -> None:
    """Our network in so many processes, one a GPU, each with `share` images a step.

    Args:
        keep: stores figures.
        size: of the published ones.
        share: images of a process.
        steps: timed.
        processes: one a GPU.
        sharded: each keeps its share of the states only.
        most_gib: what PyTorch may take of each GPU.
        checkpoint_activations: as in `AiM`.
    """
    import torch.multiprocessing

    keep(model=size, processes=processes, images=share * processes)
    how = (sharded, most_gib, checkpoint_activations)
    keep(sharded=sharded, most_gib=most_gib, checkpoint_activations=checkpoint_activations)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rank0.json"
        meeting = f"file://{folder}/meeting"
        arguments = (processes, meeting, str(result), size, share, steps, *how)
        torch.multiprocessing.spawn(one_of_several, arguments, nprocs=processes)
        found = json.loads(result.read_text(encoding="utf-8"))
    found["images_per_second"] *= processes
    found["tflops"] *= processes
    keep(**found)


def one_of_several(
    rank: int,
    processes: int,
    meeting: str,
    result: str,
    size: str,
    share: int,
    steps: int,
    sharded: bool,
    most_gib: float | None,
    checkpoint_activations: bool,
) -> None:
    """One process of `measure_several`; the first writes what it measured."""
    import torch
    import torch.distributed as distributed

    torch.cuda.set_device(rank)
    torch.set_float32_matmul_precision("high")
    if most_gib is not None:
        card = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(most_gib * 2**30 / card)
    if processes > 1:
        distributed.init_process_group(
            "nccl",
            init_method=meeting,
            rank=rank,
            world_size=processes,
            device_id=torch.device("cuda", rank),
        )
    found: dict[str, Any] = {}
    network = our_network(size, checkpoint_activations=checkpoint_activations)
    step = ShardedStep(network, rank) if sharded else our_step(network)
    measure_step(found.update, step, share, steps)
    found["at_once"] = None if step.gradients is None else step.gradients.at_once
    if rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    if processes > 1:
        distributed.destroy_process_group()


class ShardedStep:
    """A step of `aim train model --shard-states` on random codes."""

    def __init__(self, network: Any, rank: int) -> None:
        import torch

        from aim_training.kernels.cross_entropy import cross_entropy
        from aim_training.learner import autocast
        from aim_training.options import ModelTrainingOptions
        from aim_training.sharded_gradients import ShardedGradients
        from aim_training.sharded_learner import ShardedLearner

        device = torch.device("cuda", rank)
        here = Path()
        options = ModelTrainingOptions(data=here, out=here, tokenizer=here, ema_decay=0.9999)
        # What of an Accelerator a learner asks.
        process: Any = SimpleNamespace(device=device, is_main_process=rank == 0)

        def loss(codes: Tensor, classes: Tensor) -> Tensor:
            with autocast(options, device, keeps_casts=False):
                logits = network(codes, classes)
            return cross_entropy(logits, codes)

        self.network = network
        self.learner = ShardedLearner(network, process, options, average=True)
        reserve = self.learner.moments_bytes
        self.gradients = ShardedGradients(network, loss, reserve=reserve, say=click.echo)

    def __call__(self, codes: Tensor, classes: Tensor) -> Tensor:
        """The loss before the step."""
        value = self.gradients(codes, classes)
        self.learner.apply_gradients()
        return value


def measure_published_step(
    keep: Keep, checkout: str, mamba: str, size: str, images: int, steps: int
) -> None:
    """The published network."""
    import importlib.util

    import torch

    torch.set_float32_matmul_precision("high")
    conv = importlib.util.find_spec("causal_conv1d") is not None
    keep(what="published", model=size, images=images, causal_conv1d=conv)
    network = open_gates(published_network(checkout, mamba, **PUBLISHED_CONFIG[size]))
    measure_step(keep, published_step(network), images, steps)


def measure_step(keep: Keep, step: Step | ShardedStep, images: int, steps: int) -> None:
    """Milliseconds, memory and how long the first step takes."""
    import torch
    import triton

    keep(torch=torch.__version__, triton=triton.__version__, gpu=torch.cuda.get_device_name())
    parameters = sum(p.numel() for p in step.network.parameters())
    codes, classes = random_batch(images, 256, 16384, 1000)
    torch.cuda.synchronize()
    started = time.perf_counter()
    first = float(step(codes, classes))
    keep(first_step_s=time.perf_counter() - started, first_loss=first)
    for _ in range(WARM_UP):
        step(codes, classes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    started = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        step(codes, classes)
        mark.record()
    asked = time.perf_counter() - started
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    flops = 6 * parameters * images * 256
    keep(
        parameters=parameters,
        ms_per_step=ms,
        images_per_second=images / ms * 1e3,
        tflops=flops / ms / 1e9,
        host_ms_per_step=asked / steps * 1e3,
        # What PyTorch took of the card: memory of a graph is not counted as allocated.
        peak_gib=torch.cuda.max_memory_reserved() / 2**30,
    )


def measure_tokenizer(keep: Keep, images: int, steps: int, compiled: bool) -> None:
    """A step of `aim train tokenizer` with the published sizes: both networks, no LPIPS."""
    import numpy as np
    import torch
    from PIL import Image

    from aim_training.devices import make_accelerator
    from aim_training.options import TokenizerTrainingOptions
    from aim_training.train_tokenizer import TokenizerTask

    torch.set_float32_matmul_precision("high")
    keep(images=images, compiled=compiled, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures" / "noise"
        pictures.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        for number in range(images):
            Image.fromarray(noise).save(pictures / f"{number}.png")
        options = TokenizerTrainingOptions(
            data=pictures.parent, out=Path(folder) / "run", batch_size=images, compile=compiled
        )
        task = TokenizerTask(options, make_accelerator(options))
    batch = torch.rand(images, 3, 256, 256, device=task.device) * 2 - 1
    batch = batch.contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    task.train_step(1, 1.0, batch)
    torch.cuda.synchronize()
    keep(first_step_s=time.perf_counter() - started)
    for step in range(WARM_UP):
        task.train_step(step + 2, 1.0, batch)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        task.train_step(1, 1.0, batch)
        mark.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    peak = torch.cuda.max_memory_reserved() / 2**30
    keep(ms_per_step=ms, images_per_second=images / ms * 1e3, peak_gib=peak)


def random_batch(images: int, tokens: int, vocabulary: int, classes: int) -> tuple[Tensor, Tensor]:
    """Codes and classes on the GPU."""
    import torch

    draw = torch.Generator("cuda").manual_seed(1)
    codes = torch.randint(vocabulary, (images, tokens), generator=draw, device="cuda")
    return codes, torch.randint(classes, (images,), generator=draw, device="cuda")


def measure_rate(keep: Keep) -> None:
    """The card's rate in large bf16 products, and its copy bandwidth."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = timed(lambda: a @ b)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source))
    keep(bf16_tflops=2 * 8192**3 / ms / 1e9, copy_tb_per_second=2 * source.nbytes / copy_ms / 1e9)


def timed(work: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds."""
    import torch

    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measure_profile(keep: Keep, size: str, images: int) -> None:
    """Where the GPU's time goes in a step, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_float32_matmul_precision("high")
    step = our_step(our_network(size))
    codes, classes = random_batch(images, 256, 16384, 1000)
    for _ in range(3):
        step(codes, classes)
    torch.cuda.synchronize()
    steps = 3
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step(codes, classes)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [
        [e.key[:90], e.count // steps, round(e.self_device_time_total / steps / 1e3, 3)]
        for e in events[:45]
    ]
    total = sum(e.self_device_time_total for e in events) / steps / 1e3
    keep(model=size, images=images, kernel_ms_per_step=total, kernels=rows)


# -- kernels --------------------------------------------------------------------------------------


def measure_errors(keep: Keep) -> None:
    """Outputs and gradients of every kernel against its plain twin in float64."""
    import sys

    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
    from kernel_errors import ERRORS

    for precision, dtype in (
        ("highest", torch.float32),
        ("high", torch.float32),
        ("high", torch.bfloat16),
    ):
        torch.set_float32_matmul_precision(precision)
        for T in (256, 100):
            sizes = {"B": 2, "T": T, "D": 768, "H": 8, "P": 64, "S": 128, "V": 16384}
            key = f"{str(dtype).removeprefix('torch.')} {precision} T={T}"
            keep(**{key: {name: form("cuda", dtype, **sizes) for name, form in ERRORS.items()}})


def measure_kernels(keep: Keep) -> None:
    """Milliseconds of each kernel at AiM-L's sizes with 64 images, and the TB/s of its floor."""
    import torch

    for name, work, floor in kernel_calls():
        ms = kernel_ms(work)
        total = sum(ms.values())
        keep(**{name: {"ms": ms, "floor_tb_per_second": floor / total / 1e9}})
    torch.cuda.synchronize()


def kernel_ms(work: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Milliseconds on the GPU of each kernel that a call starts, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    events = found.key_averages()
    return {e.key[:60]: round(e.self_device_time_total / repeats / 1e3, 4) for e in events}


def measure_variants(keep: Keep) -> None:
    """The kernels with other tiles, warps, stages and register limits: how theirs were chosen."""
    from aim_training.kernels import convolution, dual

    calls = {name: work for name, work, _ in kernel_calls()}

    def one(call: str, kernel: str, options: dict[str, Any], **changes: Any) -> None:
        before = dict(options)
        options.update(changes)
        try:
            ms = kernel_ms(calls[call]).get(kernel)
        except Exception as error:  # a variant that does not compile costs no other
            click.echo(f"{kernel} {changes}: {str(error)[:200]}")
            ms = None
        options.clear()
        options.update(before)
        keep(**{f"{kernel} {changes}": ms})

    for warps, stages, registers in itertools.product((4, 8), (1, 2, 3), (128, 168, 255)):
        changes = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        one("dual forward", "_sums", dual._FORWARD, **changes)
        one("dual backward", "_sums_backward_scores", dual._BACKWARD_SCORES, **changes)
        one("dual backward", "_sums_backward_x", dual._BACKWARD_X, **changes)
    for span, block in itertools.product((32, 64, 128), (64, 128)):
        changes = {"SPAN": span, "BLOCK_X": block}
        one("convolution backward", "_convolve_backward", convolution._BACKWARD, **changes)


def kernel_calls() -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, launch and the bytes that must at least be moved."""
    import torch

    from aim_training.config import PRESETS
    from aim_training.kernels import (
        add_norm,
        convolution,
        cross_entropy,
        decays,
        dual,
        gated_norm,
    )

    cfg, B, T = PRESETS["L"], 64, 256
    H, P, S, X, D = cfg.num_heads, cfg.head_dim, cfg.d_state, cfg.conv_channels, cfg.d_model
    inner, rows = cfg.d_inner, B * T

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    single = torch.float32
    projected, d_projected = normal(B, T, inner + X + H), normal(B, T, inner + X + H)
    z, xbc, raw = projected.split([inner, X, H], -1)
    d_z, d_xbc, d_raw = d_projected.split([inner, X, H], -1)
    taps, bias = normal(X, 4, dtype=single), normal(X, dtype=single)
    weights = [normal(H, dtype=single) - 2 for _ in range(3)]
    read, y, d_y = normal(B, T, X), normal(B, T, inner), normal(B, T, inner)
    norm = normal(inner, dtype=single)
    step = decays.decays_forward(raw, weights[0], weights[1])
    d_step = dual.dual_backward(read, (H, P, S), step, weights[2], d_y)[1]
    sizes = (H, P, S)
    yield (
        "convolution forward",
        lambda: convolution.convolution_forward(xbc, taps, bias),
        rows * X * 4,
    )
    yield (
        "convolution backward",
        lambda: convolution.convolution_backward(xbc, taps, bias, read, d_xbc),
        rows * X * 6,
    )
    yield "decays", lambda: decays.decays_forward(raw, weights[0], weights[1]), rows * H * 10
    yield (
        "dual forward",
        lambda: dual.dual_forward(read, sizes, step, weights[2]),
        rows * (X + inner) * 2,
    )
    yield (
        "dual backward",
        lambda: dual.dual_backward(read, sizes, step, weights[2], d_y),
        rows * (2 * X + inner) * 2,
    )
    yield (
        "decays backward",
        lambda: decays.decays_backward(raw, weights[0], weights[1], step, d_step, d_raw),
        rows * H * 30,
    )
    flat = (y.flatten(0, 1), z.flatten(0, 1), norm)
    yield "gated norm forward", lambda: gated_norm.gated_norm_forward(*flat), rows * inner * 6
    yield (
        "gated norm backward",
        lambda: gated_norm.gated_norm_backward(*flat, d_y.flatten(0, 1), d_z.flatten(0, 1)),
        rows * inner * 10,
    )
    residual = normal(B, T, D, dtype=single).requires_grad_()
    mixed, gate = normal(B, T, D), normal(B, D, dtype=single)
    shift, scale = normal(B, D, dtype=single), normal(B, D, dtype=single)
    weight = normal(D, dtype=single)
    update = add_norm.GatedUpdate(mixed, gate)

    def both() -> tuple[Tensor, Tensor]:
        return add_norm.add_norm(residual, update, weight, (shift, scale), torch.bfloat16)

    yield "add norm forward", both, rows * D * 12
    out = both()
    pulls = [torch.randn_like(o) for o in out]
    yield (
        "add norm backward",
        lambda: torch.autograd.grad(out, residual, pulls, retain_graph=True),
        rows * D * 18,
    )
    logits = normal(rows, cfg.vocab_size).requires_grad_()
    targets = torch.randint(cfg.vocab_size, (rows,), device="cuda")
    yield (
        "cross-entropy both ways",
        lambda: torch.autograd.grad(cross_entropy.cross_entropy(logits, targets), logits),
        rows * cfg.vocab_size * 6,
    )


# -- curves ---------------------------------------------------------------------------------------


def measure_curves(keep: Keep, checkout: str, mamba: str, precision: str, steps: int) -> None:
    """Losses of ours and of the published network, from the same weights over the same batches.

    In float32 a small geometry with exact products; in bf16 twelve of AiM-B's layers; 16 images.
    """
    exact = precision == "float32"
    # Triton's own default for float32 products is TF32, in mamba-ssm's kernels too; three of them
    # make float32, and compile faster than sums without tensor cores.
    os.environ["TRITON_F32_DEFAULT"] = "tf32x3"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # one tile a kernel instead of minutes of choosing
    import torch

    from aim_training.config import PRESETS, ModelConfig
    from aim_training.model import AiM

    torch.set_float32_matmul_precision("highest" if exact else "high")
    config = ModelConfig(**SMALL) if exact else replace(PRESETS["B"], num_layers=12)
    torch.manual_seed(0)
    start = open_gates(AiM(config).cuda().initialise()).state_dict()
    head = {"lm_head.weight": start["backbone.embeddings.word_embeddings.weight"]}
    theirs = published_network(
        checkout,
        mamba,
        d_model=config.d_model,
        n_layer=config.num_layers,
        vocab_size=config.vocab_size,
        num_classes=config.num_classes,
        num_tokens=config.num_tokens,
    )
    theirs.backbone.cls_embed.dropout_prob = 0.0  # no classes lost at random
    curves = {}
    for name in ("ours", "published", "ours, other order"):
        if name == "published":
            theirs.load_state_dict(start | head)
            step = published_step(theirs, not exact)
        else:
            network = AiM(config).cuda()
            network.load_state_dict(start)
            step = our_step(network, not exact)
        images = 16
        losses = []
        for index in range(steps):
            codes, classes = pattern(index, images, config)
            if name == "ours, other order":  # the same mathematics, sums in another order
                codes, classes = codes.flip(0), classes.flip(0)
            losses.append(step(codes, classes))
        curves[name] = torch.stack(losses).double()
        keep(**{name: [round(v, 6) for v in curves[name].tolist()[:: steps // 20]]})
    difference = (curves["ours"] - curves["published"]).abs()
    noise = (curves["ours"] - curves["ours, other order"]).abs()
    keep(
        precision=precision,
        steps=steps,
        largest_difference=float(difference.max()),
        largest_relative_difference=float((difference / curves["published"]).max()),
        mean_difference_last_50=float((curves["ours"] - curves["published"])[-50:].mean()),
        largest_noise=float(noise.max()),
        mean_noise_last_50=float((curves["ours"] - curves["ours, other order"])[-50:].mean()),
        first_loss=float(curves["ours"][0]),
        last_loss=float(curves["ours"][-1]),
    )


def pattern(index: int, images: int, config: Any) -> tuple[Tensor, Tensor]:
    """A batch that can be learned: codes that walk by the class, with noise."""
    import torch

    draw = torch.Generator("cuda").manual_seed(index)
    classes = torch.randint(10, (images,), generator=draw, device="cuda")
    time_ = torch.arange(config.num_tokens, device="cuda")
    walk = (classes[:, None] * 37 + time_ * (1 + classes[:, None])) % 64
    noise = torch.randint(16, walk.shape, generator=draw, device="cuda")
    shown = torch.rand(walk.shape, generator=draw, device="cuda") < 0.8
    return torch.where(shown, walk, noise) % config.vocab_size, classes


if __name__ == "__main__":
    main()
