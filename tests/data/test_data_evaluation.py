"""Evaluation images are the same every time, and evenly spread."""

import numpy as np
import pytest
from data_zoo import BAD, GOOD, smooth

from gigatok_jax.data import ImageFolder, Photographs, Record, adm_center_crop, eval_batches, eval_crops
from gigatok_jax.data.transforms import resize_square


class Pictures:
    class_names = ("",)

    def __init__(self, *shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        return Record(smooth(*self.shapes[index], index), 0, f"p{index}")


def test_eval_batches_give_every_good_image_once_in_order(zoo):
    source, bad = ImageFolder(zoo), {}
    batches = list(eval_batches(source, image_size=16, batch=4, bad_records=bad))
    assert [b["image"].shape for b in batches] == [(4, 16, 16, 3)] * 3
    joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    ids = joined["id"][joined["valid"]]
    assert [source.name_of(i) for i in ids] == sorted(GOOD)
    assert (joined["id"][~joined["valid"]] == -1).all() and not joined["image"][~joined["valid"]].any()
    for index, image, label in zip(ids, joined["image"][joined["valid"]], joined["label"][joined["valid"]]):
        np.testing.assert_array_equal(image, adm_center_crop(source[index].image, 16))
        assert label == source[index].label
    assert bad.keys() == BAD.keys()


def test_eval_batches_of_two_processes_make_the_whole(zoo):
    source = ImageFolder(zoo)
    whole = list(eval_batches(source, image_size=16, batch=4))
    halves = [list(eval_batches(source, image_size=16, batch=4, rows=r)) for r in ((0, 1), (1, 4))]
    for batch, low, high in zip(whole, *halves, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([low[key], high[key]]))


def test_a_part_of_the_set_is_spread_over_it():
    (batch,) = eval_batches(Pictures(*[(16, 16)] * 20), image_size=16, batch=4, count=4)
    assert batch["id"].tolist() == [0, 5, 10, 15]


def test_eval_batches_arguments():
    for changes in ({"count": 3}, {"count": 0}, {"rows": (0, 5)}, {"image_size": 0}):
        with pytest.raises(ValueError):
            eval_batches(Pictures((16, 16), (16, 16)), **({"image_size": 16, "batch": 4} | changes))


def test_eval_crops_of_the_photographs():
    source = Photographs("eval")
    images, names = eval_crops(source, 64, 16)
    assert (images.shape, images.dtype, len(set(names))) == ((16, 64, 64, 3), np.uint8, 16)
    sides = [(name.split("@")[0], int(name.rsplit(",", 1)[1])) for name in names]
    assert {s: sides.count(s) for s in sides} == {
        (picture, side): count
        for picture in ("china.jpg", "flower.jpg")
        for side, count in ((427, 2), (213, 3), (106, 3))
    }
    for image, name in zip(images, names):
        picture, place = name.split("@")
        top, left, side = map(int, place.split(","))
        photograph = source[0 if picture == "china.jpg" else 1].image
        np.testing.assert_array_equal(image, resize_square(photograph[top : top + side, left : left + side], 64))
    np.testing.assert_array_equal(eval_crops(source, 64, 16)[0], images)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_eval_crops_give_the_count_asked_for(count):
    _, names = eval_crops(Pictures((40, 40), (64, 200), (16, 30)), 16, count)
    assert len(set(names)) == len(names) == count


def test_eval_crops_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="p1 is 30x20: crops of size 21 do not fit"):
        eval_crops(Pictures((40, 50), (20, 30)), 21, 4)
    with pytest.raises(ValueError, match="has no 2 different crops of size 16"):
        eval_crops(Pictures((16, 16)), 16, 2)
