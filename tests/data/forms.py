"""The same images as a folder, a TFDS dataset, ArrayRecord shards and WebDataset tars."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import tensorflow_datasets as tfds
from data_zoo import encoded, smooth
from PIL import Image

from gigatok_jax.data import ImageFolder, Source, make_source
from gigatok_jax.data.packing import pack

CLASSES = ("birds", "cats")
FORMS = ("folder", "array_record", "webdataset", "tfds")


def some_images() -> dict[str, bytes]:
    """path -> file, in sorted order: several formats, sizes and two classes."""
    files = {}
    for i in range(11):
        picture = Image.fromarray(smooth(40 + i, 60 - 2 * i, i))
        form, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        files[f"{CLASSES[i // 6]}/{i:02d}.{ending}"] = encoded(picture, form)
    files["cats/20.jpg"] = encoded(Image.fromarray(smooth(33, 47, 90)).convert("CMYK"), "JPEG")
    return files


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """Takes pairs, too, where a name comes twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(root: Path, files: Mapping[str, bytes]) -> Path:
    """Two tars with a .cls and a .txt beside every image, and the class names."""
    names, half = list(files), len(files) // 2
    for number, part in enumerate((names[:half], names[half:])):
        members = {}
        for name in part:
            stem = name.split(".")[0]
            members |= {name: files[name], f"{stem}.cls": str(label_of(name)).encode(), f"{stem}.txt": b"a picture"}
        write_tar(root / f"part-{number}.tar", members)
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


class Tiny(tfds.core.GeneratorBasedBuilder):
    """What a user's dataset looks like; images are stored as they are."""

    VERSION = tfds.core.Version("1.0.0")
    files: Mapping[str, bytes] = {}  # set before the dataset is prepared

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "file_name": tfds.features.Text(),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for key, (name, data) in enumerate(self.files.items()):
            yield key, {"image": io.BytesIO(data), "label": label_of(name), "file_name": name}


def write_tfds(root: Path, files: Mapping[str, bytes]) -> Path:
    """Returns the folder of the version, `<root>/tiny/1.0.0`."""
    Tiny.files = files
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return root / "tiny" / "1.0.0"


def write_forms(root: Path, files: Mapping[str, bytes]) -> dict[str, Path]:
    """form -> root of its source."""
    folder = write_folder(root / "folder", files)
    packed = root / "packed"
    pack(ImageFolder(folder), packed, made_from={}, shard_records=5)
    tars, dataset = write_tars(root / "tars", files), write_tfds(root / "tfds", files)
    return {"folder": folder, "array_record": packed, "webdataset": tars, "tfds": dataset}


def label_of(name: str) -> int:
    return CLASSES.index(name.split("/")[0])


def damage(path: Path, content: bytes) -> None:
    """Turns one byte in the middle of `content`, where it lies in the file."""
    data = bytearray(path.read_bytes())
    start = bytes(data).index(content)
    data[start + len(content) // 2] ^= 0xFF
    path.write_bytes(data)


def source_of(form: str, roots: Mapping[str, Path]) -> Source:
    return make_source(form, root=roots[form])
