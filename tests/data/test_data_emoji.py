"""The emoji set from tiny archives of the same layout; nothing is fetched."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_zoo import encoded, smooth
from PIL import Image

from gigatok_jax import pack as program
from gigatok_jax.data import emoji, make_source

TABLE = [
    {"name": "GRINNING FACE", "unified": "1F600", "non_qualified": None, "subcategory": "face-smiling"},
    {"name": "KEYCAP 4", "unified": "0034-FE0F-20E3", "non_qualified": "0034-20E3", "subcategory": "keycap"},
    {
        "name": "WAVING HAND SIGN",
        "unified": "1F44B",
        "non_qualified": None,
        "subcategory": "hand-fingers-open",
        "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB", "non_qualified": None}},
    },
    {"name": "NO PICTURE", "unified": "1F601", "non_qualified": None, "subcategory": "unused"},
    {
        "name": "Wales Flag",
        "unified": "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F",
        "non_qualified": None,
        "subcategory": "subdivision-flag",
    },
]
PICTURES = ("1f600", "0034-fe0f-20e3", "34-fe0f-20e3", "1f44b", "1f44b-1f3fb", "1f3f4-e0067_e0062_e0077_e006c_e0073")


def picture(seed: int) -> Image.Image:
    alpha = np.full((24, 24, 1), 255, np.uint8)
    alpha[:12] = 0
    return Image.fromarray(np.concatenate([smooth(24, 24, seed), alpha], -1))


def write_tgz(path: Path, files: dict[str, bytes]) -> str:
    """Writes the archive; returns its SHA-512 as npm writes it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    files = {f"package/assets/{s}.webp": encoded(picture(i), "WEBP", lossless=True) for i, s in enumerate(PICTURES)}
    files |= {"package/README.md": b"words", "package/../../1f601.webp": b"outside"}
    table = {"package/emoji.json": json.dumps(TABLE).encode()}
    for name, content in (("PICTURES", files), ("NAMES", table)):
        package = getattr(emoji, name)
        monkeypatch.setattr(emoji, name, package._replace(sha512=write_tgz(folder / package.archive, content)))
    return folder


def test_classes_captions_and_white_ground(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "EVAL_SHARE", 5)
    facts = program.run("emoji", str(archives), tmp_path / "emoji", "train")
    splits = [make_source("emoji", root=tmp_path / "emoji", split=name) for name in ("train", "eval")]
    assert [facts[name]["records"] for name in ("train", "eval")] == [len(split) for split in splits]
    assert min(map(len, splits)) > 0 and facts["train"]["hash"] == splits[0].identity
    found = {split[i].name: split[i] for split in splits for i in range(len(split))}
    assert found.keys() == set(PICTURES)
    classes = ("face-smiling", "hand-fingers-open", "keycap", "subdivision-flag")
    assert splits[0].class_names == splits[1].class_names == classes
    for stem, label, caption in (
        ("1f600", 0, "grinning face"),
        ("1f44b-1f3fb", 1, "waving hand sign"),
        ("34-fe0f-20e3", 2, "keycap 4"),
        ("1f3f4-e0067_e0062_e0077_e006c_e0073", 3, "wales flag"),
    ):
        assert (found[stem].label, found[stem].caption) == (label, caption)
    image = found["1f44b"].image
    assert (image[:12] == 255).all()
    np.testing.assert_array_equal(image[12:], smooth(24, 24, PICTURES.index("1f44b"))[12:])


def test_variants_are_on_one_side():
    families = (
        ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff"),
        ("1f3c3", "1f3c3-200d-2642", "1f3c3-1f3fd-200d-2640-200d-27a1"),
        ("1f468-200d-1f692", "1f469-1f3fc-200d-1f692", "1f9d1-200d-1f692"),
        ("1f46b", "1f9d1-200d-1f91d-200d-1f9d1", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3fc"),
    )
    for family in families:
        assert len({emoji.split_of(points) for points in family}) == 1, family
    splits = [emoji.split_of(f"{0x1F300 + i:x}") for i in range(1000)]
    assert 60 < splits.count("eval") < 140 and set(splits) == {"train", "eval"}
    # Trained models were evaluated on these: a change here moves pictures between the splits.
    held_out = [i for i, split in enumerate(splits) if split == "eval"]
    assert held_out[:4] == [7, 11, 24, 43]


def test_normal_code_points():
    assert emoji.normal("A9-FE0F") == emoji.normal("00a9") == "00a9"
    assert emoji.normal("1f3f4-e0067_e0062-e007f") == "1f3f4-e0067-e0062"


def test_wrong_archives_are_told(archives, monkeypatch):
    with pytest.raises(ValueError, match="no split 'test'; splits: train, eval"):
        emoji.EmojiArchives(archives, "test")
    pictures = archives / emoji.PICTURES.archive
    content = pictures.read_bytes()
    pictures.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"is not the published archive: make it with `npm pack @lobehub"):
        emoji.EmojiArchives(archives)
    pictures.unlink()
    with pytest.raises(FileNotFoundError, match=r"fluent-emoji-3d-1.1.0.tgz' is missing: `npm pack @lobehub"):
        emoji.EmojiArchives(archives)
    sha512 = write_tgz(pictures, {"package/assets/1f699.webp": b"x"})
    monkeypatch.setattr(emoji, "PICTURES", emoji.PICTURES._replace(sha512=sha512))
    with pytest.raises(ValueError, match=r"says nothing about the picture 1f699.webp"):
        emoji.EmojiArchives(archives)


def test_npm_missing_or_failing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"npm is not installed: install it, or fetch .*--root"):
        emoji.fetch(tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "npm error network down\nnpm error a log is there\n")
    monkeypatch.setattr(emoji.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(emoji.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match=r"failed .npm error network down.*--root"):
        emoji.fetch(tmp_path)
