"""The published recipes at reduced widths, with narrow frozen networks whose weights are drawn from seeds."""

import os
from pathlib import Path

from ml_collections import ConfigDict
from safetensors.numpy import save_file

from gigatok_jax import teachers
from gigatok_jax.hub import teachers as hub
from gigatok_jax.nn.vit import ViTSizes
from gigatok_jax.teachers import inception
from gigatok_jax.teachers.convnet import Stage
from tests.teachers.seeded import seeded
from tests.tiny import config_module, tiny_run

TINY_VGG = (Stage(0, (4,)), Stage(2, (4,)), Stage(2, (8,)), Stage(2, (8,)), Stage(2, (8,)))
DINO = ViTSizes(16, 4, 2, 16, 14, "gelu_tanh", layer_scale=False)
VITS = {"dinov2-b": ViTSizes(16, 2, 2, 14, 4), "dino-s16": DINO}


def tiny(sizes: ViTSizes) -> ViTSizes:
    """The same kind of vision transformer, narrow and shallow: 20 pixels, patches of 4."""
    return sizes._replace(width=16, depth=2, num_heads=2, patch=4, side=5, hidden=24 if sizes.hidden else 0)


def _narrow(branch: inception.Branch) -> inception.Branch:
    steps = (tuple(unit._replace(width=max(4, unit.width // 64)) for unit in step) for step in branch.steps)
    return branch._replace(steps=tuple(steps))


TINY_INCEPTION = tuple(tuple(map(_narrow, block)) for block in inception.INCEPTION)  # 33 features


def narrow(folder: Path) -> None:
    """Makes VGG16, DINOv2-B and DINO v1 narrow in this process, with their weights in `folder`."""
    teachers.CONVNETS["vgg16"] = TINY_VGG
    teachers.VITS.update(VITS)
    teachers.SEMANTIC["dinov2-b"] = VITS["dinov2-b"].width
    os.environ["GIGATOK_WEIGHTS"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vgg16", *VITS):
        save_file(seeded(hub.entries(name)), folder / f"{name}.safetensors")


def recipe(size: str, **changes: object) -> ConfigDict:
    """The losses and discriminator of `configs/gigatok.py:size` on the tests' tiny tokenizer; phases change at 3, 5."""
    published = config_module("gigatok").get_config(size)
    cfg = tiny_run(tokenizer__image_size=16, tokenizer__teacher_dim=VITS["dinov2-b"].width, frozen__dtype="float32")
    cfg.loss.update(published.loss.to_dict())
    cfg.loss.update(auxiliary_end=3, discriminator_start=5, usage_window=128)
    cfg.discriminator.name = published.discriminator.name
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            cfg[section][name] = value
        else:
            cfg[section] = value
    return cfg
