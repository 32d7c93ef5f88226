"""Batches depend on (seed, step) and on nothing else; bad records are replaced, counted and named."""

import logging
import multiprocessing
import threading
import time

import numpy as np
import pytest
from data_zoo import BAD, GOOD

from gigatok_jax.data import BadRecord, ImageElement, ImageFolder, Record, TrainLoader, adm_center_crop, sample_ids
from gigatok_jax.data import pipeline as pipeline_lib

BASE = {"global_batch": 6, "seed": 11, "num_steps": 4, "element": ImageElement(16), "num_threads": 2}


class Numbered:
    """N tiny images; record i is filled with i, and those in `bad` cannot be read."""

    class_names = ("all",)

    def __init__(self, count, bad=()):
        self.count, self.bad = count, frozenset(bad)

    def __len__(self):
        return self.count

    def name_of(self, index):
        return f"n{index}"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"n{index}", "made bad")
        return Record(np.full((8, 8, 3), index, np.uint8), 0, f"n{index}")


def batches(source, **changes):
    with TrainLoader(source, **(BASE | changes)) as loader:
        return [{k: np.array(v) for k, v in batch.items()} for batch in loader]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("table", [True, False])
def test_every_pass_is_a_permutation(monkeypatch, table):
    if not table:
        monkeypatch.setattr(pipeline_lib, "_TABLE_RECORDS", 0)
    sizes = [*range(1, 40), 255, 256, 257, 1000] if table else [1, 2, 3, 5, 8, 17, 255, 256, 257, 1000]
    for count in sizes:
        for epoch in range(2):
            # A batch as long as one pass.
            assert sorted(sample_ids(3, epoch, count, count)) == list(range(count))


@pytest.mark.parametrize("count", [50, 1_281_167])
def test_order_changes_with_seed_and_pass(count):
    orders = [tuple(sample_ids(s, 0, 50, count)) for s in range(3)] + [tuple(sample_ids(0, 1, 50, count))]
    assert len(set(orders)) == 4
    one_by_one = np.concatenate([sample_ids(0, s, 10, count) for s in range(5)])
    np.testing.assert_array_equal(one_by_one, orders[0])
    second_pass = pipeline_lib._record_at(0, count, count), pipeline_lib._record_at(0, count + 1, count)
    assert second_pass != (orders[0][0], orders[0][1])


def test_order_is_pinned():
    # A stored run resumes onto this order: these numbers may change only with a note to those who resume.
    assert sample_ids(0, 0, 5, 100).tolist() == [11, 92, 3, 20, 13]
    assert sample_ids(0, 0, 5, 10**6).tolist() == [609330, 562558, 745267, 689751, 937207]


def test_ids_are_sample_ids_where_no_record_is_bad():
    for step, batch in enumerate(batches(Numbered(23))):
        np.testing.assert_array_equal(batch["id"], sample_ids(11, step, 6, 23))
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["id"])
        assert (batch["image"].shape, batch["image"].dtype) == ((6, 16, 16, 3), np.uint8)
        assert (batch["label"].dtype, batch["id"].dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("crop", ["adm", "scale", "center"])
def test_two_processes_halves_are_the_whole_batch(zoo, crop):
    source = ImageFolder(zoo)
    whole = batches(source, element=ImageElement(16, crop))
    low, high = (batches(source, element=ImageElement(16, crop), rows=rows) for rows in ((0, 2), (2, 6)))
    assert_same(whole, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(low, high)])


def test_thread_and_worker_counts_change_nothing(zoo):
    source = ImageFolder(zoo)
    whole = batches(source, num_threads=0)
    assert_same(whole, batches(source, num_threads=5, prefetch=1))
    with TrainLoader(source, **BASE, num_workers=2) as loader:
        # Copied: the arrays live in the workers' shared memory.
        from_workers = [{k: np.array(v) for k, v in next(loader).items()}]
        assert len(multiprocessing.active_children()) >= 2, "the workers must be processes"
        from_workers += [{k: np.array(v) for k, v in batch.items()} for batch in loader]
    assert_same(whole, from_workers)
    with TrainLoader(source, **BASE) as reference:
        list(reference)
    assert loader.bad_records == reference.bad_records and len(loader.bad_records) > 0


def test_resuming_gives_the_same_batches(zoo):
    source = ImageFolder(zoo)
    assert_same(batches(source)[2:], batches(source, start_step=2))
    assert batches(source, start_step=4) == []


def test_seed_and_position_move_the_crop(zoo):
    source = ImageFolder(zoo)
    first, other = batches(source), batches(source, seed=12)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other))
    seen = {}
    for batch in batches(source, num_steps=12, element=ImageElement(16, flip=False)):
        for index, image in zip(batch["id"], batch["image"]):
            seen.setdefault(int(index), set()).add(image.tobytes())
    # The CMYK file is of one colour.
    assert all(len(crops) > 3 for i, crops in seen.items() if "cmyk" not in source.name_of(i))


def test_permuted_channels_are_the_same_planes_in_all_orders(zoo):
    source = ImageFolder(zoo)
    plain, permuted = (
        batches(source, element=ImageElement(16, "center", permute_channels=on), num_steps=20) for on in (False, True)
    )
    orders = set()
    for p, q in ((p, q) for a, b in zip(plain, permuted) for p, q in zip(a["image"], b["image"])):
        assert sorted(plane.tobytes() for plane in np.moveaxis(p, -1, 0)) == sorted(
            plane.tobytes() for plane in np.moveaxis(q, -1, 0)
        )
        orders.add(tuple(next(i for i in range(3) if np.array_equal(p[..., i], q[..., j])) for j in range(3)))
    assert len(orders) >= 6


def test_flip_mirrors_about_half(zoo):
    source = ImageFolder(zoo)
    plain, flipped = (batches(source, element=ImageElement(16, "center", flip), num_steps=20) for flip in (False, True))
    images = [(p, f) for a, b in zip(plain, flipped) for p, f in zip(a["image"], b["image"])]
    same = [np.array_equal(p, f) for p, f in images]
    assert all(s or np.array_equal(p[:, ::-1], f) for s, (p, f) in zip(same, images))
    assert 20 < sum(not s for s in same) < 100


def test_zoo_is_run_through_and_every_bad_file_named(zoo, caplog):
    source = ImageFolder(zoo)
    used = {}
    with (
        caplog.at_level(logging.WARNING, "absl"),
        TrainLoader(source, **(BASE | {"num_steps": 6, "element": ImageElement(16, "center", False)})) as loader,
    ):
        for batch in loader:
            for index, label, image in zip(batch["id"], batch["label"], batch["image"]):
                used[source.name_of(index)] = image
                assert label == GOOD[source.name_of(index)]
    assert used.keys() == GOOD.keys()
    assert loader.bad_records.keys() == BAD.keys()
    for name, reason in BAD.items():
        assert reason in loader.bad_records[name]
        assert sum(name in line for line in caplog.messages) == 1, "each bad file is logged once"
    for i in range(len(source)):
        if source.name_of(i) in GOOD:
            np.testing.assert_array_equal(used[source.name_of(i)], adm_center_crop(source[i].image, 16))
    np.testing.assert_allclose(used["birds/deep/cmyk.jpg"].reshape(-1, 3), [[204, 153, 255]] * 256, atol=2)
    assert used["dogs/grey16.png"].max() > 220 and used["dogs/grey16.png"].min() < 20


def test_substitutes_depend_on_the_position_only():
    bad = {1, 4, 7, 8, 9}
    clean, mended = batches(Numbered(23)), batches(Numbered(23, bad))
    resumed = batches(Numbered(23, bad), start_step=3, rows=(3, 6))
    for a, b in zip(clean, mended):
        was_bad = np.isin(a["id"], list(bad))
        np.testing.assert_array_equal(a["id"][~was_bad], b["id"][~was_bad])
        assert not np.isin(b["id"], list(bad)).any()
    np.testing.assert_array_equal(resumed[0]["id"], mended[3]["id"][3:])


def test_the_last_good_record_is_found():
    ids = np.concatenate([b["id"] for b in batches(Numbered(16, set(range(16)) - {5}))])
    assert (ids == 5).all()


def test_a_mostly_bad_set_is_trained_on():
    good = {3, 150, 199}
    ids = np.concatenate([b["id"] for b in batches(Numbered(200, set(range(200)) - good), num_steps=8)])
    assert set(ids.tolist()) == good


def test_a_large_set_is_not_tried_to_its_end():
    with (
        TrainLoader(Numbered(10_000, range(10_000)), **BASE) as loader,
        pytest.raises(RuntimeError, match="256 records in a row are bad"),
    ):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_records_stop_the_run(tmp_path, num_workers):
    for i in range(20):  # fewer than MAX_ATTEMPTS: all of them are tried
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with (
        TrainLoader(ImageFolder(tmp_path), **BASE, num_workers=num_workers) as loader,
        pytest.raises(RuntimeError, match=r"20 records in a row are bad, the first is \d+.png: .*not a JPEG"),
    ):
        next(loader)


def test_batches_are_collected_outside_the_consumers_thread(monkeypatch):
    # Collecting in `next` costs a turn at the interpreter lock per row: 100 ms for a ready batch of 64 on two cores.
    collectors = []
    real = pipeline_lib.stack_rows
    monkeypatch.setattr(pipeline_lib, "stack_rows", lambda e: collectors.append(threading.current_thread()) or real(e))
    batches(Numbered(23))
    assert len(collectors) == BASE["num_steps"] and threading.current_thread() not in collectors
    # With no thread to read in, everything is done by the caller.
    batches(Numbered(23), num_threads=0)
    assert collectors[-1] is threading.current_thread()


def test_closing_ends_the_threads():
    before = threading.active_count()
    with TrainLoader(Numbered(23), **(BASE | {"num_steps": 1000, "num_threads": 4})) as loader:
        next(loader)
        assert threading.active_count() >= before + 2
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_wait_is_measured():
    with TrainLoader(Numbered(23), **BASE) as loader:
        next(loader)
        first = loader.wait_seconds
        list(loader)
    assert 0 < first < loader.wait_seconds


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"element": ImageElement(16, "middle")}, "unknown crop 'middle'; crops: adm, scale, center"),
        ({"rows": (2, 7)}, r"rows \(2, 7\) is no slice of 6 global rows"),
        ({"rows": (2, 2)}, "no slice"),
        ({"start_step": 5}, r"start_step 5 is not in \[0, num_steps=4\]"),
        ({"element": ImageElement(0)}, "image_size must be at least 1"),
        ({"global_batch": 0}, "global_batch must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"num_workers": -1}, "must not be negative"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(Numbered(3), **(BASE | changes))
    with pytest.raises(ValueError, match="empty"):
        TrainLoader(Numbered(0), **BASE)
