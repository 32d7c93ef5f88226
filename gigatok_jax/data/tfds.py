"""Images of a TFDS dataset, read without TensorFlow: it must be stored as ArrayRecord."""

import os
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gigatok_jax.data.array_record import allow_open_files
from gigatok_jax.data.decode import BadRecord
from gigatok_jax.data.records import Encoded, EncodedSource

_INFO = "dataset_info.json"
# The first of these that a dataset has is the split "eval".
_EVAL_SPLITS = ("eval", "validation", "val", "test")
_NAME_FEATURES = ("file_name", "filename", "name", "image/filename", "image/id", "id")
_CAPTION_FEATURES = ("caption", "text")


class TfdsImages(EncodedSource):
    """One split of a dataset that TFDS prepared, in its stored order.

    The first image feature is the image, the first class feature the label (0 without one), a text feature "caption"
    or "text" the caption, a feature such as "file_name" the name; without it the name is "<split>/<index>".

    Args:
        root: the dataset's folder, with or without its version (`imagenet2012/5.1.0`, or `imagenet2012` for the
            newest that is there).
        split: "train", "eval" (the dataset's eval, validation, val or test, the first it has), or any split that
            TFDS understands, such as "train[:10%]".

    Raises:
        FileNotFoundError: no dataset at `root`, or one of its shards is missing.
        ValueError: the dataset is not stored as ArrayRecord, has no image feature, or no such split.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train"):
        folder = _version_folder(Path(root))
        try:
            builder = tfds.builder_from_directory(folder)
        except Exception as error:  # TFDS raises many kinds on damaged metadata
            message = str(error).splitlines()[0]
            raise ValueError(f"TFDS cannot read {str(folder)!r} ({type(error).__name__}: {message})") from error
        _check_format(builder, folder)
        self._split = _find_split(builder, split, folder)
        _check_shards(builder, self._split)
        features = builder.info.features
        self._image = _first(features, tfds.features.Image)
        self._label = _first(features, tfds.features.ClassLabel)
        if self._image is None:
            raise ValueError(f"the TFDS dataset {str(folder)!r} has no image; its features: {', '.join(features)}")
        held = builder.info.splits[self._split]
        self.identity = f"{builder.info.full_name} {self._split} {held.num_examples}"
        self._name = next((name for name in _NAME_FEATURES if name in features), None)
        self._caption = next((name for name in _CAPTION_FEATURES if name in features), None)
        self.class_names = ("",) if self._label is None else tuple(features[self._label].names)
        undecoded = {self._image: tfds.decode.SkipDecoding()}
        self._raw = builder.as_data_source(split=self._split, decoders=undecoded)

    def __len__(self) -> int:
        return len(self._raw)

    def name_of(self, index: int) -> str:
        """The name stored with the image (reads the record), or "<split>/<index>"."""
        return f"{self._split}/{index}" if self._name is None else self.read(index).name

    def read(self, index: int) -> Encoded:
        """One image file; raises BadRecord where the shard is damaged."""
        place = f"{self._split}/{index}"
        try:
            fields = self._raw[index]
        except Exception as error:  # the reader's, the parser's or a feature's
            raise BadRecord(place, f"cannot be read ({type(error).__name__}: {error})") from error
        if fields[self._image] is None:  # what the reader makes of a cut shard
            raise BadRecord(place, "cannot be read (an empty record: its shard is cut, copy it again)")
        name = place if self._name is None else _text(fields[self._name])
        caption = "" if self._caption is None else _text(fields[self._caption])
        return Encoded(fields[self._image], 0 if self._label is None else int(fields[self._label]), name, caption)


def _version_folder(root: Path) -> Path:
    """`root`, or its sub-folder of the newest version."""
    if (root / _INFO).is_file():
        return root
    versions = [path.parent for path in root.glob(f"*/{_INFO}") if tfds.core.Version.is_valid(path.parent.name)]
    if not versions:
        raise FileNotFoundError(
            f"no TFDS dataset in {str(root)!r}: a folder with {_INFO}, such as {root.name}/5.1.0, is wanted. Make it "
            f"with `tfds build {root.name} --file_format=array_record` on a machine with TensorFlow"
        )
    return max(versions, key=lambda path: tfds.core.Version(path.name))


def _check_format(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    stored = builder.info.file_format
    if stored is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"the TFDS dataset {str(folder)!r} is stored as {stored.value}, which only TensorFlow reads: on a machine "
            "that has it, `tfds convert_format --root_data_dir=... --out_file_format=array_record` makes it readable "
            "here (file_format=array_record)"
        )


def _find_split(builder: tfds.core.DatasetBuilder, split: str, folder: Path) -> str:
    splits = builder.info.splits
    if split == "eval":
        split = next((name for name in _EVAL_SPLITS if name in splits), split)
    try:
        empty = not splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} has no split {split!r}; splits: {', '.join(splits)}") from error
    if empty:
        raise ValueError(f"the split {split!r} of {str(folder)!r} has no record")
    return split


def _check_shards(builder: tfds.core.DatasetBuilder, split: str) -> None:
    paths = [Path(os.fspath(part.filename)) for part in builder.info.splits[split].file_instructions]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"shard {str(path)!r} is missing: copy it again")
    allow_open_files(len(paths))


def _first(features: Any, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
