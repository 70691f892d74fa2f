"""What can be known of the plugin without TensorRT: NVIDIA's own layer accepts and drives it.

That layer is the package ``tensorrt_cu13_bindings`` (or ``_cu12_``), which installs alone. It links
to TensorRT's libraries; stand-ins with the same nine symbols, compiled here, let it import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton, which the kernel is written in, is not installed")

from aim_export.onnx.state_scan import OUTPUTS
from aim_export.tensorrt.ptx import compile_scan, keep_parameters
from aim_export.tensorrt.scan import PARAMETERS, ScanSizes

SIZES = ScanSizes(heads=32, head_dim=64, d_state=128, conv_width=4)
_STAND_INS = """
void *createInferBuilder_INTERNAL(void *a, int b) { return 0; }
void *createInferRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
void *createInferRuntime_INTERNAL(void *a, int b) { return 0; }
void *createNvOnnxParser_INTERNAL(void *a, void *b, int c) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
void *getBuilderPluginRegistry(int a) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *a, const char *b) { return 1; }
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plugin answers for AiM-L's sizes."""
    package = importlib.util.find_spec("tensorrt_bindings")
    if package is None or package.origin is None:
        pytest.skip(
            "NVIDIA's Python layer is missing: pip install --no-deps tensorrt_cu13_bindings"
        )
    if importlib.util.find_spec("tensorrt_libs") is not None:
        pytest.skip("TensorRT itself is installed; stand-ins for it would hide it")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc, which compiles the stand-ins, is missing")
    version = re.search(r'__version__ = "(\d+)', Path(package.origin).read_text())
    assert version is not None
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "stand_ins.c").write_text(_STAND_INS)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = folder / f"lib{name}.so.{version[1]}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, folder / "stand_ins.c"], check=True
        )
    sizes = (SIZES.heads, SIZES.head_dim, SIZES.d_state, SIZES.conv_width)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("tensorrt_layer.py"), *map(str, sizes)],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_types_shapes_and_layouts(answers: dict[str, Any]) -> None:
    assert answers["output_types"] == ["DataType.FLOAT"] * 4
    types = ["DataType.INT64" if name == "position" else "DataType.FLOAT" for name in PARAMETERS]
    assert answers["formats"] == [[kind, "TensorFormat.LINEAR"] for kind in types]
    assert answers["aliased"] == [-1] * 4  # old and new state are two buffers
    for rows, found in answers["rows"].items():
        shapes = SIZES.shapes(int(rows))
        assert found["shapes"] == [list(shapes[name]) for name in OUTPUTS]


def test_launch(answers: dict[str, Any]) -> None:
    compiled = compile_scan(SIZES)
    for rows, found in answers["rows"].items():
        heads, grid_rows = SIZES.grid(int(rows))
        assert found["launch"] == {
            **{"grid_x": heads, "grid_y": grid_rows, "grid_z": 1},
            **{"block_x": compiled.threads, "block_y": 1, "block_z": 1},
            "shared_mem": compiled.shared_bytes,
        }
    assert answers["extra"] == 0
    assert answers["tactics"] == []


def test_kernel_is_what_a_launch_in_tensorrts_order_needs(answers: dict[str, Any]) -> None:
    compiled = compile_scan(SIZES)
    assert (answers["kernel"], answers["ptx"]) == (compiled.name, compiled.ptx)


def test_other_types_are_refused(answers: dict[str, Any]) -> None:
    assert "computes in float32" in answers["refused"]


def test_ptx_has_the_nodes_parameters_alone_and_runs_on_every_gpu_since_8_0() -> None:
    compiled = compile_scan(SIZES)
    header = re.search(r"\.entry state_scan_kernel\(([^)]*)\)\s*\.reqntid (\d+)", compiled.ptx)
    assert header is not None
    assert len(header[1].split(",")) == len(PARAMETERS)
    assert header[1].count(".param .u64") == len(PARAMETERS)
    assert int(header[2]) == compiled.threads
    assert ".version 8.0\n.target sm_80\n" in compiled.ptx
    assert ".py" not in compiled.ptx  # no paths of this machine


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_ptx_assembles_for_every_gpu(target: str, tmp_path: Path) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "ptxas-blackwell" if target in ("sm_100", "sm_120") else "ptxas"
    if not (tools / name).exists():
        pytest.skip(f"this Triton brings no {name}")
    (tmp_path / "kernel.ptx").write_text(compile_scan(SIZES).ptx)
    arguments = [f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run([tools / name, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_PTX = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{{ {body} }}\n"


def test_parameters_are_removed_only_if_nothing_reads_them() -> None:
    kept = keep_parameters(_PTX.format(body="ld [k_param_0];"), "k", 1)
    assert "k_param_0" in kept
    assert "k_param_1" not in kept
    with pytest.raises(RuntimeError, match="reads k_param_1"):
        keep_parameters(_PTX.format(body="ld [k_param_1+8];"), "k", 1)
    with pytest.raises(RuntimeError, match="has 2 parameters, not 3"):
        keep_parameters(_PTX.format(body=""), "k", 3)
    with pytest.raises(RuntimeError, match="no kernel other"):
        keep_parameters(_PTX.format(body=""), "other", 1)
