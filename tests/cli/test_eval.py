"""`aim eval` from the command line, on models that were never trained."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from aim_cli.eval_checkpoint import CheckpointModel
from aim_evaluation.features import Features
from aim_evaluation.models import BundleModel
from aim_export import export_bundle
from aim_runtime import Bundle
from aim_runtime.engines.backends import load_engine
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from .conftest import Cli, refused

pytestmark = pytest.mark.usefixtures("lowered_once")

CLASSES = ("blue", "green", "red")
SIZE, LEAST = 16, 51
TOKENIZER = TokenizerConfig(
    codebook_size=16,
    codebook_dim=4,
    channels=32,
    channel_multipliers=(1, 1),
    z_channels=8,
    encoder_blocks=1,
    decoder_blocks=1,
)
MODEL = ModelConfig(
    vocab_size=16, num_classes=3, num_tokens=64, d_model=32, num_layers=1, d_state=8, head_dim=16
)


@dataclass(frozen=True)
class Box:
    """A checkpoint, its bundle, and pictures to measure them on."""

    checkpoint: Path
    bundle: Path
    real: Path


def squares(count: int, size: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    rng = np.random.default_rng(seed)
    pictures = np.full((count, size, size, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = rng.integers(0, size // 2, 2)
        picture[top : top + size // 2, left : left + size // 2] = rng.integers(0, 90, 3)
        picture[top : top + size // 2, left : left + size // 2, 2 - index % 3] = 255
    return pictures, [CLASSES[index % 3] for index in range(count)]


def write(folder: Path, pictures: NDArray[np.uint8], names: list[str]) -> Path:
    for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("box")
    torch.manual_seed(0)
    checkpoint = save_checkpoint(
        root / "model.safetensors",
        AiM(MODEL).initialise(),
        VQTokenizer(TOKENIZER),
        {
            "class_names": list(CLASSES),
            "sampling": {"cfg_scale": 2.0, "temperature": 0.5, "top_k": 4, "top_p": 0.9},
        },
    )
    export_bundle(checkpoint, root / "bundle")
    return Box(checkpoint, root / "bundle", write(root / "real", *squares(LEAST, 18, 0)))


@pytest.fixture(autouse=True)
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that take no time: a picture's means over a grid of 2 x 2."""
    import aim_evaluation.features as module

    def network(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)
        return cells, cells[:, :3] / 50

    def load(name: str, weights: Path | None, *, download: bool, device: str) -> Features:
        if (name, weights) != ("efficientnet-lite0", None):
            return module.load_features_of_old(name, weights, download=download, device=device)
        where = torch.device(device)
        return Features(name, "toy.pth", "ab" * 32, "to 2 x 2", 12, 3, network, where)

    monkeypatch.setattr(module, "load_features_of_old", module.load_features, raising=False)
    monkeypatch.setattr(module, "load_features", load)


def report_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_a_bundle_is_drawn_and_compared(cli: Cli, folder: Path, box: Box) -> None:
    args = ("eval", box.bundle, "-n", LEAST, "--seed", 5, "--real", box.real, "--crop", "centre")
    done = cli(*args, "--cfg-scale", 1.5)
    assert done.exit_code == 0, done.output
    report = report_of(folder / "aim-eval")
    settings = report["samples"]["settings"]
    manifest = Bundle.open(box.bundle)
    assert settings["bundle_sha256"] == manifest.manifest_sha256
    assert settings["checkpoint_sha256"] == manifest.manifest.provenance["checkpoint_sha256"]
    expected = {"cfg_scale": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "preset": "fid"}
    assert {name: settings[name] for name in expected} == expected
    assert (settings["seeds"], settings["backend"]) == ("5 to 55", "cpu")
    assert (settings["precision"], settings["weights"]) == ("fp32", "fp32")
    assert settings["position_offset"] == 0
    assert report["samples"]["pictures"] == report["real"]["pictures"] == LEAST
    assert "1.125 times" in report["real"]["resizing"]
    assert report["features"]["weights_sha256"] == "ab" * 32
    figures = report["figures"]
    assert figures["fid"] > 0
    for name in ("precision", "recall", "coverage"):
        assert 0 <= figures[name] <= 1
    assert [row["class"] for row in report["classes"]] == list(CLASSES)
    assert {row["generated"] for row in report["classes"]} == {LEAST // 3}
    # Whatever is printed carries what it depends on.
    printed = done.stdout
    for text in (manifest.manifest_sha256, "5 to 55", "ab" * 32, report["real"]["sha256"], "1.5"):
        assert text in printed
        assert text in (folder / "aim-eval" / "report.md").read_text(encoding="utf-8")
    assert (folder / "aim-eval" / "nearest.png").is_file()


def test_what_was_drawn_is_not_drawn_again(cli: Cli, folder: Path, box: Box) -> None:
    args = ("eval", box.bundle, "--real", box.real, "--crop", "centre")
    assert cli(*args, "-n", LEAST).exit_code == 0
    first = folder / "aim-eval" / "sample" / "images" / "000000.png"
    before = first.stat().st_mtime_ns
    fid = report_of(folder / "aim-eval")["figures"]["fid"]
    assert cli(*args, "-n", LEAST).exit_code == 0
    assert first.stat().st_mtime_ns == before
    assert report_of(folder / "aim-eval")["figures"]["fid"] == fid
    assert cli(*args, "-n", LEAST + 2).exit_code == 0
    assert first.stat().st_mtime_ns == before
    refused(cli(*args, "-n", LEAST + 2, "--top-k", 3), "a sample with top_k 0", "this one has 3")


def test_samples_and_their_archive_have_the_same_figures(cli: Cli, folder: Path, box: Box) -> None:
    assert cli("sample", "-n", LEAST, "--bundle", box.bundle, "--preset", "fid").exit_code == 0
    args = ("--real", box.real, "--crop", "centre", "--json")
    (archive,) = Path("aim-sample").glob("*.npz")
    found = [json.loads(cli("eval", one, *args).stdout) for one in ("aim-sample", archive)]
    assert found[0]["figures"] == found[1]["figures"]
    assert found[0]["samples"]["path"] == "aim-sample"
    # An archive does not say how it was drawn, and neither does its report.
    assert found[0]["samples"]["settings"]["seeds"] == "0 to 50"
    assert found[1]["samples"]["settings"] is None
    assert "not recorded" in (folder / "aim-eval" / "report.md").read_text(encoding="utf-8")


def test_equal_sets_are_no_distance_apart(cli: Cli, folder: Path, box: Box) -> None:
    assert cli("eval", box.real, "--real", box.real).exit_code == 0
    report = report_of(folder / "aim-eval")
    assert abs(report["figures"]["fid"]) < 1e-6
    assert report["figures"]["precision"] == report["figures"]["coverage"] == 1
    assert report["memorisation"]["generated"]["median_distance"] < 1e-3
    assert report["memorisation"]["generated"]["nearer"] == 1
    assert all(row["nearest_is_own"] == 1 for row in report["classes"])


def test_statistics_in_the_place_of_pictures(cli: Cli, folder: Path, box: Box) -> None:
    assert cli("eval", box.real, "--real", box.real).exit_code == 0
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(box.real.rglob("*.png"))])
    cells = pictures.reshape(LEAST, 2, 9, 2, 9, 3).astype(np.float64).mean((2, 4))
    values = cells.transpose(0, 3, 1, 2).reshape(LEAST, 12)
    np.savez("adm.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    assert cli("eval", box.real, "--real", "adm.npz").exit_code == 0
    report = report_of(folder / "aim-eval")
    assert abs(report["figures"]["fid"]) < 1e-2
    assert "kid" not in report["figures"]
    assert report["real"]["statistics"] == "mu and sigma as stored"
    np.savez("adm.npz", arr_0=pictures, mu=values.mean(0) + 2, sigma=np.cov(values, rowvar=False))
    assert cli("eval", box.real, "--real", "adm.npz").exit_code == 0
    both = report_of(folder / "aim-eval")
    assert both["figures"]["fid"] == pytest.approx(12 * 4, abs=0.1)  # to the statistics
    assert both["figures"]["precision"] == 1  # of the pictures
    assert both["real"]["statistics"] == "mu and sigma as stored"
    assert both["real"]["pictures"] == LEAST
    np.savez("adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    refused(cli("eval", box.real, "--real", "adm.npz"), "2048 features", "ADM's are of --features")


def test_copies_of_training_pictures_show(cli: Cli, folder: Path, box: Box) -> None:
    train, names = squares(70, 18, 3)
    write(Path("train"), train, names)
    copies = Path("copies")
    copies.mkdir()
    for index in range(LEAST):  # cut anywhere, and a little off
        top, left = index % 3, index // 3 % 3
        cut = train[index, top : top + SIZE, left : left + SIZE].copy()
        cut[0, 0] ^= 3
        Image.fromarray(cut).save(copies / f"{index}.png")
    args = ("--real", box.real, "--crop", "centre", "--train", "train")
    assert cli("eval", "copies", *args).exit_code == 0
    found = report_of(folder / "aim-eval")["memorisation"]
    assert found["references"]["pictures"] == 70
    assert found["generated"]["median_distance"] < 5 < found["real"]["median_distance"]
    assert found["generated"]["nearer"] > 0.9
    assert found["real"]["nearer"] == pytest.approx(0.05, abs=0.03)


def test_checkpoint_and_bundle_measure_alike(cli: Cli, folder: Path, box: Box) -> None:
    held_out = write(Path("val"), *squares(6, SIZE, 9))
    wanted = ("--reconstruction", held_out, "--likelihood", held_out)
    assert cli("eval", box.checkpoint, *wanted, "--out", "one").exit_code == 0
    assert cli("eval", box.bundle, "--ckpt", box.checkpoint, *wanted, "--out", "two").exit_code == 0
    one, two = report_of(Path("one")), report_of(Path("two"))
    assert two["model"]["backend"] == "cpu"
    assert one["model"]["checkpoint_sha256"] == two["model"]["checkpoint_sha256"]
    for name in ("psnr_db", "pooled_psnr_db", "ssim"):
        assert one["reconstruction"][name] == pytest.approx(two["reconstruction"][name], rel=1e-2)
    assert one["reconstruction"]["codes"] == two["reconstruction"]["codes"]
    for side in ("given_class", "without_class"):
        costs = [part["likelihood"][side]["bits_per_token"] for part in (one, two)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-2)
        assert 0 < costs[0] < 8
        assert one["likelihood"][side]["bits_per_picture"] == pytest.approx(64 * costs[0])
    assert (Path("one") / "reconstructions.png").is_file()


def test_fewer_pictures(cli: Cli, folder: Path, box: Box) -> None:
    held_out = write(Path("val"), *squares(9, SIZE, 9))
    args = ("eval", box.checkpoint, "--likelihood", held_out, "--max-pictures", 3)
    assert cli(*args).exit_code == 0
    found = report_of(folder / "aim-eval")["likelihood"]["pictures"]
    assert (found["pictures"], found["classes"]) == (3, 3)


def test_bits_are_those_of_the_logits(box: Box) -> None:
    checkpoint = CheckpointModel(box.checkpoint, "cpu")
    codes = checkpoint.encode(squares(4, SIZE, 2)[0])
    classes = np.array([0, 2, 1, 3], np.int64)  # 3: no class
    model = checkpoint.checkpoint.model
    assert model is not None
    logits = model(torch.from_numpy(codes), torch.from_numpy(classes)).double()
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(codes)[..., None])
    expected = -chosen.sum((1, 2)).detach().numpy() / math.log(2)
    assert checkpoint.bits(codes, classes) == pytest.approx(expected, rel=1e-5)
    opened = Bundle.open(box.bundle)
    bundle = BundleModel(opened, load_engine(opened, backend="cpu"))
    assert bundle.bits(codes, classes) == pytest.approx(expected, rel=5e-3)
    assert np.abs(bundle.decode(codes).astype(int) - checkpoint.decode(codes)).max() <= 3


def test_a_tokenizer_alone(cli: Cli, folder: Path) -> None:
    torch.manual_seed(1)
    save_checkpoint("tokenizer.safetensors", tokenizer=VQTokenizer(TOKENIZER))
    held_out = write(Path("val"), *squares(4, 20, 9))
    args = ("eval", "--ckpt", "tokenizer.safetensors")
    assert cli(*args, "--reconstruction", held_out).exit_code == 0
    found = report_of(folder / "aim-eval")["reconstruction"]
    assert found["psnr_db"] > 0
    assert found["lpips"] is None
    assert found["pictures"]["width"] == 20
    refused(cli(*args, "--likelihood", held_out), "holds no model")


def drawn_too_early(*args: object, **more: object) -> None:
    raise AssertionError("what is wrong is said before pictures are drawn")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "there is nothing to measure"),
        (("real",), "there is nothing to measure"),
        (("--real", "real"), "--real compares pictures"),
        (("missing", "--real", "real"), "missing does not exist"),
        (("real", "--real", "missing"), "missing does not exist"),
        (("real", "--reconstruction", "real"), "--ckpt is missing"),
        (("bundle", "--real", "real"), "-n says how many"),
        (("bundle", "--real", "few", "-n", "60"), "there are 3 real pictures, too few"),
        (("bundle", "--real", "real", "-n", "6"), "there are 6 generated pictures, too few"),
        (("bundle", "--real", "real", "-n", "60"), "--crop centre or --crop random"),
        (("bundle", "--likelihood", "real"), "--ckpt is missing"),
        (("real", "--train", "real", "--likelihood", "real"), "--train tells of generated"),
        (("real", "--real", "real", "-n", "60"), "drawn already"),
        (("real", "--real", "real", "--top-k", "5"), "drawn already"),
        (("few", "--real", "real"), "there are 3 generated pictures, too few"),
        (("real", "--real", "few"), "there are 3 real pictures, too few"),
        (("small", "--real", "real"), "--crop centre or --crop random"),
        (("same", "--real", "real"), "of the 51 generated pictures equal another"),
        (("real", "--real", "real", "--features", "dino"), "there are no features 'dino'"),
        (("real", "--real", "real", "--weights", "missing.pth"), "missing.pth does not exist"),
        (("real", "--real", "real", "--device", "cuda"), "PyTorch sees no GPU"),
        (("empty", "--real", "real"), "holds no pictures"),
    ],
)
def test_refusals(
    cli: Cli,
    folder: Path,
    box: Box,
    args: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(Path("few"), *squares(3, 18, 0))
    write(Path("small"), *squares(LEAST, 17, 0))
    write(Path("same"), np.repeat(squares(1, 18, 0)[0], LEAST, 0), ["red"] * LEAST)
    Path("empty").mkdir()
    Path("real").symlink_to(box.real)
    Path("bundle").symlink_to(box.bundle)
    monkeypatch.setattr("aim_cli.commands.eval.draw_sample", drawn_too_early)
    sentence = refused(cli("eval", *args), words)
    assert len(sentence) <= 320
    assert not (folder / "aim-eval" / "report.json").exists()


def test_equal_pictures_are_measured_when_asked(cli: Cli, folder: Path, box: Box) -> None:
    write(Path("same"), np.repeat(squares(1, 18, 0)[0], LEAST, 0), ["red"] * LEAST)
    assert cli("eval", "same", "--real", box.real, "--allow-duplicates").exit_code == 0
    assert report_of(folder / "aim-eval")["figures"]["equal_pictures"]["generated"] == LEAST - 1


def test_the_checkpoint_must_be_the_bundle_s(cli: Cli, box: Box) -> None:
    torch.manual_seed(2)
    save_checkpoint("other.safetensors", AiM(MODEL).initialise(), VQTokenizer(TOKENIZER))
    args = ("eval", box.bundle, "--ckpt", "other.safetensors", "--reconstruction", box.real)
    refused(cli(*args), "has the tokenizer of a file with sha256")


def test_classes_that_the_model_lacks(cli: Cli, box: Box) -> None:
    write(Path("val"), squares(2, SIZE, 0)[0], ["blue", "violet"])
    refused(cli("eval", box.checkpoint, "--likelihood", "val"), "'violet'", "'blue'")
