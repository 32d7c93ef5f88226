"""Shards of ids: the same records however often, and by however many processes, they were written."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from gigatok_jax.data import (
    ArrayRecordSet,
    BadRecord,
    Record,
    TokenElement,
    TokenSet,
    TrainLoader,
    encoding,
    make_source,
)
from gigatok_jax.data.encoding import encode_shards, finish
from gigatok_jax.data.tokens import TokenRecord, from_bytes, to_bytes
from gigatok_jax.data.transforms import adm_center_crop
from gigatok_jax.data.views import Views, ten_crop

TOKENIZER = {"hash": "ab", "codebook_size": 256, "num_latent_tokens": 4, "image_size": 8}


class Pictures:
    """Numbered pictures of random sizes, some of which cannot be read."""

    class_names = ("even", "odd")

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def name_of(self, index):
        return f"picture {index}"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(self.name_of(index), "it is torn")
        rng = np.random.default_rng(index)
        size = rng.integers(8, 20, 2)
        return Record(rng.integers(0, 256, (*size, 3), np.uint8), index % 2, self.name_of(index), f"a {index}")


def corners(images):
    """An encoder for tests: the red of an image's four corners."""
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    return images[:, [0, 0, -1, -1], [0, -1, 0, -1], 0].astype(np.int32)


def encode(out, source=None, encoder=corners, views=None, **options):
    source, views = source or Pictures(11, bad=(3,)), views or Views(8, "ten_crop", crop_range=1.25)
    made_from = {"source": "numbers"}
    settings = {"tokenizer": TOKENIZER, "made_from": made_from, "batch": 4, "shard_records": 3, "num_threads": 2}
    encode_shards(source, out, encoder, views, **settings | options)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_records_are_the_views_ids(tmp_path):
    encode(tmp_path)
    index = finish(tmp_path)
    source, tokens = Pictures(11), TokenSet(tmp_path)
    assert index["records"] == len(tokens) == 10 and index["dropped"] == {"picture 3": "it is torn"}
    assert tokens.tokenizer == TOKENIZER and tokens.class_names == ("even", "odd")
    for row, number in enumerate(n for n in range(11) if n != 3):
        record, picture = tokens[row], source[number]
        crops = ten_crop(picture.image, 8, 1.25)
        np.testing.assert_array_equal(record.ids_RK, crops[:, [0, 0, -1, -1], [0, -1, 0, -1], 0])
        assert (
            (record.label, record.name, record.caption)
            == picture[1:]
            == (number % 2, f"picture {number}", f"a {number}")
        )


class Killed(Exception):
    pass


def test_killed_at_any_moment_the_union_is_one_clean_run(tmp_path):
    encode(tmp_path / "clean")
    clean = finish(tmp_path / "clean")
    rng, calls = np.random.default_rng(0), 0

    def fragile(images):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Killed
        return corners(images)

    for _ in range(10):
        calls = int(rng.integers(0, 9))
        try:
            encode(tmp_path / "killed", encoder=fragile)
        except Killed:
            continue
    encode(tmp_path / "killed")
    assert finish(tmp_path / "killed") == clean
    assert content(tmp_path / "killed") == content(tmp_path / "clean")


def test_a_picture_is_copied_a_few_times_whatever_the_batch(tmp_path, monkeypatch):
    copied = []

    def concatenate(arrays, **options):
        joined = np.concatenate(arrays, **options)
        copied.append(len(joined))
        return joined

    monkeypatch.setattr(encoding, "np", SimpleNamespace(**{**vars(np), "concatenate": concatenate}))
    encode(tmp_path, Pictures(60), lambda images: images[:, :2, 0, 0], Views(8), batch=32, shard_records=60)
    assert sum(copied) <= 5 * 60  # joined, the last batch filled up, and the same again as ids


def test_processes_share_out_the_shards(tmp_path):
    encode(tmp_path / "one")
    for process in (2, 0, 1):
        encode(tmp_path / "three", process=(process, 3))
    assert finish(tmp_path / "three") == finish(tmp_path / "one")
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_a_set_is_finished_only_when_every_shard_is_there(tmp_path):
    encode(tmp_path, process=(0, 2))
    with pytest.raises(ValueError, match="2 of 4 shards are not there, such as tokens-00001-of-00004"):
        finish(tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        TokenSet(tmp_path)


def test_a_damaged_shard_is_written_again(tmp_path):
    encode(tmp_path)
    finish(tmp_path)
    before = content(tmp_path)
    shard = tmp_path / "tokens-00002-of-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    encode(tmp_path)
    finish(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": {**TOKENIZER, "hash": "cd"}}, "another tokenizer"),
        ({"views": Views(8)}, "was encoded from"),
        ({"source": Pictures(12)}, "was encoded from"),
        ({"shard_records": 4}, "was encoded from"),
        ({"batch": 0}, "must be at least 1"),
        ({"views": Views(8, "middle")}, "is not one of ten_crop, adm, scale, center"),
        ({"views": Views(8, "center", num_views=2)}, "whose views are fixed"),
        ({"views": Views(8, "ten_crop", flip=True)}, "flip: half of crop='ten_crop' are mirror images already"),
        ({"views": Views(8, "ten_crop", permute_channels=True)}, "permute_channels is of random crops, adm and scale"),
        ({"views": Views(8, "center", permute_channels=True)}, "permute_channels is of random crops, adm and scale"),
    ],
)
def test_what_cannot_be_gone_on_with(tmp_path, options, words):
    encode(tmp_path)
    finish(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=words):
        encode(tmp_path, **options)
    assert content(tmp_path) == before


def test_images_are_no_ids(tmp_path):
    encode(tmp_path)
    finish(tmp_path)
    index = json.loads((tmp_path / "dataset.json").read_text())
    del index["tokenizer"]
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"gigatok_jax\.encode"):
        make_source("tokens", root=tmp_path)
    assert len(ArrayRecordSet(tmp_path)) == 10


def test_no_usable_picture(tmp_path):
    encode(tmp_path, Pictures(2, bad=(0, 1)))
    with pytest.raises(ValueError, match="none of the pictures is usable; the first is picture 0: it is torn"):
        finish(tmp_path)


@pytest.mark.parametrize("largest", [255, 70_000])
def test_records_read_back(largest):
    ids = np.array([[0, 1, largest]], np.int32)
    record = TokenRecord(ids, 3, "name", "caption")
    back = from_bytes(to_bytes(record), "here")
    np.testing.assert_array_equal(back.ids_RK, ids)
    assert back[1:] == record[1:] and back.ids_RK.dtype == np.int32
    for damaged in (
        b"",
        b"\x80",
        to_bytes(record)[:-3],
        to_bytes(record).replace(b"<u2", b"|O8").replace(b"<i4", b"|O8"),
    ):
        with pytest.raises(BadRecord, match="no encoded picture"):
            from_bytes(damaged, "here")


def test_ten_crops_are_corners_centre_and_their_mirrors():
    image = np.random.default_rng(0).integers(0, 256, (30, 24, 3), np.uint8)
    crops, whole = ten_crop(image, 20, 1.1), adm_center_crop(image, 22)
    for crop, (y, x) in zip(crops, ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))):
        np.testing.assert_array_equal(crop, whole[y : y + 20, x : x + 20])
    np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])


@pytest.mark.parametrize("crop", ["adm", "scale"])
def test_random_views_follow_from_seed_and_number(crop):
    record = Pictures(1)[0]
    views = Views(8, crop, num_views=5, flip=True, permute_channels=True)
    np.testing.assert_array_equal(views(record, 4), views(record, 4))
    np.testing.assert_array_equal(views(record, 4)[:2], views._replace(num_views=2)(record, 4))
    for other in (views(record, 5), views._replace(seed=1)(record, 4)):
        assert (other != views(record, 4)).any()
    assert len(np.unique(views(record, 4), axis=0)) > 1
    centre = Views(8, flip=True)(record, 0)
    np.testing.assert_array_equal(centre[1], centre[0, :, ::-1])


def test_training_draws_one_of_a_pictures_views(tmp_path):
    encode(tmp_path)
    finish(tmp_path)
    tokens = TokenSet(tmp_path)
    settings = {"global_batch": 5, "seed": 0, "num_steps": 40, "element": TokenElement(), "num_threads": 2}
    with TrainLoader(tokens, **settings) as loader:
        batches = list(loader)
    drawn = set()
    for batch in batches:
        assert batch["ids"].shape == (5, 4) and batch["ids"].dtype == np.int32
        for ids, label, number in zip(batch["ids"], batch["label"], batch["id"]):
            record = tokens[int(number)]
            assert label == record.label and (record.ids_RK == ids).all(1).any()
            drawn.add((int(number), int(np.flatnonzero((record.ids_RK == ids).all(1))[0])))
    assert len(drawn) > 50  # of 10 pictures with 10 views, in 200 draws
    with TrainLoader(tokens, **settings, start_step=30) as resumed:
        for a, b in zip(batches[30:], resumed, strict=True):
            np.testing.assert_array_equal(a["ids"], b["ids"])


def test_two_sets_of_views_are_taken_from_in_halves(tmp_path):
    ranges = {"110": 1.25, "105": 1.5}
    for name, crop_range in ranges.items():
        encode(tmp_path / name, views=Views(8, "ten_crop", crop_range=crop_range))
        finish(tmp_path / name)
    joined = make_source("tokens", root=f"{tmp_path / '110'},{tmp_path / '105'}")
    sets = [TokenSet(tmp_path / name) for name in ranges]
    assert len(joined) == 10 and joined.tokenizer == TOKENIZER and joined.name_of(3) == sets[0].name_of(3)
    assert joined.identity not in {one.identity for one in sets}
    for index in range(10):
        np.testing.assert_array_equal(joined[index].ids_RK, np.concatenate([one[index].ids_RK for one in sets]))
    element, rng = TokenElement(), np.random.default_rng(0)
    drawn = [np.flatnonzero((joined[0].ids_RK == element(joined[0], rng)["ids"]).all(1))[0] for _ in range(2000)]
    counts = np.bincount(drawn, minlength=20)
    assert abs(counts[:10].sum() / 2000 - 0.5) < 0.04 and counts.min() > 60


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (None, {"tokenizer": {**TOKENIZER, "hash": "cd"}}, "by different tokenizers"),
        (Pictures(10), {}, "different pictures"),
    ],
)
def test_sets_that_are_not_of_the_same_pictures_are_not_joined(source, options, words, tmp_path):
    encode(tmp_path / "one")
    encode(tmp_path / "two", source, **options)
    for name in ("one", "two"):
        finish(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        make_source("tokens", root=f"{tmp_path / 'one'},{tmp_path / 'two'}")
