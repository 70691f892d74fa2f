"""Trains the VQ tokenizer on a folder of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor
from torch.nn.grad import conv2d_weight

from aim_training.checkpoint import save_checkpoint
from aim_training.config import TokenizerConfig
from aim_training.data import (
    BadImages,
    BatchOrder,
    Crop,
    ImageSet,
    ImageSource,
    centre_draws,
    open_images,
)
from aim_training.dataset import training_images
from aim_training.devices import make_accelerator
from aim_training.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    feature_loss,
    generator_loss,
)
from aim_training.divergence import check_drawn
from aim_training.errors import explained, options_that_fit
from aim_training.initial import TOKENIZER_PARTS, freeze, start
from aim_training.learner import Learner, autocast
from aim_training.loop import train
from aim_training.losses import edge_loss, load_perceptual, pixel_loss
from aim_training.options import TokenizerTrainingOptions, recipe
from aim_training.pictures import contact_sheet
from aim_training.run_folder import run_folder
from aim_training.task import Judge, Task, at
from aim_training.tokenizer import TokenizerOutput, VQTokenizer, channels_last

# What a laptop without a GPU trains in an hour or so at 64 to 128 pixels.
SMALL = TokenizerConfig(
    codebook_size=1024,
    channels=32,
    channel_multipliers=(1, 2, 2, 4),
    z_channels=64,
    encoder_blocks=1,
    decoder_blocks=1,
)
_SMALLER = (
    "a smaller --batch-size or --size, a smaller network (--preset small, --channels), "
    "--discriminator-weight 0, a smaller --resident-limit-mb"
)
# Images that an evaluation looks at, at most; and those in a sample picture.
_EVALUATED = 1024
_SHOWN = 24
# Fraction of the training after which the codebook is left to settle.
_REVIVED_UNTIL = 0.8


def train_tokenizer(options: TokenizerTrainingOptions) -> Path:
    """Train a tokenizer, resuming where the run folder holds a checkpoint.

    Returns:
        `RUN/tokenizer.safetensors`, the averaged weights.

    Raises:
        DataError: the images cannot be used.
        TrainingError: the options do not fit, the run folder holds another run or cannot be
            written, or training diverged.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was written.
    """
    with explained(_SMALLER):
        accelerator = make_accelerator(options)
        folders = (options.data, options.val_data)
        with run_folder(options.out, *folders, main=accelerator.is_main_process):
            torch.manual_seed(options.seed)
            return train(TokenizerTask(options, accelerator), options, accelerator)


def tokenizer_config(options: TokenizerTrainingOptions) -> TokenizerConfig:
    """The geometry that the options ask for.

    Raises:
        ValueError: impossible, or the image size is no multiple of the downsampling.
    """
    config = SMALL if options.preset == "small" else _chosen(options)
    check_size(options.size, config)
    return config


def check_size(size: int, config: TokenizerConfig) -> None:
    """Raise ValueError unless images of `size` pixels are a whole number of tokens."""
    if size % config.downsampling:
        raise ValueError(
            f"size is {size}; with {len(config.channel_multipliers)} levels it must be a "
            f"multiple of {config.downsampling}"
        )


def _chosen(options: TokenizerTrainingOptions) -> TokenizerConfig:
    return TokenizerConfig(
        codebook_size=options.codebook_size,
        codebook_dim=options.codebook_dim,
        channels=options.channels,
        channel_multipliers=options.channel_multipliers,
        z_channels=options.z_channels,
        encoder_blocks=options.encoder_blocks,
        decoder_blocks=options.decoder_blocks,
    )


class TokenizerTask(Task):
    """Autoencoder against discriminator."""

    def __init__(self, options: TokenizerTrainingOptions, accelerator: Accelerator) -> None:
        self.options = options
        self.accelerator = accelerator
        self.device = accelerator.device
        self.bad_images = BadImages.of_run(
            options.bad_images, options.out, quiet=not accelerator.is_main_process
        )
        # The main process indexes shards; the others then find its indices.
        with accelerator.main_process_first():
            self.folder, self.held_out_folder = training_images(
                options, self.bad_images.say, quiet=not accelerator.is_main_process
            )
        tokenizer = channels_last(self._network())
        config = tokenizer.config
        with options_that_fit():
            freeze(tokenizer, options.freeze, TOKENIZER_PARTS)
            self.order = BatchOrder(
                len(self.folder),
                options.batch_size,
                options.seed,
                accelerator.process_index,
                accelerator.num_processes,
            )
        self.share = options.batch_size // accelerator.num_processes
        # PSNR falls when the discriminator joins, for the sake of sharpness.
        self.judge = Judge("psnr_db", "higher", trusted=not options.discriminator_weight)
        self.smaller = _SMALLER
        self.held_out: ImageSource | None = None
        self.held_out_count = 0
        self.tokenizer = Learner(tokenizer, accelerator, options, average=True)
        self.learners = {"tokenizer": self.tokenizer}
        self.discriminator: Learner[PatchDiscriminator] | None = None
        if options.discriminator_weight:
            network = channels_last(PatchDiscriminator())
            self.discriminator = Learner(network, accelerator, options, average=False)
            self.learners["discriminator"] = self.discriminator
        self.perceptual, line = load_perceptual(self.device)
        accelerator.print(line)
        # How often each code was used since the last log line, and since the last revival.
        self.logged_use = torch.zeros(config.codebook_size, device=self.device)
        self.revival_use = torch.zeros_like(self.logged_use)

    def _network(self) -> VQTokenizer:
        """A new tokenizer, or the one to start from."""
        options = self.options
        self.start = start(options.init, "tokenizer", options.out, self.bad_images.say)
        if self.start.geometry is not None:
            geometry = dict(self.start.geometry)
            geometry["channel_multipliers"] = tuple(geometry["channel_multipliers"])
            with options_that_fit():
                return VQTokenizer(TokenizerConfig(**geometry))
        checkpoint = self.start.checkpoint
        if checkpoint is None:
            with options_that_fit():
                return VQTokenizer(tokenizer_config(options))
        assert checkpoint.tokenizer is not None
        with options_that_fit():
            check_size(options.size, checkpoint.tokenizer.config)
        self.bad_images.say(f"Starting from {checkpoint.path.name}.")
        return checkpoint.tokenizer.train()

    def prepare(self) -> None:
        """Open the images."""
        self.images = self._open(self.folder)
        if self.held_out_folder is not None:
            self.held_out_count = min(len(self.held_out_folder), _EVALUATED)
            self.held_out = self._open(self.held_out_folder)

    def _open(self, folder: ImageSet) -> ImageSource:
        options = self.options
        return open_images(
            folder,
            Crop(options.size, options.resize_factor, options.flip),
            self.device,
            workers=self.options.workers,
            resident_limit_mb=self.options.resident_limit_mb,
            bad_images=self.bad_images,
        )

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Images (B, 3, size, size)."""
        yield from self.images.batches(self.order.batch(step) for step in range(first, last))

    def blank(self, count: int) -> Tensor:
        """White images."""
        side = self.options.size
        return torch.ones(count, 3, side, side, device=self.device)

    def train_step(self, step: int, progress: float, batch: Tensor) -> dict[str, Tensor]:
        """Autoencoder first, then the discriminator on the same reconstructions."""
        options = self.options
        learning = "encoder" not in options.freeze  # whose codes would change their meaning
        reviving = learning and step and options.revive_every and step % options.revive_every == 0
        if reviving and progress < _REVIVED_UNTIL:
            self._revive(batch)
        with autocast(options, self.device):
            output: TokenizerOutput = self.tokenizer.wrapped(batch)
        _count(output.indices, self.logged_use, self.revival_use)

        image = output.image.float()
        leaf = image.detach().requires_grad_()
        values = {"loss/pixel": pixel_loss(leaf, batch), "loss/edge": edge_loss(leaf, batch)}
        loss = values["loss/pixel"] + options.edge_weight * values["loss/edge"]
        if self.perceptual is not None:
            values["loss/perceptual"] = self.perceptual(leaf, batch)
            loss = loss + options.perceptual_weight * values["loss/perceptual"]
        values = {"loss": loss, **values}
        (gradient,) = torch.autograd.grad(loss, leaf)
        playing = self.discriminator is not None and progress >= options.discriminator_start
        if playing:
            adversarial = self._adversarial(leaf, batch, values)
            (pull,) = torch.autograd.grad(adversarial, leaf)
            weight = self._balance(output.features, gradient, pull)
            values["discriminator/weight"] = weight
            gradient = gradient + weight * pull
        # Its gradient on the image is `gradient`: the losses above need no second backward pass.
        surrogate = (image * gradient).sum()
        codebook = output.codebook_loss + options.commitment_weight * output.commitment_loss
        values["gradient_norm"] = self.tokenizer.update(surrogate + codebook)
        values["loss/codebook"] = output.codebook_loss
        if playing:
            values |= self._train_discriminator(batch, image.detach())
        return {name: value.detach() for name, value in values.items()}

    def _adversarial(self, leaf: Tensor, batch: Tensor, values: dict[str, Tensor]) -> Tensor:
        """What the reconstructions (B, 3, H, W) lose against the discriminator as it stands."""
        assert self.discriminator is not None
        network = self.discriminator.network.requires_grad_(False)
        with autocast(self.options, self.device):
            score, features = network(leaf)
            with torch.no_grad():
                _, real_features = network(batch)
        network.requires_grad_(True)
        values["discriminator/features"] = feature_loss(real_features, features)
        values["discriminator/generator"] = generator_loss(score)
        return (
            values["discriminator/generator"]
            + self.options.feature_weight * values["discriminator/features"]
        )

    def _balance(self, features: Tensor, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """VQGAN's adaptive weight (arXiv 2012.09841, equation 7): the adversarial gradient on the
        decoder's last conv is held at `discriminator_weight` of the reconstruction's.

        A fixed weight, LlamaGen's default, needs LPIPS to hold against it.
        """
        weight = self.tokenizer.network.decoder.conv_out.weight
        with torch.no_grad():
            norms = [
                conv2d_weight(features, weight.shape, part.to(features.dtype), padding=1).norm()
                for part in (reconstruction, adversarial)
            ]
            ratio = (norms[0] / (norms[1] + 1e-8)).float().clamp(max=1e4)
            ratio = self.accelerator.reduce(ratio, "mean")
        return ratio * self.options.discriminator_weight

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        assert self.discriminator is not None
        with autocast(self.options, self.device):
            scores, _ = self.discriminator.wrapped(torch.cat([real, fake]))
        real_scores, fake_scores = scores.chunk(2)
        loss = discriminator_loss(real_scores, fake_scores)
        self.discriminator.update(loss)
        return {
            "discriminator/loss": loss,
            "discriminator/real": real_scores.float().mean(),
            "discriminator/fake": fake_scores.float().mean(),
        }

    @torch.no_grad()
    def _revive(self, batch: Tensor) -> None:
        """Put every code that no image used since the last time on a random encoder vector."""
        network = self.tokenizer.network
        with autocast(self.options, self.device):
            vectors = network.encode_vectors(batch).flatten(0, 2)  # (B·T, E)
        table = network.quantize.embedding.weight
        chosen = torch.randint(len(vectors), (len(table),), device=self.device)
        vectors = broadcast(vectors[chosen].contiguous())  # (V, E), the main process's
        unused = self.accelerator.reduce(self.revival_use, "sum") == 0
        # The codes' lengths do not matter for looking up, only for how fast they turn.
        lengths = table.norm(dim=1, keepdim=True)
        table.copy_(torch.where(unused[:, None], vectors * lengths, table))
        self.revival_use.zero_()

    def window(self) -> dict[str, float]:
        """Codebook use by this process's images since the last log line."""
        share = self.logged_use / self.logged_use.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = (self.logged_use > 0).float().mean()
        self.logged_use.zero_()
        return {"codes": float(used), "codebook/perplexity": math.exp(float(entropy))}

    def extra_state(self) -> dict[str, Tensor]:
        """The code counts, which decide the next revival."""
        return {"logged_use": self.logged_use, "revival_use": self.revival_use}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take up the code counts."""
        # One process's counts were saved; every process adds to its own.
        share = 1 / self.accelerator.num_processes
        self.logged_use.copy_(state["logged_use"] * share)
        self.revival_use.copy_(state["revival_use"] * share)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR and absolute error on centre crops in bytes, and the share of codes they use."""
        if self.held_out is None:
            return {}
        network = self.tokenizer.averaged
        used = torch.zeros_like(self.logged_use)
        psnr, absolute, count = 0.0, 0.0, 0
        index = np.arange(self.held_out_count)
        parts = np.array_split(index, -(-len(index) // self.share))
        for batch in self.held_out.batches(centre_draws(part) for part in parts):
            indices = network.encode(batch)
            drawn = _bytes(network.decode(indices))
            error = (drawn - _bytes(batch)).flatten(1)
            squared = error.square().mean(1).clamp(min=1e-3)
            psnr += float((10 * torch.log10(255**2 / squared)).sum())
            absolute += float(error.abs().mean(1).sum())
            count += len(batch)
            _count(indices, used)
        return {
            "psnr_db": psnr / count,
            "absolute_error": absolute / count,
            "codes": float((used > 0).float().mean()),
        }

    @torch.no_grad()
    def picture(self) -> Image.Image:
        """Images with their classes above their reconstructions, in rows of eight."""
        folder, source, count = self.folder, self.images, len(self.folder)
        if self.held_out is not None:
            assert self.held_out_folder is not None
            folder, source, count = self.held_out_folder, self.held_out, self.held_out_count
        index = np.unique(np.linspace(0, count - 1, _SHOWN).astype(np.int64))
        parts = np.array_split(index, -(-len(index) // self.share))
        shown = list(source.batches(centre_draws(part) for part in parts))
        network = self.tokenizer.averaged
        batch = torch.cat(shown)
        drawn = torch.cat([network.decode(network.encode(part)) for part in shown])
        check_drawn("the pixels of the averaged weights", drawn)
        rows = [row for pair in zip(batch.split(8), drawn.split(8), strict=True) for row in pair]
        rows = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, 8 - len(row)), value=1.0) for row in rows]
        names = [folder.class_names[label] for label in folder.labels[index]]
        captions = [names[first : first + 8] for first in range(0, len(names), 8)]
        captions = [row + [""] * (16 - len(row)) for row in captions]  # none under the second row
        return contact_sheet(torch.cat(rows), 8, [text for row in captions for text in row])

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "kind": "tokenizer",
            "geometry": self.tokenizer.network.config.to_dict(),
            "init": self.start.mark,
            "size": self.options.size,
            "seed": self.options.seed,
            "data_digest": self.folder.digest,
            "discriminator": bool(self.discriminator),
        }

    def remark(self) -> str | None:
        """How many images could not be read."""
        return self.bad_images.remark()

    def held_out_digest(self) -> str | None:
        """That of the held-out images' names and contents."""
        return None if self.held_out_folder is None else self.held_out_folder.digest

    def averaged(self) -> VQTokenizer:
        """The averaged tokenizer."""
        return self.tokenizer.averaged

    @property
    def path(self) -> Path:
        """`RUN/tokenizer.safetensors`."""
        return self.options.out / "tokenizer.safetensors"

    def export(self, weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]) -> None:
        """Write the tokenizer."""
        metadata = {
            "training": recipe(self.options) | dict(facts),
            "image_size": self.options.size,
            "data_digest": self.folder.digest,
        }
        save_checkpoint(self.path, tokenizer=at(self.averaged(), weights), metadata=metadata)


def _count(indices: Tensor, *tallies: Tensor) -> None:
    """Add how often each code occurs to every tally (V,). Unlike bincount it never waits."""
    flat = indices.flatten()
    for tally in tallies:
        tally.index_add_(0, flat, torch.ones_like(flat, dtype=tally.dtype))


def _bytes(images: Tensor) -> Tensor:
    """[-1, 1] as the whole numbers 0..255 that a file would hold, in float32."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round()
