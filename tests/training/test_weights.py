"""Strangers' weights: told apart, read as data, refused in one sentence where they are none."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from aim_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from .fuzz_checkpoints import campaign

MODEL = ModelConfig(8, 2, 4, 8, 1, d_state=4, head_dim=8)
WORDS = "backbone.embeddings.word_embeddings.weight"
POSITIONS = "backbone.embeddings.position_embeddings.weight"
CLASSES = "backbone.cls_embed.embedding_table.weight"
MIXER = "backbone.layers.0.mixer."

State = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> AiM:
    torch.manual_seed(0)
    return AiM(MODEL).initialise()


@pytest.fixture
def state(model: AiM) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refusal(path: Path) -> str:
    """The one sentence that a file is refused with."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 300
    return message


def loaded(path: Path, like: AiM) -> bool:
    """Whether a file holds exactly the weights of ``like``."""
    found = load_checkpoint(path).model
    assert found is not None
    ours, theirs = found.state_dict(), like.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def torch_bytes(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


# -- what a file is, whatever it is called ---------------------------------------------------------


@pytest.mark.parametrize("name", ["M.SAFETENSORS", "noend", "m.pt", "m.bin"])
def test_safetensors_under_any_name(tmp_path: Path, model: AiM, state: State, name: str) -> None:
    save_file(state, tmp_path / name)
    assert loaded(tmp_path / name, model)


@pytest.mark.parametrize("name", ["m.pt", "noend", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_under_any_name(
    tmp_path: Path, model: AiM, state: State, name: str, zipped: bool
) -> None:
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert loaded(tmp_path / name, model)


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 10)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"", "is empty"),
        (lambda: LFS, "git lfs pull"),
        (lambda: b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (lambda: b"<html>404</html>", "is a web page"),
        (tar, "is a tar archive"),
        (lambda: b"\x1f\x8b\x08" + b"\0" * 50, "compressed with gzip"),
        (lambda: zipped(["aim/model.safetensors", "aim/config.json"]), "is a zip of other files"),
        (lambda: zipped(["notes.txt"]), "has no data.pkl"),
        (npz, "holds NumPy arrays"),
        (script, "is a TorchScript program"),
        (lambda: b'{"a": 1}', "is JSON, not weights"),
        (lambda: b"hello", "neither a safetensors file nor what torch.save writes"),
        (lambda: os.urandom(64).replace(b"P", b"q")[8:] * 9, "a.pt"),
        (lambda: pickle.dumps({"a": 1}), "PyTorch did not write"),
        (lambda: b"\x80\x02", "may be cut short"),
        (lambda: b"\x80\x02" + b"]" * 410_000, "longer than 400000 instructions"),
    ],
)
def test_other_files_are_called_what_they_are(
    tmp_path: Path, make: Callable[[], bytes], words: str
) -> None:
    (tmp_path / "a.pt").write_bytes(make())
    assert words in refusal(tmp_path / "a.pt")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")
    assert "no regular file" in refusal(Path("/dev/zero"))
    assert "no checkpoint at" in refusal(tmp_path / "a\0b")


def test_sparse_giants_are_refused_without_being_read(tmp_path: Path, state: State) -> None:
    whole = save(state)
    for name, start in (("a.safetensors", whole), ("b.pt", torch_bytes(state)), ("c.pt", b"")):
        path = tmp_path / name
        path.write_bytes(start)
        os.truncate(path, 20 << 30)
        refusal(path)


# -- pickles, read as data ----------------------------------------------------------------------


def test_trainers_own_files_load(tmp_path: Path, model: AiM, state: State) -> None:
    beside = {
        "args": argparse.Namespace(lr=1e-4, path=Path("data"), sizes=(1, 2)),
        "best": np.float32(2.1),
        "curve": np.zeros(3),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "seen": {1, 2},
    }
    other = {name: tensor + 1 for name, tensor in state.items()}
    for content in (
        {"model": state, **beside},
        {"ema": state, "model": other, **beside},  # the average is what trainers evaluate
        {"ema": None, "state_dict": state},
        {"loss": torch.tensor(0.5), "model": {f"module.{n}": t for n, t in state.items()}},
        {"state_dict": {f"model.{n}": torch.nn.Parameter(t) for n, t in state.items()}},
        {"module": {"model": state}},
    ):
        torch.save(content, tmp_path / "t.pt")
        assert loaded(tmp_path / "t.pt", model)
    for protocol in (2, 3, 4, 5):
        torch.save({"model": state, **beside}, tmp_path / "t.pt", pickle_protocol=protocol)
        assert loaded(tmp_path / "t.pt", model)


class Payload:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, print, torch.load, open])
@pytest.mark.parametrize("old", [True, False])
def test_code_is_refused_by_name_and_never_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    function: Callable[..., object],
    old: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": state, "extra": Payload(function, "hacked")}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=not old)
    before = sorted(os.listdir())
    assert "code in checkpoints is never run" in refusal(tmp_path / "evil.pt")
    assert sorted(os.listdir()) == before


def test_containers_that_hold_themselves(tmp_path: Path, model: AiM, state: State) -> None:
    circle: State = {}
    circle.update(dict.fromkeys(("ema", "model", "state_dict", "module"), circle))
    torch.save(circle, tmp_path / "c.pt")
    assert "holds no tensors" in refusal(tmp_path / "c.pt")
    circle["model"] = {"module": circle, "state_dict": state}
    torch.save(circle, tmp_path / "c.pt")
    assert loaded(tmp_path / "c.pt", model)


def test_one_long_tuple_given_to_every_call(tmp_path: Path, state: State) -> None:
    """Each call would walk it: a quadratic amount of work from a small file."""
    calls = b"".join(
        (
            b"\x80\x02}(",
            b"K\x01" * 100_000,
            b"tq\x000",
            b"ctorch\nSize\nq\x010",
            b"h\x01h\x00R0" * 100_000,
            b"}.",
        )
    )
    (tmp_path / "t.pt").write_bytes(calls)
    assert "may be cut short or damaged" in refusal(tmp_path / "t.pt")


def test_a_damaged_tensor_is_found_by_its_checksum(tmp_path: Path, state: State) -> None:
    data = bytearray(torch_bytes(state))
    at = data.index(state[WORDS].numpy().tobytes())
    data[at] ^= 1
    (tmp_path / "d.pt").write_bytes(data)
    assert "is damaged" in refusal(tmp_path / "d.pt")


def test_zips_packed_again(tmp_path: Path, model: AiM, state: State) -> None:
    whole = zipfile.ZipFile(io.BytesIO(torch_bytes(state)))
    for name, method, words in (
        ("stored.pt", zipfile.ZIP_STORED, ""),
        ("deflated.pt", zipfile.ZIP_DEFLATED, "is compressed"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", method) as target:
            for info in whole.infolist():
                target.writestr(info.filename, whole.read(info))
        if words:
            assert words in refusal(tmp_path / name)
        else:
            assert loaded(tmp_path / name, model)
    with (
        zipfile.ZipFile(tmp_path / "stored.pt", "a") as target,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        target.writestr("archive/data.pkl", b"x")
    assert "twice" in refusal(tmp_path / "stored.pt")


# -- tensors that are no weights -------------------------------------------------------------------


def quantized(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to_sparse(), "a sparse tensor"),
        (quantized, "a quantized tensor"),
        (lambda t: t.to("meta"), "a meta tensor"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t.to(torch.bool), "bool"),
        (lambda t: t.to(torch.uint16), "uint16"),
        (lambda t: torch.zeros(1).expand(2**34, 8), "only 1 of its"),
        (lambda t: torch.zeros(1).expand(t.shape), "only 1 of its"),
        (lambda t: t.double() * 1e300, "beyond float32's range"),
    ],
)
def test_tensors_that_are_no_weights_are_named(
    tmp_path: Path, state: State, change: Callable[[Tensor], Tensor], words: str
) -> None:
    state[WORDS] = change(state[WORDS])
    torch.save(state, tmp_path / "odd.pt")
    message = refusal(tmp_path / "odd.pt")
    assert words in message
    assert WORDS in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [WORDS, POSITIONS, CLASSES, MIXER + "A_log"])
def test_what_is_not_finite_is_named(
    tmp_path: Path, state: State, name: str, value: float, suffix: str
) -> None:
    state[name].view(-1)[-1] = value
    path = tmp_path / f"nan{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    message = refusal(path)
    assert name in message
    assert "not finite" in message


def test_parts_of_a_tokenizer_that_draw_nothing_count_too(tmp_path: Path) -> None:
    config = TokenizerConfig(8, 2, 32, (1,), 4, encoder_blocks=1, decoder_blocks=1)
    tokenizer = VQTokenizer(config)
    tokenizer.encoder.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    path = save_checkpoint(tmp_path / "t.safetensors", tokenizer=tokenizer)
    assert "encoder.conv_in.weight" in refusal(path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_floating_point_of_any_width_is_read(
    tmp_path: Path, state: State, dtype: torch.dtype
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(narrow, tmp_path / "n.pt")
    save_file(narrow, tmp_path / "n.safetensors")
    for name in ("n.pt", "n.safetensors"):
        found = load_checkpoint(tmp_path / name).model
        assert found is not None
        for key, tensor in found.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, narrow[key].float())


def test_views_and_other_orders_in_memory(tmp_path: Path, model: AiM, state: State) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    sizes = [tensor.numel() for tensor in state.values()]
    views = zip(state, flat.split(sizes), strict=True)
    content: State = {name: view.view(state[name].shape) for name, view in views}
    content[WORDS] = state[WORDS].t().contiguous().t()
    torch.save(content, tmp_path / "views.pt")
    assert loaded(tmp_path / "views.pt", model)


def test_numbers_used_more_than_once_do_not_multiply(tmp_path: Path) -> None:
    big = AiM(ModelConfig(8, 2, 4, 8, 40, d_state=4, head_dim=8)).state_dict()
    shared: State = {}
    for tensor in big.values():
        shared.setdefault(tuple(tensor.shape), tensor.clone())
    torch.save({n: shared[tuple(t.shape)] for n, t in big.items()}, tmp_path / "s.pt")
    held = (tmp_path / "s.pt").stat().st_size
    needed = sum(t.numel() * 4 for t in big.values())
    if needed > held:
        assert "are stored" in refusal(tmp_path / "s.pt")
    else:
        load_checkpoint(tmp_path / "s.pt")


# -- geometry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["1000", "1000000", str(10**9), "9" * 5000, "٣", "01"])
def test_layers_that_are_not_there_cost_nothing(tmp_path: Path, state: State, index: str) -> None:
    state[f"backbone.layers.{index}.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "l.pt")
    assert "layer" in refusal(tmp_path / "l.pt")


def test_many_layers_of_next_to_nothing(tmp_path: Path, state: State) -> None:
    one = torch.zeros(1)
    state |= {f"backbone.layers.{index}.x": one for index in range(1, 12_000)}
    torch.save(state, tmp_path / "l.pt")
    assert "num_layers is 12000" in refusal(tmp_path / "l.pt")


def test_many_levels_of_a_tokenizer(tmp_path: Path) -> None:
    config = TokenizerConfig(8, 2, 32, (1,), 4, encoder_blocks=1, decoder_blocks=1)
    state = VQTokenizer(config).state_dict()
    for first, name in (("encoder.conv_blocks.", "res.0.conv1.weight"), ("", "")):
        if first:
            odd = {f"{first}{n}.{name}": torch.zeros(32, 32, 3, 3) for n in range(1, 40)}
        else:
            odd = {"encoder.conv_blocks.7.res.0.conv1.weight": torch.zeros(32, 32, 3, 3)}
        torch.save(state | odd, tmp_path / "t.pt")
        assert "numbered from 0" in refusal(tmp_path / "t.pt")


def test_one_tensor_under_two_prefixes(tmp_path: Path, state: State) -> None:
    state["module." + WORDS] = state[WORDS].clone()
    torch.save(state, tmp_path / "t.pt")
    assert "twice" in refusal(tmp_path / "t.pt")


# -- safetensors headers ---------------------------------------------------------------------------


def with_header(data: bytes, change: Callable[[State], object]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[WORDS].update(data_offsets=[0, 2**40]),
        lambda h: h[WORDS].update(data_offsets=[0, 256]),
        lambda h: h[WORDS].update(shape=[2**40, 2**40]),
        lambda h: h[WORDS].update(shape=[-8, -8]),
        lambda h: h[WORDS].update(shape=[True, 64]),
        lambda h: h[WORDS].update(shape=[10**4000] * 8),
        lambda h: h[WORDS].update(shape=[1] * 100_000),
        lambda h: h[WORDS].update(dtype="F128"),
        lambda h: h[WORDS].update(dtype=["F32"]),
        lambda h: h.update({WORDS: [1, 2]}),
        lambda h: h.pop(WORDS),
    ],
)
def test_headers_that_lie(tmp_path: Path, state: State, change: Callable[[State], object]) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(with_header(save(state), change))
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        struct.pack("<Q", 10**6) + b"[" * 10**6,
        struct.pack("<Q", 10**6) + b'{"a":' * 200_000,
        struct.pack("<Q", 2) + b"{}x",
        b"\0" * 8,
        b"hello world",
    ],
)
def test_headers_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    assert "cannot be read" in refusal(tmp_path / "x.safetensors")


# -- shards and folders ----------------------------------------------------------------------------


def write_shards(folder: Path, state: State, suffix: str) -> dict[str, str]:
    """A checkpoint in two shards with an index, as large published ones come."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = sorted(state)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{number}-of-00002{suffix}"
        places |= dict.fromkeys(part, shard)
        content = {name: state[name] for name in part}
        if suffix == ".safetensors":
            save_file(content, folder / shard)
        else:
            torch.save(content, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return places


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, model: AiM, state: State, suffix: str) -> None:
    write_shards(tmp_path, state, suffix)
    assert loaded(tmp_path, model)
    index = next(tmp_path.glob("*.index.json"))
    assert loaded(index, model)
    assert len(load_checkpoint(index).files) == 2
    assert load_checkpoint(index).metadata == {}  # the index is none, and nothing else is there
    stem = index.name.split(".")[0]
    (tmp_path / f"{stem}.json").write_text('{"class_names": ["a", "b"]}')
    assert load_checkpoint(tmp_path).class_names == ["a", "b"]


def test_shards_that_are_not_there(tmp_path: Path, state: State) -> None:
    places = write_shards(tmp_path, state, ".safetensors")
    index = tmp_path / "model.safetensors.index.json"
    first, second = sorted(set(places.values()))
    outside = tmp_path.parent / "outside.safetensors"
    save_file(state, outside)
    for shard in ("../outside.safetensors", str(outside), "..", "a\\b", "", "no\nne", "pipe"):
        index.write_text(json.dumps({"weight_map": places | {WORDS: shard}}))
        refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "missing" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, first)}))
    assert "lacks it" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-4])
    assert "cut short" in refusal(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 10**6, "\0"):
        index.write_text(text)
        assert "index" in refusal(tmp_path)


def test_run_folders(tmp_path: Path, model: AiM) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert "no step has been saved yet" in refusal(run)
    torch.save({"learners": {}, "fingerprint": "{}"}, run / "checkpoints" / "step-00000001.pt")
    assert "wrote no model yet" in refusal(run)
    assert "name the run folder" in refusal(run / "checkpoints" / "step-00000001.pt")
    save_checkpoint(run / "model.safetensors", model)
    assert loaded(run, model)

    whole = tmp_path / "whole"  # of one command: tokenizer and model are runs of their own
    (whole / "model" / "checkpoints").mkdir(parents=True)
    assert "no step has been saved yet" in refusal(whole)
    save_checkpoint(whole / "model" / "model.safetensors", model)
    assert loaded(whole, model)


def test_other_folders(tmp_path: Path, model: AiM, state: State) -> None:
    assert "a folder without any of" in refusal(tmp_path)
    save_file(state, tmp_path / "aim_b.safetensors")
    (tmp_path / "README.md").write_text("An AiM.")
    assert loaded(tmp_path, model)
    torch.save(state, tmp_path / "aim_l.pt")
    assert "several files of weights (aim_b.safetensors, aim_l.pt)" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert "is a bundle" in refusal(tmp_path)


# -- the JSON file beside --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"model": {"position_offset": true}}', "it may be 0 or 1"),
        (b'{"model": {"position_offset": []}}', "it may be 0 or 1"),
        (b'{"model": {"position_offset": 1.0}}', "it may be 0 or 1"),
        (b'{"model": {"position_offset": "' + b"x" * 500 + b'"}}', "it may be 0 or 1"),
    ],
)
def test_odd_metadata(tmp_path: Path, state: State, text: bytes, words: str) -> None:
    save_file(state, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_bytes(text)
    assert words in refusal(tmp_path / "m.safetensors")


def test_metadata_that_is_no_file(tmp_path: Path, model: AiM, state: State) -> None:
    save_file(state, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf{}")
    assert loaded(tmp_path / "m.safetensors", model)
    (tmp_path / "m.json").unlink()
    os.mkfifo(tmp_path / "m.json")
    assert "no regular file" in refusal(tmp_path / "m.safetensors")
    (tmp_path / "m.json").unlink()
    (tmp_path / "m.json").touch()
    os.truncate(tmp_path / "m.json", 20 << 30)
    assert "bytes" in refusal(tmp_path / "m.safetensors")


# -- the rest by chance ----------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are read in forked children")
def test_damaged_checkpoints_end_in_a_sentence(tmp_path: Path) -> None:
    outcome = campaign(3, seed=0, folder=tmp_path)
    assert outcome.failures == []
    assert outcome.counts["refused"] > 10
