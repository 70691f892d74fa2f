"""Which files are taken for images, which classes they belong to, and whether they changed."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from aim_training.data import DataError, ImageFolder, open_data, shown
from aim_training.data.digest import contents_digest


def draw(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), colour).save(path, "PNG")
    return path


def relative(folder: ImageFolder) -> list[str]:
    return [path.relative_to(folder.root).as_posix() for path in folder.paths]


def test_every_ending_that_pillow_reads_is_taken_as_deep_as_the_tree_goes(tmp_path: Path) -> None:
    names = ["0.png", "1.BMP", "2.tiff", "3.jfif", "more/4.gif", "more/and/more/5.webp"]
    for name in names:
        draw(tmp_path / "cat" / name)
    folder = ImageFolder.scan(tmp_path)
    assert relative(folder) == [f"cat/{name}" for name in names]
    assert folder.describe() == "took 6 images of 1 class; left out no file"


def test_what_is_left_out_is_counted_with_the_reason(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "0.png")
    for name in (
        *("cat/._0.png", "cat/Thumbs.db", "cat/@eaDir/0.png", "__MACOSX/cat/._0.png", ".git/x.png"),
        *("cat/0.txt", "cat/1.txt", "cat/drawing.eps", "cat/page.pdf", "cat/README", "labels.csv"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"\0\5\x16\7")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    folder = ImageFolder.scan(tmp_path)
    assert relative(folder) == ["cat/0.png"]
    assert folder.left_out.counts == {
        "hidden": 5,
        ".txt": 2,
        ".eps": 1,
        ".pdf": 1,
        "without an ending": 1,
        "beside the class folders": 1,
        "not a regular file": 1,
        "broken link": 2,
    }
    said = folder.describe()
    assert said.startswith("took 1 image of 1 class; left out 14 files: 5 hidden, 2 .txt, ")
    assert said.endswith("2 for other reasons")


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.heix").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cat holds no images \(left out 1 file: 1 \.heix\)"):
        ImageFolder.scan(tmp_path)


@pytest.mark.parametrize("splits", [["train", "val"], ["Train"], ["test", "validation"]])
def test_splits_are_no_classes(tmp_path: Path, splits: list[str]) -> None:
    for name in splits:
        draw(tmp_path / name / "cat" / "0.png")
    first = re.escape(str(tmp_path / splits[0]))
    with pytest.raises(DataError, match=f"holds {' and '.join(splits)} .*such as {first}$"):
        open_data(tmp_path)


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    """With their images directly in them, or beside others."""
    for path in ("a/test/0.png", "b/test/deep/0.png", "b/cat/0.png"):
        draw(tmp_path / path)
    assert open_data(tmp_path / "a").class_names == ("test",)
    assert open_data(tmp_path / "b").class_names == ("cat", "test")


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "deep" / "0.png")
    root = tmp_path / "data"
    draw(root / "cat" / "0.png")
    (root / "cat" / "1.png").symlink_to(root / "cat" / "0.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to("../..")
    (root / "up").symlink_to("..")
    (root / "circle").symlink_to("circle")
    folder = ImageFolder.scan(root)
    assert relative(folder) == ["cat/0.png", "cat/1.png", "dog/deep/0.png"]
    assert folder.left_out.counts == {"link that leads back": 3, "beside the class folders": 1}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "2", "0"], ("0", "2", "9", "10")),
        (["010", "9", "2"], ("2", "9", "010")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["-1", "10", "9"], ("-1", "10", "9")),
        (["²", "10", "9"], ("10", "9", "²")),
    ],
)
def test_folders_that_are_all_numbers_are_in_their_order(
    tmp_path: Path, names: list[str], order: tuple[str, ...]
) -> None:
    for name in names:
        draw(tmp_path / name / "0.png")
    folder = ImageFolder.scan(tmp_path)
    assert folder.class_names == order
    assert [path.parent.name for path in folder.paths] == list(order)
    assert folder.labels.tolist() == list(range(len(order)))


def test_class_names_are_composed_and_compared_so(tmp_path: Path) -> None:
    composed = "café"
    decomposed = unicodedata.normalize("NFD", composed)
    draw(tmp_path / "train" / decomposed / "0.png")
    folder = ImageFolder.scan(tmp_path / "train")
    assert folder.class_names == (composed,)
    draw(tmp_path / "val" / composed / "0.png")
    assert ImageFolder.scan(tmp_path / "val", folder.class_names).labels.tolist() == [0]
    assert ImageFolder.scan(tmp_path / "val", [decomposed]).labels.tolist() == [0]
    assert ImageFolder.scan(tmp_path / "val").digest == folder.digest
    draw(tmp_path / "val" / decomposed / "0.png")
    with pytest.raises(DataError, match=f"two folders named '{composed}'"):
        ImageFolder.scan(tmp_path / "val")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"bad\xffbytes", r"class folder 'bad\\xffbytes' in \S+ is not UTF-8"),
        (b"new\nline", r"class folder 'new\\nline' in \S+ has line breaks or control"),
        ("\N{LINE SEPARATOR}".encode(), r"'\\u2028' in \S+ has line breaks"),
        (b" ", "is blank"),
    ],
)
def test_names_that_no_class_can_have(tmp_path: Path, name: bytes, message: str) -> None:
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder.scan(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_file_names_are_opaque(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "0.png")
    name = b"caf\xe9\nnew.png"
    os.rename(tmp_path / "cat" / "0.png", os.path.join(os.fsencode(tmp_path / "cat"), name))
    folder = ImageFolder.scan(tmp_path)
    assert len(folder) == 1
    assert len(folder.digest) == 64
    assert shown(folder.paths[0].name) == r"caf\xe9\nnew.png"


def test_names_are_shown_on_one_short_line() -> None:
    assert shown("a\r\tb\u2028\x1b[0m\ud800é") == r"a\r\tb\u2028\x1b[0m\ud800é"
    assert shown("x" * 500 + ".png", 40).endswith("xxx.png")
    assert len(shown("x" * 500, 40)) == 40


def test_changed_contents_of_equal_size_change_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draw(tmp_path / "cat" / "0.png")
    path.write_bytes(bytes(50_000))
    whole = ImageFolder.scan(tmp_path).digest
    monkeypatch.setattr("aim_training.data.digest._WHOLE_BYTES", 1000)
    sampled = ImageFolder.scan(tmp_path).digest
    for place in (0, 20_000, 49_999):
        content = bytearray(50_000)
        content[place] = 1
        path.write_bytes(content)
        found = contents_digest(tmp_path, ("cat",), (path,))
        assert (found == sampled) == (place == 20_000)  # between two samples
        with monkeypatch.context() as patch:
            patch.setattr("aim_training.data.digest._WHOLE_BYTES", 10**6)
            assert contents_digest(tmp_path, ("cat",), (path,)) != whole
