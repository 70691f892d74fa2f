"""One file to pixels: every mode by its meaning, every fault as one sentence, memory bounded."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from aim_training.data import ImageError, load_image, read_header
from aim_training.data import decode as module
from aim_training.data.colour import Coding

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    try:
        image.save(folder / name, **options)
    except (KeyError, OSError, ValueError) as error:
        pytest.skip(f"this Pillow cannot write {name}: {error}")
    return folder / name


def grey(path: Path) -> np.ndarray:
    """The picture read at its own size, which must be grey."""
    found = load_image(path, 16)
    assert (found == found[..., :1]).all()
    return found[..., 0]


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("16.png", RAMP.astype(np.uint16) * 257),
        ("16.tiff", RAMP.astype(np.uint16) * 257),
        ("16.pgm", RAMP.astype(np.uint16) * 257),
        ("big-endian.tiff", RAMP.astype(">u2") * 257),
        ("32.tiff", RAMP.astype(np.int32)),
        ("32-holds-16.tiff", RAMP.astype(np.int32) * 257),
        ("32-bits.tiff", (RAMP.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32)),
        ("unit.tiff", RAMP.astype(np.float32) / 255),
        ("bytes.tiff", RAMP.astype(np.float32)),
        ("words.tiff", RAMP.astype(np.float32) * 257),
        ("overshoot.tiff", RAMP.astype(np.float32) / 255 * 1.0001),
        ("float.pfm", RAMP.astype(np.float32) / 255),
        ("palette.png", Image.fromarray(RAMP).convert("P")),
        ("grey.webp", RAMP),
        ("grey.qoi", COLOUR),
    ],
)
def test_samples_of_any_width_are_read_by_their_meaning(
    tmp_path: Path, name: str, samples: Any
) -> None:
    image = samples if isinstance(samples, Image.Image) else Image.fromarray(samples)
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, image, name, **options)
    if name.endswith("qoi"):
        assert np.array_equal(load_image(path, 16), COLOUR)
    else:
        assert np.abs(grey(path).astype(int) - RAMP).max() <= (name == "overshoot.tiff")


def test_a_mode_that_opened_as_wide_is_16_bit_in_formats_of_16_bits(tmp_path: Path) -> None:
    """Older versions of Pillow open a 16-bit PNG as 32 bits; a dark one is no 8-bit picture."""
    wide = Image.fromarray(np.full((16, 16), 255, np.int32))
    assert np.asarray(module.eight_bit(wide, Coding("PNG"))).max() == 0
    assert np.asarray(module.eight_bit(wide, Coding("TIFF"))).max() == 255


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.array([[0.0, np.nan]]), "not all finite"),
        (np.array([[0.0, np.inf]]), "not all finite"),
        (np.array([[-5.0, 1.0]]), "go from -5 to 1; expected 0 to 1"),
        (np.array([[0.0, 1e9]]), r"go from 0 to 1e\+09"),
        (np.array([[-3, 5]]), "go down to -3"),
    ],
)
def test_samples_that_are_no_picture_are_refused(
    tmp_path: Path, samples: np.ndarray, message: str
) -> None:
    dtype = np.float32 if samples.dtype.kind == "f" else np.int32
    path = saved(tmp_path, Image.fromarray(samples.astype(dtype)), "odd.tiff")
    with pytest.raises(ImageError, match=message):
        load_image(path, 1)


def tiff(path: Path, data: bytes, bits: int, sample: int, meaning: int) -> Path:
    """A grey TIFF of 16 x 16 samples: unsigned (1), signed (2), floating (3).

    With `meaning` 0 zero is white, with 1 black.
    """
    facts = {256: 16, 257: 16, 258: bits, 259: 1, 262: meaning, 273: 0, 277: 1, 278: 16}
    facts |= {279: len(data), 339: sample}
    facts[273] = 8 + 2 + 12 * len(facts) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in facts.items())
    start = b"II*\0" + struct.pack("<IH", 8, len(facts))
    path.write_bytes(start + entries + bytes(4) + data)
    return path


@pytest.mark.parametrize(("bits", "meaning"), [(8, 0), (12, 1), (16, 0), (16, 1), (32, 0), (32, 1)])
def test_grey_of_a_tiff_is_read_as_its_tags_say(tmp_path: Path, bits: int, meaning: int) -> None:
    """Zero may be white, as in negatives, and cameras write 12 bits."""
    levels = RAMP if meaning else 255 - RAMP
    if bits == 12:
        wide = (levels.astype(np.uint32) * 4095 // 255).reshape(-1, 2).T
        data = np.stack([wide[0] >> 4, wide[0] << 4 & 0xF0 | wide[1] >> 8, wide[1] & 0xFF], -1)
        samples = data.astype(np.uint8)
    else:
        samples = {8: levels, 16: levels.astype("<u2") * 257, 32: levels.astype("<f4") / 255}[bits]
    path = tiff(tmp_path / "a.tiff", samples.tobytes(), bits, 3 if bits == 32 else 1, meaning)
    assert np.abs(grey(path).astype(int) - RAMP).max() <= 1


def test_signed_samples_have_the_largest_as_white(tmp_path: Path) -> None:
    levels = (RAMP.astype(np.int32) * 32767 // 255).astype("<i2")
    path = tiff(tmp_path / "a.tiff", levels.tobytes(), 16, 2, 1)
    assert np.abs(grey(path).astype(int) - RAMP).max() <= 1
    below = tiff(tmp_path / "b.tiff", (levels - 1000).tobytes(), 16, 2, 1)
    with pytest.raises(ImageError, match="samples go down to -1000; none may be negative"):
        load_image(below, 16)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "1", "L", "RGB", "I;16"])
def test_transparent_pixels_are_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    """The upper half is transparent, the lower half black."""
    alpha = np.repeat(np.array([0, 255], np.uint8), 8)[:, None].repeat(16, 1)
    rgba = Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), alpha]))
    if mode in ("LA", "RGBA"):
        path = saved(tmp_path, rgba.convert(mode), "a.png")
    elif mode == "PA":
        image = rgba.convert("L").convert("PA")  # which forgets transparency
        image.putalpha(rgba.getchannel("A"))
        path = saved(tmp_path, image, "a.tiff")
    else:  # one colour stands for transparency
        levels = np.where(alpha == 0, 7, 0).astype(np.uint8)
        keyed: dict[str, tuple[Image.Image, Any]] = {
            "P": (Image.fromarray(levels).convert("P"), 7),
            "1": (Image.fromarray(alpha == 0), 1),
            "L": (Image.fromarray(levels), 7),
            "RGB": (Image.fromarray(levels).convert("RGB"), (7, 7, 7)),
            "I;16": (Image.fromarray(levels.astype(np.uint16)), 7),
        }
        image, key = keyed[mode]
        path = saved(tmp_path, image, "a.png", transparency=key)
    assert np.array_equal(grey(path), np.where(alpha == 0, 255, 0))


def test_inks_are_read_with_their_profile_and_without(tmp_path: Path) -> None:
    plain = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = load_image(saved(tmp_path, plain, "plain.tiff"), 16)[0, 0]
    assert red.tolist() == [255, 0, 0]
    # A profile of other colours than the image's says nothing about them.
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, plain, "other.tiff", icc_profile=other)
    assert load_image(path, 16)[0, 0].tolist() == [255, 0, 0]
    path = saved(tmp_path, plain, "broken.tiff", icc_profile=b"no profile")
    assert load_image(path, 16)[0, 0].tolist() == [255, 0, 0]


def swapped_profile() -> bytes:
    """An RGB profile whose red is sRGB's green and the reverse."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    count = struct.unpack(">I", profile[128:132])[0]
    for entry in range(132, 132 + 12 * count, 12):
        swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
        profile[entry : entry + 4] = swap.get(
            bytes(profile[entry : entry + 4]), profile[entry : entry + 4]
        )
    return bytes(profile)


def test_colours_of_another_profile_become_srgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (250, 0, 0))
    path = saved(tmp_path, image, "swapped.png", icc_profile=swapped_profile())
    red, green, blue = load_image(path, 16)[0, 0].tolist()
    assert green > 240
    assert max(red, blue) < 10
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, Image.fromarray(COLOUR), "srgb.png", icc_profile=same)
    assert np.array_equal(load_image(path, 16), COLOUR)


def test_lab_and_video_colours_are_read(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (16, 16), (200, 30, 30)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    found = load_image(saved(tmp_path, lab, "lab.tiff"), 16)[0, 0].astype(int)
    assert np.abs(found - (200, 30, 30)).max() <= 6
    video = Image.new("RGB", (16, 16), (200, 30, 30)).convert("YCbCr")
    found = load_image(saved(tmp_path, video, "video.jpg", quality=100), 16)[0, 0].astype(int)
    assert np.abs(found - (200, 30, 30)).max() <= 6


def test_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(COLOUR, shift, 0)) for shift in range(3)]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("a.tiff", {})):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(load_image(path, 16), COLOUR), name


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = np.ascontiguousarray(COLOUR[:8])
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, Image.fromarray(wide), name, exif=exif, **options)
    expected = {
        1: wide,
        2: wide[:, ::-1],
        3: wide[::-1, ::-1],
        4: wide[::-1],
        5: wide.swapaxes(0, 1),
        6: np.rot90(wide, -1),
        7: np.rot90(wide, 2).swapaxes(0, 1),
        8: np.rot90(wide),
    }[orientation]
    assert np.array_equal(load_image(path, 8), expected)
    header = read_header(path, 8)
    assert (header.height, header.width) == expected.shape[:2]


def test_a_broken_exif_block_costs_nothing_but_the_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for number, block in enumerate(
        (whole[:-9], whole[:12], b"Exif\0\0MM\0*", b"Exif\0\0xxxxxxxxx")
    ):
        path = saved(tmp_path, Image.fromarray(COLOUR[:8]), f"{number}.png", exif=block)
        assert load_image(path, 8).shape in ((8, 16, 3), (16, 8, 3))
        assert read_header(path, 8).format == "PNG"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.png", b"hello, I am text", "no image in a format that is read"),
        ("a.jpg", b"<!DOCTYPE html><html>", "a web page"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript, a program"),
        ("a.png", b"%PDF-1.7\n", "a PDF"),
    ],
)
def test_files_that_are_no_images_say_what_they_are(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (load_image, read_header):
        with pytest.raises(ImageError, match=rf"{name} cannot be read as an image: .*{message}"):
            read(tmp_path / name, 8)


def test_pipes_and_missing_files_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe.png", 8)
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "gone.png", 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.tga"])
def test_a_file_cut_anywhere_is_one_sentence(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    whole = saved(tmp_path, Image.fromarray(noise), name).read_bytes()
    path = tmp_path / f"cut-{name}"
    refused = []
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert load_image(path, 24).shape == (24, 24, 3)
        except ImageError as error:
            refused.append(str(error))
    assert refused
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)
    assert max(map(len, refused)) <= 300


def test_any_exception_of_a_reader_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, Image.fromarray(RAMP), "a.png")
    for error in (struct.error("unpack"), zlib.error(""), KeyError("x\ny"), RecursionError()):

        def broken(*args: Any, error: Exception = error, **options: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", broken)
            with pytest.raises(
                ImageError, match=r"a\.png cannot be read as an image: \S+"
            ) as caught:
                load_image(path, 8)
            assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch:  # no fault of the file's
        patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            load_image(path, 8)


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (3000, 2)])
def test_very_long_images_are_cut_before_they_are_enlarged(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    long = max(size)
    ramp = np.linspace(0, 255, long).astype(np.uint8)
    pixels = np.tile(ramp, (min(size), 1))
    path = saved(tmp_path, Image.fromarray(pixels if size[0] == long else pixels.T), "long.png")
    for at, level in ((0.0, 0), (0.5, 127), (1.0, 255)):
        found = load_image(path, 32, at=(at, at))
        assert sorted(found.shape) == [3, 32, 256]
        assert abs(found.mean() - level) < 2
    assert read_header(path, 32).is_long


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    facts = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", facts) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (2**31 - 1, 1)])
def test_what_is_too_large_to_decode_is_named_with_its_size(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the same
        with pytest.raises(ImageError, match=r"bomb\.png .*pixels") as caught:
            load_image(path, 32)
    assert caught.value.kind == "oversized"
    if size == (9000, 9000):
        assert "9000 x 9000 pixels" in str(caught.value)


def test_a_large_photo_is_decoded_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    smooth = Image.fromarray(COLOUR).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, smooth, "photo.jpg", quality=95, exif=exif)
    decoded = []
    original = module.eight_bit

    def watched(image: Image.Image, format: str | None) -> Image.Image:
        decoded.append(image.size)
        return original(image, format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eight_bit", watched)
        found = load_image(path, 72)
    assert decoded == [(150, 200)]  # an eighth, upright, at least twice what is wanted
    assert found.shape == (96, 72, 3)
    whole = Image.open(path).transpose(Image.Transpose.ROTATE_270).resize((72, 96), 3)
    assert np.abs(found.astype(int) - np.asarray(whole)).mean() < 2
    assert load_image(path, 1200).shape == (1600, 1200, 3)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.tiff", "a.gif", "a.avif"])
def test_a_header_is_read_without_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR[:8]), name)

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    header = read_header(path, 8)
    assert (header.width, header.height) == (16, 8)


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    class Lock:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *exception: object) -> None:
            held.append(False)

    path = saved(tmp_path, Image.fromarray(RAMP), "a.png")
    load_image(path, 8, one_large_image=Lock())
    assert held == []
    monkeypatch.setattr(module, "_MANY_PIXELS", 255)
    load_image(path, 8, one_large_image=Lock())
    assert held == [True, False]


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR), "a.png")
    assert np.array_equal(load_image(path, 16), COLOUR)
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())  # its contents decide, not its ending
    assert np.array_equal(load_image(path, 16), np.asarray(Image.open(buffer)))
