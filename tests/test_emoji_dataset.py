"""The emoji data set's pure parts: classes, split, placement. No network, no renderer."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from aim_runtime import models_dir

from .emoji_recipe import load_script

artwork = load_script("artwork")
emoji_data = load_script("make_dataset")

HEXCODES = st.sets(st.integers(0x1F000, 0x1FFFF).map("{:X}".format), max_size=200)


def emoji(hexcode: str, class_name: str = "animal-mammal", tone: int = 0, label: str = ""):
    points = artwork.code_points(hexcode) + ((0x1F3FA + tone,) if tone else ())
    return artwork.Emoji(hexcode, label or hexcode, class_name, points, tone)


def picture(one, style: str = "noto", pixels: np.ndarray | None = None):
    """A finished picture of noise of its own, or of the pixels given."""
    if pixels is None:
        seed = [*one.points, *style.encode()]
        pixels = np.random.default_rng(seed).integers(0, 256, (144, 144, 3), dtype=np.uint8)
        pixels[36:108, 36:108] = pixels[0, 0]  # else means of noise are all the same grey
        pixels[72:84] = pixels[0, 1]
    return emoji_data.Picture(one, style, pixels.tobytes(), emoji_data.cells(pixels))


def content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of everything that is not white."""
    ys, xs = np.nonzero((np.asarray(image) != 255).any(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


# ---- classes ------------------------------------------------------------------------------------


def record(hexcode: str, label: str, group: int, subgroup: int, **more):
    return {"hexcode": hexcode, "label": label, "group": group, "subgroup": subgroup, **more}


def test_emoji_get_their_subgroups_key_and_parts_of_emoji_are_left_out():
    records = [
        record("1F98D", "gorilla", 3, 34),
        {"hexcode": "1F1E6", "label": "regional indicator A"},
        record("1F3FB", "light skin tone", 2, 32),
    ]
    (found,) = artwork.assign_classes(records, {"32": "skin-tone", "34": "animal-mammal"})
    assert (found.hexcode, found.class_name, found.tone) == ("1F98D", "animal-mammal", 0)


def test_tones_follow_their_emoji_but_not_pairs_of_tones():
    skins = [
        {"hexcode": "1F491-1F3FD", "label": "couple: medium skin tone", "tone": 3},
        {"hexcode": "1F9D1-1F3FB-200D-1F9D1-1F3FF", "label": "couple: two", "tone": [1, 5]},
    ]
    found = artwork.assign_classes(
        [record("1F491", "couple", 1, 30, skins=skins)], {"30": "family"}
    )
    assert [(one.hexcode, one.points, one.tone) for one in found] == [
        ("1F491", (0x1F491,), 0),
        ("1F491", (0x1F491, 0x1F3FD), 3),
    ]


def test_sequences_match_with_and_without_variation_selector():
    assert artwork.code_points("0031-FE0F-20E3") == artwork.code_points("31-20e3")
    assert artwork.code_points("1F441-FE0F") != artwork.code_points("1F442-FE0F")


@pytest.mark.parametrize(
    ("name", "hexcode"),
    [
        ("pinata", "1FA85"),  # the label, in ASCII
        ("mens-room", "1F6B9"),  # without the apostrophe
        ("pinata-2", "1FA85"),  # the second drawing of one
        ("men-symbol", "1F6B9"),  # what another set calls it
        ("flag-for-brazil", "1F1E7-1F1F7"),  # as flags were called once
        ("flag-for-flag-brazil", "1F1E7-1F1F7"),
        ("admissiontickets", "1F39F"),  # its Unicode name, letters only
        ("no-such-emoji", None),
        ("2", None),
    ],
)
def test_names_of_any_year_find_their_emoji(name, hexcode):
    known = [
        emoji("1FA85", label="pi\N{LATIN SMALL LETTER N WITH TILDE}ata"),
        emoji("1F6B9", label="men\N{RIGHT SINGLE QUOTATION MARK}s room"),
        emoji("1F1E7-1F1F7", label="flag: Brazil"),
        emoji("1F39F", label="tickets"),
    ]
    names = artwork.Names(known, [{"men-symbol": (0x1F6B9,), "of-no-emoji": (0x2A,)}])
    found = names.find(name)
    assert found == (hexcode and artwork.code_points(hexcode))


@pytest.mark.parametrize("source", artwork.SOURCES, ids=lambda source: source.package)
def test_the_model_in_the_box_names_every_source_with_its_licence(source):
    licences = (models_dir() / "emoji" / "LICENSES.md").read_text(encoding="utf-8")
    (row,) = (line for line in licences.splitlines() if f"`{source.package}` " in line)
    assert f"`{source.package}` {source.version} " in row
    written = {"Apache-2.0": "Apache License 2.0", "CC-BY-4.0": "CC BY 4.0"}
    assert written.get(source.licence, source.licence) in row


def test_an_icon_becomes_a_whole_svg_in_its_sets_view_box():
    names = artwork.Names([emoji("1F98D", label="gorilla"), emoji("1F436", label="dog face")])
    icons = {
        "width": 36,
        "height": 36,
        "icons": {
            "gorilla-1": {"body": "<wrong/>"},
            "gorilla": {"body": "<path/>", "width": 40, "left": -2},
            "unknown": {"body": ""},
        },
    }
    (found,) = artwork.read_icons("noto", icons, names, [emoji("1F98D", label="gorilla")])
    assert found.is_svg
    assert b'viewBox="-2 0 40 36"' in found.data
    assert b"<path/>" in found.data


def test_no_set_is_share_alike_and_every_style_is_one_sets():
    assert {source.licence for source in artwork.SOURCES} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert len(set(artwork.STYLES)) == len(artwork.SOURCES) - 1 == 9
    assert all(len(source.sha256) == 64 for source in artwork.SOURCES)


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


def test_all_styles_and_tones_of_an_emoji_go_to_one_side():
    codes = [f"{code:X}" for code in range(0x1F400, 0x1F440)]
    pictures = [
        picture(emoji(code, tone=tone), style)
        for code in codes
        for style in emoji_data.STYLES
        for tone in range(6)
    ]
    files = emoji_data.split(pictures)
    sides: dict[str, set[str]] = {}
    for path in files:
        side, class_name, name = path.split("/")
        assert class_name == "animal-mammal"
        sides.setdefault(name.split("_")[0], set()).add(side)
    assert len(files) == len(pictures)
    assert sides.keys() == set(codes)
    assert all(len(both) == 1 for both in sides.values())
    assert set().union(*sides.values()) == {"train", "val"}


def test_tones_do_not_move_the_split():
    codes = [f"{code:X}" for code in range(0x1F400, 0x1F440)]
    plain = emoji_data.split([picture(emoji(code)) for code in codes])
    toned = emoji_data.split([picture(emoji(code, tone=t)) for code in codes for t in range(6)])
    assert plain.keys() <= toned.keys()


# ---- near-equal pictures ------------------------------------------------------------------------


def pixels_with(change: int, where: slice) -> np.ndarray:
    """Grey, but for one square of 12 pixels that is `change` lighter."""
    pixels = np.full((144, 144, 3), 100, np.uint8)
    pixels[where, where] += change
    return pixels


@pytest.mark.parametrize("where", [slice(0, 12), slice(72, 84), slice(132, 144)])
@pytest.mark.parametrize(("change", "kept"), [(0, 1), (emoji_data.NEAR, 1), (13, 2), (90, 2)])
def test_one_differing_square_decides_whether_pictures_are_near_equal(where, change, kept):
    first = picture(emoji("1F550"), pixels=pixels_with(0, where))
    second = picture(emoji("1F551"), "twemoji", pixels_with(change, where))
    found, dropped = emoji_data.without_repeats([first, second])
    assert found == [first, second][:kept]
    assert dropped == [(second.path, first.path)][: 2 - kept]


def test_of_near_equal_pictures_the_first_is_kept_and_chains_do_not_grow():
    steps = [
        picture(emoji(f"1F55{i}"), pixels=np.full((144, 144, 3), 100 + 8 * i, np.uint8))
        for i in range(4)
    ]
    found, dropped = emoji_data.without_repeats(steps)
    assert found == [steps[0], steps[2]]  # 8 apart: each second is near the kept one before it
    assert dropped == [(steps[1].path, steps[0].path), (steps[3].path, steps[2].path)]


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
    drawing = artwork.Drawing(emoji("1F98D", label="gorilla"), "noto", png.getvalue(), is_svg=False)
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
        {
            "train/a/1_noto.png": b"",
            "train/a/1_noto_tone5.png": b"",
            "train/a/1_fluent3d.png": b"",
            "val/b/2_noto.png": b"",
        }
    )
    assert report["images"] == {"train": 3, "val": 1}
    assert report["emoji"] == {"train": 1, "val": 1}
    styles = {style: count for style, count in report["styles"].items() if count}
    assert styles == {"fluent3d": 1, "noto": 3}
    assert report["classes"]["a"]["train"] == 3


def test_an_archive_with_other_bytes_is_refused(tmp_path):
    source = artwork.FLUENT_3D
    assert source.file == "lobehub-fluent-emoji-3d-1.1.0.tgz"
    (tmp_path / source.file).write_bytes(b"not the archive")
    with pytest.raises(artwork.BuildError, match=r"has sha256 [0-9a-f]{64}, not"):
        artwork.fetch(source, tmp_path)


def pack(path: Path, **files: object) -> Path:
    """Write an npm package with JSON files, or with the bytes given."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_drawings_come_by_emoji_then_style_in_every_tone(tmp_path):
    hand = [emoji("1F44B", "hand", tone, f"wave{tone or ''}") for tone in (0, 3)]
    flag = emoji("1F1E7-1F1F7", "country-flag", label="flag: Brazil")
    bitmap = {f"assets/{code}.webp": code.encode() for code in ("1f44b-1f3fd", "1f1e7-1f1f7")}
    archives = {artwork.FLUENT_3D.package: pack(tmp_path / "3d.tgz", **bitmap)}
    for source in artwork.ICON_SETS:
        icons = {"icons": {"flag-for-brazil": {"body": source.style}}}
        chars = {}
        if source.style == "twemoji":
            icons["icons"] |= {"waving": {"body": "w"}, "waving-medium": {"body": "m"}}
            chars = {"1f44b": "waving", "1f44b-1f3fd": "waving-medium"}
        files = {"icons.json": icons, "chars.json": chars}
        archives[source.package] = pack(tmp_path / f"{source.style}.tgz", **files)
    found = artwork.read_drawings(archives, [*hand, flag])
    assert [(one.emoji.tone, one.style) for one in found[:3]] == [
        (0, "twemoji"),
        (3, "fluent3d"),
        (3, "twemoji"),
    ]
    # The 3D set's flags are another's; all other sets have one.
    assert [one.style for one in found[3:]] == list(artwork.STYLES[1:])
