"""Build the emoji data set: four drawings of every emoji, in one folder a kind of emoji.

The archives come through the package clients (`npm`, `apt-get`) at pinned versions and are
checked against the hashes below, so two builds read the same artwork. Everything after the
download is a pure function of those bytes; the pictures' exact bytes also depend on the versions
of Pillow and of the renderers in `requirements.txt`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

CANVAS = 144
"""Side of a finished picture, in pixels."""

CONTENT = 112
"""Longer side of the drawing inside it, in pixels: any 128-pixel crop of the canvas keeps it."""

ALPHA_FLOOR = 8
"""Alpha (0..255) from which a pixel counts as drawn: shadows fade out in invisible dust."""

HELD_OUT_SHARE = 0.08
"""Share of the emoji that is meant to be held out, before each class's bounds."""

SVG_RENDER_WIDTH = 256
"""Pixels across an SVG when it is rasterised: about twice what is kept, so edges stay smooth."""

STYLES = ("fluent3d", "fluentcolor", "fluentflat", "noto")
"""Names of the drawings, as the files carry them."""

COMPONENT_GROUP = 2
"""The emojibase group of characters that only modify others."""

VARIATION_SELECTOR = 0xFE0F
"""Asks for the colour form of a character; sources disagree on where they write it."""


@dataclass(frozen=True)
class Source:
    """One pinned archive."""

    key: str
    client: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    rights: str
    provides: str


SOURCES = (
    Source(
        key="fluent3d",
        client="npm",
        package="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        licence="MIT",
        rights="Microsoft Corporation (Fluent Emoji); package: LobeHub, 2023",
        provides="fluent3d",
    ),
    Source(
        key="fluentsvg",
        client="npm",
        package="fluentui-emoji",
        version="1.3.0",
        file="fluentui-emoji-1.3.0.tgz",
        sha256="ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
        licence="MIT",
        rights="Microsoft Corporation (Fluent Emoji); package: Mohammad Abu Mattar, 2022",
        provides="fluentcolor, fluentflat",
    ),
    Source(
        key="noto",
        client="debian",
        package="fonts-noto-color-emoji",
        version="2.042-0+deb12u1",
        file="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        licence="OFL-1.1",
        rights="Google Inc.",
        provides="noto",
    ),
    Source(
        key="emojibase",
        client="npm",
        package="emojibase-data",
        version="17.0.0",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        licence="MIT",
        rights="Miles Johnson, 2017-2019",
        provides="classes",
    ),
)

SVG_FOLDERS = {"modern": "fluentcolor", "flat": "fluentflat"}
"""Folders of the SVG archive that are used, and the style each one holds."""

SVG_NAMES = {
    "1F917": "hugging-face",
    "1F635": "knocked-out-face",
    "1F621": "pouting-face",
    "1F471": "person-blonde-hair",
    "1F471-200D-2642-FE0F": "man-blonde-hair",
    "1F471-200D-2640-FE0F": "woman-blonde-hair",
    "1F9CF": "person-deaf",
    "1F9CF-200D-2642-FE0F": "man-deaf",
    "1F9CF-200D-2640-FE0F": "woman-deaf",
    "1F9B8": "person-superhero",
    "1F9B9": "person-supervillain",
    "1F9D9": "person-mage",
    "1F9DA": "person-fairy",
    "1F9DB": "person-vampire",
    "1F9DC": "person-merpeople",
    "1F9DC-200D-2642-FE0F": "man-merpeople",
    "1F9DC-200D-2640-FE0F": "woman-merpeople",
    "1F9DD": "person-elf",
    "1F9DE": "person-genie",
    "1F9DF": "person-zombie",
    "1F46F": "person-with-bunny-ears",
    "1F46F-200D-2642-FE0F": "man-with-bunny-ears",
    "1F46F-200D-2640-FE0F": "woman-with-bunny-ears",
    "1F93C": "person-wrestling",
    "1F93C-200D-2642-FE0F": "man-wrestling",
    "1F93C-200D-2640-FE0F": "woman-wrestling",
    "1F426-200D-2B1B": "blackbird",
    "1F426-200D-1F525": "phoenix-bird",
    "1F959": "stuffedbread",
    "1F53A": "red-triangle",
    "0023-FE0F-20E3": "keycap-hashtag",
    "002A-FE0F-20E3": "keycap-asterisk",
}
"""SVG names that are not the emoji's label in lower case with hyphens, by hexcode."""

RENDERERS = ("resvg_py", "uharfbuzz")
"""Modules that draw SVG and find the font's bitmaps."""

NOT_FLUENT = {"country-flag"}
"""Classes the 3D archive fills with another set's flat drawings: neither 3D nor Microsoft's."""


class BuildError(click.ClickException):
    """Something the reader can put right; printed as one sentence."""


@dataclass(frozen=True)
class Emoji:
    """One emoji in its default skin tone."""

    hexcode: str
    label: str
    class_name: str


@dataclass(frozen=True)
class Drawing:
    """One source's drawing of one emoji, still encoded (SVG text, or a PNG or WebP file)."""

    emoji: Emoji
    style: str
    data: bytes
    is_svg: bool


@dataclass(frozen=True)
class Picture:
    """One finished picture: a PNG file of `CANVAS` x `CANVAS` RGB pixels."""

    emoji: Emoji
    style: str
    png: bytes

    @property
    def path(self) -> str:
        """Path below the split's folder, with forward slashes."""
        return f"{self.emoji.class_name}/{self.emoji.hexcode}_{self.style}.png"


# ---- classes and members ------------------------------------------------------------------------


def assign_classes(records: Iterable[dict[str, Any]], subgroups: dict[str, str]) -> list[Emoji]:
    """Return the emoji of an emojibase list, each with its subgroup's key as its class.

    `records` are the entries of `data.json` and `subgroups` maps a subgroup's number (as
    text) to its key. Skin tones are nested inside their base entry and so never listed. Parts of
    emoji are left out: entries without a subgroup (the letters that flags are spelled with), and
    the component group (skin-tone swatches and hair).
    """
    return [
        Emoji(record["hexcode"], record["label"], subgroups[str(record["subgroup"])])
        for record in records
        if "subgroup" in record and record["group"] != COMPONENT_GROUP
    ]


def code_points(hexcode: str) -> tuple[int, ...]:
    """Return a hexcode's code points without variation selectors, to match across sources."""
    points = (int(part, 16) for part in hexcode.split("-"))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def svg_name(emoji: Emoji) -> str:
    """Return the stem under which the SVG archive files an emoji, less any `-default`."""
    if emoji.hexcode in SVG_NAMES:
        return SVG_NAMES[emoji.hexcode]
    plain = unicodedata.normalize("NFKD", emoji.label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


# ---- the split ----------------------------------------------------------------------------------


def held_out(hexcodes: Iterable[str]) -> set[str]:
    """Choose the emoji of one class that are held out, from nothing but their hexcodes.

    An emoji's hash puts it at a fixed point between 0 and 1; those below `HELD_OUT_SHARE` are
    held out. A class of four or more gives at least one, and no class more than a quarter, in
    the order of the hashes, so that the choice depends neither on the order of the input nor on
    how many styles an emoji has.
    """
    points = sorted(
        (int.from_bytes(hashlib.sha256(code.encode()).digest()[:8], "big") / 2**64, code)
        for code in set(hexcodes)
    )
    wanted = max(1, sum(point < HELD_OUT_SHARE for point, _ in points))
    return {code for _, code in points[: min(wanted, len(points) // 4)]}


# ---- pictures -----------------------------------------------------------------------------------


def renderer(module: str) -> Any:
    """Import one of `RENDERERS`: only a build needs them, so the project does not list them."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = Path(__file__).with_name("requirements.txt")
        raise BuildError(
            f"The Python module {module} is missing: pip install -r {wanted}"
        ) from error


def place(art: Image.Image) -> Image.Image:
    """Put a drawing on the white canvas.

    `art` is an image with alpha, of any size. Returns `CANVAS` x `CANVAS` RGB, the drawn
    part centred and its longer side `CONTENT` pixels. Raises `ValueError` if nothing is drawn.
    """
    art = art.convert("RGBA")
    box = art.getchannel("A").point([255 * (a >= ALPHA_FLOOR) for a in range(256)]).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    art = art.crop(box)
    # White goes under the drawing before it is scaled: the colour that encoders leave in
    # transparent pixels, mostly black, then has no way into the edges.
    flat = Image.new("RGBA", art.size, "white")
    flat.alpha_composite(art)
    scale = CONTENT / max(art.size)
    width, height = (max(1, round(side * scale)) for side in art.size)
    scaled = flat.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    canvas.paste(scaled, ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return canvas


def render(drawing: Drawing) -> Picture:
    """Turn one source's drawing into a finished picture."""
    data = drawing.data
    try:
        if drawing.is_svg:
            data = renderer("resvg_py").svg_to_bytes(
                svg_string=data.decode(), width=SVG_RENDER_WIDTH, skip_system_fonts=True
            )
        picture = place(Image.open(io.BytesIO(data)))
    except (ValueError, OSError) as error:
        raise BuildError(
            f"The {drawing.style} drawing of {drawing.emoji.label} ({drawing.emoji.hexcode}) "
            f"cannot be used: {error}."
        ) from error
    out = io.BytesIO()
    picture.save(out, "PNG")
    return Picture(drawing.emoji, drawing.style, out.getvalue())


def without_repeats(pictures: Iterable[Picture]) -> tuple[list[Picture], list[str]]:
    """Drop pictures whose pixels were already seen; return those kept and the paths dropped.

    Some emoji are drawn alike (Norway's flag also stands for Svalbard and Bouvet Island). Kept
    twice, such a picture could be trained on and held out at once.
    """
    seen: set[bytes] = set()
    kept: list[Picture] = []
    dropped: list[str] = []
    for picture in pictures:
        digest = hashlib.sha256(picture.png).digest()
        if digest in seen:
            dropped.append(picture.path)
        else:
            seen.add(digest)
            kept.append(picture)
    return kept, dropped


def tree_digest(files: dict[str, bytes]) -> str:
    """Return one sha256 over the lines `PATH SHA256` of `files`, sorted by path."""
    lines = (f"{path} {hashlib.sha256(files[path]).hexdigest()}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- archives -----------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> Path:
    """Return the path of a source's archive in `folder`, downloading it if it is not there."""
    path = folder / source.file
    if not path.exists():
        if source.client == "npm":
            command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        else:
            command = ["apt-get", "download", "-q", f"{source.package}={source.version}"]
        if shutil.which(command[0]) is None:
            raise BuildError(f"{command[0]} is not installed: install it, or put {path} in place.")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.exists():
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else "it wrote no such file"
            raise BuildError(f"`{' '.join(command)}` did not deliver {source.file}: {reason}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise BuildError(
            f"{path} has sha256 {found}, not {source.sha256}: delete it to download it again."
        )
    return path


def deb_payload(path: Path) -> bytes:
    """Return the `data.tar.*` member of a Debian package (an `ar` archive)."""
    with path.open("rb") as file:
        file.seek(8)  # the magic line "!<arch>\n"
        while header := file.read(60):
            size = int(header[48:58])
            member = file.read(size + size % 2)  # members are padded to even offsets
            if header.startswith(b"data.tar"):
                return member[:size]
    raise BuildError(f"{path} has no data.tar inside.")


def read_members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield (match, bytes) for the files of a tar archive whose whole name matches `pattern`."""
    for member in archive:
        match = re.fullmatch(pattern, member.name)
        file = archive.extractfile(member) if match else None
        if match and file:
            yield match, file.read()


def read_emoji(path: Path) -> tuple[list[str], list[Emoji]]:
    """Return all class names and all emoji from the emojibase archive."""
    with tarfile.open(path) as archive:
        found = {
            match[1]: json.loads(data)
            for match, data in read_members(archive, r"package/(en/data|meta/groups)\.json")
        }
    subgroups = found["meta/groups"]["subgroups"]
    return list(subgroups.values()), assign_classes(found["en/data"], subgroups)


def read_fluent3d(path: Path, emoji: Iterable[Emoji]) -> Iterator[Drawing]:
    """Yield the 3D drawings (256 x 256 WebP with alpha)."""
    with tarfile.open(path) as archive:
        # Sorted, because a few drawings are stored under two spellings of one sequence.
        files = sorted(
            (match[1], data)
            for match, data in read_members(archive, r"package/assets/([0-9a-f-]+)\.webp")
        )
    drawings = {code_points(name): data for name, data in files}
    for one in emoji:
        data = drawings.get(code_points(one.hexcode))
        if data is not None and one.class_name not in NOT_FLUENT:
            yield Drawing(one, "fluent3d", data, is_svg=False)


def read_fluent_svg(path: Path, emoji: Iterable[Emoji]) -> Iterator[Drawing]:
    """Yield the colour and the flat drawings (SVG)."""
    folders = "|".join(SVG_FOLDERS)
    with tarfile.open(path) as archive:
        drawings = {
            (match[1], match[2]): data
            for match, data in read_members(archive, rf"package/icons/({folders})/(.+)\.svg")
        }
    for one in emoji:
        name = svg_name(one)
        for folder, style in SVG_FOLDERS.items():
            # "-default" marks the tone of emoji that come in several; one file is misnamed "-flat".
            for stem in (name, f"{name}-default", f"{name}-flat"):
                if (folder, stem) in drawings:
                    yield Drawing(one, style, drawings[folder, stem], is_svg=True)
                    break


def read_noto(path: Path, emoji: Iterable[Emoji]) -> Iterator[Drawing]:
    """Yield the bitmaps (136 x 128 PNG with alpha) of Noto Color Emoji.

    The font joins a sequence of characters into one glyph with its substitution rules, so each
    emoji is shaped as text; one that the font does not know gives no glyph, or several.
    """
    uharfbuzz = renderer("uharfbuzz")
    with tarfile.open(fileobj=io.BytesIO(deb_payload(path))) as archive:
        ((_, data),) = read_members(archive, r".*/NotoColorEmoji\.ttf")
    font = uharfbuzz.Font(uharfbuzz.Face(data))
    for one in emoji:
        text = uharfbuzz.Buffer()
        text.add_str("".join(chr(int(part, 16)) for part in one.hexcode.split("-")))
        text.guess_segment_properties()
        text.flags = uharfbuzz.BufferFlags.REMOVE_DEFAULT_IGNORABLES
        uharfbuzz.shape(font, text)
        glyphs = [info.codepoint for info in text.glyph_infos]
        if len(glyphs) == 1 and glyphs[0] != 0:
            yield Drawing(one, "noto", font.get_glyph_color_png(glyphs[0]).data, is_svg=False)


# ---- the data set -------------------------------------------------------------------------------


def split(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """Return the PNG files by path, `train/CLASS/NAME` or `val/CLASS/NAME`."""
    pictures = list(pictures)
    members: dict[str, set[str]] = {}
    for picture in pictures:
        members.setdefault(picture.emoji.class_name, set()).add(picture.emoji.hexcode)
    held = {code for codes in members.values() for code in held_out(codes)}
    return {
        f"{'val' if picture.emoji.hexcode in held else 'train'}/{picture.path}": picture.png
        for picture in pictures
    }


def describe(files: dict[str, bytes]) -> dict[str, Any]:
    """Return the counts and the digest of a build's files, for `dataset.json`."""
    classes: dict[str, dict[str, int]] = {}
    emoji: dict[str, set[str]] = {"train": set(), "val": set()}
    for path in sorted(files):
        side, class_name, name = path.split("/")
        hexcode, style = name.removesuffix(".png").split("_")
        row = classes.setdefault(class_name, dict.fromkeys(("train", "val", *STYLES), 0))
        row[side] += 1
        row[style] += 1
        emoji[side].add(hexcode)
    total = {column: sum(row[column] for row in classes.values()) for column in ("train", "val")}
    return {
        "images": total,
        "emoji": {side: len(codes) for side, codes in emoji.items()},
        "styles": {style: sum(row[style] for row in classes.values()) for style in STYLES},
        "classes": dict(sorted(classes.items())),
        "sha256": tree_digest(files),
    }


def read_drawings(archives: dict[str, Path], emoji: Sequence[Emoji]) -> list[Drawing]:
    """Return every source's drawings, in the order of the emoji and then of the styles."""
    place_of = {one: index for index, one in enumerate(emoji)}
    drawings = [
        *read_fluent3d(archives["fluent3d"], emoji),
        *read_fluent_svg(archives["fluentsvg"], emoji),
        *read_noto(archives["noto"], emoji),
    ]
    return sorted(drawings, key=lambda one: (place_of[one.emoji], STYLES.index(one.style)))


def write_folder(out: Path, files: dict[str, bytes], report: dict[str, Any]) -> None:
    """Write the files and `dataset.json` to `out`, which appears only when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / "whole"
        for path, png in files.items():
            target = whole / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png)
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (whole / "dataset.json").write_text(text, encoding="utf-8")
        whole.replace(out)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--archives",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path(click.get_app_dir("aim-runtime")) / "emoji-archives",
    show_default="the user's aim-runtime folder",
    help="Where the downloaded archives are kept. Those already there are not fetched again.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    help="Processes that draw pictures. The result does not depend on it.",
)
def main(out: Path, archives: Path, jobs: int) -> None:
    """Build the emoji data set in DIR, which must not exist yet (or be empty).

    \b
    DIR/train/CLASS/HEXCODE_STYLE.png   pictures to train on
    DIR/val/CLASS/HEXCODE_STYLE.png     pictures of held-out emoji
    DIR/dataset.json                    sources, licences, counts, digest

    CLASS is a subgroup of the Unicode emoji list, such as animal-mammal, and STYLE one of
    fluent3d, fluentcolor, fluentflat and noto. A picture is 144 x 144 RGB on white; the drawing's
    longer side is 112 pixels and centred, so that a random 128-pixel crop never cuts it. About one
    emoji in eleven is held out, in all its styles, and always the same ones.

    About 56 MB are downloaded with npm and apt-get (on another system than Debian 12, put the
    font's package into the --archives folder yourself). Drawing takes a few minutes.

    \b
    Example:
      pip install -r recipes/emoji/requirements.txt
      python recipes/emoji/make_dataset.py data/emoji
    """
    if out.exists() and any(out.iterdir()):
        raise BuildError(f"{out} is not empty: name a new folder, or remove this one first.")
    for module in RENDERERS:  # before the download, not after it
        renderer(module)

    archives.mkdir(parents=True, exist_ok=True)
    paths = {}
    for source in SOURCES:
        click.echo(f"{source.package} {source.version} ({source.licence})")
        paths[source.key] = fetch(source, archives)

    all_classes, emoji = read_emoji(paths["emojibase"])
    drawings = read_drawings(paths, emoji)
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(render, drawings, chunksize=16)
        with click.progressbar(results, length=len(drawings), label="Drawing") as bar:
            pictures, repeats = without_repeats(bar)

    files = split(pictures)
    report = {
        "sources": [asdict(source) for source in SOURCES],
        **describe(files),
        "repeats_left_out": repeats,
    }
    empty = [name for name in all_classes if name not in report["classes"]]
    report["classes_left_out"] = empty
    write_folder(out, files, report)

    click.echo(
        f"{out}: {len(report['classes'])} classes, {report['images']['train']} pictures to train "
        f"on, {report['images']['val']} held out ({report['emoji']['train']} and "
        f"{report['emoji']['val']} emoji)."
    )
    click.echo(f"Left out: {', '.join(empty) or 'no class'}; {len(repeats)} repeated pictures.")
    click.echo(f"sha256 {report['sha256']}")


if __name__ == "__main__":
    main()
