"""Folders of TFDS datasets: versions, splits, ImageNet by name, and what cannot be read without TensorFlow."""

import json
import os
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from data_zoo import encoded, smooth
from forms import CLASSES, some_images, write_tfds
from PIL import Image

from gigatok_jax.data import BadRecord, make_source
from gigatok_jax.data.tfds import TfdsImages


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tfds(tmp_path_factory.mktemp("tfds"), some_images())


@pytest.fixture
def copy(tiny, tmp_path):
    """A version folder that a test may damage."""
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_with_and_without_the_version(tiny):
    for root in (tiny, tiny.parent, str(tiny)):
        source = make_source("tfds", root=root)
        assert (len(source), source.class_names, source.name_of(1)) == (12, CLASSES, "birds/01.png")


def test_the_newest_version_is_taken(copy):
    for version in ("0.9.0", "0.10.0", "not_a_version"):
        copy.with_name(version).mkdir()
        (copy.with_name(version) / "dataset_info.json").write_text("{}")
    assert len(TfdsImages(copy.parent)) == 12


def test_splits(tiny):
    assert make_source("tfds", root=tiny, split="eval")[0].name == "birds/00.jpg"
    assert len(TfdsImages(tiny, "train[:25%]")) == 3
    with pytest.raises(ValueError, match=r"1.0.0' has no split 'test'; splits: train, validation"):
        TfdsImages(tiny, "test")


def test_imagenet_by_name(tiny, tmp_path, monkeypatch):
    """ImageNet as TFDS stores it: the same features, in the folder imagenet2012."""

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            names = [f"n{i:08d}" for i in range(1000)]
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                path = tmp_path / f"{i}.JPEG"
                path.write_bytes(encoded(Image.fromarray(smooth(32, 40, i)), "JPEG"))
                yield i, {"image": str(path), "label": 10 * i, "file_name": path.name}

    Imagenet2012(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train = make_source("imagenet2012", root=tmp_path)
    held_out = make_source("imagenet2012", root=str(tmp_path), split="eval")
    assert (len(train), len(held_out), len(train.class_names)) == (4, 2, 1000)
    assert {(train[i].name, train[i].label) for i in range(4)} == {(f"{i}.JPEG", 10 * i) for i in range(4)}
    assert make_source("tfds", root=tmp_path / "imagenet2012" / "5.1.0")[0].image.shape == (32, 40, 3)
    with pytest.raises(
        FileNotFoundError, match=r"no TFDS dataset in .*missing/imagenet2012'.*file_format=array_record"
    ):
        make_source("imagenet2012", root=tmp_path / "missing")


def test_a_wrong_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no TFDS dataset in .*: a folder with dataset_info.json"):
        TfdsImages(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="TFDS cannot read"):
        TfdsImages(tmp_path)


def test_a_dataset_stored_for_tensorflow_is_told(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"stored as tfrecord, which only TensorFlow reads.*array_record"):
        TfdsImages(copy)


def test_a_missing_shard_is_told_and_a_cut_one_is_bad_records(copy):
    (shard,) = copy.glob("*train.array_record*")
    source = TfdsImages(copy)
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(BadRecord, match=r"^train/5: cannot be read"):
        source[5]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*train.array_record-00000-of-00001' is missing: copy"):
        TfdsImages(copy)


def test_tensorflow_is_not_imported(tiny):
    code = (
        "import sys; from gigatok_jax.data import make_source; assert 'tensorflow_datasets' not in sys.modules; "
        f"make_source('tfds', root={str(tiny)!r})[0]; print('tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
