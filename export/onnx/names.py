"""What the values at a step's border are called."""

from __future__ import annotations

CLASS_EMBEDDING, MODULATION, FINAL = "class_embedding", "modulation", "final_modulation"


def state_names(layer: int) -> tuple[str, str]:
    """What a layer's convolution inputs and its state are called."""
    return f"conv_state_{layer}", f"ssm_state_{layer}"


def next_name(state: str) -> str:
    """The output that replaces a state input."""
    return f"next_{state}"
