"""`aim info`: what a bundle is, before anything of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli import human
from aim_cli.terminal import as_json, fields, table

if TYPE_CHECKING:
    from aim_runtime import BatchPlan, Bundle

_REQUESTS = (1, 16, 64)
_FLOAT32_BYTES = 4
_CLASSES_SHOWN = 6


@click.command("info")
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@click.option("--classes", is_flag=True, help="List the classes: index, tab, name.")
@click.option("--json", "everything", is_flag=True, help="Print everything as one JSON object.")
def command(path: Path | None, classes: bool, everything: bool) -> None:
    """Show what a bundle holds, what it needs and what can run it.

    BUNDLE is a folder or a .zip; without it, the model in the box. Nothing in it is executed.
    """
    from aim_runtime import Bundle

    bundle = Bundle.open(path)
    if everything:
        click.echo(as_json(as_dict(bundle), indent=2))
    elif classes:
        names = bundle.manifest.class_names
        click.echo("\n".join(f"{index}\t{name}" for index, name in enumerate(names)))
    else:
        click.echo(card(bundle))


def memory_plans(bundle: Bundle) -> dict[int, BatchPlan]:
    """How requests of some sizes would be batched and what memory they take on a CPU.

    An image may alone exceed the default limit: then nothing is returned.
    """
    from aim_runtime import plan_batches

    try:
        return {n: plan_batches(bundle.manifest, n) for n in _REQUESTS}
    except ValueError:
        return {}


def default_limit_bytes() -> int:
    """What a request may take here on a CPU where no limit is given."""
    from aim_runtime.memory import share_mib

    return share_mib() << 20


def model_bytes(bundle: Bundle) -> int:
    """Memory of the weights once loaded: arithmetic on a CPU is float32 however they are stored."""
    model = bundle.manifest.model
    return (model.parameters + model.decoder_parameters) * _FLOAT32_BYTES


def cuda_kernels(bundle: Bundle) -> dict[str, Any] | None:
    """What the bundle's CUDA kernels compute in, run on and were compiled by; None without any.

    And whether images join at any step a batch that they draw. What cannot be read of them, damaged
    or newer than this runtime, hides nothing else.
    """
    from aim_runtime import BundleError
    from aim_runtime.engines.cuda.plan import architectures, precisions
    from aim_runtime.engines.cuda.plan_reader import read_plan
    from aim_runtime.engines.gpu.architecture import describe

    formats = precisions(bundle.manifest)
    if not formats:
        return None
    continuous: bool | None = None
    try:
        plan = read_plan(bundle, formats[0])
        compiler, continuous = plan.compiler or "an unrecorded compiler", plan.continuous
    except BundleError as error:
        compiler = f"an unknown compiler ({error})"
    return {
        "precisions": formats,
        "compute_capabilities": describe(architectures(bundle.manifest)).split(", "),
        "compiler": compiler,
        "continuous": continuous,
    }


def cpu_step(bundle: Bundle) -> dict[str, str]:
    """Which step graph the backend `cpu` takes here, "fused" or "plain", and why not the first.

    What cannot be read of it, damaged or without ONNX Runtime, is "unknown" and hides nothing else.
    """
    from aim_runtime.engines.onnxruntime.step_graph import chosen_step
    from aim_runtime.quoting import sentence

    try:
        choice = chosen_step(bundle)
    except Exception as error:  # without onnxruntime its import fails in many ways
        return {"graph": "unknown", "reason": sentence(str(error))}
    return {"graph": "plain" if choice.step is None else "fused", "reason": choice.reason}


def cpu_decoder(bundle: Bundle) -> dict[str, Any]:
    """Which decoder graph the backend `cpu` takes here, and why the plain one where it is that.

    "graph" is "plain", or what most sums of the faster one are of, "int8" or "fp32"; then "psnr_db"
    says how near its pictures are to the plain one's. What cannot be read is "unknown".
    """
    from aim_runtime.engines.onnxruntime.decoder_graph import chosen_decoder
    from aim_runtime.quoting import sentence

    try:
        choice = chosen_decoder(bundle)
    except Exception as error:  # without onnxruntime its import fails in many ways
        return {"graph": "unknown", "psnr_db": None, "reason": sentence(str(error))}
    if choice.decoder is None:
        return {"graph": "plain", "psnr_db": None, "reason": choice.reason}
    return {"graph": choice.decoder.precision, "psnr_db": choice.decoder.psnr_db, "reason": ""}


def as_dict(bundle: Bundle) -> dict[str, Any]:
    """Everything `aim info` knows, as JSON values."""
    from aim_runtime import available_backends

    manifest = json.loads(bundle.manifest.to_json())
    plans = memory_plans(bundle)
    return {
        "path": str(bundle.path),
        "manifest_sha256": bundle.manifest_sha256,
        **manifest,
        "memory": {
            "model_bytes": model_bytes(bundle),
            "default_limit_bytes": default_limit_bytes(),
            "state_bytes_per_row": bundle.manifest.state_bytes_per_row,
            "requests": [
                {
                    "images": n,
                    "at_once": plan.batch_size,
                    "bytes_per_image": plan.bytes_per_image,
                    "bytes": plan.total,
                }
                for n, plan in plans.items()
            ],
        },
        "cpu_step": cpu_step(bundle),
        "cpu_decoder": cpu_decoder(bundle),
        "cuda_kernels": cuda_kernels(bundle),
        "backends": [
            {"name": s.name, "available": s.available, "reason": s.reason}
            for s in available_backends(bundle)
        ],
    }


def card(bundle: Bundle) -> str:
    """The model card as text."""
    manifest = bundle.manifest
    model, sampling = manifest.model, manifest.sampling
    names = manifest.class_names
    shown = ", ".join(name.split(",")[0] for name in names[:_CLASSES_SHOWN])
    more = f", ... ({len(names)} in all: --classes)" if len(names) > _CLASSES_SHOWN else ""
    top_k = str(sampling.top_k) if sampling.top_k else "all"
    stored = sum(entry.size for entry in manifest.files.values())
    down, across = model.grid
    pairs = [
        ("name", manifest.name),
        ("description", manifest.description or "none"),
        ("licence", manifest.license or "not stated"),
        ("path", str(bundle.path)),
        ("images", f"{model.image_width}x{model.image_height} pixels"),
        ("classes", shown + more),
        (
            "model",
            f"{human.quantity(model.parameters)} parameters: "
            f"{human.count(model.num_layers, 'layer')} of width "
            f"{model.d_model}, state {model.d_state}, {model.conditioning}",
        ),
        (
            "tokenizer",
            f"{human.quantity(model.decoder_parameters)} parameters in the decoder; "
            f"{down}x{across} = {model.num_tokens} tokens of {model.vocab_size:,}",
        ),
        (
            "sampling",
            f"guidance {sampling.cfg_scale:g}, temperature {sampling.temperature:g}, "
            f"top-k {top_k}, top-p {sampling.top_p:g}, position offset {model.position_offset}",
        ),
        ("on disk", f"{human.size(stored)}, weights in {manifest.precision}"),
        ("memory", _memory(bundle)),
        ("provenance", _provenance(manifest.provenance)),
        ("CPU decoder", _cpu_decoder(bundle)),
        ("CPU step", _cpu_step(bundle)),
        ("backends", _backends(bundle)),
    ]
    if (kernels := cuda_kernels(bundle)) is not None:
        formats, capabilities = (
            ", ".join(kernels[key]) for key in ("precisions", "compute_capabilities")
        )
        made_by = f"compiled by {kernels['compiler']}"
        line = f"{formats} for compute capability {capabilities}, {made_by}"
        if kernels["continuous"] is False:
            line += (
                "; a Batcher draws whole batches with them: 'aim export --bundle DIR --cuda' makes "
                "such as let images join at any step"
            )
        pairs.insert(-1, ("CUDA kernels", line))
    return fields(pairs)


def _memory(bundle: Bundle) -> str:
    state = human.size(bundle.manifest.state_bytes_per_row)
    lines = [
        f"{human.size(model_bytes(bundle))} for the model; state {state} a row",
        f"{human.size(default_limit_bytes())} of what is free now for images that a CPU draws",
    ]
    rows = [("images", "at once", "memory on top")]
    for n, plan in memory_plans(bundle).items():
        rows.append((str(n), str(plan.batch_size), human.size(plan.total)))
    if len(rows) == 1:
        return "\n".join([*lines, "one image needs more than the default --memory-limit"])
    return "\n".join([*lines, table(rows)])


def _cpu_step(bundle: Bundle) -> str:
    """The step graph of the backend `cpu` in one sentence."""
    step = cpu_step(bundle)
    return ": ".join(filter(None, (f"{step['graph']} graph", step["reason"])))


def _cpu_decoder(bundle: Bundle) -> str:
    """The decoder graph of the backend `cpu` in one sentence."""
    decoder = cpu_decoder(bundle)
    line = ": ".join(filter(None, (f"{decoder['graph']} graph", decoder["reason"])))
    if decoder["psnr_db"] is not None:
        line += f", {decoder['psnr_db']:.1f} dB PSNR from the plain one's pictures"
    return line


def _backends(bundle: Bundle) -> str:
    """Each backend, fastest first, and whether it can run this bundle here or why not."""
    from aim_runtime import available_backends

    return "\n".join(
        f"{status.name}: {'available' if status.available else status.reason}"
        for status in available_backends(bundle)
    )


def _provenance(value: Any, prefix: str = "") -> str:
    """Nested facts as `key: value` lines, `parity.max_error: 0` for those inside others."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines.append(_provenance(item, f"{prefix}{key}."))
        else:
            lines.append(f"{prefix}{key}: {item}")
    return "\n".join(filter(None, lines)) or "not stated"
