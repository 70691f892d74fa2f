"""What parity measures, and that nothing which is not a number ever passes for agreement."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aim_export import ExportError, ParityReport
from aim_export.parity import (
    TOLERANCES,
    _psnr_db,
    _relative_error,
    _token_agreement,
    check_parity,
)
from aim_runtime import SamplingOptions
from aim_training.checkpoint import load_checkpoint

from .conftest import Exported, Golden

GOOD = ParityReport("fp32", 2, 9, 1e-7, 1e-7, 1e-6, 1.0, 999.0, 1e-12, 1.0)
NAN = float("nan")


def test_a_good_report_has_no_failures() -> None:
    assert GOOD.failures == []


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize(
    "name", [field.name for field in fields(ParityReport) if field.type == "float"]
)
def test_what_is_not_a_number_fails_whatever_was_measured(name: str, precision: str) -> None:
    report = replace(GOOD, precision=precision, **{name: NAN})
    assert len(report.failures) == 1
    assert name in report.failures[0]


def test_errors_of_what_is_not_finite_are_not_numbers() -> None:
    good = np.ones((2, 3), np.float32)
    for bad in (NAN, math.inf, -math.inf):
        spoilt = good.copy()
        spoilt[1, 1] = bad
        assert math.isnan(_relative_error(spoilt, spoilt))
        assert math.isnan(_relative_error(good, spoilt))
        assert math.isnan(_relative_error(spoilt, good))
    zeros = np.zeros_like(good)
    assert _relative_error(zeros, zeros) == 0
    assert _relative_error(good, zeros) == math.inf
    assert _relative_error(good * 2, good) == pytest.approx(1)


def test_pixels_are_compared_before_nan_becomes_black() -> None:
    pixels = torch.full((1, 3, 2, 2), -1.0)
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert _psnr_db(black, pixels) == 999
    pixels[0, 1, 1, 1] = NAN
    assert math.isnan(_psnr_db(black, pixels))


def test_tokens_of_scores_that_are_not_finite_agree_with_nothing() -> None:
    options = SamplingOptions(cfg_scale=1.0, temperature=0.0, top_k=0, top_p=1.0)
    logits, noise = np.zeros((1, 2, 4), np.float32), np.full((1, 2), 0.5)
    tokens = np.zeros((1, 2), np.int64)
    assert _token_agreement(logits, noise, options, tokens) == 1
    logits[0, 1, 3] = NAN
    assert math.isnan(_token_agreement(logits, noise, options, tokens))


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_network_that_computes_nothing_fails(
    golden: Golden, exports: object, tmp_path: Path, part: str
) -> None:
    exported: Exported = exports(golden.name)  # type: ignore[operator]
    source = load_checkpoint(golden.checkpoint)
    assert source.model is not None
    assert source.tokenizer is not None
    with torch.no_grad():
        if part == "model":  # finite weights that overflow
            source.model.backbone.final_layer.norm_final.weight.fill_(3e38)
        else:
            source.tokenizer.decoder.conv_out.bias.fill_(NAN)
    if part == "model":
        with pytest.raises(ExportError, match="scores are not finite at step"):
            check_parity(source.model, source.tokenizer, exported.bundle)
    else:
        report = check_parity(source.model, source.tokenizer, exported.bundle)
        assert any("psnr_db is nan" in failure for failure in report.failures)
