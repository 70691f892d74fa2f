"""The browser's engine part by part in Node, held against the Python runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aim_runtime import BundleError, Manifest
from aim_runtime.bundle import Bundle
from aim_runtime.engines.onnxruntime.decoder_graph import DECODER_FILE, DecoderGraph
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE, StepGraph, chosen_step
from aim_runtime.noise import uniforms
from aim_runtime.sampling import SamplingOptions, guide, sample

from ..runtime.test_manifest import EDITS, NO_MANIFESTS
from ..runtime.tiny_bundle import DECODER, STEP, tiny_manifest, write_tiny_bundle
from .engine_parts import in_node, installed, needs_node, served

pytestmark = needs_node


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny")


def text_of(tiny: Path) -> str:
    return (tiny / "manifest.json").read_text(encoding="utf-8")


def test_types(tmp_path: Path, npm: Path) -> None:
    """The JSDoc types hold under the strict rules of TypeScript."""
    folder = installed(tmp_path, npm)
    command = [folder / "node_modules" / ".bin" / "tsc", "--project", "engine/tsconfig.json"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout


def test_noise_is_that_of_the_specification() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63 + 12345, 2**64 - 1, 0x9E3779B97F4A7C15]
    found = in_node("noise", seeds=[str(seed) for seed in seeds], steps=300)
    np.testing.assert_array_equal(np.array(found), uniforms(seeds, 300))


@pytest.mark.parametrize(
    ("step_ms", "picture_ms", "images", "expected"),
    [
        (1, 1, 1, [(32 * n, [0]) for n in range(1, 8)]),  # no more than were asked for
        (10, 300, 1, [(86, [0]), (171, [0])]),  # 640 ms are a quarter of the steps' time
        (10, 2000, 1, []),
        (10, None, 1, []),  # unknown, and so slow
        (40, None, 1, [(128, [0])]),
        (20, 300, 4, [(52, [0]), (103, [1]), (154, [2]), (205, [3])]),  # by turns
        (20, 200, 4, [(64, [0, 1]), (128, [2, 3]), (192, [0, 1])]),
    ],
)
def test_previews_take_little_of_the_time(
    step_ms: float, picture_ms: float | None, images: int, expected: list[tuple[int, list[int]]]
) -> None:
    pace = {"images": images, "tokens": 256, "stepMs": step_ms, "pictureMs": picture_ms}
    found = in_node("previews", paces=[{"every": 32, **pace}, {"every": 0, **pace}])
    assert [[(step, due) for step, due in one] for one in found] == [expected, []]


OPTIONS = [
    SamplingOptions(),
    SamplingOptions(cfg_scale=3.0, temperature=0.8, top_p=0.95),
    SamplingOptions(cfg_scale=4.7, temperature=1.3, top_k=20),
    SamplingOptions(cfg_scale=1.1, temperature=0.1, top_k=7, top_p=0.5),
    SamplingOptions(cfg_scale=2.0, temperature=0.0),
    SamplingOptions(cfg_scale=2.0, temperature=1e-30, top_p=0.9),
    SamplingOptions(cfg_scale=2.0, top_k=1),
    SamplingOptions(cfg_scale=2.0, top_p=1e-9),
    SamplingOptions(cfg_scale=2.0, top_k=10**6, top_p=0.999999),
    SamplingOptions(cfg_scale=2.0, temperature=1e6, top_k=300, top_p=0.2),
]


def drawn_from(options: SamplingOptions) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
    """Rows of scores with what is drawn from them, and the guided scores."""
    rng = np.random.default_rng(1)
    two = options.rows_per_image == 2
    for size, kind in itertools.product((2, 300, 4096), range(4)):
        logits = rng.normal(0, [0.1, 3, 30, 1][kind], (2, size)).astype(np.float32)
        if kind == 3:
            logits = np.round(logits)  # ties
        if kind == 2:
            logits[:, ::5] = -3e35
        guided = guide(logits if two else logits[:1], 1, options.cfg_scale)
        for u in (0.5 / 2**32, 1 - 0.5 / 2**32, *rng.random(3)):
            row = {"cond": logits[0].tolist(), "uncond": logits[1].tolist() if two else None}
            yield row | {"u": u, "options": dataclasses.asdict(options)}, guided[0]


def test_sampler_is_that_of_the_specification() -> None:
    rows, scores = zip(*itertools.chain(*map(drawn_from, OPTIONS)), strict=True)
    found = in_node("sample", rows=rows)
    for row, guided, one in zip(rows, scores, found, strict=True):
        np.testing.assert_array_equal(np.array(one["scores"], np.float32), guided)
        options = SamplingOptions(**row["options"])
        assert one["token"] == sample(guided[None], np.array([row["u"]]), options)[0], row[
            "options"
        ]


def test_manifest_that_is_one_reads_as_in_python(tiny: Path) -> None:
    text = text_of(tiny)
    names = ("Füchse", "猫", "family: 👩\u200d👩\u200d👧")
    translated = json.loads(text) | {"class_names": names}
    spaced = json.dumps(json.loads(text), indent=7)
    found = in_node("manifests", texts=[text, json.dumps(translated), spaced])
    assert found[0]["value"] == json.loads(text)
    assert found[1]["value"]["class_names"] == list(names)
    assert found[2] == found[0]


def test_manifests_are_refused_in_the_words_of_python(tiny: Path) -> None:
    texts, sentences = [], []
    for edit, _ in EDITS.values():
        document = json.loads(text_of(tiny))
        edit(document)
        texts.append(json.dumps(document))
        with pytest.raises(BundleError) as caught:
            Manifest.from_json(texts[-1])
        sentences.append(str(caught.value))
    found = in_node("manifests", texts=texts)
    assert [one.get("message") for one in found] == sentences
    assert {one["code"] for one in found} == {"bundle"}


TEXTS = [
    *NO_MANIFESTS,
    # Of a reader of its own for JSON.
    ("[1,]", "not valid JSON"),
    ('{"a": 01}', "not valid JSON"),
    ('{"a": "x\ny"}', "not valid JSON"),
    ('{"a": 1} {', "not valid JSON"),
    ('{"__proto__": 1, "__proto__": 2}', "the key '__proto__' twice"),
]


def test_texts_that_are_no_manifests() -> None:
    found = in_node("manifests", texts=[text for text, _ in TEXTS])
    for (_, says), one in zip(TEXTS, found, strict=True):
        assert says in one["message"]
        assert one["code"] == "bundle"
        assert "\n" not in one["message"]
        assert len(one["message"]) < 300


def test_numbers_that_overflow_are_refused(tiny: Path) -> None:
    text = text_of(tiny)
    olds = ('"cfg_scale": 2.0', '"max_error": 0.0')
    texts = [text.replace(old, old.split(":")[0] + ": 1e999") for old in olds]
    assert all("is inf" in one["message"] for one in in_node("manifests", texts=texts))


def test_newer_format_says_so_whatever_else_it_holds() -> None:
    newer = {"format": "aim-bundle", "format_version": 4, "new": {}}
    (found,) = in_node("manifests", texts=[json.dumps(newer)])
    assert found["code"] == "newer"
    assert "bundle format 4, this page reads up to 3" in found["message"]


def test_formats_2_and_3_have_what_they_add(tiny: Path) -> None:
    document = json.loads(text_of(tiny))
    entry = document["files"]["step.onnx"]
    engines = document | {"files": document["files"] | {"engines/cuda/plan.json": entry}}
    packed = document | {"precision": "int8"}
    texts = [
        json.dumps(one | {"format_version": version})
        for one in (engines, packed)
        for version in (1, 2, 3)
    ]
    found = ["value" in one for one in in_node("manifests", texts=texts)]
    assert found == [False, True, True, False, False, True]


def with_files(tiny: Path) -> str:
    """The tiny bundle's manifest, which also lists the graphs for the CPU."""
    document = json.loads(text_of(tiny))
    for name in ("step-cpu.onnx", "decoder-cpu.onnx"):
        document["files"][name] = document["files"]["step.onnx"]
    return json.dumps(document)


def test_graphs_for_the_cpu_are_taken_or_left_as_in_python(tiny: Path) -> None:
    step = StepGraph(
        dataclasses.replace(STEP, file="step-cpu.onnx"), tiny_manifest().state, (), "1.26"
    )
    decoder = DecoderGraph(
        dataclasses.replace(DECODER, file="decoder-cpu.onnx"), "int8", 40.0, "1.24"
    )

    def changed(text: str, **changes: Any) -> str:
        return json.dumps(json.loads(text) | changes)

    steps = [
        step.to_json(),
        changed(step.to_json(), onnxruntime="1.31"),
        changed(step.to_json(), format_version=2, other={}),
        changed(step.to_json(), in_place=["token"]),
        changed(step.to_json(), format="other"),
        changed(step.to_json(), state=[]),
        changed(
            step.to_json(), graphs={"step": json.loads(decoder.to_json())["graphs"]["decoder"]}
        ),
    ]
    decoders = [
        decoder.to_json(),
        changed(decoder.to_json(), onnxruntime="2.0"),
        changed(decoder.to_json(), precision="int4"),
        changed(decoder.to_json(), psnr_db=1e9),
    ]
    found = in_node(
        "cpuGraphs", manifest=with_files(tiny), steps=steps, decoders=decoders, version="1.30.0"
    )
    assert found["steps"][:3] == [{"value": "step-cpu.onnx"}, {"value": None}, {"value": None}]
    assert [one["message"] for one in found["steps"][3:]] == [
        "step-cpu.json's in_place[0] is 'token'; it must be the input of a state",
        'step-cpu.json is no step graph: it lacks "format": "aim-step-graph"',
        "step-cpu.json's state is a list of 0 items; it must be a list of 1 to 80 items",
        "step-cpu.json's state[0].input is 'ssm_state_0'; it must be an input of graphs.step",
    ]
    assert found["decoders"][:2] == [{"value": "decoder-cpu.onnx"}, {"value": None}]
    assert [one["message"] for one in found["decoders"][2:]] == [
        "decoder-cpu.json's precision is 'int4'; it must be one of 'int8', 'fp32'",
        "decoder-cpu.json's psnr_db is 1000000000.0; it must be a number from 0 to 999",
    ]
    assert STEP_FILE == "step-cpu.json"
    assert DECODER_FILE == "decoder-cpu.json"


def test_the_model_in_the_box_reads_as_in_python() -> None:
    """Its manifest and the description of its step are the largest that there are."""
    bundle = Bundle.open()
    text = bundle._source.manifest_bytes().decode()
    own = str(bundle.read(STEP_FILE), "utf-8")
    found = in_node("cpuGraphs", manifest=text, steps=[own], decoders=[], version="1.30.0")
    chosen = chosen_step(bundle).step
    assert chosen is not None
    assert found["steps"] == [{"value": chosen.graph.file}]


def entry_of(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_downloads_are_counted_and_checked(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "good").write_bytes(data)
    (folder / "short").write_bytes(data)
    (folder / "long").write_bytes(data + b"!")
    (folder / "other").write_bytes(data[:-1] + b"!")
    names = ["good", "short", "long", "other", "absent"]
    with served({"files": folder}) as site:
        site.cuts["/files/short"] = 1000
        wanted = [
            {"name": name, "url": f"{site.url}/files/{name}", "entry": entry_of(data)}
            for name in names
        ]
        gone = {"name": "gone", "url": "http://127.0.0.1:9/", "entry": entry_of(data)}
        good, short, long, other, absent, nobody = in_node("downloads", wanted=[*wanted, gone])
        site.honest = False  # the connection breaks
        (broken,) = in_node("downloads", wanted=[wanted[1]])
    assert good["value"] == len(data)
    assert good["seen"][0] == [0, len(data)]
    assert good["seen"][-1] == [len(data), len(data)]
    assert [one["code"] for one in (short, long, other, absent, nobody, broken)] == [
        "truncated",
        "altered",
        "altered",
        "network",
        "network",
        "truncated",
    ]
    assert f"1000 of {len(data)} bytes" in short["message"]
    assert "404" in absent["message"]
    assert short["file"] == "short"


def test_what_arrives_damaged_is_asked_for_once_more_past_the_caches(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with served({"files": tmp_path}) as site:
        wanted = [{"name": "file", "url": f"{site.url}/files/file", "entry": entry_of(b"right")}]
        in_node("downloads", wanted=wanted)
        assert [path for path, _ in site.asked] == ["/files/file"] * 2
        assert site.asked[1][1] == "no-cache"


GOOD = {"classes": [0, 2], "seeds": [5, "18446744073709551615"]}


def test_orders_are_checked(tiny: Path) -> None:
    wrong = {
        "class is 3; it must be a whole number from 0 to 2": {"classes": [0, 3]},
        "class is 0.5": {"classes": [0, 0.5]},
        "classes must be a list of 1 to 1024": {"classes": []},
        "2 classes and 1 seeds": {"seeds": [1]},
        "a seed is -1": {"seeds": [0, -1]},
        "a seed is 9007199254740992": {"seeds": [0, 2**53]},
        'a seed is "18446744073709551616"': {"seeds": [0, str(2**64)]},
        'a seed is "x"': {"seeds": [0, "x"]},
        "guidance is 1001; it must be a number from 0 to 1000": {"guidance": 1001},
        "temperature is -1; it must be a number from 0 up": {"temperature": -1},
        "top_k is 1.5": {"top_k": 1.5},
        "top_p is 0; it must be a number above 0, up to 1": {"top_p": 0},
        'top_p is "1"': {"top_p": "1"},
        "every is -1": {"every": -1},
    }
    orders = [GOOD, *({**GOOD, **change} for change in wrong.values())]
    good, *refused = in_node("orders", manifest=text_of(tiny), orders=orders)
    defaults = dataclasses.asdict(tiny_manifest().sampling)
    assert good["value"]["options"] == defaults
    assert good["value"]["seeds"] == ["5", "18446744073709551615"]
    for says, one in zip(wrong, refused, strict=True):
        assert one["code"] == "request"
        assert says in one["message"]
