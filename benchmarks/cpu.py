"""Measure the product on this machine's CPU: `python benchmarks/cpu.py`.

Two models: the one in the box, as people meet it, and a network of AiM-B's size (148 M parameters,
or another published size) with **random weights**, for speed alone. Needs the `export` extra,
which exports the random network once, into a cache folder. Each figure comes from a process of its
own; the step is also timed in plain PyTorch, by turns with the engine in one process, so that the
ratio means something on a machine whose speed drifts. Ends in a Markdown table and one JSON line.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli import human
from aim_cli.commands.bench import machine
from aim_cli.measure import Measurement, Workload, measure
from aim_cli.options import EngineOptions
from aim_runtime import Bundle

if TYPE_CHECKING:
    from aim_export.onnx.graph import Precision
    from aim_training.model import AiM

IMPORTS = 5
STEPS_A_TURN = 16
TURNS = 6
ROWS = 2  # one image under guidance
GUIDANCE = 4.0


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--preset", default="B", show_default=True, help="Size of the random network.")
@click.option(
    "--preset-bundle",
    type=click.Path(path_type=Path),
    help="Bundle of that size. [default: random weights, exported into the cache]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aim-runtime",
    show_default=True,
    help="Where the random bundle is kept between runs.",
)
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
def main(
    bundle: Path | None,
    preset: str,
    preset_bundle: Path | None,
    cache: Path,
    threads: int | None,
    repeats: int,
) -> None:
    """Measure this machine."""
    say("import time and install size")
    found: dict[str, Any] = machine() | {
        "threads": threads,
        "bundle": "the model in the box" if bundle is None else bundle.name,
        "import_seconds": import_seconds(),
        "installed_bytes": installed_bytes(),
    }
    say("aim generate -n 16")
    found["command_seconds"] = command_seconds(bundle, threads)
    path = None if bundle is None else str(bundle)
    engine = EngineOptions(threads=threads)
    rows = []
    for batch in (1, 4, 16):
        say(f"requests of {human.count(batch, 'image')}")
        rows.append(measure(Workload(path, batch, repeats, "cpu", engine=engine)))
    found["box"] = [row.to_dict() for row in rows]

    random = preset_bundle or random_bundle(preset, cache)
    found["parity"] = Bundle.open(random).manifest.provenance.get("parity")
    say(f"AiM-{preset}: one image")
    large = measure(Workload(str(random), 1, 2, "cpu", cfg_scale=GUIDANCE, engine=engine))
    found["random"] = {"preset": preset, **large.to_dict()}
    say(f"AiM-{preset}: the step, by turns in ONNX Runtime and PyTorch")
    found["step"] = in_fresh_process(compare_steps, str(random), preset, threads)

    click.echo(markdown(found, rows, large, preset))
    click.echo()
    click.echo(json.dumps(found))


def say(what: str) -> None:
    """Progress, on stderr."""
    click.echo(f"measuring {what}", err=True)


def import_seconds() -> float:
    """Median over fresh processes of `import aim_runtime`."""
    program = (
        "import time; start = time.perf_counter(); import aim_runtime; "
        "print(time.perf_counter() - start)"
    )
    times = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        )
        for _ in range(IMPORTS)
    ]
    return statistics.median(times)


def installed_bytes() -> dict[str, int]:
    """Size on disk of the four packages, and of each distribution that they need to run."""
    packages = ("aim_runtime", "aim_cli", "aim_export", "aim_training")
    sizes = {"aim-runtime": sum(folder_bytes(name) for name in packages)}
    waiting = ["aim-runtime"]
    while waiting:
        for requirement in metadata.requires(waiting.pop()) or []:
            name, _, marker = requirement.partition(";")
            name = re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0].lower()
            if "extra ==" in marker or name in sizes:
                continue
            try:
                files = metadata.files(name) or []
            except metadata.PackageNotFoundError:
                continue  # for another platform
            paths = (Path(str(file.locate())) for file in files)
            sizes[name] = sum(path.stat().st_size for path in paths if counts(path))
            waiting.append(name)
    return sizes


def folder_bytes(package: str) -> int:
    """Size of a package's own files."""
    spec = util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return sum(p.stat().st_size for p in Path(spec.origin).parent.rglob("*") if counts(p))


def counts(path: Path) -> bool:
    """Whether a file belongs to an installation, which compiled bytecode does not."""
    return path.is_file() and path.suffix != ".pyc"


def command_seconds(bundle: Path | None, threads: int | None) -> float:
    """The real command, from the start of its process to its end, 16 PNGs written."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "aim_cli", "generate", "--class", "0", "-n", "16", "-q"]
        command += ["--out", folder]
        command += [] if bundle is None else ["--bundle", str(bundle)]
        command += [] if threads is None else ["--threads", str(threads)]
        started = time.perf_counter()
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return time.perf_counter() - started


def random_bundle(preset: str, cache: Path, precision: Precision = "fp32") -> Path:
    """A bundle of a published size with random weights and tokenizer, made once."""
    suffix = "" if precision == "fp32" else f"-{precision}"
    path = cache / f"random-{preset.lower()}{suffix}"
    if not path.exists():
        say(f"nothing yet: exporting a random AiM-{preset} into {path}")
        in_fresh_process(export_random, preset, path, precision)
    return path


def export_random(preset: str, path: Path, precision: Precision) -> None:
    """Initialise both networks and export them, parity report included."""
    import torch

    from aim_export import export_bundle
    from aim_training.checkpoint import save_checkpoint
    from aim_training.config import TokenizerConfig
    from aim_training.tokenizer import VQTokenizer

    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        checkpoint = save_checkpoint(
            Path(folder) / "random.safetensors",
            random_network(preset),
            VQTokenizer(TokenizerConfig()),
        )
        export_bundle(
            checkpoint,
            path,
            precision=precision,
            name=f"AiM-{preset}, random weights",
            description="Draws noise. For measurements of speed.",
            license="MIT",
        )


def random_network(preset: str) -> AiM:
    """A network of a published size whose layers all take part.

    The published initialisation closes every gate, so that the layers would not reach the logits
    and the parity report would compare next to nothing.
    """
    import torch

    from aim_training.config import PRESETS
    from aim_training.model import AiM

    network = AiM(PRESETS[preset]).initialise().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN" in name:
                parameter.normal_(0.0, 0.02)
    return network


def compare_steps(bundle: str, preset: str, threads: int | None) -> dict[str, float]:
    """Milliseconds of one step of `ROWS` rows in either engine, measured by turns."""
    import numpy as np
    import torch

    from aim_runtime import Bundle
    from aim_runtime.engines.backends import load_engine
    from aim_training.config import PRESETS

    cores = threads or machine()["cores"]
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    engine = load_engine(Bundle.open(bundle), backend="cpu", threads=cores)
    model = random_network(preset)
    classes = np.array([0, PRESETS[preset].num_classes])
    tokens = np.arange(TURNS * STEPS_A_TURN)

    rows = engine.start(ROWS, engine.prologue(classes))

    def onnx_step(step: int) -> None:
        rows.step(np.full(ROWS, tokens[step]), np.full(ROWS, step))

    conditioning = model.prologue(torch.from_numpy(classes))
    state = model.init_state(ROWS)

    def torch_step(step: int) -> None:
        nonlocal state
        token = torch.full((ROWS,), int(tokens[step]))
        _, state = model.step(token, torch.full((ROWS,), step), conditioning, state)

    with torch.inference_mode():
        times: dict[str, list[float]] = {"onnxruntime_ms": [], "pytorch_ms": []}
        for turn in range(TURNS):
            for name, run in (("onnxruntime_ms", onnx_step), ("pytorch_ms", torch_step)):
                measured = time_steps(run, turn * STEPS_A_TURN)
                if turn:  # the first turn warms up
                    times[name] += measured
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": medians["pytorch_ms"] / medians["onnxruntime_ms"]}


def time_steps(run: Callable[[int], None], first: int) -> list[float]:
    """Milliseconds of each of the next steps."""
    times = []
    for step in range(first, first + STEPS_A_TURN):
        started = time.perf_counter()
        run(step)
        times.append((time.perf_counter() - started) * 1000)
    return times


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this file in a new process, so that its memory ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def markdown(
    found: dict[str, Any], rows: list[Measurement], large: Measurement, preset: str
) -> str:
    """The figures as a table for RESULTS.md."""
    installed = found["installed_bytes"]
    ours = installed["aim-runtime"]
    step = found["step"]
    threads = found["threads"] or found["cores"]
    one, *_, sixteen = rows
    lines = [
        (f"`{found['cpu']}`, threads", str(threads)),
        ("`import aim_runtime`", human.duration(found["import_seconds"])),
        ("installed: aim-runtime alone", human.size(ours)),
        ("installed: with all it needs to run", human.size(sum(installed.values()))),
        (f"**{found['bundle']}**", ""),
        ("`aim generate -n 16`, new process to last PNG", human.duration(found["command_seconds"])),
        ("first image, from the start of a process", human.duration(one.process_seconds)),
        ("loading the model", human.duration(one.load_seconds)),
        *(
            (f"requests of {row.batch}", human.rate(row.images_per_second, "images"))
            for row in rows
        ),
        ("peak memory, 16 images", memory(sixteen)),
        (f"**AiM-{preset}, random weights, one image, guidance on**", ""),
        ("seconds an image", human.duration(large.seconds_per_request)),
        ("first image, from the start of a process", human.duration(large.process_seconds)),
        ("loading the model", human.duration(large.load_seconds)),
        ("peak memory", memory(large)),
        (f"one step of {ROWS} rows, ONNX Runtime", f"{step['onnxruntime_ms']:.1f} ms"),
        (f"one step of {ROWS} rows, plain PyTorch", f"{step['pytorch_ms']:.1f} ms"),
        ("PyTorch's time over ONNX Runtime's", f"{step['ratio']:.2f}"),
    ]
    if parity := found["parity"]:
        lines += [
            (
                f"parity of its export: logits, {parity['steps']} steps",
                f"{parity['logits_error']:.1e}",
            ),
            ("parity of its export: tokens drawn alike", f"{parity['token_agreement']:.1%}"),
            ("parity of its export: pixels", f"{parity['psnr_db']:.1f} dB"),
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def memory(row: Measurement) -> str:
    """The peak, where the system tells it."""
    return "unknown" if row.peak_bytes is None else human.size(row.peak_bytes)


if __name__ == "__main__":
    main()
