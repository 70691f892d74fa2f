"""The decoder on ONNX Runtime's CPU: `python benchmarks/cpu_decoder.py --model box|published`.

Its working memory comes from the system, value by value, or is planned in an arena, which is kept
from image to image or given back after each; the backend `cpu` does one or the other by the
decoder's size. With `--precision` the plain decoder, the one of fewer multiplications and the one
of 8-bit convolutions are compared instead, all in an arena. By turns, each in a process of its own,
since it is about memory and pages too. Then what share of a run each kind of operator takes.
`published` is the network of the published tokenizer with random weights, exported once into a
cache folder; that, and `--precision`, need the `export` extra. Ends in Markdown tables; with
`--json` the rows are added to a file.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from cpu import in_fresh_process, random_bundle, say

from aim_cli.commands.bench import machine
from aim_runtime import Bundle

MEMORY = ("system", "arena, kept", "arena, given back")
USUAL = {"box": "arena, kept", "published": "arena, given back"}
TURNS = {"box": 3, "published": 2}
IMAGES = {"box": 10, "published": 2}  # a turn; the first is not counted
OPERATORS = 8
COMPARED = 6  # pictures
TOKENS = 256


@click.command()
@click.option("--model", type=click.Choice(list(IMAGES)), default="box", show_default=True)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path.home() / ".cache" / "aim-runtime",
    show_default=True,
    help="Where the random network is kept between runs.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--precision", is_flag=True, help="Compare number formats instead of memory.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the rows to this file.")
def main(model: str, cache: Path, threads: int, precision: bool, out: Path | None) -> None:
    """Measure the decoder."""
    folder = Bundle.open().path if model == "box" else random_decoder(cache)
    if precision and model == "published":
        folder = random_bundle("B", cache)
    plain = str(folder / "decoder.onnx")
    variants = [("fp32", plain, memory, {}) for memory in MEMORY]
    if precision:
        others = rewritten(folder, cache)
        variants = [("fp32", plain, USUAL[model], {})]
        variants += [(name, graph, USUAL[model], distance) for name, graph, distance in others]
    found: dict[int, list[dict[str, float]]] = {number: [] for number in range(len(variants))}
    for turn in range(TURNS[model]):
        for number, (name, graph, memory, _) in enumerate(variants):
            say(f"{model}: turn {turn + 1}, {name}, memory: {memory}")
            found[number].append(in_fresh_process(decoded, graph, memory, IMAGES[model], threads))
    say(f"{model}: a run by operator")
    shares = in_fresh_process(operator_shares, variants[1][1], threads)
    common = machine() | {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": threads,
        "model": f"decoder, {model}",
    }
    rows = [
        common
        | {"precision": name, "memory": memory, "images": 1}
        | {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        | distance
        for turns, (name, _, memory, distance) in zip(found.values(), variants, strict=True)
    ]
    click.echo(markdown(rows, shares))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


def random_decoder(cache: Path) -> Path:
    """A folder with the published tokenizer's decoder, random weights."""
    folder = cache / "random-decoder"
    if not (folder / "decoder.onnx").exists():
        say("exporting the random decoder")
        from aim_export.onnx.decoder import lower_decoder
        from aim_export.onnx.graph import write_graph
        from aim_training.config import TokenizerConfig
        from aim_training.tokenizer import VQTokenizer

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            model = lower_decoder(VQTokenizer(TokenizerConfig()).eval(), TOKENS)
            write_graph(model, made, "decoder", "fp32")
            made.rename(folder)
    return folder


def rewritten(bundle: Path, cache: Path) -> list[tuple[str, str, dict[str, float]]]:
    """The decoder of a bundle in float32 with fewer multiplications, and with all convolutions in 8
    bits: name, graph, and its PSNR from the plain one.

    8 bits are fitted to codes drawn at random, both are compared on others. Beside their weights,
    so that they can be opened by their paths.
    """
    from aim_export import decoder
    from aim_export.onnx.float_decoder import rearrange_decoder
    from aim_export.onnx.quantised_decoder import quantise_decoder

    folder = cache / f"rewritten-{bundle.name}"
    folder.mkdir(parents=True, exist_ok=True)
    opened = Bundle.open(bundle)
    spec = opened.manifest.graphs["decoder"]
    shutil.copyfile(bundle / spec.weights, folder / spec.weights)
    source = decoder.decoder_source(opened)
    vocabulary = opened.manifest.model.vocab_size
    codes = np.random.default_rng(1).integers(0, vocabulary, (2 * COMPARED, TOKENS))
    ranges = decoder.seen_ranges(opened, source, codes[:COMPARED])
    models = {
        "fp32, fewer products": rearrange_decoder(source),
        "int8": quantise_decoder(source, ranges),
    }

    def pictures(graph: Path) -> Any:
        session = session_of(str(graph), 2, arena=True)
        found = [session.run(None, {"tokens": row[None]})[0] for row in codes[COMPARED:]]
        return np.concatenate(found)

    plain, made = pictures(bundle / spec.file), []
    for name, model in models.items():
        if model is None:  # its maps are too small
            continue
        graph = folder / f"decoder-{name[:4]}.onnx"
        graph.write_bytes(model.SerializeToString())
        made.append((name, str(graph), {"psnr_db": decoder.psnr_db(pictures(graph), plain)}))
    return made


def session_of(graph: str, threads: int, *, arena: bool, profile: str = "") -> Any:
    """A session as the backend makes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def tokens_of() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Codes of one image: few enough different ones for every codebook."""
    return np.random.default_rng(0).integers(0, 512, (1, TOKENS))


def decoded(graph: str, memory: str, images: int, threads: int) -> dict[str, float]:
    """Medians of an image's time; the process's peak memory, and what it has left afterwards."""
    import resource

    import onnxruntime

    session = session_of(graph, threads, arena=memory != "system")
    options = onnxruntime.RunOptions()
    if memory == "arena, given back":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    tokens = tokens_of()
    loaded = resident_mib()
    seconds, cpu_seconds, faults = [], [], []
    for _ in range(images):
        began, cpu_began = time.perf_counter(), time.process_time()
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        session.run(None, {"tokens": tokens}, options)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    return {
        "decode_ms": statistics.median(seconds[1:]) * 1e3,
        "fastest_decode_ms": min(seconds[1:]) * 1e3,
        "cpu_ms": statistics.median(cpu_seconds[1:]) * 1e3,
        "page_faults": statistics.median(faults[1:]),
        "loaded_mib": loaded,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "left_mib": resident_mib(),
    }


def resident_mib() -> float:
    """Memory of this process."""
    import resource

    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize() / 2**20


def operator_shares(graph: str, threads: int) -> dict[str, float]:
    """What share of an image's time each kind of node takes, the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(graph, threads, arena=True, profile=f"{folder}/run")
        for _ in range(2):
            session.run(None, {"tokens": tokens_of()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    whole = spent.total()
    return {name: time_spent / whole for name, time_spent in spent.most_common(OPERATORS)}


def markdown(rows: list[dict[str, Any]], shares: dict[str, float]) -> str:
    """The rows as tables for RESULTS.md."""
    lines = [f"{rows[0]['cpu']}, {rows[0]['threads']} threads", ""]
    lines.append(
        "| decoder | sums | memory | ms | fastest | CPU ms | page faults | peak MiB | left |"
    )
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['memory']} | {row['decode_ms']:.0f} "
            f"| {row['fastest_decode_ms']:.0f} | {row['cpu_ms']:.0f} | {row['page_faults']:.0f} "
            f"| {row['peak_mib']:.0f} | {row['left_mib']:.0f} |"
        )
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return "\n".join([*lines, "", parts])


if __name__ == "__main__":
    main()
