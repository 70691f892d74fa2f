"""Starting a training from weights: which of a checkpoint's tensors a new network begins with.

What a tensor means decides whether it can stay: rows of the class table belong to class names,
rows of the code table to one tokenizer's codes. What cannot stay begins at random, as in any
training. Parts can be kept as they are throughout (`freeze`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from aim_training.checkpoint import Checkpoint, load_checkpoint
from aim_training.codes import weights_digest
from aim_training.errors import TrainingError
from aim_training.model import AiM
from aim_training.saves import Saves
from aim_training.tokenizer import VQTokenizer

# Parts of the networks by what the names of their tensors hold, after a dot.
MODEL_PARTS: Mapping[str, tuple[str, ...]] = {
    "tables": (".embeddings.",),
    "mixers": (".mixer.", ".norm.", ".norm_f.", ".norm_final."),
    "classes": (".cls_embed.", ".adaLN_modulation.", ".adaln_group.", ".scale_shift_table"),
}
TOKENIZER_PARTS: Mapping[str, tuple[str, ...]] = {
    "encoder": (".encoder.", ".quant_conv.", ".quantize."),
    "decoder": (".decoder.", ".post_quant_conv."),
}
_CLASSES = "backbone.cls_embed.embedding_table.weight"
_CODES = "backbone.embeddings.word_embeddings.weight"


class Begun(NamedTuple):
    """A network with a checkpoint's weights, and how it came by them as a line for the user."""

    network: AiM
    line: str


def open_initial(path: Path, half: str) -> Checkpoint:
    """The checkpoint to start from.

    Args:
        path: file or folder.
        half: "model" or "tokenizer", which it must hold.

    Raises:
        CheckpointError: it cannot be read.
        TrainingError: it has no such half.
    """
    checkpoint = load_checkpoint(path)
    if getattr(checkpoint, half) is None:
        raise TrainingError(f"{path} holds no {half} to start from")
    return checkpoint


class Start(NamedTuple):
    """What a network starts from.

    Attributes:
        checkpoint: the weights, where a run begins with `--init`.
        geometry: that of the network, where such a run goes on: its own checkpoint has the weights.
        mark: what tells the weights from others, for the run's fingerprint; None for random ones.
    """

    checkpoint: Checkpoint | None
    geometry: Mapping[str, Any] | None
    mark: Mapping[str, str] | None


def start(path: Path | None, half: str, out: Path, say: Callable[[str], None]) -> Start:
    """What a training starts from, or started from where it goes on.

    Args:
        path: of the weights; None for random ones.
        half: "model" or "tokenizer", whichever is trained.
        out: the run folder. Where it has a checkpoint, `path` need not exist any longer.
        say: told so.

    Raises:
        CheckpointError: the weights cannot be read.
        TrainingError: they have no such half, or the run's checkpoint cannot be read.
    """
    if path is None:
        return Start(None, None, None)
    before = Saves(out, mapped=True).fingerprint(half)
    if before is None:
        checkpoint = open_initial(path, half)
        return Start(checkpoint, None, _mark(path, checkpoint, half))
    now = {"name": path.name}
    if path.exists():
        now = _mark(path, open_initial(path, half), half)
    if _same_weights(before.get("init", now), now):
        say(f"{out} has its weights: {path.name}, which it started from, is needed no longer.")
        now = before.get("init", now)
    return Start(None, before["geometry"], now)


def _mark(path: Path, checkpoint: Checkpoint, half: str) -> dict[str, str]:
    return {"name": path.name, "sha256": weights_digest(getattr(checkpoint, half))}


def _same_weights(before: Mapping[str, str] | None, now: Mapping[str, str]) -> bool:
    """Whatever their name is by now; of weights that are gone, the name is all there is."""
    if before is None:
        return False
    telling = "sha256" if "sha256" in before.keys() & now.keys() else "name"
    return before[telling] == now[telling]


def begin_model(
    checkpoint: Checkpoint,
    tokenizer: VQTokenizer,
    class_names: Sequence[str],
    num_tokens: int,
    *,
    relearn_codes: bool,
    dropout: float,
    checkpoint_activations: bool,
) -> Begun:
    """A model for these codes and classes with the weights of another.

    Args:
        checkpoint: with a model.
        tokenizer: of the training.
        class_names: of the training's classes, in order.
        num_tokens: of its images.
        relearn_codes: let the code table begin at random.
        dropout: as in `AiM`.
        checkpoint_activations: as in `AiM`.

    Raises:
        TrainingError: the model draws images of another number of tokens, or of another
            tokenizer's codes that it is not to learn anew.
    """
    source, name = checkpoint.model, checkpoint.path.name
    assert source is not None
    if source.config.num_tokens != num_tokens:
        raise TrainingError(
            f"{name} draws images of {source.config.num_tokens} tokens; with --size and tokenizer "
            f"as they are, an image has {num_tokens}"
        )
    if not relearn_codes and not _knows_codes(checkpoint, tokenizer):
        kept = (
            "give its own as --tokenizer"
            if checkpoint.tokenizer is None
            else "leave --tokenizer out to take the one in it"
        )
        raise TrainingError(
            f"{name} was trained on another tokenizer's codes; {kept}, or let it learn these with "
            "--relearn-codes"
        )
    config = replace(
        source.config,
        vocab_size=tokenizer.config.codebook_size,
        num_classes=len(class_names),
        position_offset=0,
    )
    network = AiM(config, dropout, checkpoint_activations=checkpoint_activations).initialise()
    tensors = source.state_dict()
    table = tensors.pop(_CLASSES)
    if relearn_codes:
        del tensors[_CODES]
    network.load_state_dict(tensors, strict=False)
    rows = _same_classes(checkpoint, class_names)
    with torch.no_grad():
        ours = network.backbone.cls_embed.embedding_table.weight
        ours[-1] = table[-1]  # "no class"
        for row, theirs in rows.items():
            ours[row] = table[theirs]
    line = f"Starting from {name}: {len(rows)} of {len(class_names)} classes are its own"
    return Begun(network, line + (", the code table is new." if relearn_codes else "."))


def _knows_codes(checkpoint: Checkpoint, tokenizer: VQTokenizer) -> bool:
    """Whether a model was trained on a tokenizer's codes, as far as its checkpoint tells."""
    assert checkpoint.model is not None
    if checkpoint.tokenizer is not None:
        return same_codes(checkpoint.tokenizer, tokenizer)
    trained_on = checkpoint.metadata.get("tokenizer_sha256")
    if trained_on is not None:
        return bool(trained_on == weights_digest(tokenizer))
    return checkpoint.model.config.vocab_size == tokenizer.config.codebook_size


def _same_classes(checkpoint: Checkpoint, names: Sequence[str]) -> dict[int, int]:
    """The checkpoint's row of each class that it knows: by its name.

    A checkpoint without names, as the published ones are, knows its classes by their numbers:
    those of a folder whose names are numbers, or of one with as many classes in the same order.
    """
    assert checkpoint.model is not None
    count = checkpoint.model.config.num_classes
    if checkpoint.class_names is not None:
        known = {name: row for row, name in enumerate(checkpoint.class_names[:count])}
    elif all(name.isdecimal() and name.isascii() for name in names):
        known = {name: int(name) for name in names if len(name) < 9 and int(name) < count}
    elif len(names) == count:
        known = {name: row for row, name in enumerate(names)}
    else:
        known = {}
    return {row: known[name] for row, name in enumerate(names) if name in known}


def same_codes(ours: VQTokenizer, theirs: VQTokenizer) -> bool:
    """Whether two tokenizers make the same codes of an image; their decoders may differ."""
    return _codes_digest(ours) == _codes_digest(theirs)


def _codes_digest(tokenizer: VQTokenizer) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if _belongs(name, TOKENIZER_PARTS["encoder"]):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def freeze(network: nn.Module, frozen: Sequence[str], parts: Mapping[str, tuple[str, ...]]) -> None:
    """Keep the parameters of some parts as they are.

    Raises:
        ValueError: nothing would be left to train.
    """
    for name, parameter in network.named_parameters():
        if any(_belongs(name, parts[part]) for part in frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze is {','.join(frozen)}; that leaves nothing to train")


def _belongs(name: str, part: tuple[str, ...]) -> bool:
    return any(text in f".{name}" for text in part)
