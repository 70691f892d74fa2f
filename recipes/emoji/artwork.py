"""Where the emoji artwork comes from: pinned archives, and which file draws which emoji.

Every archive is an npm package. The drawings of one artist call the same emoji by the label that
Unicode gave it that year, so names are resolved through several tables; a file that none of them
knows is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

COMPONENT_GROUP = 2
"""The emojibase group of characters that only modify others."""

VARIATION_SELECTOR = 0xFE0F
"""Asks for the colour form of a character; sources disagree on where they write it."""

NOT_FLUENT = {"country-flag"}
"""Classes the 3D archive fills with another set's flat drawings: neither 3D nor Microsoft's."""

NAMED_BY_CODE_POINTS = ("fluentflat", "noto", "twemoji")
"""Styles whose archive says which code points a name stands for; the others have names only."""

Points = tuple[int, ...]
"""An emoji as code points, without variation selectors."""


class BuildError(click.ClickException):
    """Something the reader can put right; printed as one sentence."""


@dataclass(frozen=True)
class Source:
    """One pinned npm package. `style` is what its drawings are called here, if it has any."""

    package: str
    version: str
    sha256: str
    licence: str
    rights: str
    style: str = ""

    @property
    def file(self) -> str:
        """The archive's file name, as `npm pack` writes it."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Source(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "Miles Johnson, 2017-2019",
)
"""The list of all emoji with their subgroups, which are the classes."""

FLUENT_3D = Source(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
    "Microsoft Corporation (Fluent Emoji); package: LobeHub, 2023",
    style="fluent3d",
)
"""The only archive of bitmaps."""

ICON_SETS = (
    Source(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
        style="fluentcolor",
    ),
    Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
        style="fluentflat",
    ),
    Source(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc. (Noto Emoji)",
        style="noto",
    ),
    Source(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Google Inc. (Noto Emoji, first design)",
        style="notov1",
    ),
    Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, Inc. and other contributors (Twemoji)",
        style="twemoji",
    ),
    Source(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One, now JoyPixels (EmojiOne 2.3)",
        style="emojione",
    ),
    Source(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla (Firefox OS Emoji)",
        style="fxemoji",
    ),
    Source(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "Streamline (Streamline Emojis)",
        style="streamline",
    ),
)
"""Archives of SVG drawings, one JSON file each. Sets under share-alike licences are left out."""

SOURCES = (EMOJIBASE, FLUENT_3D, *ICON_SETS)

STYLES = tuple(source.style for source in SOURCES if source.style)
"""Names of the drawings, as the files carry them; of near-equal drawings the first is kept."""


@dataclass(frozen=True)
class Emoji:
    """One emoji in one skin tone.

    Attributes:
        hexcode: of the emoji without a tone; what the split goes by.
        label: Unicode's name for it, with its tone.
        class_name: key of its subgroup.
        points: its code points, tone included.
        tone: 1 (light) to 5 (dark), or 0, the default.
    """

    hexcode: str
    label: str
    class_name: str
    points: Points
    tone: int = 0


@dataclass(frozen=True)
class Drawing:
    """One source's drawing of one emoji, still encoded (SVG text, or a WebP file)."""

    emoji: Emoji
    style: str
    data: bytes
    is_svg: bool


# ---- emoji and their names ----------------------------------------------------------------------


def code_points(hexcode: str) -> Points:
    """Return a hexcode's code points without variation selectors, to match across sources."""
    points = (int(part, 16) for part in hexcode.split("-"))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def assign_classes(records: Iterable[dict[str, Any]], subgroups: dict[str, str]) -> list[Emoji]:
    """Return the emoji of an emojibase list, each with its subgroup's key as its class.

    `records` are the entries of `data.json` and `subgroups` maps a subgroup's number (as
    text) to its key. An emoji is followed by its skin tones, but not by those that give two people
    two tones. Parts of emoji are left out: entries without a subgroup (the letters that flags are
    spelled with), and the component group (skin-tone swatches and hair).
    """
    return [
        Emoji(
            record["hexcode"],
            form["label"],
            subgroups[str(record["subgroup"])],
            code_points(form["hexcode"]),
            form.get("tone", 0),
        )
        for record in records
        if "subgroup" in record and record["group"] != COMPONENT_GROUP
        for form in (record, *record.get("skins", ()))
        if isinstance(form.get("tone", 0), int)
    ]


def slug(label: str) -> str:
    """Return a label as the icon sets spell it: lower case, ASCII, hyphens."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def letters(name: str) -> str:
    """Return a name's letters and digits alone, as the Firefox OS set spells it."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Names:
    """Finds an emoji's code points by any name it has had.

    The emoji's labels go first, then the tables of the sets that say what their names mean, then
    the Unicode names of single characters.
    """

    def __init__(self, emoji: Sequence[Emoji], tables: Iterable[dict[str, Points]] = ()) -> None:
        known = {one.points for one in emoji}
        self._names = {slug(one.label): one.points for one in emoji}
        for table in tables:
            for name, points in table.items():
                if points in known:
                    self._names.setdefault(name, points)
        self._letters = {letters(name): points for name, points in self._names.items()}
        for points in sorted(known):
            if len(points) == 1:
                self._letters.setdefault(letters(unicodedata.name(chr(points[0]), "")), points)

    def find(self, name: str) -> Points | None:
        """Return the code points of `name`, or nothing.

        A trailing number counts drawings of one emoji and is ignored; flags have a prefix that
        labels lack.
        """
        for form in (
            name,
            re.sub(r"^flag-for-(flag-)?", "flag-", name),
            re.sub(r"-\d+$", "", name),
        ):
            if form in self._names:
                return self._names[form]
        return self._letters.get(letters(name))


# ---- archives -----------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> Path:
    """Return the path of a source's archive in `folder`, downloading it if it is not there."""
    path = folder / source.file
    if not path.exists():
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
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


def read_members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield (match, bytes) for the files of a tar archive whose whole name matches `pattern`."""
    for member in archive:
        match = re.fullmatch(pattern, member.name)
        file = archive.extractfile(member) if match else None
        if match and file:
            yield match, file.read()


def read_json(path: Path, pattern: str) -> dict[str, Any]:
    """Return the JSON files of an archive that match `pattern`, by its first group."""
    with tarfile.open(path) as archive:
        return {match[1]: json.loads(data) for match, data in read_members(archive, pattern)}


def read_emoji(path: Path) -> tuple[list[str], list[Emoji]]:
    """Return all class names and all emoji from the emojibase archive."""
    found = read_json(path, r"package/(en/data|meta/groups)\.json")
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
        data = drawings.get(one.points)
        if data is not None and one.class_name not in NOT_FLUENT:
            yield Drawing(one, FLUENT_3D.style, data, is_svg=False)


def svg(icon: dict[str, Any], defaults: dict[str, Any]) -> bytes:
    """Return one icon of a set as a whole SVG file."""
    left, top, width, height = (
        icon.get(side, defaults.get(side, fallback))
        for side, fallback in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    ).encode()


def read_icons(
    style: str, icons: dict[str, Any], names: Names, emoji: Iterable[Emoji]
) -> Iterator[Drawing]:
    """Yield the drawings of an icon set (`icons.json`), one an emoji.

    Of several names for one emoji the shortest is taken, which has no number at its end.
    """
    found: dict[Points, str] = {}
    for name in sorted(icons["icons"], key=lambda name: (len(name), name)):
        points = names.find(name)
        if points is not None:
            found.setdefault(points, name)
    for one in emoji:
        if one.points in found:
            icon = icons["icons"][found[one.points]]
            yield Drawing(one, style, svg(icon, icons), is_svg=True)


def read_drawings(archives: dict[str, Path], emoji: Sequence[Emoji]) -> list[Drawing]:
    """Return every source's drawings, in the order of the emoji and then of the styles.

    `archives` holds the archives' paths by package.
    """
    sets = {
        source.style: read_json(archives[source.package], r"package/(icons|chars)\.json")
        for source in ICON_SETS
    }
    tables = (
        {name: code_points(hexcode) for hexcode, name in sets[style]["chars"].items()}
        for style in NAMED_BY_CODE_POINTS
    )
    names = Names(emoji, tables)
    drawings = [*read_fluent3d(archives[FLUENT_3D.package], emoji)]
    for style, files in sets.items():
        drawings += read_icons(style, files["icons"], names, emoji)
    place_of = {one: index for index, one in enumerate(emoji)}
    return sorted(drawings, key=lambda one: (place_of[one.emoji], STYLES.index(one.style)))
