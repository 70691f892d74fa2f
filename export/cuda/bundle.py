"""From a bundle to the compiled kernels and plans beside its graphs.

Everything follows from the bundle: it takes neither the checkpoint nor a GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from aim_export.cuda.compile import (
    MEASURED_TRITON,
    Binary,
    CompileError,
    Progress,
    compile_kernels,
    compiler,
)
from aim_export.cuda.decoder import lower_decoder
from aim_export.cuda.decoder_network import decoder_tensors, group_norms
from aim_export.cuda.decoder_tiles import Storage
from aim_export.cuda.geometry import Geometry
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.persistent import pays, persistent_buckets
from aim_export.cuda.plan import Draft
from aim_export.cuda.precision import FORMATS, Format
from aim_export.cuda.register_bytes import bytes_bucket
from aim_export.cuda.register_weights import register_bucket
from aim_export.cuda.step import step_bucket
from aim_export.cuda.stored import stored_tensors
from aim_export.cuda.targets import CAPABILITIES, PRECISIONS
from aim_export.cuda.tuning import TUNING, Tuning
from aim_export.cuda.warpgroup import warpgroup_bucket
from aim_export.cuda.weights import CONSTANTS_FILE, Constants, converted, step_weights
from aim_export.errors import ExportError
from aim_export.wide import check_wide
from aim_runtime import Bundle
from aim_runtime.bundle import add_engine
from aim_runtime.bundle.manifest import ModelCard
from aim_runtime.engines.cuda.plan import Bucket, Code, flat, kernels_file, plan_file
from aim_runtime.quoting import shortened

Report = Callable[[str], None]


def add_engines(
    bundle_dir: Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    capabilities: Sequence[int] = CAPABILITIES,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile a bundle's kernels and put them into its folder; what was there is replaced.

    Args:
        bundle_dir: the folder of a bundle.
        precisions: keys of `FORMATS`.
        capabilities: keys of `SHARED_MEMORY`; 90 stands for 9.0.
        report: told, line by line, what is being done.
        progress: called with (done, all) after each compiled kernel.

    Returns:
        The bundle with its kernels.

    Raises:
        ExportError: the network cannot be lowered, or a kernel not be compiled; the bundle is as
            it was.
        aim_runtime.BundleError: there is no bundle folder, or it is damaged or cannot be written.
    """
    bundle = Bundle.open(bundle_dir)
    if not bundle.path.is_dir():
        raise ExportError(f"{bundle.path}: engines are added to a bundle folder; unpack it first")
    with tempfile.TemporaryDirectory() as folder:
        compile_engines(
            bundle,
            Path(folder),
            precisions=precisions,
            capabilities=capabilities,
            report=report,
            progress=progress,
        )
        return add_engine(bundle_dir, "cuda", folder)


def compile_engines(
    bundle: Bundle,
    out_dir: Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    capabilities: Sequence[int] = CAPABILITIES,
    report: Report | None = None,
    progress: Progress | None = None,
) -> None:
    """Write plans, constants and kernels of `bundle` to `out_dir` (see `add_engines`)."""
    say = report or (lambda line: None)
    check_wide(bundle, "CUDA kernels")
    constants = Constants()
    drafts = [
        draft_plan(bundle, precision, constants, capabilities=capabilities)
        for precision in precisions
    ]
    kernels = {id: kernel for draft in drafts for id, kernel in draft.kernels().items()}
    shown = ", ".join(f"{capability / 10}" for capability in capabilities)
    say(f"compiling {len(kernels)} kernels for compute capability {shown}")
    if compiler() != f"Triton {MEASURED_TRITON}":
        say(
            f"with {compiler()}; the published speeds are of kernels that Triton {MEASURED_TRITON} "
            "compiled, and other releases have been slower: pip install 'aim-runtime[kernels]' "
            "brings that one"
        )
    try:
        binaries = compile_kernels(kernels.values(), capabilities, progress=progress)
    except CompileError as error:
        raise ExportError(str(error)) from error
    write_engines(out_dir, drafts, constants, binaries)


def draft_plan(
    bundle: Bundle,
    precision: str,
    constants: Constants,
    *,
    capabilities: Sequence[int] = CAPABILITIES,
) -> Draft:
    """The plan of `bundle` in `precision`, yet to be compiled; small tensors go to `constants`.

    Buckets that no GPU of `capabilities` could run are left out.

    Raises ExportError for a network that the kernels do not know.
    """
    _check_sizes(bundle.manifest.model, precision)
    try:
        return _draft_plan(bundle, precision, constants, capabilities)
    except KeyError as error:
        raise ExportError(
            f"{bundle.path}: its graphs have no {shortened(str(error))}; kernels are for bundles "
            "that 'aim export' made"
        ) from error
    except ValueError as error:
        raise ExportError(f"{bundle.path}: {shortened(str(error))}") from error


def _check_sizes(model: ModelCard, precision: str) -> None:
    # Products of bytes are of 32 at a time.
    least = 32 if FORMATS[precision].state == "int8" else 16
    for name, size, lowest in (("head_dim", model.head_dim, 16), ("d_state", model.d_state, least)):
        if size & (size - 1) or size < lowest:
            others = "; those of fp16-state16 want 16" if size == 16 else ""
            raise ExportError(
                f"the kernels of {precision} want a power of two from {lowest} for {name}, not "
                f"{size}{others}"
            )
    if model.d_model % 64:
        raise ExportError(f"the kernels want a multiple of 64 for d_model, not {model.d_model}")
    heads = 2 * model.d_model // model.head_dim
    if FORMATS[precision].quantised and model.num_layers > 1 and heads % 4:
        # A second layer's factors, one for each output of in_proj, would begin at an odd address.
        raise ExportError(
            f"the kernels of {precision} want a multiple of 4 heads (2 d_model / head_dim), not "
            f"{heads}; those of fp16 do not"
        )


def _draft_plan(
    bundle: Bundle, precision: str, constants: Constants, capabilities: Sequence[int]
) -> Draft:
    formats = FORMATS[precision]
    stored = {graph: stored_tensors(bundle, graph) for graph in ("prologue", "step")}
    model = bundle.manifest.model
    geometry = Geometry.of(model, stored)
    weights = step_weights(geometry, stored, formats, constants)
    storage: Storage = "float32" if formats.activation == "float32" else "float16"
    tensors, norms = decoder_tensors(bundle), group_norms(bundle)
    decoder = lower_decoder(tensors, model.num_tokens, storage, norms, capabilities=capabilities)
    weights |= decoder.weights
    weights |= {name: constants.add(values) for name, values in decoder.constants.items()}
    weights, conversions = converted(weights)
    return Draft(
        precision=precision,
        weights=weights,
        conversions=conversions,
        setup=decoder.setup,
        buckets=_buckets(geometry, formats, capabilities),
        decoder=decoder.buckets,
    )


def _buckets(
    geometry: Geometry, formats: Format, capabilities: Sequence[int]
) -> tuple[Bucket[KernelSpec], ...]:
    """Buckets in the order in which a runtime takes them: it passes over those of fewer rows."""
    in_one_launch = persistent_buckets(geometry, formats, TUNING, capabilities)
    found = [bucket for bucket in in_one_launch if pays(geometry, formats, bucket.rows)]
    for rows, tuning in TUNING.items():
        for of_one_kind in (warpgroup_bucket, register_bucket, bytes_bucket):
            if bucket := of_one_kind(geometry, formats, rows, tuning, capabilities):
                found.append(bucket)
        found += _launches_a_layer(geometry, formats, rows, tuning, capabilities)
    return tuple(found)


def _launches_a_layer(
    geometry: Geometry, formats: Format, rows: int, tuning: Tuning, capabilities: Sequence[int]
) -> list[Bucket[KernelSpec]]:
    """Buckets of `rows` rows, with the largest held tiles that each GPU can take."""
    found, left = [], set(capabilities)
    for cuts in (tuning.held_of(geometry.D), tuning.held_narrow, None):
        cut = replace(tuning, held=cuts, held_narrow=cuts)
        bucket = step_bucket(geometry, formats, rows, cut)
        bound = [kernel for item in flat(bucket.step) if (kernel := item.kernel).capabilities]
        served = {c for c in left if all(c in (kernel.capabilities or ()) for kernel in bound)}
        if served:
            found.append(bucket)
            left -= served
        if not left:
            break
    return found


def write_engines(
    out_dir: Path,
    drafts: Iterable[Draft],
    constants: Constants,
    binaries: dict[tuple[str, int], Binary],
) -> None:
    """Write what `compile_kernels` made, one file for each compute capability, and the plans."""
    code: dict[str, dict[str, Code]] = {}
    for capability in sorted({capability for _, capability in binaries}):
        offset = 0
        with (out_dir / Path(kernels_file(str(capability))).name).open("wb") as file:
            for (kernel, compiled_for), binary in sorted(binaries.items()):
                if compiled_for != capability:
                    continue
                file.write(binary.code)
                code.setdefault(kernel, {})[str(capability)] = Code(
                    offset=offset,
                    size=len(binary.code),
                    shared=binary.shared,
                    pointers=binary.pointers,
                )
                offset += len(binary.code)
    (out_dir / Path(CONSTANTS_FILE).name).write_bytes(constants.to_bytes())
    for draft in drafts:
        text = json.dumps(draft.plan(compiler(), code).to_json(), separators=(",", ":"))
        (out_dir / Path(plan_file(draft.precision)).name).write_text(text, encoding="utf-8")
