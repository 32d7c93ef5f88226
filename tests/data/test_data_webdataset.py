"""Grouping, captions and labels of tars; the stored index; cut and foreign tars."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_zoo import encoded, smooth
from forms import write_tar
from PIL import Image

from gigatok_jax.data import BadRecord, make_source, tar_index, webdataset
from gigatok_jax.data.webdataset import TarImages

PNG = encoded(Image.fromarray(smooth(16, 20, 0)), "PNG")
JPEG = encoded(Image.fromarray(smooth(20, 16, 1)), "JPEG")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gigatok_jax" / "tar_index"


def test_samples_are_grouped_by_the_name_up_to_the_first_dot(tmp_path):
    long = "x" * 150  # needs an extended header
    files = {
        "a.png": PNG,
        "a.seg.png": JPEG,  # another kind of file: its extension is seg.png
        "a.cls": b"3\n",
        "a.json": json.dumps({"caption": " from json "}).encode(),
        "deep/a.JPG": JPEG,
        "deep/a.txt": "über\n  alles ".encode(),
        "deep/a.json": b'{"caption": "not this one"}',
        "no_image.cls": b"9",
        f"{long}.webp": PNG,
        f"{long}.jpg": JPEG,
        "last.png": PNG,
        "last.json": b'{"width": 3}',
    }
    source = TarImages(write_tar(tmp_path / "x.tar", files))
    assert [source.read(i) for i in range(len(source))] == [
        (PNG, 3, "x.tar/a", "from json"),
        (JPEG, 0, "x.tar/deep/a", "über alles"),
        (JPEG, 0, f"x.tar/{long}", ""),
        (PNG, 0, "x.tar/last", ""),
    ]
    assert source.class_names == ("0", "1", "2", "3")


def test_a_folder_one_tar_and_a_pattern(tmp_path):
    for name in ("train-1", "train-0", "val-0"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": PNG})
    names = [make_source("webdataset", root=tmp_path).name_of(i) for i in range(3)]
    assert names == ["train-0.tar/train-0", "train-1.tar/train-1", "val-0.tar/val-0"]
    assert len(make_source("webdataset", root=f"{tmp_path}/train-*.tar")) == 2
    assert len(make_source("webdataset", root=tmp_path / "val-0.tar")) == 1


@pytest.mark.parametrize(
    "names",
    [("a.png", "b.png", "a.cls", "b.cls"), ("a.json", "b.png", "a.png"), ("a.png", "b.png", "a.png")],
    ids=["labels behind", "caption before", "image twice"],
)
def test_a_sample_whose_files_lie_apart_is_refused(tmp_path, names):
    content = {".png": PNG, ".cls": b"1", ".json": b"{}"}
    write_tar(tmp_path / "x.tar", [(name, content[Path(name).suffix]) for name in names])
    with pytest.raises(ValueError, match=r"x.tar' .* sample 'a' apart from each other.*--sort=name"):
        TarImages(tmp_path)


def test_labels_that_no_image_takes_are_told(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        assert TarImages(write_tar(tmp_path / "x.tar", {"images/a.png": PNG, "labels/a.cls": b"3"}))[0].label == 0
    assert "x.tar: 1 .cls files are beside no image, the first is labels/a.cls; 1 images have no .cls" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        assert TarImages(write_tar(tmp_path / "y.tar", {"a.png": PNG, "a.cls": b"1", "b.cls": b"1"}))[0].label == 1
    assert ".cls" not in caplog.text, "every image has its label"


def test_tars_of_one_name_in_several_folders_have_names_of_their_own(tmp_path):
    for name in ("d/1/a.tar", "d/2/a.tar", "d/2/deep/b.tar"):
        write_tar(tmp_path / name, {"0.png": PNG})
    for pattern, names in (
        ("d/*/a.tar", ["1/a.tar/0", "2/a.tar/0"]),
        ("d/2/a.tar", ["a.tar/0"]),
        ("d/2", ["a.tar/0"]),
    ):
        source = make_source("webdataset", root=f"{tmp_path}/{pattern}")
        assert [source.name_of(i) for i in range(len(source))] == names == [source[i].name for i in range(len(source))]


def test_headers_are_read_once_and_again_when_the_tar_changes(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", {"a.png": PNG})
    built = []
    real = tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda path: built.append(path) or real(path))
    assert TarImages(tar).read(0).data == PNG and TarImages(tar).read(0).data == PNG
    assert len(built) == 1 and (tmp_path / "x.tar.index.npz").is_file()
    write_tar(tar, {"b.jpg": JPEG, "c.png": PNG})
    source = TarImages(tar)
    assert [source.read(i).data for i in range(2)] == [JPEG, PNG] and len(built) == 2


def test_a_damaged_index_is_built_anew(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.png": PNG, "b.png": PNG})
    TarImages(tar)
    stored = tmp_path / "x.tar.index.npz"
    for content in (b"", b"nothing", stored.read_bytes()[:-300]):
        stored.write_bytes(content)
        assert TarImages(tar).read(1).data == PNG
        np.load(stored)["stamp"]


def test_an_index_that_cannot_lie_beside_the_tar_goes_to_the_cache(tmp_path, monkeypatch, cache):
    tar = write_tar(tmp_path / "tars" / "x.tar", {"a.png": PNG})
    real = tar_index._store

    def store(place, stamp, index):
        if place.parent == tar.parent:
            raise PermissionError(13, "Permission denied")
        real(place, stamp, index)

    monkeypatch.setattr(tar_index, "_store", store)
    TarImages(tar)
    assert os.listdir(tar.parent) == ["x.tar"] and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tar_index, "build_index", None)
    assert TarImages(tar).read(0).data == PNG


@pytest.mark.parametrize("cut", [700, 1500, 1800, 2048, -1024])
def test_a_cut_tar_is_refused(tmp_path, cut):
    big = os.urandom(5000)
    tar = write_tar(tmp_path / "x.tar", {"a.png": PNG.ljust(1024, b"\0")[:1024], "b.png": big})
    whole = tar.read_bytes()
    end = 512 + 1024 + 512 + 5120  # headers and contents in blocks of 512; zeros follow
    tar.write_bytes(whole[: cut if cut > 0 else end])
    with pytest.raises(ValueError, match=r"x.tar' (cannot be indexed|has no end mark|is damaged at byte 1536).*cop"):
        TarImages(tar)


@pytest.mark.parametrize("harm", ["flipped header", "zeroed header", "joined", "something behind", "half an end mark"])
def test_a_tar_damaged_in_its_middle_is_refused(tmp_path, harm):
    tar = write_tar(tmp_path / "x.tar", {f"{i}.png": b"x" * 600 for i in range(4)})
    whole, second, end = tar.read_bytes(), 512 + 1024, 4 * (512 + 1024)
    assert len(whole) == 10_240 and not any(whole[end:]), "padded with zeros"
    harmed, message = {
        "flipped header": (whole[:second] + b"?" + whole[second + 1 :], f"is damaged at byte {second}: .*copy it"),
        "zeroed header": (whole[:second] + bytes(512) + whole[second + 512 :], f"is damaged at byte {second}: "),
        "joined": (2 * whole, f"is damaged at byte {end}: .* from byte 10240 on"),
        # Far behind, so that it is not in the first piece that is read.
        "something behind": (whole + bytes(3 * 2**20) + b"x", f"is damaged at byte {end}: .* from byte 3155968 on"),
        "half an end mark": (whole[: end + 512], "has no end mark"),
    }[harm]
    tar.write_bytes(harmed)
    with pytest.raises(ValueError, match=rf"x.tar' {message}"):
        TarImages(tar)


def test_a_tar_may_end_after_its_end_mark_or_in_many_zeros(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.png": b"x" * 600})
    for content in (tar.read_bytes()[: 512 + 1024 + 1024], tar.read_bytes() + bytes(3 * 2**20)):
        tar.write_bytes(content)
        assert len(TarImages(tar)) == 1


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(os.urandom(4000))
    with pytest.raises(ValueError, match=r"x.tar' cannot be indexed .*compressed"):
        TarImages(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tar at .*missing': give a folder of .tar files"):
        TarImages(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tar at .*empty': put .tar files there"):
        TarImages(tmp_path / "empty")
    write_tar(tmp_path / "words" / "x.tar", {"a.txt": b"words"})
    with pytest.raises(ValueError, match="no sample with an image"):
        TarImages(tmp_path / "words")
    write_tar(tmp_path / "twice" / "x.tar", {"a.png": PNG, "a.PNG": PNG})
    with pytest.raises(ValueError, match=r"sample 'a' has two .png files"):
        TarImages(tmp_path / "twice")


def test_class_names_lie_beside_the_tars(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": PNG, "a.cls": b"2"})
    (tmp_path / webdataset.CLASS_NAMES).write_text("ant\nbee\ncat\n")
    assert TarImages(tmp_path).class_names == ("ant", "bee", "cat")
    (tmp_path / webdataset.CLASS_NAMES).write_text("ant\n")
    with pytest.raises(ValueError, match="has 1 lines, but the tars' largest class number is 2"):
        TarImages(tmp_path)


def test_bad_samples_are_named(tmp_path):
    files = {"a.png": PNG, "a.cls": b"cat", "b.png": PNG, "b.json": b"{", "c.png": PNG, "c.txt": b"\xff\xfe"}
    source = TarImages(write_tar(tmp_path / "x.tar", files | {"d.png": PNG}))
    for index, reason in enumerate((r"x.tar/a: its .cls", r"x.tar/b: its .json", r"x.tar/c: its .txt")):
        with pytest.raises(BadRecord, match=reason):
            source[index]
    assert source[3].name == "x.tar/d"
    webdataset._opened.cache_clear()
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:-12_000])
    with pytest.raises(BadRecord, match=r"x.tar/d: the tar is shorter"):
        source[3]
    (tmp_path / "x.tar").unlink()
    webdataset._opened.cache_clear()
    with pytest.raises(BadRecord, match=r"x.tar/d: cannot be read .No such file"):
        source[3]


def test_many_tars_stay_within_the_limit_of_open_files(tmp_path, monkeypatch):
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", {f"{number}.png": PNG})
    source = TarImages(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    small = webdataset.functools.lru_cache(maxsize=2)(webdataset._opened.__wrapped__)
    monkeypatch.setattr(webdataset, "_opened", small)
    for index in range(8):
        source.read(index)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_file_that_the_cache_has_let_go_of_stays_open_while_it_is_read(tmp_path, monkeypatch):
    source = TarImages(write_tar(tmp_path / "x.tar", {"a.png": PNG}))
    # Two threads that miss at once both open the tar, and the cache keeps one file; here it keeps none.
    monkeypatch.setattr(webdataset, "_opened", webdataset._opened.__wrapped__)
    assert source.read(0).data == PNG
