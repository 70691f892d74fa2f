"""`aim web`: what it writes, what it refuses, where ONNX Runtime comes from, and `--serve`."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aim_cli.main import aim
from aim_runtime import Bundle, models_dir
from aim_runtime.bundle import add_engine
from aim_web import Package, Site, modules, site, write_site
from aim_web.headers import POLICY
from aim_web.onnxruntime_web import NAME, WASM, Pin

from ..runtime.tiny_bundle import write_tiny_bundle
from .engine_parts import listening
from .site_parts import FAKE_ENGINE

LONG = 60


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modules.FOLDERS, "web/engine", FAKE_ENGINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY", "AIM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def web(*args: object) -> Result:
    return CliRunner().invoke(aim, ["web", *map(str, args)], prog_name="aim")


def refused(result: Result, *words: str) -> None:
    """It ended in one sentence that says these words."""
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("Error: "), result.stderr
    assert result.exit_code == 2
    assert len(sentence) <= 400
    for word in words:
        assert word in sentence


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_site_holds_all_it_needs_and_lists_it(tiny: Path, package: Path) -> None:
    result = web("site", "--bundle", tiny, "--onnxruntime-web", package)
    assert result.exit_code == 0, result.stderr
    assert "before the first picture" in result.stdout
    found = Site.open(Path("site"))
    listed = {*found.files, site.LIST}
    assert listed == {path for path in everything(Path("site")) if (Path("site") / path).is_file()}
    for path, entry in found.files.items():
        data = (Path("site") / path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.size)
    index = Path("site/index.html").read_text(encoding="utf-8")
    assert f'content="{POLICY}"' in index
    for link in re.findall(r'(?:src|href)="([^"#]+)"', index):
        assert link in found.files
    told = json.loads(re.findall(r'id="site">(.*)</script>', index)[0])
    manifest = Bundle.open(tiny).manifest
    assert {*told["files"]} == {"manifest.json", *manifest.files}
    assert [one["name"] for one in told["classes"]] == list(manifest.class_names)
    places = [*told["files"].values(), told["runtime"]["wasm"], *told["runtime"]["webgpu"].values()]
    assert {*places} <= {*found.files}
    assert not [path for path in found.files if path.endswith(("/api.js", "/health.js"))]
    licences = Path("site/LICENSES.txt").read_text(encoding="utf-8")
    assert "aim-runtime" in licences
    assert "Microsoft" in licences
    headers = Path("site/_headers").read_text(encoding="utf-8")
    assert "Cross-Origin-Embedder-Policy: require-corp" in headers
    assert headers.count("immutable") == 3


def test_equal_sites_are_equal_and_changes_change_folders(
    tiny: Path, package: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_site(Bundle.open(tiny), Package.at(package), name)
    assert Site.open(Path("one")).files == Site.open(Path("two")).files
    source = (FAKE_ENGINE / "worker.js").read_text(encoding="utf-8")
    (tmp_path / "worker.js").write_text(f"{source}// changed\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modules.FOLDERS, "web/engine", tmp_path)
        write_site(Bundle.open(tiny), Package.at(package), "two")
    before, after = (
        {path.partition("/")[0] for path in Site.open(Path(n)).files} for n in ("one", "two")
    )
    assert [name.partition("-")[0] for name in sorted(before ^ after)] == ["page", "page"]


def test_text_of_a_bundle_is_not_taken_for_html(tmp_path: Path, package: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    names = text.replace("red panda", "</script><script>alert(1)</script>")
    (bundle / "manifest.json").write_text(names, encoding="utf-8")
    assert web("site", "--bundle", bundle, "--onnxruntime-web", package).exit_code == 0
    index = Path("site/index.html").read_text(encoding="utf-8")
    assert "alert(1)" in index
    assert "<script>alert" not in index


def test_engines_of_gpus_stay_out(tmp_path: Path, package: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "kernels.bin").write_bytes(b"kernels")
    add_engine(bundle, "cuda", tmp_path / "engine")
    assert web("site", "--bundle", bundle, "--onnxruntime-web", package).exit_code == 0
    assert not [path for path in everything(Path("site")) if "kernels.bin" in path]


def test_a_small_decoder_comes_in_the_form_that_loads_soon(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(models_dir() / "emoji")
    files = {"decoder-cpu.json", "decoder-cpu.onnx"}
    assert files <= set(bundle.manifest.files)
    for large, found in ((1 << 24, set()), (1, files)):
        monkeypatch.setattr(site, "_LARGE_DECODER", large)
        assert web("site", "--onnxruntime-web", package).exit_code == 0
        assert {path.split("/")[-1] for path in everything(Path("site"))} & files == found


def test_an_own_site_is_replaced_and_nothing_else(tiny: Path, package: Path) -> None:
    args = ("--bundle", tiny, "--onnxruntime-web", package)
    assert web("site", *args).exit_code == 0
    assert web("site", *args, "--no-webgpu").exit_code == 0
    assert not [path for path in everything(Path("site")) if "webgpu" in path]
    Path("site/CNAME").write_text("example.com", encoding="utf-8")
    refused(web("site", *args), "site has files", "'CNAME'")
    assert Path("site/CNAME").exists()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine", encoding="utf-8")
    refused(web("other", *args), "other things in it")
    refused(web("other/notes.txt", *args), "is not a folder")
    refused(web("other/notes.txt/site", *args), "notes.txt is not a folder")
    assert everything(Path("other")) == {"notes.txt"}
    Path("empty").mkdir()
    assert web("empty", *args).exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_half_a_site_is_never_left(
    tiny: Path,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: str,
    there: bool,
) -> None:
    args = ("deep/site", "--bundle", tiny, "--onnxruntime-web", package)
    if there:
        assert web(*args).exit_code == 0
    before = everything(Path())

    def fail(*args: object) -> str:
        raise error

    monkeypatch.setattr(site, "headers_file", fail)
    result = web(*args)
    assert result.exit_code == code
    assert words in result.stderr
    assert ".tmp" not in result.stderr
    assert everything(Path()) == before


def test_what_does_not_fit_together_is_refused(tiny: Path, package: Path) -> None:
    refused(web(), "OUT is missing")
    refused(web("site", "--port", 1), "--serve")
    refused(web("site", "--bundle", tiny, "--ckpt", "a.pt"), "exclude each other")
    refused(web("site", "--tokenizer", "a.pt"), "--ckpt")
    refused(web("site", "--bundle", "nothing"), "nothing")
    result = web("site", "--bundle", tiny, "--precision", "int4")
    refused(result, "stored in fp32", "aim export --ckpt CKPT --precision int4 --out DIR")
    assert web("site", "--bundle", tiny, "--onnxruntime-web", package).exit_code == 0
    refused(web("site", "--serve", "--bundle", tiny), "leave out --bundle")
    Path("site/aim-site.json").write_text("{}", encoding="utf-8")
    refused(web("site", "--serve"), "is not the list of a site")
    assert not Path("site2").exists()


def test_a_damaged_bundle_makes_no_site(tmp_path: Path, package: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    weights = bundle / "step.weights"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    refused(web("site", "--bundle", bundle, "--onnxruntime-web", package), "step.weights")
    assert not Path("site").exists()


# -- the package ----------------------------------------------------------------------------------


@pytest.fixture
def packed(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The package as a registry has it, pinned."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as file:
        file.add(package, "package")
    data = memory.getvalue()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    lock = {"packages": {f"node_modules/{NAME}": {}}}
    lock["packages"][f"node_modules/{NAME}"] = {
        "version": Pin.read().version,
        "integrity": f"sha512-{digest}",
    }
    (tmp_path / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    monkeypatch.setattr("aim_web.onnxruntime_web._LOCK", tmp_path / "lock.json")
    return data


class Registry:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.says = len(data)
        self.status = 200
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def registry(data: bytes) -> Iterator[Registry]:
    served = Registry(data)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            self.send_response(served.status)
            self.send_header("Content-Length", str(served.says))
            self.end_headers()
            self.wfile.write(served.data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with listening(Handler) as url:
        served.url = f"{url}/npm/"
        yield served


def test_the_package_is_fetched_once_and_checked(
    tiny: Path, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry(packed) as served:
        monkeypatch.setenv("npm_config_registry", served.url)
        assert web("site", "--bundle", tiny).exit_code == 0
        assert served.asked == [f"/npm/{NAME}/-/{Pin.read().file_name}"]
        assert web("site", "--bundle", tiny, "--registry", "http://127.0.0.1:9/").exit_code == 0
        assert len(served.asked) == 1
        (cached,) = (tmp_path / "cache" / "aim-runtime").iterdir()
        cached.write_bytes(cached.read_bytes()[:-1])  # damaged: fetched again
        assert web("site", "--bundle", tiny).exit_code == 0
        assert len(served.asked) == 2
    found = Site.open(Path("site"))
    assert any(path.endswith(WASM[1]) for path in found.files)
    Path("own.tgz").write_bytes(packed)
    assert web("site2", "--bundle", tiny, "--onnxruntime-web", "own.tgz").exit_code == 0
    assert Site.open(Path("site2")).files == found.files


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("altered", "its checksum differs"),
        ("cut off", "was cut off after"),
        ("missing", "answers 404"),
        ("away", "cannot fetch http://127.0.0.1:"),
        ("no URL", "must be a URL such as"),
    ],
)
def test_a_package_that_does_not_come_whole_is_not_kept(
    tiny: Path, packed: bytes, tmp_path: Path, how: str, words: str
) -> None:
    with registry(packed) as served:
        if how == "altered":
            served.data = bytes([packed[0] ^ 1]) + packed[1:]
        elif how == "cut off":
            served.data = packed[: len(packed) // 2]
        elif how == "missing":
            served.status = 404
        url = "registry.npmjs.org" if how == "no URL" else served.url
        if how != "away":
            refused(web("site", "--bundle", tiny, "--registry", url), words)
    if how == "away":
        refused(web("site", "--bundle", tiny, "--registry", url), words, "npm pack")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tgz", ".tmp")]
    assert not Path("site").exists()


def test_other_packages_are_refused(tiny: Path, package: Path, tmp_path: Path) -> None:
    args = ("site", "--bundle", tiny, "--onnxruntime-web")
    (tmp_path / "empty").mkdir()
    refused(web(*args, tmp_path / "empty"), "no package.json")
    refused(web(*args, "nothing"), "nothing")
    Path("other.tgz").write_bytes(b"other")
    refused(web(*args, "other.tgz"), "checksum differs")
    old = tmp_path / "old"
    (old / "dist").mkdir(parents=True)
    about = old / "package.json"
    about.write_text(json.dumps({"name": NAME, "version": "1.0.0"}), encoding="utf-8")
    refused(web(*args, old), "'1.0.0'", Pin.read().version)
    about.write_text((package / "package.json").read_text(encoding="utf-8"), encoding="utf-8")
    refused(web(*args, old), "is not complete")
    assert not Path("site").exists()


# -- serve ----------------------------------------------------------------------------------------


@contextmanager
def shown(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `aim web --serve`, and where it shows a site."""
    command = [sys.executable, "-m", "aim_cli", "web", "--serve", "--port", "0", *map(str, args)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = next((line for line in process.stderr or () if "http://" in line), "")
            assert said, process.wait(LONG)
            yield process, re.findall(r"http://\S+", said)[0]
        finally:
            process.kill()


def test_a_site_is_shown_with_its_headers_until_ctrl_c(tiny: Path, package: Path) -> None:
    write_site(Bundle.open(tiny), Package.at(package), "site")
    with shown("site") as (process, url):
        with urllib.request.urlopen(url, timeout=LONG) as answer:
            assert answer.read() == Path("site/index.html").read_bytes()
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Cache-Control"] == "no-cache"
            tag = answer.headers["ETag"]
        model = next(path for path in Site.open(Path("site")).files if path.endswith(".wasm"))
        with urllib.request.urlopen(url + model, timeout=LONG) as answer:
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.headers["Content-Type"] == "application/wasm"
        for path, headers, status in (
            ("", {"If-None-Match": tag}, 304),
            ("../../etc/passwd", {}, 404),
            ("%2e%2e/site/index.html", {}, 404),
            ("nothing", {}, 404),
        ):
            request = urllib.request.Request(url + path, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=LONG)
            assert caught.value.code == status
        port = url.rstrip("/").rpartition(":")[2]
        refused(web("--serve", "site", "--port", port), "cannot listen", "another --port")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LONG) == ("", "")
        assert process.returncode == 0


def test_without_a_folder_it_is_tried_in_a_temporary_one(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with shown("--onnxruntime-web", package) as (process, url):
        with urllib.request.urlopen(url, timeout=LONG) as answer:
            assert b"emoji" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LONG)[0] == ""
        assert process.returncode == 0
    assert everything(tmp_path / "temporary") == set()
