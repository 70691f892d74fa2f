"""The weights of the model in the box out of its bundle, where no checkpoint of it is left.

A bundle holds all that draws: the model whole, of the tokenizer the codes and the decoder. What an
export folds (the gated norm's weight into the projection after it) stays folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

Arrays = Mapping[str, NDArray[np.floating]]
# What train.sh asks for, which a bundle does not say.
_TOKENIZER = TokenizerConfig(4096, 8, 64, (1, 2, 2, 2), 128, 2, 3)
_ADALN_GROUPS = 4


def bundle_networks(path: Path) -> tuple[AiM, VQTokenizer]:
    """Model and tokenizer of a bundle of this recipe; the tokenizer's encoder is random.

    Raises:
        BundleError: the bundle is damaged.
    """
    from aim_export.cuda.stored import stored_tensors
    from aim_runtime import Bundle

    bundle = Bundle.open(path)
    graphs = {
        name: {key: tensor.values for key, tensor in stored_tensors(bundle, name).items()}
        for name in ("prologue", "step", "decoder")
    }
    card = bundle.manifest.model
    config = ModelConfig(
        card.vocab_size,
        card.num_classes,
        card.num_tokens,
        card.d_model,
        card.num_layers,
        d_state=card.d_state,
        head_dim=card.head_dim,
        adaln_groups=_ADALN_GROUPS,
        position_offset=card.position_offset,
    )
    model = AiM(config)
    state = model_state(graphs["prologue"], graphs["step"], config.num_layers)
    model.load_state_dict({name: _tensor(array) for name, array in state.items()})
    tokenizer = VQTokenizer(_TOKENIZER)
    state = decoder_state(graphs["decoder"])
    wanted = {
        name for name in tokenizer.state_dict() if not name.startswith(("encoder.", "quant_"))
    }
    assert state.keys() == wanted, state.keys() ^ wanted
    tokenizer.load_state_dict({k: _tensor(a) for k, a in state.items()}, strict=False)
    return model.eval(), tokenizer.eval()


def model_state(prologue: Arrays, step: Arrays, layers: int) -> dict[str, NDArray[np.floating]]:
    """The model's tensors by their names in checkpoints, of those of its two graphs."""
    state = {
        "cls_embed.embedding_table.weight": prologue["class_table"],
        "adaln_group.1.weight": prologue["adaln_group.weight"],
        "adaln_group.1.bias": prologue["adaln_group.bias"],
        "final_layer.adaLN_modulation.1.weight": prologue["final.weight"],
        "final_layer.adaLN_modulation.1.bias": prologue["final.bias"],
        "final_layer.norm_final.weight": prologue["final_factor"][1],
        "embeddings.word_embeddings.weight": step["word_table"],
        "embeddings.position_embeddings.weight": step["position_table"],
        "norm_f.weight": step["norm_f"],
    }
    for index in range(layers):
        ours, theirs = f"layers.{index}.", f"layer_{index}."
        out_proj = step[theirs + "out_proj"]
        state |= {
            ours + "scale_shift_table": prologue["scale_shift_table"][index][None],
            ours + "norm.weight": prologue["modulation_offset"][index, 1],
            ours + "mixer.in_proj.weight": step[theirs + "in_proj"],
            ours + "mixer.conv1d.weight": step[theirs + "conv_weight"].T[:, None],
            ours + "mixer.conv1d.bias": step[theirs + "conv_bias"],
            ours + "mixer.dt_bias": step[theirs + "dt_bias"],
            ours + "mixer.A_log": np.log(-step[theirs + "a"]),
            ours + "mixer.D": step[theirs + "d"],
            ours + "mixer.norm.weight": np.ones(out_proj.shape[1], np.float32),
            ours + "mixer.out_proj.weight": out_proj,
        }
    return {f"backbone.{name}": array for name, array in state.items()}


def decoder_state(decoder: Arrays) -> dict[str, NDArray[np.floating]]:
    """The tensors of the tokenizer's codes and decoder, of those of its graph."""
    state = {
        name.removeprefix("tokenizer."): array
        for name, array in decoder.items()
        if name.startswith("tokenizer.")
    }
    return {k: a.ravel() if ".norm" in k else a for k, a in state.items()}


def _tensor(array: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))
