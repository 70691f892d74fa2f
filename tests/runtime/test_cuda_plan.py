"""Plans of CUDA kernels come from strangers: what is wrong is named before anything is launched."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aim_runtime import AimError, Bundle, BundleError, SamplingOptions
from aim_runtime.bundle.manifest import FileEntry, Manifest
from aim_runtime.engines.cuda import CudaEngine
from aim_runtime.engines.cuda.plan import (
    Argument,
    Launch,
    Plan,
    Repeat,
    Setup,
    Tensor,
    architectures,
    precisions,
    unrolled,
)
from aim_runtime.engines.cuda.plan_reader import parse_plan
from aim_runtime.engines.gpu.architecture import choose, describe

from .simulated_cuda import SimulatedDevice
from .test_cuda_engine import drawn
from .test_untrusted import changed_bytes, json_values, nodes
from .tiny_bundle import TOKENS, VOCAB, WIDTH, copy_bundle, rehash
from .toy_cuda import simulated, toy_plan, write_toy_bundle


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tiny, tmp_path_factory.mktemp("plans") / "toy", toy_plan("int8"))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def read(document: dict[str, Any], manifest: Manifest) -> Plan:
    return parse_plan(json.dumps(document), manifest)


def test_a_plan_is_read(manifest: Manifest) -> None:
    document = toy_plan("int8")
    document["setup"] = {
        "buffers": {"counts": {"dtype": "float32", "shape": [4, 4]}},
        "launches": [
            {
                "repeat": 3,
                "body": [{"kernel": "add", "grid": [1, 2, 3], "args": [["counts", 16, 16]]}],
            }
        ],
    }
    plan = read(document, manifest)
    assert plan.precision == "int8"
    assert [bucket.rows for bucket in plan.buckets] == [1, 2, 6, 8]
    assert [bucket.images for bucket in plan.decoder] == [1, 4]
    assert [launch.arguments for launch in plan.setup.launches] == [
        (("counts", 16),),
        (("counts", 32),),
        (("counts", 48),),
    ]
    assert plan.setup.launches[0].grid == (1, 2, 3)
    assert plan.weights["head"].conversion == "quantise"
    assert plan.weights["head"].scales == "head_scales"
    assert plan.weights["words"].conversion is None
    assert not plan.kernels["cell"].overlaps
    assert plan.kernels["head"].overlaps
    assert plan.architectures() == {"80", "90"}


def test_a_plan_of_format_1_does_not_say_what_compiled_it(manifest: Manifest) -> None:
    document = toy_plan("int8")
    assert parse_plan(json.dumps(document), manifest).compiler == "Triton 3.6.0"
    document = toy_plan("int8", version=2)
    del document["compiler"]
    document["format_version"] = 1
    assert parse_plan(json.dumps(document), manifest).compiler == ""


@pytest.mark.parametrize("version", [1, 2, 3])
def test_kernels_of_older_plans_need_not_be_resident(manifest: Manifest, version: int) -> None:
    document = toy_plan(version=version)
    if version == 1:
        del document["compiler"]
    plan = read(document, manifest)
    assert not any(kernel.resident for kernel in plan.kernels.values())
    document = toy_plan()
    document["kernels"]["cell"]["resident"] = True
    assert [
        name for name, kernel in read(document, manifest).kernels.items() if kernel.resident
    ] == ["cell"]


def test_launches_that_not_every_step_wants(manifest: Manifest) -> None:
    plan = read(toy_plan(rare=True), manifest)
    assert [launch.every for launch in unrolled(plan.buckets[0].step)] == [1, 1, 1, 4, 1]
    assert read(plan.to_json(), manifest) == plan
    document = toy_plan(rare=True)
    document["buckets"][0]["step"][3] = {"repeat": 2, "body": document["buckets"][0]["step"][3:4]}
    found = read(document, manifest).buckets[0].step
    assert [launch.every for launch in unrolled(found)] == [1, 1, 1, 4, 4, 1]
    for version in (3, 4):
        older = read(toy_plan(version=version), manifest)
        assert {launch.every for launch in unrolled(older.buckets[0].step)} == {1}


@pytest.mark.parametrize("version", [1, 2])
def test_images_of_older_plans_begin_together(manifest: Manifest, version: int) -> None:
    document = toy_plan(version=version)
    if version == 1:
        del document["compiler"]
    plan = parse_plan(json.dumps(document), manifest)
    assert not plan.continuous
    assert all(not bucket.memory for bucket in plan.buckets)
    plan = read(toy_plan(), manifest)
    assert plan.continuous
    assert all(bucket.memory == {"ssm": 1, "conv": 1} for bucket in plan.buckets)


def test_what_is_written_is_what_is_read(manifest: Manifest) -> None:
    body = Launch("cast", (1, 2, 3), (Argument("counts", 16), Argument("words")))
    setup = Setup({"counts": Tensor("float32", (4, 4))}, (Repeat(3, (body,), {"counts": 16}),))
    plan = dataclasses.replace(read(toy_plan("int8"), manifest), setup=setup)
    found = read(plan.to_json(), manifest)
    written_out = Setup(setup.buffers, tuple(unrolled(setup.launches)))
    assert found == dataclasses.replace(plan, setup=written_out)
    assert [launch.arguments[0] for launch in written_out.launches] == [
        ("counts", 16),
        ("counts", 32),
        ("counts", 48),
    ]


def test_what_a_bundle_has(manifest: Manifest) -> None:
    assert architectures(manifest) == ["80", "90"]
    entry = FileEntry("0" * 64, 1)
    names = ["int8", "fp32", "fp16-state16", "fp16"]
    files = {f"engines/cuda/plan-{name}.json": entry for name in names}
    files |= {"engines/other/plan-bf16.json": entry, "plan-x.json": entry}
    found = precisions(dataclasses.replace(manifest, files=files))
    assert found == ["fp16", "fp32", "fp16-state16", "int8"]


Edit = Callable[[dict[str, Any]], object]
STEP = "buckets[1].step[1]"


def head_launch(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["buckets"][1]["step"][1]
    return found


EDITS: dict[str, tuple[Edit, str]] = {
    "not a plan": (lambda d: d.update(format="x"), 'lacks "format": "aim-cuda-plan"'),
    "newer": (lambda d: d.update(format_version=6), "made by a newer aim-runtime (format 6"),
    "version": (lambda d: d.update(format_version="1"), "format_version is '1'"),
    "missing key": (lambda d: d.pop("setup"), "top level lacks the key 'setup'"),
    "unknown key": (lambda d: d.update(more=1), "unknown key 'more'"),
    "no compiler": (lambda d: d.pop("compiler"), "top level lacks the key 'compiler'"),
    "compiler": (lambda d: d.update(compiler="a\nb"), "compiler is 'a\\nb'"),
    "compiler of format 1": (lambda d: d.update(format_version=1), "unknown key 'compiler'"),
    "memory of format 2": (
        lambda d: d.update(format_version=2, kernels=toy_plan("int8", version=3)["kernels"]),
        "buckets[0] has the unknown key 'memory'",
    ),
    "memory": (
        lambda d: d["buckets"][1]["memory"].update(nothing=1),
        "buckets[1].memory is 'nothing'; it must be names of buffers",
    ),
    "memory blocks": (
        lambda d: d["buckets"][1]["memory"].update(ssm=0),
        "buckets[1].memory['ssm'] is 0; it must be",
    ),
    "memory of other rows": (
        lambda d: d["buckets"][1]["memory"].update(ssm=3),
        "buckets[1].memory['ssm'] is 3; the buffer has",
    ),
    "precision": (lambda d: d.update(precision="../x y"), "precision is '../x y'"),
    "kernels": (lambda d: d.update(kernels=[]), "kernels is a list of 0 items"),
    "kernel name": (
        lambda d: d["kernels"].update({"a b": d["kernels"]["cell"]}),
        "kernels key is 'a b'",
    ),
    "symbol": (lambda d: d["kernels"]["cell"].update(symbol="a\0b"), "kernels['cell'].symbol is"),
    "threads": (lambda d: d["kernels"]["cell"].update(threads=100), "must be a multiple of 32"),
    "many threads": (lambda d: d["kernels"]["cell"].update(threads=2048), "threads is 2048"),
    "flag": (lambda d: d["kernels"]["cell"].update(pdl=1), "pdl is 1; it must be true or false"),
    "resident": (
        lambda d: d["kernels"]["cell"].update(resident=1),
        "resident is 1; it must be true or false",
    ),
    "resident of format 3": (
        lambda d: d.update(format_version=3),
        "has the unknown key 'resident'",
    ),
    "no code": (lambda d: d["kernels"]["cell"].update(code={}), "kernels['cell'].code is empty"),
    "architecture": (
        lambda d: d["kernels"]["cell"]["code"].update({"../90": {}}),
        "code key is '../90'",
    ),
    "no kernels file": (
        lambda d: d["kernels"]["cell"]["code"].update({"100": d["kernels"]["cell"]["code"]["90"]}),
        "needs engines/cuda/kernels-sm100.bin, which the bundle lacks",
    ),
    "code outside": (
        lambda d: d["kernels"]["cell"]["code"]["90"].update(offset=448),
        "kernels['cell'].code.90 ends at byte 480 of engines/cuda/kernels-sm90.bin, which has 448",
    ),
    "code negative": (
        lambda d: d["kernels"]["cell"]["code"]["90"].update(offset=-32),
        "code.90.offset is -32",
    ),
    "shared": (
        lambda d: d["kernels"]["cell"]["code"]["90"].update(shared=1 << 30),
        "code.90.shared is 1073741824",
    ),
    "too few pointers": (
        lambda d: d["kernels"]["byte_head"]["code"]["90"].update(pointers=3),
        "passes 5 arguments to 'byte_head', which takes 3 on sm_90",
    ),
    "many pointers": (
        lambda d: d["kernels"]["cell"]["code"]["90"].update(pointers=10**6),
        "pointers is 1000000",
    ),
    "conversion": (
        lambda d: d["conversions"].update(x="nothing"),
        "conversions['x'] is 'nothing'; it must be one of its kernels",
    ),
    "no conversion": (
        lambda d: d["conversions"].pop(f"quantise_float32_{VOCAB}"),
        f"weights['head'] needs the conversion 'quantise_float32_{VOCAB}'",
    ),
    "conversion pointers": (
        lambda d: d["conversions"].update({f"quantise_float32_{VOCAB}": "cast"}),
        "weights['head'] passes 3 arguments to 'cast', which takes 2",
    ),
    "weight dtype": (
        lambda d: d["weights"]["words"].update(dtype="object"),
        "weights['words'].dtype is 'object'",
    ),
    "weight cast": (
        lambda d: d["weights"]["words"].update(dtype="bfloat16"),
        "needs the conversion 'cast_float32_bfloat16'",
    ),
    "weight scalar": (
        lambda d: d["weights"]["words"].update(shape=[]),
        "a list of at least one size",
    ),
    "weight shape": (
        lambda d: d["weights"]["words"].update(shape=[VOCAB, -1]),
        "weights['words'].shape is -1",
    ),
    "weight huge": (
        lambda d: d["weights"]["words"].update(shape=[1 << 40, 1 << 40]),
        "weights['words'] takes",
    ),
    "part outside": (
        lambda d: d["weights"]["words"]["parts"][0].update(offset=10**5),
        "of step.weights, which has",
    ),
    "part elsewhere": (
        lambda d: d["weights"]["words"]["parts"][0].update(file="../step.weights"),
        "parts[0].file is '../step.weights'; it must be a file of the bundle",
    ),
    "part file": (
        lambda d: d["weights"]["words"]["parts"][0].update(file=["x"]),
        "parts[0].file is a list",
    ),
    "part rows": (
        lambda d: d["weights"]["words"]["parts"][0].update(rows=3),
        f"weights['words'].parts have 3 rows, its shape says {VOCAB}",
    ),
    "part types": (
        lambda d: d["weights"]["words"]["parts"].append(
            d["weights"]["words"]["parts"][0] | {"dtype": "float16"}
        ),
        "parts are of several types",
    ),
    "no parts": (
        lambda d: d["weights"]["words"].update(parts=[]),
        "weights['words'] has no parts and is not the scales",
    ),
    "scales unknown": (
        lambda d: d["weights"]["head"].update(scales="nothing"),
        "weights['head'].scales is 'nothing'; it must be a weight without parts",
    ),
    "scales twice": (
        lambda d: d["weights"].update(again=d["weights"]["head"]),
        "weights['head_scales'] has no parts and is not the scales of one other weight",
    ),
    "scales of another shape": (
        lambda d: d["weights"]["head_scales"].update(shape=[WIDTH + 1]),
        f"float32 of shape [{WIDTH}]",
    ),
    "scales for floats": (
        lambda d: d["weights"]["head"].update(dtype="float32"),
        "weights['head'] has scales; it must be int8",
    ),
    "setup": (lambda d: d.update(setup=None), "setup is null"),
    "no buckets": (lambda d: d.update(buckets=[]), "buckets is a list of 0 items"),
    "no decoder": (lambda d: d.update(decoder=[]), "decoder is a list of 0 items"),
    "order of format 3": (
        lambda d: d.update(toy_plan("int8", version=3), buckets=d["buckets"][::-1]),
        "buckets are not in ascending order",
    ),
    "decoder order": (lambda d: d["decoder"].reverse(), "decoder are not in ascending order"),
    "no noise": (
        lambda d: d["buckets"][1]["buffers"].pop("noise"),
        f"buckets[1].buffers['noise'] is missing; it must be float64 [2, {TOKENS}]",
    ),
    "short tokens": (
        lambda d: d["buckets"][1]["buffers"]["tokens"].update(shape=[2, TOKENS - 1]),
        f"is int64 [2, {TOKENS - 1}]; it must be int64 [2, {TOKENS}]",
    ),
    "image dtype": (
        lambda d: d["decoder"][0]["buffers"]["image"].update(dtype="float32"),
        "decoder[0].buffers['image'] is float32 [1, 6, 6, 3]; it must be uint8",
    ),
    "launch": (lambda d: d["buckets"][1]["step"].append(3), "buckets[1].step[3] is 3"),
    "unknown kernel": (
        lambda d: head_launch(d).update(kernel="nothing"),
        f"{STEP}.kernel is 'nothing'",
    ),
    "period": (
        lambda d: head_launch(d).update(every=1),
        f"{STEP}.every is 1; it must be a whole number from 2 to 65536",
    ),
    "period of a flag": (lambda d: head_launch(d).update(every=True), f"{STEP}.every is true"),
    "period of format 4": (
        lambda d: d.update(format_version=4) or head_launch(d).update(every=16),
        f"{STEP} has the unknown key 'every'; it may have kernel, grid, args",
    ),
    "period where images begin": (
        lambda d: d["buckets"][0]["begin"][0].update(every=16),
        "buckets[0].begin[0] has the unknown key 'every'",
    ),
    "period of a decoder": (
        lambda d: d["decoder"][0]["launches"][0].update(every=16),
        "decoder[0].launches[0] has the unknown key 'every'",
    ),
    "grid": (lambda d: head_launch(d).update(grid=[0, 1, 1]), f"{STEP}.grid is 0"),
    "grid sizes": (lambda d: head_launch(d).update(grid=[1, 1]), f"{STEP}.grid is a list of 2"),
    "grid depth": (lambda d: head_launch(d).update(grid=[1, 1, 65536]), f"{STEP}.grid is 65536"),
    "argument": (
        lambda d: head_launch(d)["args"].__setitem__(0, ["nothing", 0, 0]),
        f"{STEP}.args[0] is 'nothing'; it must be a buffer or a weight",
    ),
    "argument list": (
        lambda d: head_launch(d)["args"].__setitem__(0, [["ssm"], 0, 0]),
        f"{STEP}.args[0] is a list of 1 items; it must be a buffer or a weight",
    ),
    "argument negative": (
        lambda d: head_launch(d)["args"].__setitem__(0, ["ssm", -16, 0]),
        f"{STEP}.args[0] offset is -16",
    ),
    "argument outside": (
        lambda d: head_launch(d)["args"].__setitem__(0, ["ssm", 64, 0]),
        f"{STEP}.args[0] offset is 64; it must be a whole number from 0 to 63",
    ),
    "argument unaligned": (
        lambda d: head_launch(d)["args"].__setitem__(0, ["ssm", 8, 0]),
        f"{STEP}.args[0] is not a multiple of 16 bytes",
    ),
    "repetition outside": (
        lambda d: d["buckets"][1]["step"].__setitem__(
            1, {"repeat": 5, "body": [head_launch(d) | {"args": [["ssm", 0, 16]]}]}
        ),
        f"{STEP}.body.args[0] reaches byte 64 of 'ssm', which has 64",
    ),
    "repetition unaligned": (
        lambda d: d["buckets"][1]["step"].__setitem__(
            1, {"repeat": 2, "body": [head_launch(d) | {"args": [["ssm", 0, 4]]}]}
        ),
        "is not a multiple of 16 bytes",
    ),
    "repetition nested": (
        lambda d: d["buckets"][1]["step"].__setitem__(
            1, {"repeat": 2, "body": [{"repeat": 2, "body": [head_launch(d)]}]}
        ),
        f"{STEP}.body lacks the key 'kernel'",
    ),
    "repetition of too much": (
        lambda d: d["buckets"][1]["step"].__setitem__(
            1, {"repeat": 1 << 14, "body": [head_launch(d)] * 17}
        ),
        "buckets[1].step has over 262144 launches",
    ),
    "repetition none": (
        lambda d: d["buckets"][1]["step"].__setitem__(1, {"repeat": 0, "body": [head_launch(d)]}),
        f"{STEP}.repeat is 0",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_wrong_is_named(manifest: Manifest, name: str) -> None:
    edit, says = EDITS[name]
    document = copy.deepcopy(toy_plan("int8"))
    read(document, manifest)
    edit(document)
    with pytest.raises(BundleError, match=re.escape(says)) as caught:
        read(document, manifest)
    message = str(caught.value)
    assert "CUDA plan" in message
    assert message.isprintable()
    assert len(message) < 400


def test_a_plan_that_is_no_text(bundle: Path, tmp_path: Path) -> None:
    other = copy_bundle(bundle, tmp_path / "toy")
    file = other / "engines" / "cuda" / "plan-int8.json"
    for content, says in (
        (b"\xff\xfe", "plan-int8.json is not UTF-8 text"),
        (b"{", "the CUDA plan is not valid JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (json.dumps(toy_plan("fp32")).encode(), "plan-int8.json is a CUDA plan for 'fp32'"),
    ):
        file.write_bytes(content)
        rehash(other)
        with pytest.raises(BundleError, match=re.escape(says)) as caught:
            CudaEngine(Bundle.open(other), simulated(), "int8")
        assert str(other) in str(caught.value)


fuzz = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)
PLAN_VALUES = st.one_of(
    json_values,
    st.sampled_from(["head", "cell", "ssm", "logits", "words", "90", "step.weights", "int64"]),
    st.integers(0, 4096).map(lambda number: 16 * number),
)


@fuzz
@given(data=st.data())
def test_any_change_of_a_plan(manifest: Manifest, data: st.DataObject) -> None:
    document = copy.deepcopy(toy_plan("int8", rows=(2,), images=(1,)))
    for _ in range(data.draw(st.integers(1, 3))):
        places = nodes(document)
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                container[key] = data.draw(PLAN_VALUES)
            case "remove":
                del container[key]
            case _ if isinstance(container, list):
                container.append(data.draw(PLAN_VALUES))
            case _:
                container[data.draw(st.sampled_from(["added", "head", "100"]))] = container[key]
    refusal = ""
    try:
        plan = read(document, manifest)
    except BundleError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) < 400
    for bucket in () if refusal else plan.buckets:
        sizes = {name: weight.tensor.size for name, weight in plan.weights.items()}
        sizes |= {name: tensor.size for name, tensor in plan.setup.buffers.items()}
        sizes |= {name: tensor.size for name, tensor in bucket.buffers.items()}
        for launch in bucket.begin + bucket.step:
            assert launch.kernel in plan.kernels
            for name, offset in launch.arguments:
                assert 0 <= offset < sizes[name]
                assert offset % 16 == 0


@fuzz
@given(data=st.data())
def test_any_change_of_the_engines_files(bundle: Path, data: st.DataObject) -> None:
    """With checksums that fit: they load or are refused in one sentence."""
    with tempfile.TemporaryDirectory() as name:
        other = copy_bundle(bundle, Path(name) / "toy")
        files = sorted((other / "engines" / "cuda").iterdir())
        file = data.draw(st.sampled_from(files))
        file.write_bytes(changed_bytes(file.read_bytes(), data))
        rehash(other)
        # What kernels do is theirs; these do nothing.
        device = SimulatedDevice(lambda code, symbol: lambda grid, arguments: None)
        refusal = ""
        try:
            engine = CudaEngine(Bundle.open(other), device, "int8")
            drawn(engine, [0, 1], SamplingOptions(2.0))
        except AimError as error:
            refusal = str(error)
        assert refusal.isprintable()
        assert len(refusal) < 600


def test_which_binary_a_gpu_takes() -> None:
    compiled = ["80", "86", "89", "90", "100", "120"]
    for capability, expected in {
        (8, 0): "80",
        (8, 6): "86",
        (8, 7): "86",
        (8, 9): "89",
        (9, 0): "90",
        (10, 0): "100",
        (10, 3): None,
        (12, 0): "120",
        (12, 1): None,
        (7, 5): None,
        (11, 0): None,
    }.items():
        assert choose(compiled, capability) == expected
    assert choose(["86"], (8, 0)) is None
    assert choose([], (8, 0)) is None
    assert describe(compiled) == "8.0, 8.6, 8.9, 9.0, 10.0, 12.0"
