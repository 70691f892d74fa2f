"""The emoji data set's pure parts: classes, split, placement. No network, no renderer."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

SCRIPT = Path(__file__).parents[1] / "recipes" / "emoji" / "make_dataset.py"


def load_script() -> ModuleType:
    """Import the recipe, which is a script and belongs to no package."""
    spec = importlib.util.spec_from_file_location("emoji_make_dataset", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


emoji_data = load_script()

HEXCODES = st.sets(st.integers(0x1F000, 0x1FFFF).map("{:X}".format), max_size=200)


def picture(hexcode: str, style: str = "noto", class_name: str = "animal-mammal", png: bytes = b""):
    emoji = emoji_data.Emoji(hexcode, hexcode, class_name)
    return emoji_data.Picture(emoji, style, png or f"{hexcode}{style}".encode())


def content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of everything that is not white."""
    ys, xs = np.nonzero((np.asarray(image) != 255).any(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


# ---- classes ------------------------------------------------------------------------------------


def test_emoji_get_their_subgroups_key_and_parts_of_emoji_are_left_out():
    records = [
        {"hexcode": "1F98D", "label": "gorilla", "group": 3, "subgroup": 34},
        {"hexcode": "1F44B", "label": "waving hand", "group": 1, "subgroup": 16, "skins": [{}]},
        {"hexcode": "1F1E6", "label": "regional indicator A"},
        {"hexcode": "1F3FB", "label": "light skin tone", "group": 2, "subgroup": 32},
    ]
    subgroups = {"16": "hand-fingers-open", "32": "skin-tone", "34": "animal-mammal"}
    found = emoji_data.assign_classes(records, subgroups)
    assert [(one.hexcode, one.class_name) for one in found] == [
        ("1F98D", "animal-mammal"),
        ("1F44B", "hand-fingers-open"),
    ]


def test_sequences_match_with_and_without_variation_selector():
    assert emoji_data.code_points("0031-FE0F-20E3") == emoji_data.code_points("31-20e3")
    assert emoji_data.code_points("1F441-FE0F") != emoji_data.code_points("1F442-FE0F")


@pytest.mark.parametrize(
    ("hexcode", "label", "name"),
    [
        ("1F98D", "gorilla", "gorilla"),
        ("1FA85", "piñata", "pinata"),
        ("1F6B9", "men\N{RIGHT SINGLE QUOTATION MARK}s room", "mens-room"),
        ("0031-FE0F-20E3", "keycap: 1", "keycap-1"),
        ("0023-FE0F-20E3", "keycap: #", "keycap-hashtag"),
    ],
)
def test_svg_names_come_from_labels_or_from_the_table(hexcode, label, name):
    assert emoji_data.svg_name(emoji_data.Emoji(hexcode, label, "any")) == name


# ---- the split ----------------------------------------------------------------------------------


@given(HEXCODES)
def test_classes_of_four_hold_out_one_to_a_quarter(codes):
    held = emoji_data.held_out(codes)
    assert held <= codes
    assert len(held) <= len(codes) / 4
    assert bool(held) == (len(codes) >= 4)


def test_about_eight_percent_of_a_large_class_is_held_out():
    codes = [f"{code:X}" for code in range(0x1F000, 0x1F000 + 5000)]
    assert 0.07 < len(emoji_data.held_out(codes)) / len(codes) < 0.09


def test_the_split_is_fixed():
    codes = [f"{code:X}" for code in range(0x1F400, 0x1F440)]
    assert (
        emoji_data.held_out(codes)
        == emoji_data.held_out(reversed(codes))
        == {
            "1F405",
            "1F406",
            "1F41D",
        }
    )


def test_all_styles_of_an_emoji_go_to_one_side():
    codes = [f"{code:X}" for code in range(0x1F400, 0x1F440)]
    files = emoji_data.split([picture(c, s) for c in codes for s in emoji_data.STYLES])
    sides: dict[str, set[str]] = {}
    for path in files:
        side, class_name, name = path.split("/")
        assert class_name == "animal-mammal"
        sides.setdefault(name.split("_")[0], set()).add(side)
    assert len(files) == len(codes) * len(emoji_data.STYLES)
    assert sides.keys() == set(codes)
    assert all(len(both) == 1 for both in sides.values())


def test_a_repeated_picture_is_kept_once():
    first, same, other = picture("A", png=b"x"), picture("B", png=b"x"), picture("C", png=b"y")
    assert emoji_data.without_repeats([first, same, other]) == ([first, other], [same.path])


# ---- placement ----------------------------------------------------------------------------------


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    margin=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_content_is_112_long_and_centred(width, height, margin):
    art = Image.new("RGBA", (width + margin[0], height + margin[1]))
    art.paste((200, 30, 30, 255), (margin[0], margin[1], margin[0] + width, margin[1] + height))
    placed = emoji_data.place(art)
    assert placed.mode == "RGB"
    assert placed.size == (144, 144)
    left, top, right, bottom = content_box(placed)
    assert max(right - left, bottom - top) == 112
    assert abs((left + right) - 144) <= 1
    assert abs((top + bottom) - 144) <= 1
    # A 128-pixel crop starts anywhere from 0 to 16.
    assert min(left, top) >= 16
    assert max(right, bottom) <= 128


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (0, 255, 0, 0)])
def test_colours_behind_transparency_never_show(hidden):
    art = Image.new("RGBA", (256, 256), hidden)
    ImageDraw.Draw(art).ellipse((20, 20, 236, 236), fill=(255, 220, 0, 255))
    placed = np.asarray(emoji_data.place(art)).astype(int)
    # Yellow on white mixes to lighter yellows only: a fringe would lack red. Lanczos overshoots by
    # up to a tenth of the step from 220 to 255, and red has no step to overshoot.
    assert placed[..., 0].min() == 255
    assert placed[..., 1].min() >= 216


def test_half_transparent_colour_is_mixed_with_white():
    placed = emoji_data.place(Image.new("RGBA", (50, 50), (0, 0, 0, 128)))
    assert placed.getpixel((72, 72)) == (127, 127, 127)


def test_invisible_dust_does_not_count_as_content():
    art = Image.new("RGBA", (200, 200), (0, 0, 0, emoji_data.ALPHA_FLOOR - 1))
    art.paste((10, 20, 30, 255), (90, 90, 110, 110))
    assert content_box(emoji_data.place(art)) == (16, 16, 128, 128)


def test_an_empty_drawing_is_an_error_that_names_it():
    png = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(png, "PNG")
    emoji = emoji_data.Emoji("1F98D", "gorilla", "animal-mammal")
    drawing = emoji_data.Drawing(emoji, "noto", png.getvalue(), is_svg=False)
    with pytest.raises(emoji_data.BuildError, match="gorilla"):
        emoji_data.render(drawing)


# ---- the report and the archives ----------------------------------------------------------------


def test_the_digest_sees_paths_and_bytes_and_no_order():
    files = {"train/a/1_noto.png": b"one", "val/a/2_noto.png": b"two"}
    digest = emoji_data.tree_digest(files)
    assert emoji_data.tree_digest(dict(reversed(files.items()))) == digest
    assert emoji_data.tree_digest({**files, "val/a/2_noto.png": b"2"}) != digest
    assert emoji_data.tree_digest({"train/a/1_noto.png": b"one", "val/b": b"two"}) != digest


def test_counts_add_up():
    report = emoji_data.describe(
        {"train/a/1_noto.png": b"", "train/a/1_fluent3d.png": b"", "val/b/2_noto.png": b""}
    )
    assert report["images"] == {"train": 2, "val": 1}
    assert report["emoji"] == {"train": 1, "val": 1}
    assert report["styles"] == {"fluent3d": 1, "fluentcolor": 0, "fluentflat": 0, "noto": 2}
    assert report["classes"]["a"]["train"] == 2


def test_an_archive_with_other_bytes_is_refused(tmp_path):
    source = emoji_data.SOURCES[0]
    (tmp_path / source.file).write_bytes(b"not the archive")
    with pytest.raises(emoji_data.BuildError, match=r"has sha256 [0-9a-f]{64}, not"):
        emoji_data.fetch(source, tmp_path)


def test_the_payload_of_a_debian_package_is_found(tmp_path):
    def member(name: str, data: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        return header + data + b"\n" * (len(data) % 2)

    deb = tmp_path / "font.deb"
    deb.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz", b"font"))
    assert emoji_data.deb_payload(deb) == b"font"
