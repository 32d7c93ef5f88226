"""The same images through every form of storage give the same batches, bad records included."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from forms import (
    CLASSES,
    FORMS,
    damage,
    label_of,
    some_images,
    source_of,
    write_folder,
    write_forms,
    write_tars,
    write_tfds,
)

from gigatok_jax.data import BadRecord, ImageElement, ImageFolder, TrainLoader, eval_batches, make_source
from gigatok_jax.data.packing import pack

LOADING = {"global_batch": 5, "seed": 3, "num_steps": 6, "element": ImageElement(16), "num_threads": 3}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    return write_forms(tmp_path_factory.mktemp("forms"), some_images())


def batches(source, **changes):
    with TrainLoader(source, **(LOADING | changes)) as loader:
        # Copied: a worker's arrays live in shared memory.
        return [{key: np.array(value) for key, value in batch.items()} for batch in loader], loader.bad_records


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        for key in ("id", "label", "image"):
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_gives_the_folders_batches(roots, form):
    folder, source = source_of("folder", roots), source_of(form, roots)
    assert len(source) == len(folder) == 12 and source.class_names == CLASSES
    assert_same(batches(folder)[0], batches(source)[0])
    for a, b in zip(eval_batches(folder, image_size=16, batch=8), eval_batches(source, image_size=16, batch=8)):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("form", FORMS)
def test_files_come_out_as_they_went_in(roots, form):
    source = source_of(form, roots)
    for index, (name, data) in enumerate(some_images().items()):
        record = source.read(index)
        assert (record.data, record.label) == (data, label_of(name))
        assert record.name == source.name_of(index)
        assert name.split(".")[0] in record.name
        assert record.caption == ("a picture" if form == "webdataset" else "")


@pytest.mark.parametrize("form", FORMS)
def test_a_root_in_the_home_folder(roots, form, monkeypatch):
    monkeypatch.setenv("HOME", str(roots[form].parent))
    assert len(make_source(form, root=f"~/{roots[form].name}")) == 12
    assert len(make_source(form, root=Path("~") / roots[form].name)) == 12


@pytest.mark.parametrize("form", FORMS[1:])
def test_workers_read_the_same(roots, form):
    source = source_of(form, roots)
    source[7]  # opens files, which must not travel
    assert len(pickle.dumps(source)) < 10_000
    assert_same(batches(source)[0], batches(source, num_workers=1)[0])


def broken(form: str, root: Path, good: dict[str, bytes], name: str) -> Path:
    """The form with one record that cannot be used: a bad file, or, as packing leaves those out, a damaged shard."""
    if form == "array_record":
        packed = root / "packed"
        pack(ImageFolder(write_folder(root / "folder", good)), packed, made_from={}, shard_records=5)
        (shard,) = (path for path in packed.glob("*.array_record") if good[name] in path.read_bytes())
        damage(shard, good[name])
        return packed
    write = {"folder": write_folder, "webdataset": write_tars, "tfds": write_tfds}[form]
    return write(root, good | {name: b"\xff\xd8\xffnothing"})


def test_a_bad_record_is_replaced_alike_counted_and_named(tmp_path):
    good = some_images()
    name = list(good)[6]  # a JPEG, so that the folder still lists it
    seen, named = {}, {}
    for form in FORMS:
        source = make_source(form, root=broken(form, tmp_path / form, good, name))
        assert len(source) == len(good)
        with pytest.raises(BadRecord):
            source[6]
        seen[form], bad = batches(source)
        (named[form],) = bad
        assert not any(6 in batch["id"] for batch in seen[form])
    for form in FORMS[1:]:
        assert_same(seen["folder"], seen[form])
    assert named["folder"] == named["tfds"] == name and named["webdataset"] == f"part-1.tar/{name.split('.')[0]}"
    # The name lies inside the damaged record: its place is named.
    assert named["array_record"] == "images-00001-of-00003.array_record[1]"
