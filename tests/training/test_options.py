"""Every option has a range, and says so."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions

MODEL: dict[str, Any] = {"data": Path("d"), "out": Path("o"), "tokenizer": Path("t")}
TOKENIZER: dict[str, Any] = {"data": Path("d"), "out": Path("o")}
CLASSES: list[tuple[type[Any], dict[str, Any]]] = [
    (TokenizerTrainingOptions, TOKENIZER),
    (ModelTrainingOptions, MODEL),
]
NUMBERS = [
    (made, needed, field.name)
    for made, needed in CLASSES
    for field in fields(made)
    if (isinstance(field.default, int | float) and not isinstance(field.default, bool))
    or field.name == "learning_rate"  # whose default depends on --init
]


@pytest.mark.parametrize(("made", "needed", "name"), NUMBERS)
def test_no_number_is_taken_unseen(made: type[Any], needed: dict[str, Any], name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1, 10**25, True, "1", None, [1]):
        if name == "learning_rate" and value in (None, 10**25):
            continue  # whoever asks for so much is told when it diverges
        with pytest.raises(ValueError, match=f"^{name} is ") as caught:
            made(**needed, **{name: value})
        assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(("made", "needed"), CLASSES)
def test_nor_is_anything_else(made: type[Any], needed: dict[str, Any]) -> None:
    for field in fields(made):
        for value in (3.5, object(), b"1"):
            if isinstance(field.default, float) and value == 3.5:
                continue
            if field.name in ("max_minutes", "learning_rate") and value == 3.5:
                continue
            with pytest.raises(ValueError, match=f"^{field.name} is "):
                made(**(needed | {field.name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 10**23}, r"seed is 1000.*; it must be in \[0, 9223372036854775808\)"),
        ({"codebook_dim": 0}, "codebook_dim is 0; it must be 1 or more"),
        ({"channels": 48}, "channels is 48; it must be a multiple of 32"),
        ({"channel_multipliers": ()}, r"channel_multipliers is \(\); it must be 1 to 16 numbers"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers is 0; it must be 1 or more"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be a finite number"),
        ({"resize_factor": 1e9}, "resize_factor is 1000000000.0; it must be 16 or less"),
        ({"max_minutes": math.inf}, "max_minutes is inf"),
        ({"schedule": "linear"}, r"schedule is 'linear'; it must be one of \('constant'"),
        ({"early_stop": 2}, "early_stop is 2; it takes held-out images"),
        ({"export_weights": "best"}, "export_weights is best; it takes held-out images"),
        ({"val_data": Path("v"), "val_fraction": 0.1}, "val_fraction is 0.1; with val_data"),
    ],
)
def test_a_bad_value_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingOptions(**(TOKENIZER | options))


def test_what_looks_odd_and_is_not_is_taken() -> None:
    TokenizerTrainingOptions(
        **TOKENIZER, learning_rate=1e30, seed=2**63 - 1, max_minutes=2, weight_decay=0
    )
