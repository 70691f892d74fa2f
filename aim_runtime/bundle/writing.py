"""Write bundles: a whole folder, or files and engines into one that is there, all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from aim_runtime.bundle.bundle import Bundle
from aim_runtime.bundle.files import MANIFEST_NAME
from aim_runtime.bundle.manifest import ENGINES_FOLDER, FileEntry, Manifest, is_plain_file_name
from aim_runtime.errors import BundleError
from aim_runtime.replacing import replace_folder, replacing, replacing_folder


def write_bundle(
    manifest: Manifest,
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Make a bundle folder at `out_dir` from the files in `source_dir`, all or nothing.

    Every regular file of `source_dir` and of the folders in its "engines" is copied and listed (a
    manifest.json there is not); `manifest.files` is ignored and computed. The bundle is made beside
    `out_dir` and renamed in one go, so that an interruption leaves neither half a bundle nor a
    temporary. An existing bundle is replaced only with `overwrite`; anything else that exists and
    is not an empty folder stays.

    Raises BundleError when the target is taken or cannot be written, or the manifest is not valid.
    """
    source, out = Path(source_dir), Path(os.path.abspath(out_dir))
    check_target(out, overwrite)
    try:
        with replacing_folder(out) as staging:
            files = {name: _copy(source / name, staging / name) for name in _bundle_files(source)}
            _write_manifest(dataclasses.replace(manifest, files=files), staging)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"cannot write the bundle {out}: {reason}") from error
    return Bundle.open(out)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a place that `write_bundle` would not write to, before work is spent on it.

    Raises BundleError when `out` is no folder, lies under a file or in a folder that cannot be
    written, has a name that no file can have, holds other things, or holds a bundle and `overwrite`
    is not set.
    """
    out = Path(os.path.abspath(out))
    # Bundles are made beside the target and renamed. The root has no parent: it holds other things.
    existing = next((parent for parent in out.parents if os.path.lexists(parent)), out)
    if not existing.is_dir():
        raise BundleError(f"cannot write the bundle {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write the bundle {out}: no permission to write to {existing}")
    try:
        for part in out.relative_to(existing).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(existing / part)  # a name that is too long fails here, not after the work
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise BundleError(f"{out} exists and is not a folder; choose another place")
        if not any(out.iterdir()):
            return
    except OSError as error:
        raise BundleError(f"cannot write the bundle {out}: {error.strerror}") from None
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} is a folder with other things in it; choose another place")
    if not overwrite:
        raise BundleError(
            f"{out} holds a bundle already; overwrite it explicitly or choose another"
        )


def add_engine(
    bundle_dir: str | os.PathLike[str], name: str, source_dir: str | os.PathLike[str]
) -> Bundle:
    """Put the files in `source_dir` into a bundle folder as its "engines/`name`".

    What the bundle had there is replaced; all else stays and is not copied. The bundle can be read
    at every moment: at first as it was, then without the engine, then with the new one.

    Raises BundleError when there is no bundle folder, or it cannot be written, or `name` or the
    name of a file is not plain.
    """
    bundle, source = Bundle.open(bundle_dir), Path(source_dir)
    root = _folder_of(bundle, "engines")
    if not is_plain_file_name(name):
        raise BundleError(
            f"{name!r} cannot name an engine: it may have letters, digits and ._- only"
        )
    folder = root / ENGINES_FOLDER / name
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        raise BundleError(
            f"{bundle.path}: {ENGINES_FOLDER} is a link that leads outside the bundle"
        )
    staging = root / f".{name}.{secrets.token_hex(6)}.tmp"
    prefix = f"{ENGINES_FOLDER}/{name}/"
    others = {key: e for key, e in bundle.manifest.files.items() if not key.startswith(prefix)}
    try:
        staging.mkdir()
        added = {
            prefix + file: _copy(source / file, staging / file) for file in _plain_files(source)
        }
        without = dataclasses.replace(bundle.manifest, files=others)
        if others != bundle.manifest.files:
            _write_manifest(without, root)
        folder.parent.mkdir(exist_ok=True)
        replace_folder(staging, folder)
        _write_manifest(dataclasses.replace(without, files=others | added), root)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"cannot write to the bundle {bundle.path}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle.open(bundle_dir)


def add_files(bundle_dir: str | os.PathLike[str], source_dir: str | os.PathLike[str]) -> Bundle:
    """Put the files in `source_dir` beside the graphs of a bundle folder.

    What the bundle had under their names is replaced; all else stays and is not copied. The bundle
    can be read at every moment: at first as it was, then without these files, then with the new.

    Raises BundleError when there is no bundle folder, or it cannot be written, or a file has no
    plain name or that of a graph or its weights.
    """
    bundle, source = Bundle.open(bundle_dir), Path(source_dir)
    root = _folder_of(bundle, "files")
    names = _plain_files(source)
    for graph in bundle.manifest.graphs.values():
        for name in {graph.file, graph.weights}.intersection(names):
            raise BundleError(f"{bundle.path}: {name} is one of its graphs and is not replaced")
    others = {key: e for key, e in bundle.manifest.files.items() if key not in names}
    staging = root / f".files.{secrets.token_hex(6)}.tmp"
    try:
        staging.mkdir()
        added = {name: _copy(source / name, staging / name) for name in names}
        without = dataclasses.replace(bundle.manifest, files=others)
        if others != bundle.manifest.files:
            _write_manifest(without, root)
        for name in names:
            os.replace(staging / name, root / name)
        _write_manifest(dataclasses.replace(without, files=_in_order(others | added)), root)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"cannot write to the bundle {bundle.path}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle.open(bundle_dir)


def _in_order(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """As a bundle that is made with all of them at once lists them."""
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def _folder_of(bundle: Bundle, what: str) -> Path:
    """The folder that `what` can be added to, links resolved."""
    root = Path(os.path.realpath(bundle.path))
    if not root.is_dir():
        raise BundleError(f"{bundle.path}: {what} are added to a bundle folder; unpack it first")
    return root


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest of the bundle `folder`, replacing an old one in one go."""
    text = manifest.to_json()
    Manifest.from_json(text)  # what is written can be read
    with replacing(folder / MANIFEST_NAME) as new:
        new.write_text(text, encoding="utf-8")


def _bundle_files(source: Path) -> list[str]:
    """Names, as a manifest gives them, of the files that a bundle made from `source` has."""
    engines = source / ENGINES_FOLDER
    names = _plain_files(source, also=ENGINES_FOLDER if engines.is_dir() else None)
    if engines.is_dir():
        for folder in sorted(engines.iterdir()):
            if not folder.is_dir() or not is_plain_file_name(folder.name):
                raise BundleError(
                    f"{folder} cannot go into a bundle: it must be an engine's folder "
                    "whose name has letters, digits and ._- only"
                )
            names += [f"{ENGINES_FOLDER}/{folder.name}/{name}" for name in _plain_files(folder)]
    return names


def _plain_files(source: Path, also: str | None = None) -> list[str]:
    """The names of the files in `source`, which may hold nothing else but a manifest and `also`."""
    names = []
    for path in sorted(source.iterdir()):
        if path.name in (MANIFEST_NAME, also):
            continue
        if not path.is_file() or not is_plain_file_name(path.name):
            raise BundleError(
                f"{path} cannot go into a bundle: it must be a file "
                "whose name has letters, digits and ._- only"
            )
        names.append(path.name)
    return names


def _copy(path: Path, target: Path) -> FileEntry:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, target.open("xb") as copy:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            size += copy.write(chunk)
    return FileEntry(digest.hexdigest(), size)
