"""Evaluation images: always the same, in the same order."""

from collections.abc import Iterator

import numpy as np

from gigatok_jax.data import transforms
from gigatok_jax.data.decode import BadRecord
from gigatok_jax.data.pipeline import read_batches, report_bad, require
from gigatok_jax.data.records import Record, Source


class _LoadCentered:
    """Row k of the evaluation set -> one element; rows past the end and bad records are blank."""

    def __init__(self, source: Source, image_size: int, batch: int, count: int, rows: tuple[int, int]):
        self.source, self.image_size = source, image_size
        self.batch, self.count, self.rows = batch, count, rows

    def __call__(self, k: int) -> dict:
        low, high = self.rows
        step, row = divmod(int(k), high - low)
        position = step * self.batch + low + row
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        if position >= self.count:
            return {"image": blank, "label": 0, "id": -1, "bad": ()}
        # Spread over the source, which is sorted by class: its first `count` images could be one class.
        index = position * len(self.source) // self.count
        try:
            record = self.source[index]
        except BadRecord as error:
            return {"image": blank, "label": 0, "id": -1, "bad": ((error.name, error.reason),)}
        image = transforms.adm_center_crop(record.image, self.image_size)
        return {"image": image, "label": record.label, "id": index, "bad": ()}


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch: int,
    count: int | None = None,
    rows: tuple[int, int] | None = None,
    num_threads: int = 8,
    bad_records: dict[str, str] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Centre-cropped (ADM) images in the source's order, in batches of one fixed size.

    Image j of `count` is record floor(j * N / count). A bad record and the last batch's filling are blank
    rows with "valid" false, so which rows a process holds never depends on a file's health.

    Args:
        source: N records.
        image_size: S.
        batch: rows of a global batch.
        count: number of images, at most N; None is all.
        rows: this process' (low, high) slice of each batch; None is all of it.
        num_threads: reading threads.
        bad_records: filled with name -> reason of the bad records met; they are logged in any case.

    Returns:
        Iterator of `{"image": (b, S, S, 3) uint8, "label": (b,) int32, "id": (b,) int64 (-1 where blank),
        "valid": (b,) bool}`.

    Raises:
        ValueError: an argument is out of range.
    """
    count = len(source) if count is None else count
    rows = (0, batch) if rows is None else tuple(rows)
    require(image_size >= 1 and batch >= 1, f"image_size {image_size} and batch {batch} must be at least 1")
    require(1 <= count <= len(source), f"{count} evaluation images asked for, the source has {len(source)}")
    require(0 <= rows[0] < rows[1] <= batch, f"rows {rows} is no slice of {batch} rows")
    load = _LoadCentered(source, image_size, batch, count, rows)
    batches = read_batches(
        load, 0, -(-count // batch), rows[1] - rows[0], num_threads=num_threads, num_workers=0, prefetch=2
    )
    return _finish(iter(batches), {} if bad_records is None else bad_records)


def _finish(batches: Iterator[dict], bad_records: dict[str, str]) -> Iterator[dict[str, np.ndarray]]:
    for batch in batches:
        report_bad(batch.pop("bad"), bad_records)
        yield batch | {"valid": batch["id"] >= 0}


def eval_crops(source: Source, size: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Square crops of a few large pictures, spread evenly over the pictures, their octaves and their area.

    Crops have the picture's shorter side, half of it, a quarter, ... down to `size` (nothing is enlarged), in equal
    shares: the scales that `random_scale_crop` draws uniformly. Each scale's crops lie on a regular grid.

    Args:
        source: the pictures.
        size: side of the crops.
        count: number of crops, over all pictures.

    Returns:
        (count, size, size, 3) uint8, and for each crop "picture@top,left,side" in pixels of the picture.

    Raises:
        ValueError: a picture's shorter side is below `size`, or it has too few different crops.
        BadRecord: a picture cannot be read.
    """
    require(size >= 1 and count >= 1, f"size {size} and count {count} must be at least 1")
    crops, names = [], []
    for index in range(len(source)):
        share = (index + 1) * count // len(source) - index * count // len(source)
        if share == 0:
            continue
        record = source[index]
        for top, left, side in _places(*record.image.shape[:2], size, share, record.name):
            window = record.image[top : top + side, left : left + side]
            crops.append(transforms.resize_square(window, size))
            names.append(f"{record.name}@{top},{left},{side}")
    return np.stack(crops), names


class Tiles:
    """The crops of `eval_crops` as a source: one record each, unlabelled pictures' label 0."""

    def __init__(self, source: Source, size: int, count: int):
        """Raises ValueError or BadRecord as `eval_crops`."""
        self.class_names = source.class_names
        self._crops, self._names = eval_crops(source, size, count)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return Record(self._crops[index], 0, self._names[index])

    def name_of(self, index: int) -> str:
        """The picture and the crop's place in it."""
        return self._names[index]


def _places(height: int, width: int, size: int, count: int, name: str) -> list[tuple[int, int, int]]:
    """`count` different (top, left, side) squares of one picture, in equal shares from every octave."""
    shorter = min(height, width)
    require(shorter >= size, f"{name} is {width}x{height}: crops of size {size} do not fit")
    sides = [shorter >> octave for octave in range(shorter.bit_length()) if shorter >> octave >= size]
    places = []
    for index, side in enumerate(sides):
        # A large scale may have fewer different squares than its share: the smaller ones take the rest.
        places += _grid(height, width, side, (count - len(places)) // (len(sides) - index))
    require(len(places) == count, f"{name} ({width}x{height}) has no {count} different crops of size {size}")
    return places


def _grid(height: int, width: int, side: int, count: int) -> list[tuple[int, int, int]]:
    """Up to `count` squares of one side, evenly picked from the coarsest regular grid that holds so many."""
    free_rows, free_columns = height - side, width - side
    step = side
    while step > 1 and (free_rows // step + 1) * (free_columns // step + 1) < count:
        step -= 1
    tops = np.linspace(0, free_rows, free_rows // step + 1).round().astype(int)
    lefts = np.linspace(0, free_columns, free_columns // step + 1).round().astype(int)
    places = [(int(top), int(left), side) for top in tops for left in lefts]
    count = min(count, len(places))
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]
