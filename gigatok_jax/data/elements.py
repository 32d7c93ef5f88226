"""What becomes of one record in a training batch; everything random about it follows from the generator given."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gigatok_jax.data import transforms
from gigatok_jax.data.records import Record
from gigatok_jax.data.tokens import TokenRecord

CROPS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "adm": lambda image, size, rng: transforms.adm_random_crop(image, size, transforms.integers_of(rng)),
    "scale": transforms.random_scale_crop,
    "center": lambda image, size, rng: transforms.adm_center_crop(image, size),
}


class ImageElement(NamedTuple):
    """{"image": (S, S, 3) uint8, "label"} of a picture.

    image_size: S.   crop: "adm" (shorter side near S), "scale" (every scale of a large picture), "center".
    flip: mirror half of the images.
    permute_channels: put red, green and blue in a random order, so that a few pictures show many colours.
    """

    image_size: int
    crop: str = "adm"
    flip: bool = True
    permute_channels: bool = False

    def check(self) -> None:
        """Raises ValueError for a field out of range."""
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}; crops: {', '.join(CROPS)}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """One augmented picture."""
        image = CROPS[self.crop](record.image, self.image_size, rng)
        image = transforms.horizontal_flip(image, self.flip and rng.random() < 0.5)
        if self.permute_channels:
            image = image[..., rng.permutation(3)]
        return {"image": image, "label": record.label}


class TokenElement(NamedTuple):
    """{"ids": (K,) int32, "label"} of an encoded picture, from one of its crops."""

    def check(self) -> None:
        """There is nothing to be wrong."""

    def __call__(self, record: TokenRecord, rng: np.random.Generator) -> dict[str, Any]:
        """One crop's ids."""
        return {"ids": record.ids_RK[rng.integers(len(record.ids_RK))], "label": record.label}


def element(cfg: Mapping[str, Any]) -> ImageElement | TokenElement:
    """What a config's `data` section makes of its source's records."""
    section = cfg["data"]
    if section["source"] == "tokens":
        return TokenElement()
    size = cfg["tokenizer" if "tokenizer" in cfg else "first_stage"]["image_size"]
    return ImageElement(size, section["crop"], section["flip"], section["permute_channels"])
