"""The discriminators by name, of a run's section or of a bundle's."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from gigatok_jax.discriminators.blur import BlurDiscriminator
from gigatok_jax.discriminators.dino import DinoDiscriminator
from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.teachers import VITS


def _patchgan(section: Mapping[str, Any], dtype: Any) -> PatchGAN:
    return PatchGAN(section["base_channels"], section["num_layers"], dtype=dtype)


def _blur(section: Mapping[str, Any], dtype: Any) -> BlurDiscriminator:
    return BlurDiscriminator(section["base_channels"], section["num_layers"], section["pooling"], dtype)


def _dino(section: Mapping[str, Any], dtype: Any) -> DinoDiscriminator:
    """A run's reads its frozen network; a bundle's says what its trained heads are: how many, and of what width."""
    sizes = VITS["dino-s16"]
    width = section.get("width", sizes.width)
    taps = range(section["num_heads"]) if "num_heads" in section else range(0, sizes.depth + 1, sizes.depth // 4)
    return DinoDiscriminator(width, sizes.depth, sizes.num_heads, tuple(taps), section.get("remat", "none"), dtype)


DISCRIMINATORS = {"patchgan": _patchgan, "blur": _blur, "dino": _dino}


def build(name: str, section: Mapping[str, Any], dtype: Any) -> nn.Module:
    """The discriminator of a section.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in DISCRIMINATORS:
        raise ValueError(f"config.discriminator.name={name!r} is not one of none, {', '.join(DISCRIMINATORS)}")
    return DISCRIMINATORS[name](section, dtype)
