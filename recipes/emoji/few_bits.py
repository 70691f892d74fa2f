"""Trains an emoji model to have weights of few bits, from itself alone: the box's last step.

    python recipes/emoji/few_bits.py BUNDLE OUT

The model of BUNDLE teaches one whose weights are on a grid (`aim_training.fake_quantization`). Both
read codes that the teacher draws, and the student learns its probabilities, so that no picture is
needed (data-free distillation, arXiv 2305.17888). The decoder's convolutions follow in the same
way, picture by picture.

Letters: N images, T tokens of each, V codes.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from box_weights import bundle_networks
from torch import Tensor, nn

from aim_runtime import Bundle
from aim_training.batch_gradients import BatchGradients
from aim_training.checkpoint import save_checkpoint
from aim_training.ema import Ema
from aim_training.fake_quantization import (
    plain_model,
    plain_state,
    round_decoder,
    round_model,
)
from aim_training.model import AiM
from aim_training.sampling import sample
from aim_training.tokenizer import VQTokenizer

GUIDANCE = 4.0
"""What the model in the box draws with unless asked otherwise."""
_EMA_DECAY = 0.99
_SIZE_WEIGHT = 0.05  # of the model's student
_WARM_UP = 100
_DRAWN_AT_ONCE = 1024
_HELD_OUT_SEED, _HELD_OUT_AT_ONCE = 1 << 20, 16

_SOME, _MINUTES = click.IntRange(min=2), click.FloatRange(min=0, min_open=True)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How long and how fast a student learns.

    Attributes:
        bits: of its weights.
        minutes: of training; the learning rate falls to zero in them, or in `steps`.
        steps: at most.
        batch: images a step.
        rate: peak learning rate.
        held_out: draws that it is judged by, of the teacher too; a decoder by half as many.
        size_weight: nats that a bit of every weight is worth; above 0, steps grow as far as the
            probabilities let them, and what is stored compresses to less.
    """

    bits: int
    minutes: float
    steps: int
    batch: int
    rate: float
    held_out: int
    size_weight: float = 0.0


@dataclass
class Lesson:
    """What a student was seen to do, as JSON values."""

    name: str
    plan: Plan
    rows: list[dict[str, float]] = field(default_factory=list)

    def note(self, say: Say, **values: float) -> None:
        """Keep and tell a row."""
        self.rows.append(values)
        told = ", ".join(f"{key} {value:.5g}" for key, value in values.items())
        say(f"{self.name} of {self.plan.bits} bits: {told}")


@torch.no_grad()
def draw(model: AiM, images: int, guidance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (N, T) that a model draws and their classes (N,), all classes alike."""
    device = model.backbone.norm_f.weight.device
    classes = torch.arange(images, device=device) % model.config.num_classes
    parts = classes.split(_DRAWN_AT_ONCE)
    drawn = [sample(model, part, guidance, seed + index) for index, part in enumerate(parts)]
    return torch.cat(drawn), classes


def draw_both_ways(model: AiM, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same, half of them without guidance and half with it."""
    halves = [draw(model, images // 2, g, seed + int(g)) for g in (1.0, GUIDANCE)]
    codes, classes = zip(*halves, strict=True)
    return torch.cat(codes), torch.cat(classes)


def both_scores(model: AiM, codes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N, T, V) float32 given the class, and without one."""
    unknown = torch.full_like(classes, model.config.num_classes)
    scores = model(codes.repeat(2, 1), torch.cat([classes, unknown])).float()
    known, without = scores.chunk(2)
    return known, without


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Kullback-Leibler divergence of scores (N, T, V), mean over the places, nats."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1).mean()


def guided(known: Tensor, without: Tensor) -> Tensor:
    """Scores under classifier-free guidance."""
    return without + GUIDANCE * (known - without)


def mean_bits(network: nn.Module) -> Tensor:
    """Bits of a weight as far as steps decide them: minus their logarithm, mean over weights."""
    sums = [grid.log_step.sum() * (weight.numel() / len(weight)) for grid, weight in _on(network)]
    count = sum(weight.numel() for _, weight in _on(network))
    return -torch.stack(sums).sum() / (count * math.log(2))


def _on(network: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Every grid of a network with the weight before rounding."""
    for module in network.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            yield module[0], module.original


@torch.no_grad()
def entropy(network: nn.Module) -> float:
    """Bits a rounded weight of an ideal code for each matrix: about what Brotli makes of it."""
    bits, count = 0.0, 0
    for grid, weight in _on(network):
        steps = grid.steps().view(-1, *(1,) * (weight.dim() - 1))
        levels = (weight / steps).clamp(-grid.levels, grid.levels).round().long() + grid.levels
        share = torch.bincount(levels.flatten()).double() / weight.numel()
        bits += weight.numel() * float(-(share * share.clamp(min=1e-30).log2()).sum())
        count += weight.numel()
    return bits / max(count, 1)


class ModelLesson:
    """The model's student: probabilities given the class, without, and of both together."""

    name = "model"

    def __init__(self, teacher: AiM, codes: Tensor, classes: Tensor, plan: Plan) -> None:
        self.teacher, self.data, self.plan = teacher, (codes, classes), plan
        self.student = copy.deepcopy(teacher).train().requires_grad_(True)
        round_model(self.student, plan.bits)
        seed = _HELD_OUT_SEED
        self.held_out = draw_both_ways(teacher, plan.held_out, seed)

    def loss(self, codes: Tensor, classes: Tensor) -> Tensor:
        """To learn by: a scalar."""
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=codes.is_cuda):
            with torch.no_grad():
                wanted = both_scores(self.teacher, codes, classes)
            found = both_scores(self.student, codes, classes)
        apart = sum(divergence(*pair) for pair in zip(wanted, found, strict=True))
        apart = apart + divergence(guided(*wanted), guided(*found))
        return apart + self.plan.size_weight * mean_bits(self.student)

    @torch.no_grad()
    def judge(self, student: AiM) -> dict[str, float]:
        """Divergences on held-out draws in float32, nats, and how often the best code is one."""
        sums = dict.fromkeys(("known", "without", "guided", "best"), 0.0)
        parts = list(zip(*(part.split(_HELD_OUT_AT_ONCE) for part in self.held_out), strict=True))
        for codes, classes in parts:
            wanted = both_scores(self.teacher, codes, classes)
            found = both_scores(student, codes, classes)
            ours, theirs = guided(*found), guided(*wanted)
            sums["known"] += float(divergence(wanted[0], found[0]))
            sums["without"] += float(divergence(wanted[1], found[1]))
            sums["guided"] += float(divergence(theirs, ours))
            sums["best"] += float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        return {key: value / len(parts) for key, value in sums.items()}


class DecoderLesson:
    """The decoder's student: the same pixels of the same codes."""

    name = "decoder"

    def __init__(self, teacher: VQTokenizer, codes: Tensor, plan: Plan) -> None:
        held_out = plan.held_out // 2
        self.teacher, self.plan = teacher, plan
        self.data, self.held_out = (codes[held_out:],), codes[:held_out]
        self.student = copy.deepcopy(teacher).requires_grad_(False)
        self.student.decoder.requires_grad_(True)
        round_decoder(self.student, plan.bits)

    def loss(self, codes: Tensor) -> Tensor:
        """Mean absolute and squared difference of the pixels, which are -1 to 1."""
        with torch.no_grad():
            wanted = self.teacher.decode(codes).clamp(-1, 1)
        found = self.student.decode(codes)
        size = self.plan.size_weight * mean_bits(self.student)
        return F.l1_loss(found, wanted) + 4 * F.mse_loss(found, wanted) + size

    @torch.no_grad()
    def judge(self, student: VQTokenizer) -> dict[str, float]:
        """PSNR of held-out pictures in dB, the mean over them."""
        found = []
        for codes in self.held_out.split(_HELD_OUT_AT_ONCE):
            apart = self.teacher.decode(codes).clamp(-1, 1) - student.decode(codes).clamp(-1, 1)
            found.append(-10 * (apart.square().flatten(1).mean(1) / 4).clamp(min=1e-12).log10())
        return {"psnr_db": float(torch.cat(found).mean())}


def teach(lesson: ModelLesson | DecoderLesson, say: Say) -> tuple[nn.Module, Lesson]:
    """Train a lesson's student; returns its average, on the grid, and what was seen."""
    plan, student = lesson.plan, lesson.student
    record = Lesson(lesson.name, plan)
    before = lesson.judge(lesson.student.eval())  # type: ignore[arg-type]
    record.note(say, step=0, entropy=entropy(student), **before)
    student.train()
    average = Ema(student, _EMA_DECAY)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=trained[0].is_cuda
    )
    gradients = BatchGradients(student, lesson.loss, at_once=plan.batch)
    generator = torch.Generator().manual_seed(plan.bits)
    started, reported, progress = time.monotonic(), 0.0, 0.0
    for step in range(plan.steps):
        chosen = torch.randint(len(lesson.data[0]), (plan.batch,), generator=generator)
        chosen = chosen.to(lesson.data[0].device)
        loss = gradients(*(part[chosen] for part in lesson.data))
        if step == 0:
            started = time.monotonic()  # kernels are compiled and recorded by now
        nn.utils.clip_grad_norm_(trained, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = plan.rate * cosine * min(1, (step + 1) / _WARM_UP)
        optimizer.step()
        average.update(student)
        if step % 10 == 9 or step + 1 == plan.steps:
            value = float(loss)  # waits for the device
            seconds = time.monotonic() - started
            progress = min(1.0, max((step + 1) / plan.steps, seconds / (60 * plan.minutes)))
            if not math.isfinite(value):
                raise click.ClickException(f"the {lesson.name}'s loss is {value} at step {step}")
            if progress >= reported + 0.125 or progress >= 1:
                reported = progress
                judged = lesson.judge(average.module)  # type: ignore[arg-type]
                bits = entropy(average.module)
                record.note(say, step=step + 1, s=seconds, loss=value, entropy=bits, **judged)
            if progress >= 1:
                break
    return average.module, record


def write_record(records: list[Lesson], path: Path) -> None:
    """All that was seen, as JSON."""
    values = [{"name": r.name, **vars(r.plan), "rows": r.rows} for r in records]
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model-bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--decoder-bits", default=4, show_default=True, type=click.IntRange(2, 8))
@click.option("--model-minutes", default=7.2, show_default=True, type=_MINUTES)
@click.option("--decoder-minutes", default=2.5, show_default=True, type=_MINUTES)
@click.option(
    "--steps",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="At most, of each.",
)
@click.option("--batch", default=128, show_default=True, type=_SOME, help="Of the decoder: half.")
@click.option("--images", default=8192, show_default=True, type=_SOME, help="To learn from.")
@click.option(
    "--held-out", default=128, show_default=True, type=_SOME, help="That it is judged by."
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(
    bundle: Path,
    out: Path,
    model_bits: int,
    decoder_bits: int,
    model_minutes: float,
    decoder_minutes: float,
    steps: int,
    batch: int,
    images: int,
    held_out: int,
    device: str,
) -> None:
    """Teach a student of BUNDLE, an export in half precision of a model of train.sh.

    Writes OUT/model.safetensors, a checkpoint to export, and OUT/lessons.json.
    """
    if images // 2 * 2 <= held_out // 2:
        raise click.UsageError(f"--images is {images}; the decoder needs more than --held-out / 2")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no GPU is found; with --device cpu a step takes minutes")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    names = Bundle.open(bundle).manifest.class_names
    model, tokenizer = bundle_networks(bundle)
    model.to(device).requires_grad_(False)
    tokenizer.to(device).requires_grad_(False)
    codes, classes = draw_both_ways(model, images, 0)
    plan = Plan(model_bits, model_minutes, steps, batch, 5e-4, held_out, _SIZE_WEIGHT)
    student, seen = teach(ModelLesson(model, codes, classes, plan), click.echo)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(device)
    plan = Plan(decoder_bits, decoder_minutes, steps, max(1, batch // 2), 3e-4, held_out)
    drawer, watched = teach(DecoderLesson(tokenizer, codes[order], plan), click.echo)
    tokenizer.load_state_dict(plain_state(drawer))
    assert isinstance(student, AiM)
    side = math.isqrt(model.config.num_tokens) * tokenizer.config.downsampling
    metadata = {"class_names": list(names), "image_size": side}
    save_checkpoint(out / "model.safetensors", plain_model(student), tokenizer, metadata)
    write_record([seen, watched], out / "lessons.json")


if __name__ == "__main__":
    main()
