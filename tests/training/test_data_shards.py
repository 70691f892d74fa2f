"""Shards as data sets: what is found in them, what is refused, and what is kept of them."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aim_training.data import (
    BatchOrder,
    Crop,
    DataError,
    ImageError,
    ImageFolder,
    ShardedImages,
    StoredImage,
    StreamedImages,
    load_image,
    open_data,
)
from aim_training.data import shards as module
from aim_training.data.index import cache_folder
from aim_training.dataset import split

from .shards import as_parquet, as_tars, images_of, png, write_parquet, write_tar


def pixels(images: Any, place: int) -> np.ndarray:
    return load_image(images.image(place), 36)


def by_content(images: Any) -> list[tuple[str, bytes]]:
    """Class name and pixels of all images, in an order of their own."""
    return sorted(
        (images.class_names[images.labels[place]], pixels(images, place).tobytes())
        for place in range(len(images))
    )


def refused(data: Path, words: str, **options: Any) -> str:
    with pytest.raises(DataError, match=words) as caught:
        open_data(data, **options)
    said = str(caught.value)
    assert len(said) <= 300
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_shards_hold_the_images_of_the_folder_that_they_were_made_of(
    squares: Path, tmp_path: Path, layout: str
) -> None:
    if layout == "parquet":
        pytest.importorskip("pyarrow")
    make = as_tars if layout == "tar" else as_parquet
    folder = ImageFolder.scan(squares)
    images = open_data(make(squares, tmp_path / "data"))
    assert isinstance(images, ShardedImages)
    assert images.class_names == folder.class_names
    assert by_content(images) == by_content(folder)
    expected = {"tar": "3 tar shards: took 12", "parquet": "2 Parquet files: took 12"}
    assert images.describe() == f"{expected[layout]} images of 3 classes; left out no file"
    first = images_of(squares)[0][0]
    assert first in str(images.name(0))
    assert isinstance(images.image(0), StoredImage)


def test_the_same_shards_by_any_name_are_the_same_data(squares: Path, tmp_path: Path) -> None:
    data = as_tars(squares, tmp_path / "data")
    digest = open_data(data).digest
    for name in ("*.tar", "train-{000000..000002}.tar", "train-00000[0-2].tar"):
        assert open_data(data / name).digest == digest
    shutil.copytree(data, tmp_path / "elsewhere" / "copy")
    assert open_data(tmp_path / "elsewhere").digest == digest  # one folder down
    assert open_data(data / "train-{000000,000002}.tar").digest != digest
    assert len(open_data(data / "train-000001.tar")) == 4


def test_urls_are_read_through_fsspec(squares: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    data = as_tars(squares, tmp_path / "data")
    digest = open_data(data).digest
    memory = fsspec.filesystem("memory")
    for path in data.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    for name in ("memory://bucket", "memory://bucket/train-*.tar", f"file://{data}"):
        images = open_data(Path(name))  # which takes one of the slashes away
        assert images.digest == digest
        assert by_content(images) == by_content(open_data(data))
        assert images.root == name
    refused(Path("memory://bucket/no-*.tar"), r"no file is called memory://bucket/no-\*\.tar")
    refused(Path("memory://nothing"), "memory://nothing is not there")
    refused(Path("nonsense-scheme://x/y"), "nonsense-scheme://x/y .*nonsense-scheme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fsspec", None)
        refused(Path("s3://bucket/x.tar"), r"without fsspec and its driver: pip install 'aim-run")


def test_numbers_are_named_by_a_list_beside_the_shards(squares: Path, tmp_path: Path) -> None:
    data = as_tars(squares, tmp_path / "wds" / "train", numbered=True)
    assert open_data(data).class_names == ("0", "1", "2")
    (tmp_path / "wds" / "classnames.txt").write_text("azure\nlime\nruby\nunseen\n")
    images = open_data(data)
    assert images.class_names == ("azure", "lime", "ruby", "unseen")
    assert np.bincount(images.labels).tolist() == [4, 4, 4]
    assert images.describe().endswith("; no image of 1 class such as 'unseen'")
    (data / "classnames.txt").write_text("azure\nlime\n")
    refused(data, r"classnames.txt names 2 classes, and the shards hold a label 2")
    (data / "classnames.txt").write_text("azure\nlime\nlime\n")
    refused(data, "two classes of .* are called 'lime'")


def test_labels_come_from_cls_or_json_in_any_order(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            *(("./d/0.JSON", b'{"label": "cat", "class": 5}'), ("./d/0.png", png(10))),
            *(("1.png", png(20)), ("1.json", b'{"label": 7}'), ("1.cls", b" dog\n")),
            *(("2.png", png(30)), ("3.png", png(40))),  # whose labels follow below
            *(("x.cls", b"none"), ("2.cls", "caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode())),
            *(("3.json", b'{"class": "dog"}'), ("4.jpg", png(50)), ("4.txt", b"a caption")),
            *(("5.png", png(60)), ("5.cls", b"\xff"), ("6.png", png()), ("6.json", b"{" * 9999)),
            *(
                ("7.png", png()),
                ("7.json", b'{"label": true}'),
                ("._8.png", b"Mac"),
                ("8.cls", b"cat"),
            ),
            *(("9.png", png(90)), ("9.webp", png(91)), ("9.cls", b"cat"), ("10.seg.png", png())),
        ],
    )
    images = open_data(path)
    assert isinstance(images, ShardedImages)
    found = [
        (images.class_names[label], pixels(images, i)[0, 0, 0])
        for i, label in enumerate(images.labels)
    ]
    assert found == [("cat", 10), ("dog", 20), ("caf\xe9", 30), ("dog", 40), ("cat", 90)]
    assert images.left_out.counts == {
        ".txt": 1,
        ".seg.png": 1,
        "hidden": 1,
        "second image of its key": 1,
        "with a label that cannot be read": 3,
        "without a label": 1,
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_keys_like_any_other(tmp_path: Path, format: int) -> None:
    names = ["a" * 90 + "/" + "b" * 90, "../../etc/passwd", "/abs/olute", "new\nline"]
    if format != tarfile.USTAR_FORMAT:
        names += ["very/" * 60 + "long", "\N{SNOWMAN}", "bytes-\udcff"]
    members = [
        (f"{name}.{end}", data) for name in names for end, data in (("png", png()), ("cls", b"c"))
    ]
    images = open_data(write_tar(tmp_path / "a.tar", members, format))
    assert len(images) == len(names)
    before = set(tmp_path.rglob("*"))
    assert all(pixels(images, place).shape == (36, 36, 3) for place in range(len(images)))
    assert set(tmp_path.rglob("*")) == before  # nothing was extracted
    assert "new\\nline" in str(ImageError(images.name(3), "x"))


def test_what_is_no_regular_file_in_a_tar_is_left_out(tmp_path: Path) -> None:
    odd = []
    for number, kind in enumerate(
        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    ):
        info = tarfile.TarInfo(f"{number}.png")
        info.type, info.linkname, info.size = kind, "/etc/passwd", 99
        odd.append(info)
    folder = tarfile.TarInfo("a.png")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "a.tar", [*odd, folder, ("1.png", png()), ("1.cls", b"c")])
    images = open_data(path)
    assert isinstance(images, ShardedImages)
    assert images.left_out.counts == {"not a regular file": 4}
    assert len(images) == 1


def raw(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header as an attacker writes it, with the right sum."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[:100] = name.ljust(100, b"\0")
    header[124:136], header[156:157] = size.ljust(12, b"\0"), kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no tar at all " * 50, "is no tar"),
        (b"short", "is neither a tar nor a Parquet file|is no tar"),
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (raw(b"1.png", HUGE), r"was cut short, in the middle of 1\.png"),
        (raw(b"1.png", b"00000001000"), r"was cut short, in the middle of 1\.png"),
        (raw(b"x", HUGE, b"L"), "has a header of"),
        (raw(b"x", HUGE, b"x"), "has a header of"),
        (raw(b"1.png", b"0000000001z"), "is no tar"),
        (raw(b"x", b"00000000012", b"x") + b"99 path=x\n".ljust(512, b"\0"), "damaged extended"),
        (raw(b"x", b"00000000014", b"x") + b"12 size=-5\n".ljust(512, b"\0"), "damaged extended"),
        (raw(b"1.png", b"0" * 11, b"S"), "holds sparse files"),
        (raw(b"1.png", b"0" * 11) + b"\1" * 512, "is damaged at byte 512"),
        (bytes(10240), r"holds no image with a label \(left out no file\); expected KEY\.jpg"),
    ],
)
def test_tars_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        refused(path, words)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_cut_tar_is_named_with_the_member_it_ends_in(squares: Path, tmp_path: Path) -> None:
    data = as_tars(squares, tmp_path / "data")
    path = data / "train-000001.tar"
    whole = path.read_bytes()
    for length in (100, 700, 2000):
        path.write_bytes(whole[:length])
        refused(data, r"train-000001\.tar (was cut short|is no tar)")


@pytest.mark.parametrize("names", [[b"line\nbreak"], [b"\x1b[31m"], [b"a" * 70_000]])
def test_class_names_are_as_clean_as_those_of_folders(tmp_path: Path, names: list[bytes]) -> None:
    members = [
        (f"{n}.{end}", data)
        for n, name in enumerate(names)
        for end, data in (("png", png()), ("cls", name))
    ]
    data = write_tar(tmp_path / "a.tar", members)
    if names == [b"a" * 70_000]:
        assert len(open_data(data)) == 1
    else:
        refused(data, "has line breaks or control characters")


def test_an_image_in_a_shard_is_read_with_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_training.data.tar.MOST_IMAGE_BYTES", 1000)
    data = write_tar(
        tmp_path / "a.tar",
        [("1.png", bytes(5000)), ("1.cls", b"a"), ("2.png", b""), ("2.cls", b"a")],
    )
    images = open_data(data)
    with pytest.raises(
        ImageError, match=r"a\.tar/1\.png cannot .*: it takes 0 MiB, and at most"
    ) as caught:
        images.image(0)
    assert caught.value.kind == "oversized"
    with pytest.raises(ImageError, match=r"a\.tar/2\.png .*the file is empty"):
        pixels(images, 1)
    write_tar(tmp_path / "b.tar", [("1.png", png()), ("1.cls", b"a")])
    images = open_data(tmp_path / "b.tar")
    with open(tmp_path / "b.tar", "rb+") as file:
        file.truncate(550)
    with pytest.raises(ImageError, match=r"1\.png .*its shard has been cut short since"):
        images.image(0)


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, ("blue", "green", "red")),
        ({"names": None}, ("blue", "green", "red")),
        ({"plain": True}, ("blue", "green", "red")),
        ({"image": "img", "label": "fine_label"}, ("blue", "green", "red")),
        ({"compression": "none", "row_group_size": 100}, ("blue", "green", "red")),
    ],
)
def test_parquet_in_all_its_forms(
    squares: Path, tmp_path: Path, options: dict[str, Any], classes: tuple[str, ...]
) -> None:
    pytest.importorskip("pyarrow")
    images = open_data(as_parquet(squares, tmp_path / "data", **options))
    assert images.class_names == classes
    assert by_content(images) == by_content(ImageFolder.scan(squares))


def test_rows_of_parquet_without_an_image_or_a_label(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        (png(1), "a.png", 0),
        (None, "b.png", 1),
        (png(2), None, -1),
        (None, None, None),
        (b"x", "c.png", 2),
    ]
    images = open_data(write_parquet(tmp_path / "a.parquet", rows))
    assert isinstance(images, ShardedImages)
    assert images.left_out.counts == {"without a label": 2}
    with pytest.raises(ImageError, match=r"a\.parquet/b\.png \(row 1 of group 0\) .*only its path"):
        images.image(1)
    with pytest.raises(
        ImageError, match=r"c\.png \(row 1 of group 1\) cannot be read .*no image in a"
    ):
        pixels(images, 2)


def test_parquet_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    rows = [(png(1), "a.png", "blue"), (png(2), "b.png", "red")]

    def table(**columns: Any) -> None:
        pq.write_table(pa.table(columns), path)

    whole = write_parquet(path, rows).read_bytes()
    for content in (whole[:-20], whole[:100], b"PAR1" + bytes(100) + b"PAR1", b""):
        path.write_bytes(content)
        refused(path, "cannot be read as Parquet|is neither")
    table(picture=[1, 2], label=[0, 1])
    refused(
        path,
        r"it has no column of images \(expected one named 'image'\); its columns are picture",
    )
    table(a=[b"x"], b=[b"y"], label=[0])
    refused(path, "several columns may be its images")
    table(image=[b"x"], text=["y"])
    refused(path, "it has no column of labels")
    table(image=[b"x"], label=[0.5])
    refused(path, "its column label holds double; expected whole numbers or texts")
    write_parquet(path, [(png(), None, 3)])
    refused(path, "has a label 3, and its metadata names 3 classes")
    write_parquet(path, [(None, "a.png", 0)])
    refused(path, "holds no images, at most their paths")
    write_parquet(path, [(png(), "a.png", 0)], names=("x", "x"))
    refused(path, "two classes of .* are called 'x'")
    monkeypatch.setattr("aim_training.data.parquet.MOST_GROUP_BYTES", 100)
    write_parquet(path, rows)
    refused(path, r"the images of row group 0 take 0 MiB, and at most .* with row_group_size=100")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(
        tmp_path, r"a\.parquet is Parquet, which pyarrow reads: pip install 'aim-runtime\[data\]'"
    )


def test_row_groups_are_kept_while_they_are_read(squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    images = open_data(as_parquet(squares, tmp_path / "data", files=1, row_group_size=4))
    read, original = [], module.ParquetImages._group.__globals__["_read_group"]

    def watched(file: Any, group: int) -> Any:
        read.append(group)
        return original(file, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aim_training.data.parquet._read_group", watched)
        for place in range(12):
            images.image(place)
    assert read == [0, 1, 2]


def test_what_is_ambiguous_is_refused(squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = as_tars(squares, tmp_path / "mixed")
    shutil.copytree(squares / "red", data / "red")
    refused(data, r"holds both shards \(train-000000\.tar\) and folders of images")
    shutil.rmtree(data / "red")
    (data / "notes").mkdir()
    (data / ".git").mkdir()
    assert len(open_data(data)) == 12
    write_tar(data / "validation-000000.tar", [("1.png", png()), ("1.cls", b"red")])
    refused(data, r"holds shards of several splits \(train, validation\); name those of one")
    assert len(open_data(data / "train-*.tar")) == 12
    (data / "validation-000000.tar").unlink()
    write_parquet(data / "more.parquet", [(png(), "a.png", "red")])
    refused(data, "stands for both tar and Parquet files")
    both = tmp_path / "both"
    as_tars(squares, both / "train")
    as_tars(squares, both / "val")
    refused(both, r"holds shards in several folders \(train, val\); name one of them")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    refused(tmp_path / "packed", r"a\.tar\.gz is compressed")
    refused(tmp_path / "nowhere", "nowhere is not a folder, nor a tar or Parquet file")
    refused(tmp_path / "no-{0..3}.tar", r"no-0\.tar is not there")
    refused(tmp_path / "{0..999999999}.tar", "no range")
    os.mkfifo(tmp_path / "pipe.tar")
    refused(tmp_path / "pipe.tar", "pipe.tar is not a")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(
    squares: Path, tmp_path: Path
) -> None:
    shutil.copytree(squares, tmp_path / "a[1]{x}*")
    assert isinstance(open_data(tmp_path / "a[1]{x}*"), ImageFolder)


def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are indexed from now on, in this process."""
    names: list[str] = []
    original = module._INDEX["tar"]
    monkeypatch.setitem(
        module._INDEX, "tar", lambda file: names.append(file.name) or original(file)
    )
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    return names


def test_shards_are_indexed_once(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, names, told = as_tars(squares, tmp_path / "data"), walked(monkeypatch), []
    first = open_data(data, progress=lambda done, total: told.append((done, total)))
    assert sorted(names) == [f"train-00000{number}.tar" for number in range(3)]
    assert told == [(1, 3), (2, 3), (3, 3)]
    names.clear()
    again = open_data(data)
    assert names == []
    assert again.digest == first.digest
    assert by_content(again) == by_content(first)
    # One shard changes, one index is damaged, another is cut.
    shard = data / "train-000001.tar"
    os.utime(shard, ns=(1, 1))
    assert open_data(data).digest == first.digest
    assert names == ["train-000001.tar"]
    kept = sorted(cache_folder().iterdir())
    assert len(kept) == 3
    for damage in (b"", b"x", kept[0].read_bytes()[:-3], bytes(kept[0].stat().st_size)):
        names.clear()
        kept[0].write_bytes(damage)
        assert open_data(data).digest == first.digest
        assert len(names) == 1
    names.clear()
    flipped = bytearray(kept[0].read_bytes())
    flipped[-1] ^= 1
    kept[0].write_bytes(flipped)
    assert by_content(open_data(data)) == by_content(first)
    assert len(names) == 1


def test_indices_that_cannot_be_kept_are_made_each_time(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = as_tars(squares, tmp_path / "data")
    assert open_data(data).digest == open_data(data).digest


def test_the_digest_follows_names_labels_and_contents(squares: Path, tmp_path: Path) -> None:
    data = as_tars(squares, tmp_path / "data")
    digests = {open_data(data).digest}
    path = data / "train-000001.tar"
    whole = bytearray(path.read_bytes())
    end = whole.index(b"IEND") - 5  # the last bytes of the first image's pixels
    whole[end] ^= 1
    path.write_bytes(whole)
    digests.add(open_data(data).digest)
    path.rename(data / "train-000009.tar")
    digests.add(open_data(data).digest)
    write_tar(data / "train-000010.tar", [("1.png", png()), ("1.cls", b"red")])
    digests.add(open_data(data).digest)
    write_tar(data / "train-000010.tar", [("1.png", png()), ("1.cls", b"blue")])
    digests.add(open_data(data).digest)
    assert len(digests) == 5


def test_an_image_takes_24_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    members = [
        (f"{n:09d}.{end}", data)
        for n in range(1000)
        for end, data in (("png", b"x"), ("cls", b"1"))
    ]
    images = open_data(write_tar(tmp_path / "a.tar", members))
    assert isinstance(images, ShardedImages)
    columns = [one for one in vars(images).values() if isinstance(one, np.ndarray)]
    assert sum(column.nbytes for column in columns) == 24 * 1000
    assert sum(path.stat().st_size for path in cache_folder().iterdir()) < 17 * 1000


def test_held_out_images_of_any_layout(squares: Path, held_out: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = ImageFolder.scan(squares)
    for data in (as_tars(held_out, tmp_path / "t"), as_parquet(held_out, tmp_path / "p")):
        images = open_data(data, folder.class_names)
        assert by_content(images) == by_content(ImageFolder.scan(held_out))
        turned = open_data(data, ("red", "green", "blue"))
        assert turned.labels.tolist() == [2 - label for label in images.labels]
        refused(data, "is a class that the training images lack", class_names=("red", "green"))


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_a_fraction_is_held_out_by_keys(tmp_path: Path, layout: str) -> None:
    """Wherever an image lies in its shards."""
    if layout == "parquet":
        pytest.importorskip("pyarrow")

    def made(target: Path, names: list[str]) -> tuple[set[str], set[str]]:
        if layout == "tar":
            write_tar(
                target / "a.tar",
                [(f"{n}.{e}", c) for n in names for e, c in (("png", png()), ("cls", b"a"))],
            )
        else:
            write_parquet(target / "a.parquet", [(png(), f"{name}.png", "blue") for name in names])
        training, held_out = split(open_data(target), 0.2)
        sides = [
            {str(one.name(n)).rsplit("/")[-1].split(".")[0] for n in range(len(one))}
            for one in (training, held_out)
        ]
        assert training.digest != held_out.digest
        return sides[0], sides[1]

    names = [f"image{number}" for number in range(100)]
    training, held = made(tmp_path / "1", names)
    assert 10 <= len(held) <= 32
    assert training | held == set(names)
    more = [f"new{number}" for number in range(50)]
    again = made(tmp_path / "2", (more + names)[::-1])[1]
    assert again & set(names) == held


def test_many_shards_are_indexed_by_several_processes(tmp_path: Path) -> None:
    for number in range(8):
        write_tar(tmp_path / "d" / f"{number}.tar", [("1.png", png(number)), ("1.cls", b"a")])
    images = open_data(tmp_path / "d", workers=4)
    assert [pixels(images, place)[0, 0, 0] for place in range(8)] == list(range(8))
    (tmp_path / "d" / "5.tar").write_bytes(b"x" * 600)
    refused(tmp_path / "d", r"5\.tar is no tar", workers=4)


def test_a_large_photo_in_a_shard_is_decoded_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    """Within two levels of 255 on average of the whole, as in a file of its own."""
    waves = np.sin(np.arange(1600) / 40)[None] * np.cos(np.arange(1200) / 30)[:, None]
    photo = Image.fromarray((127 + 100 * waves).astype(np.uint8)).convert("RGB")
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    data = write_tar(tmp_path / "a.tar", [("1.jpg", file.getvalue()), ("1.cls", b"a")])
    stored = open_data(data).image(0)
    (tmp_path / "1.jpg").write_bytes(file.getvalue())
    found = load_image(stored, 72)
    assert np.array_equal(found, load_image(tmp_path / "1.jpg", 72))
    whole = np.asarray(Image.open(file).resize((96, 72), Image.Resampling.BICUBIC))
    assert 0 < np.abs(found.astype(int) - whole).mean() < 2


@pytest.mark.parametrize("made", ["shards", "train.parquet"])
def test_the_documented_lines_make_shards(squares: Path, tmp_path: Path, made: str) -> None:
    if made == "train.parquet":
        pytest.importorskip("pyarrow")
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n# [^\n]*\npython -c '\n(.*?)\n'\n```", text, re.DOTALL)
    (script,) = (block for block in blocks if f'"{made}' in block)
    shutil.copytree(squares, tmp_path / "pictures" / "train")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert by_content(open_data(tmp_path / made)) == by_content(ImageFolder.scan(squares))


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_several_processes_read_shards(squares: Path, tmp_path: Path, layout: str) -> None:
    if layout == "parquet":
        pytest.importorskip("pyarrow")
    images = open_data((as_tars if layout == "tar" else as_parquet)(squares, tmp_path / "data"))
    batches = []
    for workers in (0, 2):
        streamed = StreamedImages(images, Crop(32), torch.device("cpu"), workers)
        draws = [BatchOrder(12, 5, 0).batch(step) for step in range(3)]
        batches.append(torch.cat(list(streamed.batches(draws))))
    assert torch.equal(*batches)
