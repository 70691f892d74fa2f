"""Trains AiM on the codes of a folder of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from aim_training.batch_gradients import BatchGradients
from aim_training.checkpoint import load_checkpoint, save_checkpoint
from aim_training.code_files import Codes
from aim_training.codes import CodeRequest, Processes, cached_codes, weights_digest
from aim_training.config import PRESETS, ModelConfig
from aim_training.data import BadImages, BatchOrder, Crop
from aim_training.dataset import training_images
from aim_training.devices import make_accelerator
from aim_training.errors import TrainingError, explained, options_that_fit
from aim_training.fake_quantization import plain_model, round_model
from aim_training.initial import MODEL_PARTS, begin_model, freeze, start
from aim_training.kernels.cross_entropy import cross_entropy
from aim_training.learner import Learner, autocast
from aim_training.loop import train
from aim_training.model import AiM
from aim_training.options import ModelTrainingOptions, recipe, versions
from aim_training.pictures import contact_sheet
from aim_training.run_folder import run_folder
from aim_training.sampling import sample
from aim_training.saves import Saves
from aim_training.task import Judge, Task, at
from aim_training.tokenizer import VQTokenizer, channels_last

if TYPE_CHECKING:
    from aim_training.sharded_gradients import ShardedGradients

# Sizes that a laptop without a GPU trains in an hour or so, over any codes and classes.
_SMALL = {"d_model": 256, "num_layers": 8, "d_state": 64, "head_dim": 64, "adaln_groups": 2}
_SMALLER = (
    "--checkpoint-activations, a smaller --micro-batch, --batch-size or --size, a smaller network "
    "(--preset small, --d-model, --layers), a smaller --resident-limit-mb"
)
# Codes that stay on the device at most, bytes; larger ones are read from the disk.
_RESIDENT_BYTES = 8 * 2**30


def train_model(options: ModelTrainingOptions) -> Path:
    """Train a model, resuming where the run folder holds a checkpoint.

    Returns:
        `RUN/model.safetensors`: the averaged weights and the tokenizer.

    Raises:
        CheckpointError: the tokenizer cannot be read.
        DataError: the images cannot be used.
        TrainingError: the options do not fit, the run folder holds another run or cannot be
            written, or training diverged.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was written.
    """
    # The state-space sums run in float32 even under bf16; TF32 is precise enough for training.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with explained(_SMALLER):
            accelerator = make_accelerator(options)
            _check_shards(options, accelerator)
            folders = (options.data, options.val_data)
            with run_folder(options.out, *folders, main=accelerator.is_main_process):
                torch.manual_seed(options.seed)
                return train(ModelTask(options, accelerator), options, accelerator)
    finally:
        torch.set_float32_matmul_precision(precision)


def model_config(
    options: ModelTrainingOptions, vocab_size: int, num_classes: int, num_tokens: int
) -> ModelConfig:
    """The geometry that the options ask for, over these codes and classes.

    Raises:
        ValueError: impossible.
    """
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "num_tokens": num_tokens}
    if options.preset == "small":
        return ModelConfig(**sizes, **_SMALL)
    if options.preset is not None:
        return replace(PRESETS[options.preset], **sizes)
    return ModelConfig(
        **sizes,
        d_model=options.d_model,
        num_layers=options.layers,
        d_state=options.d_state,
        head_dim=options.head_dim,
        adaln_groups=options.adaln_groups,
    )


def _check_shards(options: ModelTrainingOptions, accelerator: Accelerator) -> None:
    if options.shard_states and accelerator.num_processes == 1:
        raise TrainingError(
            "shard_states is True, and one process has nobody to share with; start several, one a "
            "GPU (torchrun --nproc-per-node N -m aim_cli train model ...), or leave it out"
        )
    on_cpu = accelerator.device.type == "cpu"
    if options.shard_states and on_cpu and not hasattr(torch.cpu.Stream, "record_event"):
        raise TrainingError(
            "shard_states is True, which without a GPU takes a newer PyTorch than "
            f"{torch.__version__}; upgrade it, or leave it out"
        )


def _ways(
    options: ModelTrainingOptions,
) -> tuple[type[Learner[AiM]], type[BatchGradients | ShardedGradients]]:
    """How the network is kept, and how its gradients are computed."""
    if not options.shard_states:
        return Learner, BatchGradients
    from aim_training.sharded_gradients import ShardedGradients
    from aim_training.sharded_learner import ShardedLearner

    return ShardedLearner, ShardedGradients


class CodeBatch(NamedTuple):
    """Codes (B, T) int64 and classes (B,) int64, some of them C: "no class"."""

    codes: Tensor
    classes: Tensor


class ModelTask(Task):
    """Next-code prediction."""

    def __init__(self, options: ModelTrainingOptions, accelerator: Accelerator) -> None:
        self.options = options
        self.accelerator = accelerator
        self.device = accelerator.device
        self.bad_images = BadImages.of_run(
            options.bad_images, options.out, quiet=not accelerator.is_main_process
        )
        self.start = start(options.init, "model", options.out, self.bad_images.say)
        tokenizer = self._tokenizer()
        factor = tokenizer.config.downsampling
        if options.size % factor:
            raise TrainingError(
                f"size is {options.size}; a token of this tokenizer covers {factor} pixels, so it "
                f"must be a multiple of {factor}"
            )
        self.tokenizer: VQTokenizer = channels_last(tokenizer.to(self.device))
        # Part of every checkpoint's fingerprint, and the tokenizer never changes: hashed once.
        self.tokenizer_sha256 = weights_digest(self.tokenizer)
        self.tokenizer.requires_grad_(False)
        # The main process indexes shards; the others then find its indices.
        with accelerator.main_process_first():
            self.folder, self.held_out_folder = training_images(
                options, self.bad_images.say, quiet=not accelerator.is_main_process
            )
        with options_that_fit():
            tokens = (options.size // factor) ** 2
            network = self._network(tokenizer.config.codebook_size, tokens)
            if options.weight_bits is not None:
                round_model(network, options.weight_bits)
            freeze(network, options.freeze, MODEL_PARTS)
            self.order = BatchOrder(
                len(self.folder),
                options.batch_size,
                options.seed,
                accelerator.process_index,
                accelerator.num_processes,
            )
        self.judge = Judge("bits_per_token", "lower")
        self.smaller = _SMALLER
        self.held_out: CodeBatch | None = None
        self.resident: Tensor | None = None
        self.labels = torch.from_numpy(self.folder.labels).to(self.device)
        learner, gradients = _ways(options)
        self.model = learner(network, accelerator, options, average=True)
        self.learners = {"model": self.model}
        self.share = max(1, options.batch_size // accelerator.num_processes)
        if options.micro_batch and self.share % options.micro_batch:
            raise TrainingError(
                f"micro_batch is {options.micro_batch}; it must divide the {self.share} images of "
                "a step that a process computes"
            )
        self.gradients = gradients(
            network,
            self._loss,
            at_once=options.micro_batch,
            reserve=self.model.moments_bytes,
            say=self.bad_images.say,
        )

    def _tokenizer(self) -> VQTokenizer:
        """That of the options or, left out, of the weights to start from."""
        path = self.options.tokenizer or self.options.init
        assert path is not None
        if self.options.tokenizer is None and self.start.checkpoint is not None:
            checkpoint = self.start.checkpoint
        else:
            if not path.exists() and self._goes_on():
                self.bad_images.say(f"{path.name} is gone; its tokenizer is in {self.path} too.")
                path = self.path
            checkpoint = load_checkpoint(path)
        if checkpoint.tokenizer is None:
            if self.options.tokenizer is None:
                raise TrainingError(
                    f"{path} holds a model without its tokenizer; give the one whose codes it was "
                    "trained on as --tokenizer"
                )
            raise TrainingError(
                f"{path} holds no tokenizer; expected what `aim train tokenizer` wrote, or a "
                "published tokenizer"
            )
        return checkpoint.tokenizer

    def _goes_on(self) -> bool:
        """Whether the run has a checkpoint, and so weights with the tokenizer beside it."""
        return (
            self.path.exists()
            and Saves(self.options.out, mapped=True).fingerprint("model") is not None
        )

    def _network(self, codes: int, tokens: int) -> AiM:
        """A new network, or one with the weights to start from."""
        options, classes = self.options, self.folder.class_names
        again = options.checkpoint_activations
        if self.start.checkpoint is None:
            if self.start.geometry is None:
                config = model_config(options, codes, len(classes), tokens)
            else:
                config = ModelConfig(**self.start.geometry)
            return AiM(config, options.dropout, checkpoint_activations=again).initialise()
        begun = begin_model(
            self.start.checkpoint,
            self.tokenizer,
            classes,
            tokens,
            relearn_codes=options.relearn_codes,
            dropout=options.dropout,
            checkpoint_activations=again,
        )
        self.bad_images.say(begun.line)
        return begun.network

    def prepare(self) -> None:
        """Encode the images, or take their codes from the cache."""
        options = self.options
        crop = Crop(options.size, options.resize_factor, options.flip)
        at_once = min(64, self.at_once(self.share))
        ten_crop = options.crops == "ten-crop"
        request = CodeRequest(
            self.folder,
            replace(crop, square=ten_crop),
            versions(options),
            options.seed,
            at_once,
            ten_crop,
        )
        self.codes = self._codes("train", request)
        if self.held_out_folder is not None:
            codes = self._codes("val", CodeRequest(self.held_out_folder, crop, 0, 0, at_once))
            self.held_out = CodeBatch(
                torch.from_numpy(codes[0].astype(np.int64)),
                torch.from_numpy(self.held_out_folder.labels),
            )
        if self.codes.nbytes <= _RESIDENT_BYTES:
            # PyTorch gathers no uint16, so the bits travel as int16.
            signed = np.array(self.codes).view(f"i{self.codes.dtype.itemsize}")
            self.resident = torch.from_numpy(signed).to(self.device)  # (variants, images, T)

    def _codes(self, name: str, request: CodeRequest) -> Codes:
        cache = self.options.cache or self.options.out / "codes"
        ours = self.accelerator
        return cached_codes(
            cache / f"{name}.npy",
            request,
            self.tokenizer,
            self.device,
            workers=self.options.workers,
            resident_limit_mb=self.options.resident_limit_mb,
            bad_images=self.bad_images,
            tokenizer_sha256=self.tokenizer_sha256,
            quiet=not ours.is_main_process,
            processes=Processes(ours.process_index, ours.num_processes, ours.wait_for_everyone),
        )

    def batches(self, first: int, last: int) -> Iterator[CodeBatch]:
        """A random variant of every image; some lose their class."""
        unknown = len(self.folder.class_names)
        for step in range(first, last):
            draws = self.order.batch(step)
            variant = (draws.uniform[:, 0] * len(self.codes)).astype(np.int64)
            dropped = draws.uniform[:, 1] < self.options.class_dropout
            chosen = self._to_device(np.stack([variant, draws.index, dropped]))  # (3, B)
            if self.resident is not None:
                codes = self.resident[chosen[0], chosen[1]].long()
                if self.codes.dtype == np.uint16:
                    codes = codes & 0xFFFF
            else:
                codes = self._to_device(self.codes[variant, draws.index].astype(np.int64))
            classes = torch.where(chosen[2].bool(), unknown, self.labels[chosen[1]])
            yield CodeBatch(codes, classes)

    def at_once(self, images: int) -> int:
        """Those of a part, see `BatchGradients`."""
        return min(self.gradients.at_once or images, images)

    def compute_in_parts(self, most: int) -> int | None:
        """The largest part that is no larger and divides a process's images."""
        if self.options.micro_batch is not None:
            return None
        divides = (size for size in range(most, 0, -1) if self.share % size == 0)
        self.gradients.at_once = next(divides)
        return self.gradients.at_once

    def flops_per_image(self) -> float:
        """Six a parameter and token, as for any network of matrix products."""
        weights = sum(parameter.numel() for parameter in self.model.network.parameters())
        return 6.0 * weights * self.model.network.config.num_tokens

    def blank(self, count: int) -> CodeBatch:
        """The first code everywhere, of the first class."""
        codes = torch.zeros(
            count, self.model.network.config.num_tokens, dtype=torch.int64, device=self.device
        )
        return CodeBatch(codes, codes[:, 0])

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def train_step(self, step: int, progress: float, batch: CodeBatch) -> dict[str, Tensor]:
        """Cross-entropy over all T tokens."""
        loss = self.gradients(batch.codes, batch.classes)
        norm = self.model.apply_gradients()
        return {
            "loss": loss,
            "bits_per_token": loss / math.log(2),
            "gradient_norm": norm.detach(),
        }

    def _loss(self, codes: Tensor, classes: Tensor) -> Tensor:
        # Casts of weights in shards would be a whole copy of them.
        with autocast(self.options, self.device, keeps_casts=not self.options.shard_states):
            logits = self.model.network(codes, classes)  # (B, T, V)
        return cross_entropy(logits, codes)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Bits a token of the held-out images given their class, and without it."""
        if self.held_out is None:
            return {}
        model = self.model.averaged
        share = self.at_once(self.share)
        known = unknown = 0.0
        parts = zip(*(part.split(share) for part in self.held_out), strict=True)
        for codes, classes in parts:
            codes, classes = codes.to(self.device), classes.to(self.device)
            no_class = torch.full_like(classes, model.config.num_classes)
            known += self._bits(model, codes, classes)
            unknown += self._bits(model, codes, no_class)
        tokens = self.held_out.codes.numel()
        return {"bits_per_token": known / tokens, "bits_per_token_no_class": unknown / tokens}

    def _bits(self, model: AiM, codes: Tensor, classes: Tensor) -> float:
        with autocast(self.options, self.device):
            logits = model(codes, classes)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="sum")
        return float(nats) / math.log(2)

    @torch.no_grad()
    def picture(self) -> Image.Image:
        """Images of classes spread over all, drawn with guidance."""
        model, count = self.model.averaged, self.options.sample_count
        share = self.at_once(self.share)
        spread = torch.linspace(0, model.config.num_classes - 1, count, device=self.device)
        classes = spread.round().long()
        names = [self.folder.class_names[index] for index in classes.tolist()]
        codes = sample(model, classes, self.options.sample_guidance, seed=0)
        images = torch.cat([self.tokenizer.decode(part) for part in codes.split(share)])
        return contact_sheet(images, math.ceil(math.sqrt(count)), names)

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "kind": "model",
            "geometry": self.model.network.config.to_dict(),
            "init": self.start.mark,
            "seed": self.options.seed,
            "variants": versions(self.options),
            "class_names": list(self.folder.class_names),
            "data_digest": self.folder.digest,
            "tokenizer_sha256": self.tokenizer_sha256,
            "weight_bits": self.options.weight_bits,
        }

    def remark(self) -> str | None:
        """How many images could not be read."""
        return self.bad_images.remark()

    def held_out_digest(self) -> str | None:
        """That of the held-out images' names and contents."""
        return None if self.held_out_folder is None else self.held_out_folder.digest

    def averaged(self) -> AiM:
        """The averaged model."""
        return self.model.averaged

    @property
    def path(self) -> Path:
        """`RUN/model.safetensors`."""
        return self.options.out / "model.safetensors"

    def export(self, weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]) -> None:
        """Write the model and its tokenizer, as the published files have them."""
        metadata = {
            "class_names": list(self.folder.class_names),
            "training": recipe(self.options) | dict(facts),
            "image_size": self.options.size,
            "data_digest": self.folder.digest,
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        model = plain_model(at(self.averaged(), weights))
        save_checkpoint(self.path, model, self.tokenizer, metadata)
