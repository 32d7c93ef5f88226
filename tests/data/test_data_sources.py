"""Listing, labels, errors, and the two splits of photographs."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from data_zoo import BAD, GOOD, encoded, smooth
from PIL import Image

from gigatok_jax.data import BadRecord, ImageFolder, Photographs, make_source, sources


def test_folder_lists_every_image_file_sorted(zoo):
    source = make_source("folder", root=zoo)
    names = [source.name_of(i) for i in range(len(source))]
    assert names == sorted(BAD | GOOD)
    assert source.class_names == ("birds", "cats", "dogs")


def test_folder_gives_good_records_and_refuses_bad_ones(zoo):
    source = pickle.loads(pickle.dumps(ImageFolder(zoo)))
    for i in range(len(source)):
        name = source.name_of(i)
        if name in GOOD:
            image, label, record_name, caption = source[i]
            assert (image.dtype, image.ndim, label, record_name, caption) == (np.uint8, 3, GOOD[name], name, "")
        else:
            with pytest.raises(BadRecord, match=BAD[name]) as caught:
                source[i]
            assert caught.value.name == name


def test_images_in_the_root_are_of_the_unnamed_class(tmp_path):
    data = encoded(Image.fromarray(smooth(16, 16, 0)), "PNG")
    (tmp_path / "z.png").write_bytes(data)
    (tmp_path / "Apes").mkdir()
    (tmp_path / "Apes" / "a.PnG").write_bytes(data)
    source = ImageFolder(tmp_path)
    assert source.class_names == ("", "Apes")
    assert [(source[i].name, source[i].label) for i in range(2)] == [("Apes/a.PnG", 1), ("z.png", 0)]


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    data = encoded(Image.fromarray(smooth(16, 16, 0)), "PNG")
    for name in ("root/a", "root/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere/x.png").write_bytes(data)
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/to_b").symlink_to(tmp_path / "root/b")
    (tmp_path / "root/b/to_a").symlink_to(tmp_path / "root/a")
    (tmp_path / "root/b/to_root").symlink_to(tmp_path / "root")
    source = ImageFolder(tmp_path / "root")
    assert [source.name_of(i) for i in range(len(source))] == ["linked/x.png"]


def test_a_file_lost_after_listing_is_a_bad_record(tmp_path):
    (tmp_path / "x.png").write_bytes(b"1")
    (tmp_path / "y.png").write_bytes(b"12345")
    source = ImageFolder(tmp_path, max_bytes=4)
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadRecord, match=r"^x.png: cannot be read .No such file"):
        source[0]
    with pytest.raises(BadRecord, match=r"^y.png: 5 bytes, above the limit of 4"):
        source[1]


def test_errors_name_the_fault_and_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing' is not a folder: give the path"):
        ImageFolder(tmp_path / "missing")
    (tmp_path / "words.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no image in folder .*: put files ending in .jpg"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="needs root"):
        make_source("folder")
    with pytest.raises(ValueError, match="unknown image source 'imagenet'; sources: array_record, emoji, "):
        make_source("imagenet")
    with pytest.raises(ValueError, match="no split 'test'; splits: train, eval"):
        make_source("photographs", split="test")


def test_photographs():
    train, held_out = make_source("photographs"), make_source("photographs", split="eval")
    shapes = {train[i].name: train[i].image.shape for i in range(len(train))}
    assert len(shapes) == 9 and shapes["astronaut.png"] == (512, 512, 3) and shapes["rocket.jpg"] == (427, 640, 3)
    assert [held_out[i].name for i in range(2)] == ["china.jpg", "flower.jpg"]
    assert held_out[1].label == 0 and held_out.class_names == ("",)  # one class for all
    assert train[3].image is train[3].image and not train[3].image.flags.writeable
    assert len(pickle.dumps(train)) < 2000, "decoded pictures must not travel to the workers"


def test_photographs_say_what_to_install(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "gigatok_jax\[demo\]"'):
        Photographs()


def test_no_model_and_no_demo_package_is_imported():
    code = (
        "import sys; from gigatok_jax.data import Photographs; Photographs()[0]; "
        "print(sorted({'flax', 'optax', 'skimage', 'sklearn', 'tensorflow'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
