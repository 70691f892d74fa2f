"""Sample sheets: images in rows, and what each of them is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aim_training.pictures import contact_sheet

GREY = torch.zeros(3, 3, 20, 40)


def test_images_lie_in_rows_on_white() -> None:
    sheet = np.asarray(contact_sheet(GREY, columns=2))
    assert sheet.shape == (40, 80, 3)
    assert (sheet[:20] == 128).all()
    assert (sheet[20:, 40:] == 255).all()


def test_captions_stand_under_their_images() -> None:
    sheet = np.asarray(contact_sheet(GREY, columns=2, captions=["cat", "", "a very long\nname"]))
    assert sheet.shape == (72, 80, 3)
    assert (sheet[:20] == 128).all()
    assert sheet[20:36, :40].min() < 128
    assert (sheet[20:36, 40:] == 255).all()
    assert (sheet[36:56, :40] == 128).all()
    assert sheet[56:, :40].min() < 128
    assert (sheet[56:, 40:] == 255).all()  # cut where the next image begins
    with pytest.raises(ValueError, match="captions has 1 lines; expected one for 3"):
        contact_sheet(GREY, columns=2, captions=["cat"])
