"""Random-access image sources: `len(source)`, `source[i]`, `source.name_of(i)`, `source.class_names`.

A source raises `BadRecord` for a record it cannot give and never skips one itself: what replaces it is the
pipeline's to decide. Sources are pickled to worker processes, so they hold names and small things only.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gigatok_jax.data.array_record import ArrayRecordSet
from gigatok_jax.data.decode import MAX_BYTES, MAX_PIXELS, MIN_SIDE, BadRecord, decode_image
from gigatok_jax.data.records import Encoded, EncodedSource, Record, Source
from gigatok_jax.data.tokens import open_tokens
from gigatok_jax.data.webdataset import TarImages

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder(EncodedSource):
    """Images in a folder tree; an image's class is the first sub-folder on its path.

    Classes are the sorted sub-folders that hold an image at any depth; images directly in `root` are of class
    "" (label 0). Files are listed by suffix (`IMAGE_SUFFIXES`, any case) and sorted by their path relative to
    `root`, which is also their name. Links are followed, except back into a folder they are in.

    Args:
        root: the folder.
        max_pixels, max_bytes, min_side: as in `decode_image`.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: no image in it.
        OSError: a sub-folder cannot be listed (its images would silently be missing).
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        min_side: int = MIN_SIDE,
    ):
        self.root = Path(root)
        self.limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "min_side": min_side}
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"image folder {str(self.root)!r} is not a folder: give the path of a folder of images, "
                "with one sub-folder per class where there are classes"
            )
        self._names = _list_images(self.root)
        if not self._names:
            raise ValueError(
                f"no image in folder {str(self.root)!r}: put files ending in {' '.join(IMAGE_SUFFIXES)} "
                "there, or in one sub-folder per class"
            )
        self.class_names = tuple(sorted({_class_of(name) for name in self._names}))
        self._labels = {class_name: label for label, class_name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, index: int) -> str:
        """Path relative to the root, with forward slashes."""
        return self._names[index]

    def file_stamps(self) -> Iterator[tuple[int, int]]:
        """(size, time of change in ns) of every image file; (-1, 0) for one that cannot be looked at."""
        for name in self._names:
            try:
                status = os.stat(self.root / name)
                yield status.st_size, status.st_mtime_ns
            except OSError:
                yield -1, 0

    def read(self, index: int) -> Encoded:
        """The file's bytes; raises BadRecord where it cannot be read or is too large."""
        name = self._names[index]
        data = _read(self.root / name, name, self.limits["max_bytes"])
        return Encoded(data, self._labels[_class_of(name)], name)


class Photographs:
    """The real colour photographs inside scikit-image's (train) and scikit-learn's (eval) wheels.

    Whole photographs are held out: no crop of an eval picture is ever trained on, and both pictures of the
    stereo pair are in train. They have no labels, which counts as one class without a name. Decoded arrays are kept in
    memory, read-only.

    Args:
        split: "train" (nine pictures) or "eval" (two).

    Raises:
        ValueError: unknown split.
        ImportError: the package with the pictures is not installed.
    """

    class_names = ("",)
    SPLITS = {  # noqa: RUF012 (a constant)
        "train": (
            "skimage",
            "data",
            (
                "astronaut.png",
                "chelsea.png",
                "coffee.png",
                "hubble_deep_field.jpg",
                "ihc.png",
                "motorcycle_left.png",
                "motorcycle_right.png",
                "retina.jpg",
                "rocket.jpg",
            ),
        ),
        "eval": ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    }

    def __init__(self, split: str = "train"):
        if split not in self.SPLITS:
            raise ValueError(f"photographs has no split {split!r}; splits: {', '.join(self.SPLITS)}")
        package, folder, self._names = self.SPLITS[split]
        self._folder = _package_folder(package) / folder
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": {}}

    def name_of(self, index: int) -> str:
        """File name within the package."""
        return self._names[index]

    def __getitem__(self, index: int) -> Record:
        """One photograph; raises BadRecord where its file is missing or damaged."""
        name = self._names[index]
        if index not in self._cache:
            image = decode_image(_read(self._folder / name, name, MAX_BYTES), name)
            image.flags.writeable = False
            self._cache[index] = image
        return Record(self._cache[index], 0, name)


def make_source(name: str, *, root: str | os.PathLike | None = None, split: str = "train") -> Source:
    """Builds a source by name.

    Args:
        name: a key of `SOURCES`.
        root: where the images are; each source's own class says in which form. "photographs" needs none, "emoji"
            and "imagenet2012" have a usual place. A leading ~ is the home folder.
        split: "train" or "eval". "folder" and "webdataset" do not use it: there each split is a root of its own.

    Raises:
        ValueError: unknown name, an argument the source needs is missing, or what is there cannot be used.
        OSError: there is nothing at `root`.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown image source {name!r}; sources: {', '.join(sorted(SOURCES))}")
    kind, usual_root, make = SOURCES[name]
    if not root and usual_root is None:
        raise ValueError(f"image source {name!r} needs root, the path of {kind}")
    return make(os.path.expanduser(root or usual_root), split)


def _make_emoji(root: str | os.PathLike, split: str) -> Source:
    return ArrayRecordSet(root, split, packed_from="emoji")


def _make_tfds(root: str | os.PathLike, split: str) -> Source:
    from gigatok_jax.data.tfds import TfdsImages  # imported on use: half a second, for this source alone

    return TfdsImages(root, split)


def _make_imagenet(root: str | os.PathLike, split: str) -> Source:
    return _make_tfds(Path(root) / "imagenet2012", split)


# name: (what root is, the usual root where there is one, root and split -> source)
SOURCES = {
    "array_record": ("a folder that gigatok_jax.pack wrote", None, ArrayRecordSet),
    "emoji": ("a folder that gigatok_jax.pack --source=emoji wrote", "data/emoji", _make_emoji),
    "folder": ("a folder of images", None, lambda root, split: ImageFolder(root)),
    "imagenet2012": (
        "a TFDS data folder, in which imagenet2012/ is",
        os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"),
        _make_imagenet,
    ),
    "photographs": ("nothing", "", lambda root, split: Photographs(split)),
    "tokens": ("a folder that gigatok_jax.encode wrote, or several with commas between", None, open_tokens),
    "tfds": ("a TFDS dataset, such as .../imagenet2012/5.1.0", None, _make_tfds),
    "webdataset": (
        "a folder of tars, one tar, or a pattern such as train-*.tar",
        None,
        lambda root, _: TarImages(root),
    ),
}


def _class_of(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _list_images(root: Path) -> list[str]:
    """Sorted relative posix paths of the image files below `root`."""

    def refuse(error: OSError):
        raise error

    names, above = [], {}  # above: folder -> the real folders on its path, to stop at a link that leads back
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        real, parents = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
        if real in parents:
            subfolders.clear()
            continue
        above[folder] = parents | {real}
        relative = Path(folder).relative_to(root)
        names += [(relative / f).as_posix() for f in files if f.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(names)


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise BadRecord(name, f"{size} bytes, above the limit of {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BadRecord(name, f"cannot be read ({error.strerror or error})") from error


def _package_folder(package: str) -> Path:
    # Found, not imported: importing either costs seconds and is needed for nothing here.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the demo photographs are inside the package {package!r}: pip install "gigatok_jax[demo]"')
    return Path(spec.submodule_search_locations[0])
