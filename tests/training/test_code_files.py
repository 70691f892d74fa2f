"""Encoding that is stopped, shared and gone on with: the same codes, and nothing done twice."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aim_training.code_files import Codes, Encoding, Layout, PartFile
from aim_training.codes import CodeRequest, Processes, cached_codes
from aim_training.config import TokenizerConfig
from aim_training.data import BadImages, Crop, DataError, ImageFolder, open_data, ten_crop_draws
from aim_training.tokenizer import VQTokenizer

from .shards import as_tars

CPU = torch.device("cpu")
# Of 12 images in 3 versions: 3 batches a version, 9 in all.
BATCH, VERSIONS, BATCHES = 5, 3, 9


class Stopped(Exception):
    """What ends an encoding here."""


@pytest.fixture
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 32, "codebook_dim": 4, "channels": 32}
    sizes |= {"channel_multipliers": (1, 1), "z_channels": 8}
    return VQTokenizer(TokenizerConfig(**sizes, encoder_blocks=1, decoder_blocks=1)).eval()


@pytest.fixture
def request_(squares: Path, tmp_path: Path) -> CodeRequest:
    data = as_tars(squares, tmp_path / "data")
    return CodeRequest(open_data(data), Crop(16), VERSIONS, seed=0, batch=BATCH)


def codes(
    path: Path,
    request: CodeRequest,
    tokenizer: VQTokenizer,
    processes: Processes | None = None,
    **options: Any,
) -> Codes:
    return cached_codes(
        path,
        request,
        tokenizer,
        CPU,
        workers=0,
        resident_limit_mb=0,
        processes=processes or Processes(),
        **options,
    )


def stopping_after(
    patch: pytest.MonkeyPatch, batches: float, do: Callable[[], None] | None = None
) -> list[int]:
    """Count the images of each encoded batch; end the encoding behind so many of them."""
    counts: list[int] = []
    encode = VQTokenizer.encode

    def counted(self: VQTokenizer, batch: torch.Tensor) -> torch.Tensor:
        if len(counts) >= batches:
            if do is not None:
                do()
            raise Stopped
        counts.append(len(batch))
        return encode(self, batch)

    patch.setattr(VQTokenizer, "encode", counted)
    return counts


def together(
    path: Path, request: CodeRequest, tokenizer: VQTokenizer, world: int
) -> tuple[list[Codes], list[BaseException]]:
    """As so many processes would encode, each in a thread."""
    barrier = threading.Barrier(world)
    results: list[Codes] = []
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            processes = Processes(rank, world, lambda: barrier.wait() and None)
            results.append(codes(path, request, tokenizer, processes, quiet=rank > 0))
        except (Exception, threading.BrokenBarrierError) as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aim_training.codes._LOOK_EVERY_S", 0.01)
        patch.setattr("aim_training.codes._PATIENCE_S", 1.0)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results, errors


@pytest.mark.parametrize("stops", [[0, 1], [4, 2], [8]])
def test_what_was_stopped_goes_on_behind_its_last_batch(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path, stops: list[int]
) -> None:
    whole = codes(tmp_path / "whole.npy", request_, tokenizer)
    path, encoded = tmp_path / "train.npy", 0
    for batches in stops:
        with pytest.MonkeyPatch.context() as patch:
            counts = stopping_after(patch, batches)
            with pytest.raises(Stopped):
                codes(path, request_, tokenizer)
        encoded += sum(counts)
        assert not path.exists()
    with pytest.MonkeyPatch.context() as patch:
        # Another batch size now: batches stay those that it was begun with.
        counts = stopping_after(patch, np.inf)
        found = codes(path, dataclasses.replace(request_, batch=4), tokenizer)
    assert encoded + sum(counts) == VERSIONS * 12
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert np.array_equal(found, whole)
    assert not Encoding.folder_of(path).exists()


def test_a_killed_process_costs_one_batch_at_most(
    squares: Path, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    torch.save(tokenizer, tmp_path / "tokenizer.pt")
    script = tmp_path / "encode.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from aim_training.codes import CodeRequest, cached_codes\n"
        "from aim_training.data import Crop, open_data\n"
        "squares, folder = map(Path, sys.argv[1:])\n"
        f"request = CodeRequest(open_data(squares), Crop(16), {VERSIONS}, 0, {BATCH})\n"
        "tokenizer = torch.load(folder / 'tokenizer.pt', weights_only=False)\n"
        "encode, batches = type(tokenizer).encode, []\n"
        "def counted(self, batch):\n"
        "    batches.append(len(batch))\n"
        "    if len(batches) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return encode(self, batch)\n"
        "type(tokenizer).encode = counted\n"
        "options = {'workers': 1, 'resident_limit_mb': 100}\n"
        "cached_codes(folder / 'train.npy', request, tokenizer, torch.device('cpu'), **options)\n"
    )
    done = subprocess.run([sys.executable, script, squares, tmp_path], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    request = CodeRequest(open_data(squares), Crop(16), VERSIONS, 0, BATCH)
    with pytest.MonkeyPatch.context() as patch:
        counts = stopping_after(patch, np.inf)
        codes(tmp_path / "train.npy", request, tokenizer)
    assert len(counts) == BATCHES - 4
    codes(tmp_path / "whole.npy", request, tokenizer)
    assert (tmp_path / "train.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize(
    ("damage", "kept"), [("tail", 3), ("flip", 0), ("journal", 3), ("no journal", 0), ("header", 0)]
)
def test_what_was_half_written_or_damaged_is_encoded_again(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path, damage: str, kept: int
) -> None:
    path = tmp_path / "train.npy"
    with pytest.MonkeyPatch.context() as patch:
        stopping_after(patch, 4)
        with pytest.raises(Stopped):
            codes(path, request_, tokenizer)
    part = PartFile(Encoding.folder_of(path), Layout(VERSIONS, 12, 64, "uint16", BATCH, (0, 9)), 0)
    written, lines = bytearray(part.path.read_bytes()), part.journal.read_bytes()
    if damage == "tail":
        part.path.write_bytes(written[:-3])
    elif damage == "journal":  # half a line
        part.journal.write_bytes(lines[:-3])
    elif damage == "no journal":
        part.journal.unlink()
    else:
        written[200 if damage == "flip" else 3] ^= 1
        part.path.write_bytes(written)
    with pytest.MonkeyPatch.context() as patch:
        counts = stopping_after(patch, np.inf)
        codes(path, request_, tokenizer)
    assert len(counts) == BATCHES - kept
    codes(tmp_path / "whole.npy", request_, tokenizer)
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("change", ["seed", "crop", "request", "bounds"])
def test_what_was_begun_for_something_else_is_begun_anew(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "train.npy"
    with pytest.MonkeyPatch.context() as patch:
        stopping_after(patch, 4)
        with pytest.raises(Stopped):
            codes(path, request_, tokenizer)
    described = Encoding.folder_of(path) / "request.json"
    if change == "seed":
        request_ = dataclasses.replace(request_, seed=1)
    elif change == "crop":
        request_ = dataclasses.replace(request_, crop=Crop(16, 1.5))
    elif change == "request":
        described.write_text("[" * 100_000)
    else:
        facts = json.loads(described.read_text())
        facts["layout"]["bounds"] = [0, 10**9]
        described.write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        counts = stopping_after(patch, np.inf)
        codes(path, request_, tokenizer)
    assert len(counts) == BATCHES


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_any_number_reads_it(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path, world: int
) -> None:
    whole = codes(tmp_path / "whole.npy", request_, tokenizer)
    path = tmp_path / "train.npy"
    with pytest.MonkeyPatch.context() as patch:
        counts = stopping_after(patch, np.inf)
        results, errors = together(path, request_, tokenizer, world)
    assert not errors
    assert sum(counts) == VERSIONS * 12
    files = [f"train-{number:05d}-of-{world:05d}.npy" for number in range(world)]
    assert sorted(file.name for file in tmp_path.glob("train*")) == [*files, "train.json"]
    variant, image = np.array([2, 0, 1, 1]), np.array([11, 0, 5, 5])
    for found in (*results, codes(path, request_, tokenizer)):
        assert np.array_equal(found, whole)
        assert found.shape == (VERSIONS, 12, 64)
        assert found.nbytes == VERSIONS * 12 * 64 * 2
        assert np.array_equal(found[variant, image], np.array(whole)[variant, image])
        assert np.array_equal(found[1, 3], np.array(whole)[1, 3])
        for key in (VERSIONS, (0, 12), (0, np.array([-1]))):
            with pytest.raises(IndexError):
                found[key]
    # One file that is damaged has all of them made anew, and the several give way to one.
    damaged = bytearray((tmp_path / files[1]).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / files[1]).write_bytes(damaged)
    assert np.array_equal(codes(path, request_, tokenizer), whole)
    assert sorted(file.name for file in tmp_path.glob("train*")) == ["train.json", "train.npy"]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3)])
def test_another_number_of_processes_goes_on(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path, first: int, then: int
) -> None:
    path = tmp_path / "train.npy"
    with pytest.MonkeyPatch.context() as patch:
        before = stopping_after(patch, 4)
        _, errors = together(path, request_, tokenizer, first)
    assert any(isinstance(error, Stopped) for error in errors)
    with pytest.MonkeyPatch.context() as patch:
        after = stopping_after(patch, np.inf)
        results, errors = together(path, request_, tokenizer, then)
    assert not errors
    assert sum(before) + sum(after) == VERSIONS * 12
    assert np.array_equal(results[0], codes(tmp_path / "whole.npy", request_, tokenizer))


def test_a_cache_of_an_earlier_version_is_used(
    request_: CodeRequest, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    """One file, and a description that knows neither several files nor ten-crop."""
    path = tmp_path / "train.npy"
    codes(path, request_, tokenizer)
    described = json.loads(path.with_suffix(".json").read_text())
    assert sorted(described) == [
        *("bad_images", "crop", "data_digest", "seed", "sha256", "tokenizer_sha256", "variants")
    ]
    assert sorted(described["crop"]) == ["flip", "resize_factor", "size"]
    assert np.load(path).shape == (VERSIONS, 12, 64)


def test_images_that_others_could_not_read_are_listed_and_counted(
    squares: Path, tokenizer: VQTokenizer, tmp_path: Path
) -> None:
    """By other processes, or before a resume."""
    data = as_tars(squares, tmp_path / "data", shards=1)
    content = bytearray((data / "train-000000.tar").read_bytes())
    bad = [
        place for place in range(0, len(content), 512) if content[place : place + 4] == b"\x89PNG"
    ]
    for place in (bad[1], bad[10]):
        content[place : place + 4] = b"none"
    (data / "train-000000.tar").write_bytes(content)
    request = CodeRequest(open_data(data), Crop(16), VERSIONS, seed=0, batch=BATCH)
    path, listing = tmp_path / "train.npy", tmp_path / "bad-images.txt"

    def skipping() -> BadImages:
        return BadImages("skip", listing, lambda line: None)

    with pytest.MonkeyPatch.context() as patch:
        stopping_after(patch, 1)
        with pytest.raises(Stopped):
            codes(path, request, tokenizer, bad_images=skipping())
    listing.unlink()
    codes(path, request, tokenizer, bad_images=skipping())
    names = [line.partition("\t")[0] for line in listing.read_text().splitlines()]
    assert sorted(names) == sorted(request.folder.name(place) for place in (1, 10))
    assert json.loads(path.with_suffix(".json").read_text())["bad_images"] == 2
    with pytest.raises(DataError, match=r"train-000000\.tar/\S+\.png cannot be read"):
        codes(path, request, tokenizer, bad_images=BadImages("stop"))


@pytest.mark.parametrize("flip", [True, False])
def test_ten_crop_is_corners_and_centre_and_their_mirror_images(tmp_path: Path, flip: bool) -> None:
    """Of the middle square, as torchvision cuts them."""
    (tmp_path / "a").mkdir()
    ramp = np.add.outer(np.arange(20) * 2, np.arange(30) * 5).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    crop = Crop(16, 1.25, flip, square=True)
    square, seen = ramp[:, 5:25], []
    for number in range(10):
        draws = ten_crop_draws(number, np.arange(1))
        rows, columns = crop.windows(draws.uniform, 20, 30)
        seen.append(ramp[rows[0][:, None], columns[0]])
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    five = [square[top : top + 16, left : left + 16] for top, left in places]
    expected = five + [one[:, ::-1] if flip else one for one in five]
    assert all(np.array_equal(*pair) for pair in zip(seen, expected, strict=True))


def test_ten_crop_is_encoded(squares: Path, tokenizer: VQTokenizer, tmp_path: Path) -> None:
    images = ImageFolder.scan(squares)
    request = CodeRequest(images, Crop(16, square=True), 10, seed=0, batch=BATCH, ten_crop=True)
    found = np.array(codes(tmp_path / "ten.npy", request, tokenizer))
    assert found.shape == (10, 12, 64)
    centre = CodeRequest(images, Crop(16), 0, seed=0)
    assert np.array_equal(found[4], codes(tmp_path / "centre.npy", centre, tokenizer)[0])
    assert len({one.tobytes() for one in found}) == 10
    other = dataclasses.replace(request, ten_crop=False)
    assert not np.array_equal(codes(tmp_path / "ten.npy", other, tokenizer), found)


def test_parts_have_a_handy_size_and_are_as_many_for_each_process() -> None:
    """ImageNet's ten crops are 6.6 GB."""
    for world in (1, 8):
        layout = Layout.plan(10, 1_281_167, 256, "uint16", 64, world)
        assert layout.parts % world == 0
        assert 98 <= layout.parts <= 104
        assert layout.first_row(layout.bounds[-1]) == 12_811_670
    small = Layout.plan(2, 10, 256, "uint16", 64, 4)
    assert small.parts == 2


def test_progress_is_told_in_images(
    request_: CodeRequest,
    tokenizer: VQTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "train.npy"
    with pytest.MonkeyPatch.context() as patch:
        stopping_after(patch, 4)
        with pytest.raises(Stopped):
            codes(path, request_, tokenizer)
    capsys.readouterr()
    codes(path, request_, tokenizer)
    said = capsys.readouterr().err
    assert f"encoding into {path}, going on after 17 of 36 images" in said
    assert "36 of 36 images" in said
    assert "images/s" in said
