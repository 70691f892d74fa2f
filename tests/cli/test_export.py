from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ..export.interpreter import binaries
from ..runtime.tiny_bundle import zip_bundle
from .conftest import Cli, Spawn, refused, tree

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from aim_cli.commands.export import read_class_names  # noqa: E402
from aim_export import ExportError, export_bundle  # noqa: E402
from aim_runtime import BackendError, Bundle  # noqa: E402
from aim_runtime.engines.tensorrt.library import find_library  # noqa: E402
from aim_training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from aim_training.config import ModelConfig, TokenizerConfig  # noqa: E402
from aim_training.model import AiM  # noqa: E402
from aim_training.tokenizer import VQTokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("lowered_once")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Networks this small lose more to waiting for threads than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, its tokenizer, and names for its classes."""
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"), d_model=32)


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of such a model that is just wide enough for the CUDA kernels."""
    folder = tmp_path_factory.mktemp("wide")
    export_bundle(small_checkpoint(folder, d_model=64), folder / "made")
    return folder / "made"


def small_checkpoint(folder: Path, d_model: int) -> Path:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        TokenizerConfig(
            codebook_size=32,
            channels=32,
            channel_multipliers=(1, 1),
            z_channels=32,
            encoder_blocks=1,
            decoder_blocks=1,
        )
    )
    config = ModelConfig(
        vocab_size=32, num_classes=3, num_tokens=9, d_model=d_model, num_layers=1, d_state=32
    )
    names = {"class_names": ["cat", "dog", "red panda"]}
    return save_checkpoint(folder / "small.safetensors", AiM(config).initialise(), tokenizer, names)


def test_export_reports_parity_and_the_bundle_draws(
    cli: Cli, checkpoint: Path, folder: Path
) -> None:
    (folder / "names.txt").write_text("one\ntwo\nthree\n")
    done = cli(
        *("export", "--ckpt", checkpoint, "--out", "made", "--class-names", "names.txt"),
        *("--name", "numbers", "--license", "CC0", "--description", "Draws numbers."),
        *("--cfg-scale", 1.5, "--top-k", 8, "--include", "names.txt"),
    )
    assert done.exit_code == 0
    assert "parity over 9 steps, 2 images" in done.stdout
    assert "plain, cpu" in done.stdout
    assert "same token drawn" in done.stdout
    assert "100.00%" in done.stdout
    assert "bundle  made (" in done.stdout
    assert "comparing 9 steps with PyTorch" in done.stderr
    shown = json.loads(cli("info", "made", "--json").stdout)
    assert shown["name"] == "numbers"
    assert shown["license"] == "CC0"
    assert shown["description"] == "Draws numbers."
    assert shown["class_names"] == ["one", "two", "three"]
    assert shown["sampling"] == {"cfg_scale": 1.5, "temperature": 1.0, "top_k": 8, "top_p": 0.98}
    assert (folder / "made" / "names.txt").read_text() == "one\ntwo\nthree\n"
    assert "names.txt" in shown["files"]
    assert shown["provenance"]["parity"]["token_agreement"] == 1
    assert cli("generate", "--bundle", "made", "-c", "two").exit_code == 0
    assert (folder / "aim-images" / "two_seed0.png").exists()
    refused(cli("export", "--ckpt", checkpoint, "--out", "made"), "made", "holds a bundle already")


def test_weights_of_few_bits(cli: Cli, checkpoint: Path, folder: Path) -> None:
    done = cli("export", "--ckpt", checkpoint, "--out", "made", "--precision", "int8")
    assert done.exit_code == 0
    assert "Kullback-Leibler divergence, nats" in done.stdout
    assert "2e-03" in done.stdout
    assert "same best token" in done.stdout
    assert "weights in int8" in cli("info", "made").stdout
    assert cli("generate", "--bundle", "made", "-c", "0").exit_code == 0
    (png,) = (folder / "aim-images").glob("*.png")
    with Image.open(png) as saved:
        assert json.loads(saved.text["aim"])["precision"] == "int8"  # type: ignore[attr-defined]
    refused(cli("generate", "--bundle", "made", "--precision", "fp32"), "in 'int8' only")
    for option in ("--cuda", "--trt"):
        words = f"--precision int4 is for CPUs; {option} takes --precision fp32 or fp16"
        asked = ("--precision", "int4", option)
        refused(cli("export", "--ckpt", checkpoint, "--out", "other", *asked), words)
    assert not (folder / "other").exists()


class Code:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing there", "no checkpoint at"),
        ("wrong shape", "wrong shapes"),
        ("code", "is not a plain weights file"),
        ("cut short", "cannot be read"),
        ("no tensors", "holds no tensors"),
        ("tokenizer only", "holds a tokenizer only"),
    ],
)
def test_bad_checkpoints(cli: Cli, checkpoint: Path, folder: Path, kind: str, words: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "bad.pt"
    state = load_file(checkpoint)
    if kind == "wrong shape":
        state["mamba.backbone.norm_f.weight"] = torch.zeros(5)
        torch.save(state, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    elif kind == "cut short":
        path = folder / "bad.safetensors"
        path.write_bytes(checkpoint.read_bytes()[:1000])
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "tokenizer only":
        path = folder / "bad.safetensors"
        save_file({n: t for n, t in state.items() if n.startswith("vqvae.")}, path)
    before = tree(folder)
    refused(cli("export", "--ckpt", path, "--out", "made"), words)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out", "made", "--precision", "int2"], "int2"),
        (["--out", "made", "--position-offset", "2"], "--position-offset"),
        (["--out", "made", "--tokenizer", "nowhere"], "no checkpoint at nowhere"),
        (["--out", "made", "--class-names", "nowhere"], "'nowhere' does not exist"),
        (["--out", "made", "--class-names", "one.txt"], "the model has 3 classes"),
        (["--out", "made", "--class-names", "binary"], "not a text file"),
        (["--out", "made", "--top-p", "1.5"], "top_p is 1.5"),
        (["--out", "made", "--include", "nowhere"], "no such file"),
        (["--out", "mine"], "mine"),
        (["--out", "one.txt"], "one.txt"),
    ],
)
def test_bad_arguments(
    cli: Cli, checkpoint: Path, folder: Path, args: list[str], words: str
) -> None:
    (folder / "one.txt").write_text("one\n")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("important")
    before = tree(folder)
    refused(cli("export", "--ckpt", checkpoint, *args), words)
    assert tree(folder) == before


def test_interrupted(
    cli: Cli, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aim_export.bundle.lower_prologue", interrupt)
    stopped = cli("export", "--ckpt", checkpoint, "--out", "new/made")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("Error: interrupted; nothing was written\n")
    assert tree(folder) == set()


def test_a_summary_that_nobody_reads(
    cli: Cli, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[OSError] = [BrokenPipeError(errno.EPIPE, "Broken pipe")]

    def echo(message: object = None, err: bool = False, **options: object) -> None:
        if not err and failures:
            raise failures.pop()

    monkeypatch.setattr("click.echo", echo)
    assert cli("export", "--ckpt", checkpoint, "--out", "made").exit_code == 0
    Bundle.open(folder / "made").verify()


def test_engines_are_added_to_a_bundle_that_exists(
    cli: Cli, checkpoint: Path, folder: Path
) -> None:
    try:
        portable = find_library().portable
    except BackendError:
        pytest.skip("no TensorRT: pip install tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs")
    if not portable:
        pytest.skip("TensorRT is installed, which needs a GPU to build engines")
    done = cli("export", "--ckpt", checkpoint, "--out", "made", "--trt")
    assert done.exit_code == 0
    assert "built the step's engine with TensorRT for RTX" in done.stderr
    files = json.loads(cli("info", "made", "--json").stdout)["files"]
    engines = [name for name in files if name.startswith("engines/tensorrt-rtx-")]
    assert len(engines) == 3
    again = cli("export", "--bundle", "made", "--trt")
    assert again.exit_code == 0
    assert again.stdout.startswith("bundle  made (")
    assert set(json.loads(cli("info", "made", "--json").stdout)["files"]) == set(files)


def test_a_step_for_the_cpu_is_added_to_a_bundle_that_exists(
    cli: Cli, wide_bundle: Path, folder: Path
) -> None:
    shutil.copytree(wide_bundle, "made")
    before = tree(folder)
    done = cli("export", "--bundle", "made", "--cpu")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("bundle  made (")
    assert "the fused step's scores differ by" in done.stderr
    assert tree(folder) == before
    assert json.loads(cli("info", "made", "--json").stdout)["cpu_step"]["graph"] == "fused"
    Bundle.open("made").verify()
    assert cli("export", "--bundle", "made", "--cpu", "--quiet").stderr == ""
    packed = zip_bundle(Path("made"), Path("made.zip"))
    refused(cli("export", "--bundle", packed, "--cpu"), "unpack it first")


def test_a_decoder_of_8_bits_is_added_to_a_bundle_that_exists(
    cli: Cli, wide_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_export.decoder.LEAST_PSNR_DB", 0.0)
    monkeypatch.setattr("aim_export.decoder._WANTED_PSNR_DB", 0.0)
    shutil.copytree(wide_bundle, "made")
    assert json.loads(cli("info", "made", "--json").stdout)["cpu_decoder"]["graph"] == "plain"
    assert "'aim export --bundle made --cpu' adds one where that gains" in " ".join(
        cli("info", "made").stdout.split()
    )
    before = tree(folder)
    done = cli("export", "--bundle", "made", "--cpu", "--precision", "int8")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"8-bit convolutions decode at \d+\.\d dB PSNR", done.stderr)
    assert tree(folder) - before == {"made/decoder-cpu.json", "made/decoder-cpu.onnx"}
    found = json.loads(cli("info", "made", "--json").stdout)["cpu_decoder"]
    assert found["graph"] == "int8"
    assert f"int8 graph, {found['psnr_db']:.1f} dB PSNR" in cli("info", "made").stdout
    Bundle.open("made").verify()


def engines_of(cli: Cli, bundle: str) -> list[str]:
    files = json.loads(cli("info", bundle, "--json").stdout)["files"]
    return sorted(name for name in files if name.startswith("engines/"))


def uncompiled(
    kernels: Any, capabilities: Any, *, progress: Callable[[int, int], None] | None = None
) -> Any:
    """`compile_kernels` in no time: the real one takes minutes, and has tests of its own."""
    found = binaries(list(kernels), capabilities)
    if progress is not None:
        progress(len(found), len(found))
    return found


def test_kernels_are_added_to_a_bundle_that_exists(
    cli: Cli, wide_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("aim_export.cuda.bundle", reason="Triton is not installed")
    monkeypatch.setattr(module, "compile_kernels", uncompiled)
    shutil.copytree(wide_bundle, "made")
    drawn = ("generate", "--bundle", "made", "-c", "dog", "--backend", "cpu", "--out")
    assert cli(*drawn, "before").exit_code == 0

    done = cli(
        *("export", "--bundle", "made", "--cuda"),
        *("--cuda-precision", "int8-state16,fp16", "--cuda-precision", "fp32", "--cuda-precision"),
        *("fp16", "--cuda-arch", "8.0, 12.0"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("bundle  made (")
    assert re.search(r"compiling \d+ kernels for compute capability 8.0, 12.0\n", done.stderr)
    assert "compiling kernels\n" in done.stderr  # the bar's label, which is all a log file gets
    kernels = ["constants.bin", "kernels-sm120.bin", "kernels-sm80.bin"]
    plans = [f"plan-{precision}.json" for precision in ("fp16", "fp32", "int8-state16")]
    assert engines_of(cli, "made") == [f"engines/cuda/{name}" for name in kernels + plans]
    Bundle.open("made").verify()

    assert cli(*drawn, "after").exit_code == 0
    before, after = (
        Image.open(next(Path(name).glob("dog_*.png"))).tobytes() for name in ("before", "after")
    )
    assert before == after

    assert cli("export", "--bundle", "made", "--cuda", "--quiet").stderr == ""
    names = {f"kernels-sm{capability}.bin" for capability in module.CAPABILITIES}
    names |= {f"plan-{precision}.json" for precision in module.PRECISIONS}
    assert engines_of(cli, "made") == sorted(
        f"engines/cuda/{name}" for name in names | {"constants.bin"}
    )


def test_kernels_cannot_be_made_for_every_model(cli: Cli, checkpoint: Path, folder: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = cli("export", "--ckpt", checkpoint, "--out", "made", "--cuda")
    refused(done, "a multiple of 64 for d_model, not 32")
    assert cli("generate", "--bundle", "made").exit_code == 0


def test_interrupted_while_compiling(
    cli: Cli, wide_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("aim_export.cuda.bundle", reason="Triton is not installed")

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compile_kernels", interrupt)
    shutil.copytree(wide_bundle, "made")
    before = tree(folder)
    stopped = cli("export", "--bundle", "made", "--cuda")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("Error: interrupted; made is whole, without new CUDA kernels\n")
    assert tree(folder) == before


def test_help_names_what_kernels_are_compiled_for(cli: Cli) -> None:
    module = pytest.importorskip("aim_export.cuda.bundle", reason="Triton is not installed")
    words = " ".join(cli("export", "--help").stdout.split())
    formats = list(module.FORMATS)
    assert f"formats to compile for: {', '.join(formats)}. [default: the first four]" in words
    assert set(module.PRECISIONS) == set(formats[:4])
    archs = ", ".join(f"{capability / 10}" for capability in module.CAPABILITIES)
    assert f"capabilities to compile for: {archs}. [default: all]" in words


def test_kernels_need_triton(spawn: Spawn, folder: Path) -> None:
    program = "import sys; sys.modules['triton'] = None; from aim_cli.main import main; main()"
    process = spawn("export", "--bundle", "made", "--cuda", python=("-c", program))
    assert process.communicate(timeout=120)[1] == (
        "Error: no kernels can be compiled: Triton is not installed; "
        "pip install 'aim-runtime[kernels]'\n"
    )
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--cuda-arch", "8.0"], "--cuda-arch says what --cuda compiles for; give --cuda too"),
        (["--trt", "--cuda-precision", "fp16"], "--cuda-precision says what --cuda compiles for"),
        (["--cuda", "--cuda-arch", "8.0,7.5"], "--cuda-arch is '7.5'; kernels can be for 8.0, 8.6"),
        (["--cuda", "--cuda-arch", "90"], "--cuda-arch is '90'"),
        (["--cuda", "--cuda-arch", ""], "--cuda-arch is ''"),
        (["--cuda", "--cuda-precision", "int4"], "--cuda-precision is 'int4'; kernels can be for"),
        (["--cuda", "--top-k", "3"], "--top-k makes a new bundle"),
        (["--cuda"], "made"),
    ],
)
def test_bad_arguments_for_kernels(cli: Cli, folder: Path, args: list[str], words: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    refused(cli("export", "--bundle", "made", *args), words)
    assert tree(folder) == set()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--bundle"),
        (["--ckpt", "a.pt"], "there is no checkpoint at a.pt"),
        (["--out", "made"], "--ckpt"),
        (["--bundle", "made"], "--trt"),
        (["--bundle", "made", "--trt", "--ckpt", "a.pt"], "--ckpt makes a new bundle"),
        (["--bundle", "made", "--trt", "--top-k", "3"], "--top-k makes a new bundle"),
        (["--bundle", "made"], "--cpu"),
        (["--bundle", "made", "--cpu", "--top-k", "3"], "--top-k makes a new bundle"),
        (["--bundle", "made", "--cpu"], "made"),
        (["--bundle", "made", "--trt", "--precision", "int8"], "--precision makes a new bundle"),
        (["--bundle", "made", "--cpu", "--precision", "fp16"], "--precision makes a new bundle"),
        (["--bundle", "made", "--trt"], "no engines can be built: TensorRT is not installed"),
        (["--ckpt", "a.pt", "--trt", "--cuda"], "there is no checkpoint at a.pt"),
    ],
)
def test_bad_arguments_for_engines(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.setattr("aim_runtime.engines.tensorrt.library._MODULES", {"TensorRT": ("no_trt",)})
    refused(cli("export", *args), words)
    assert tree(folder) == set()


def test_needs_no_training_packages(spawn: Spawn) -> None:
    program = "import sys; sys.modules['accelerate'] = None; import aim_export"
    assert spawn(python=("-c", program)).communicate(timeout=120)[1] == ""


def test_a_bundle_is_named_after_its_checkpoint(
    cli: Cli, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorRT and Triton: the bundle is made, and the last lines say what is missing."""
    monkeypatch.setattr("aim_runtime.engines.tensorrt.library._MODULES", {"TensorRT": ("no_trt",)})
    monkeypatch.setitem(sys.modules, "triton", None)
    done = cli(
        *("export", "--ckpt", checkpoint, "--trt", "--cuda", "--cuda-arch", "9.0,8.0"),
        *("--cuda-precision", "fp16"),
    )
    assert done.exit_code == 0
    assert "bundle  small (" in done.stdout
    assert cli("info", "small").exit_code == 0
    assert done.stderr.splitlines()[-2:] == [
        "Warning: no kernels can be compiled: Triton is not installed; pip install "
        "'aim-runtime[kernels]'; then add them with: aim export --bundle small --cuda "
        "--cuda-precision fp16 --cuda-arch 9.0,8.0",
        "Warning: no engines can be built: TensorRT is not installed; pip install "
        "'aim-runtime[tensorrt]'; then add them with: aim export --bundle small --trt",
    ]
    again = cli("export", "--ckpt", checkpoint, "--trt")
    refused(again, "small holds a bundle already")

    # Of what is asked for a bundle that exists, something must be done.
    before = tree(folder)
    refused(cli("export", "--bundle", "small", "--trt", "--cuda"), "Triton is not installed")
    refused(cli("export", "--bundle", "small", "--trt"), "TensorRT is not installed")
    assert tree(folder) == before


def test_what_can_be_added_to_a_bundle_is(
    cli: Cli, wide_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("aim_export.cuda.bundle", reason="Triton is not installed")
    monkeypatch.setattr(module, "compile_kernels", uncompiled)
    monkeypatch.setattr("aim_runtime.engines.tensorrt.library._MODULES", {"TensorRT": ("no_trt",)})
    shutil.copytree(wide_bundle, "made")
    done = cli("export", "--bundle", "made", "--cuda", "--trt", "--cuda-precision", "fp16")
    assert done.exit_code == 0
    assert "engines/cuda/plan-fp16.json" in engines_of(cli, "made")
    assert done.stderr.splitlines()[-1].endswith("aim export --bundle made --trt")


@pytest.mark.parametrize("where", ["run", "run/model"])
def test_a_run_folder_is_a_checkpoint(
    cli: Cli, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    made: list[tuple[Path, Path]] = []

    def export_bundle(ckpt: Path, out: Path, **options: Any) -> Any:
        made.append((load_checkpoint(ckpt).path, out))
        raise ExportError("far enough")

    monkeypatch.setattr("aim_export.bundle.export_bundle", export_bundle)
    (folder / where / "checkpoints").mkdir(parents=True)
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(checkpoint.with_suffix(suffix), folder / where / f"model{suffix}")
    refused(cli("export", "--ckpt", "run"), "far enough")
    # Not into the run folder itself, which has the name already.
    assert made == [
        (Path("run") / Path(where).relative_to("run") / "model.safetensors", Path("run-bundle"))
    ]


def test_a_tokenizers_run_folder(cli: Cli, checkpoint: Path, folder: Path) -> None:
    tokenizer = load_checkpoint(checkpoint).tokenizer
    save_checkpoint(folder / "run" / "tokenizer.safetensors", tokenizer=tokenizer)
    refused(cli("export", "--ckpt", "run", "--out", "made"), "holds a tokenizer only")
    (folder / "new" / "checkpoints").mkdir(parents=True)
    refused(cli("export", "--ckpt", "new"), "no step has been saved yet")


@pytest.mark.parametrize(
    "text",
    [
        b"eins\nzwei\ndrei\n",
        b"eins\r\nzwei\r\ndrei",
        "\ufeffeins\nzwei\ndrei\n\n".encode(),
        "eins\nzwei\ndrei\n".encode("utf-16"),
        b"eins\rzwei\rdrei",
    ],
)
def test_class_names_of_any_editor(folder: Path, text: bytes) -> None:
    (folder / "names.txt").write_bytes(text)
    assert read_class_names(Path("names.txt")) == ["eins", "zwei", "drei"]


def test_class_names_that_are_no_text_file(cli: Cli, checkpoint: Path, folder: Path) -> None:
    os.mkfifo("pipe")
    Path("huge").touch()
    os.truncate("huge", 20 << 30)
    for path, words in (
        ("pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        (".", "no regular file"),
        ("huge", "bytes; at most"),
    ):
        refused(cli("export", "--ckpt", checkpoint, "--class-names", path), words)


def test_kernels_for_a_bundle_take_no_pytorch(spawn: Spawn, folder: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = (
        "import sys; sys.modules['torch'] = None; from aim_export.cuda.bundle import draft_plan; "
        "from aim_export.cuda.weights import Constants; from aim_runtime import Bundle; "
        "print(len(draft_plan(Bundle.open(), 'fp16', Constants()).kernels()) > 10)"
    )
    assert spawn(python=("-c", program)).communicate(timeout=120) == ("True\n", "")


# Runs the command with PyTorch barred, over and over in one process; prints how each run ended.
WITHOUT_PYTORCH = """
import json, sys
sys.modules["torch"] = None
from click.testing import CliRunner
from aim_cli.main import aim
from aim_export.cuda import bundle, compile

def fails(kernels, *args, **options):
    raise compile.CompileError("scan does not compile for compute capability 9.0: no registers")

bundle.compile_kernels = fails
found = []
for run in json.loads(sys.argv[1]):
    result = CliRunner().invoke(aim, ["export", *run], prog_name="aim")
    found.append((result.exit_code, result.stderr))
print(json.dumps(found))
"""


def test_kernels_for_a_bundle_fail_without_pytorch_as_with_it(
    spawn: Spawn, bundle: Path, wide_bundle: Path, folder: Path
) -> None:
    """Every way in which adding kernels can end early, in a process that has no PyTorch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    shutil.copytree(bundle, "narrow")
    for name in ("damaged", "renamed"):
        shutil.copytree(wide_bundle, name)
    Path("damaged", "step.weights").write_bytes(b"short")
    rename_tensor(Path("renamed"), b"word_table", b"word_tabla")
    Path("text").write_text("no bundle")
    with zipfile.ZipFile("packed.zip", "w") as archive:
        for file in wide_bundle.iterdir():
            archive.write(file, file.name)
    one = ("--cuda-precision", "fp16", "--cuda-arch", "9.0")
    cases = [
        (["--bundle", "nowhere", "--cuda"], "nowhere"),
        (["--bundle", "text", "--cuda"], "text"),
        (["--bundle", "packed.zip", "--cuda", *one], "unpack it first"),
        (["--bundle", "damaged", "--cuda", *one], "step.weights"),
        (["--bundle", "narrow", "--cuda", *one], "fp16 want a power of two from 16"),
        (["--bundle", "renamed", "--cuda", *one], "have no 'word_table'"),
        (["--bundle", str(wide_bundle), "--cuda", *one], "no registers"),
        (["--bundle", str(wide_bundle), "--cuda", "--cuda-precision", "fp7"], "fp7"),
        (["--bundle", str(wide_bundle), "--cuda", "--cuda-arch", "1.0"], "1.0"),
        (["--bundle", str(wide_bundle), "--cuda", "--name", "new"], "makes a new bundle"),
        (["--bundle", str(wide_bundle)], "what to add"),
        (["--cuda"], "--ckpt is missing"),
        (["--ckpt", "model.pt", "--cuda"], "needs torch, which is not installed"),
    ]
    before = tree(wide_bundle)
    process = spawn(json.dumps([args for args, _ in cases]), python=("-c", WITHOUT_PYTORCH))
    stdout, stderr = process.communicate(timeout=240)
    assert stderr == ""
    for (args, words), (code, said) in zip(cases, json.loads(stdout), strict=True):
        *_, sentence = said.strip().splitlines()
        assert code == 2, (args, said)
        assert sentence.startswith("Error: "), (args, said)
        assert words in sentence, (args, said)
        assert "bug in aim" not in said
    assert tree(wide_bundle) == before


def rename_tensor(bundle: Path, old: bytes, new: bytes) -> None:
    """Give a tensor of the step another name, of the same length, as if another tool wrote it."""
    file, manifest = bundle / "step.onnx", bundle / "manifest.json"
    data = file.read_bytes()
    file.write_bytes(data.replace(old, new))
    digests = [hashlib.sha256(some).hexdigest() for some in (data, file.read_bytes())]
    manifest.write_text(manifest.read_text().replace(*digests))
