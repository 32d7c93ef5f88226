"""Bundles and pictures that the tests of linear probes share."""

import numpy as np
from PIL import Image

from gigatok_jax.data.records import Record
from gigatok_jax.hub import bundle, sections
from tests.tiny import tiny_generator, tiny_run

CLASSES = ("blue", "green", "red")


def tiny_tokenizer(folder, seed=0, **changes):
    """The loaded bundle of the tests' tiny tokenizer (8 px, 8 ids of 64), with drawn weights."""
    section = {**tiny_run().tokenizer.to_dict(), **changes}
    return saved(folder, "tokenizer", section, seed)


def tiny_writer(folder, tokenizer, seed=1, class_names=CLASSES, **changes):
    """The loaded bundle of a generator of the tokenizer's ids."""
    sizes = {name: tokenizer.section[name] for name in ("codebook_size", "num_latent_tokens")}
    section = tiny_generator(**{**sizes, "num_classes": len(CLASSES), "dropout": 0.3, **changes}).to_dict()
    return saved(folder, "generator", section, seed, tokenizer=tokenizer.facts(), class_names=class_names)


def saved(folder, kind, section, seed, **facts):
    """The loaded bundle of a section, with drawn weights."""
    shapes = sections.parameter_shapes(kind, section)
    arrays = {name: _drawn(name, leaf.shape, seed + n) for n, (name, leaf) in enumerate(shapes.items())}
    bundle.save(folder, kind, section, arrays.__getitem__, **facts)
    return bundle.load(folder)


def _drawn(name, shape, seed):
    """A parameter that keeps signals at about their size, so that different images stay different."""
    x = np.random.default_rng(seed).normal(size=shape)
    if name.endswith("kernel"):
        x /= np.sqrt(np.prod(shape[:-1]) if "conv" in name else shape[-2])
    elif name.endswith(("scale", "bias")):
        x = 0.1 * x + name.endswith("scale")
    return x.astype(np.float32)


class Colours:
    """Noise over its class' colour; `labels`, where given, have nothing to do with it."""

    class_names = CLASSES

    def __init__(self, count, seed, labels=None):
        self.count, self.seed, self.labels = count, seed, labels

    def __len__(self):
        return self.count

    def name_of(self, index):
        return f"{self.seed}/{index}"

    def __getitem__(self, index):
        noise = np.random.default_rng([self.seed, index]).integers(0, 100, (12, 8, 3))
        image = (noise + 155 * np.eye(3, dtype=int)[index % 3]).astype(np.uint8)
        return Record(image, index % 3 if self.labels is None else int(self.labels[index]), self.name_of(index))


def write_folder(root, count, seed):
    """`Colours` as a folder of PNGs with a sub-folder per class."""
    source = Colours(count, seed)
    for record in map(source.__getitem__, range(count)):
        folder = root / CLASSES[record.label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.image).save(folder / f"{record.name.replace('/', '_')}.png")
    return root
