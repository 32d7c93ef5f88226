"""The views of a picture that are encoded: fixed crops, or as many random ones as are asked for."""

from typing import NamedTuple

import numpy as np

from gigatok_jax.data import transforms
from gigatok_jax.data.elements import CROPS, ImageElement
from gigatok_jax.data.records import Record

VIEWS = ("ten_crop", *CROPS)
_ENCODE = 2  # first word of a view's random key, apart from training's


class Views(NamedTuple):
    """Record number and picture → (R, S, S, 3) uint8; a pure function of the fields and the number.

    image_size: S.
    crop: "center" (ADM); "ten_crop" (a centre crop `crop_range` times as large, of which four corners and the centre,
      then the same mirrored); "adm" and "scale": `num_views` random crops as in training.
    crop_range: of ten_crop; GigaTok's code uses 1.1, and 1.05 for a second set.
    flip: "center" has its mirror image as a second view; random crops are mirrored half of the time.
    permute_channels: of random crops, as in training.
    """

    image_size: int
    crop: str = "center"
    num_views: int = 1
    flip: bool = False
    permute_channels: bool = False
    crop_range: float = 1.1
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for a field out of range."""
        if self.crop not in VIEWS:
            raise ValueError(f"crop={self.crop!r} is not one of {', '.join(VIEWS)}")
        fixed = self.crop in ("center", "ten_crop")
        if self.num_views < 1 or (fixed and self.num_views != 1):
            raise ValueError(
                f"num_views={self.num_views}: at least 1, and 1 for crop={self.crop!r}, whose views are fixed"
            )
        if self.flip and self.crop == "ten_crop":
            raise ValueError("flip: half of crop='ten_crop' are mirror images already, leave it out")
        if self.permute_channels and fixed:
            raise ValueError(f"permute_channels is of random crops, adm and scale: crop={self.crop!r} is none")
        if self.crop_range < 1 or self.image_size < 1:
            raise ValueError(f"crop_range={self.crop_range} and image_size={self.image_size} must be at least 1")

    @property
    def count(self) -> int:
        """R."""
        return {"center": 1 + self.flip, "ten_crop": 10}.get(self.crop, self.num_views)

    def __call__(self, record: Record, number: int) -> np.ndarray:
        """The views of record number `number`."""
        if self.crop == "center":
            image = transforms.adm_center_crop(record.image, self.image_size)
            return np.stack([image, image[:, ::-1]][: self.count])
        if self.crop == "ten_crop":
            return ten_crop(record.image, self.image_size, self.crop_range)
        element = ImageElement(self.image_size, self.crop, self.flip, self.permute_channels)
        rngs = (np.random.default_rng([_ENCODE, self.seed, number, view]) for view in range(self.num_views))
        return np.stack([element(record, rng)["image"] for rng in rngs])


def ten_crop(image: np.ndarray, size: int, crop_range: float) -> np.ndarray:
    """(10, size, size, 3): corners (top left, top right, bottom left, bottom right), centre, and these mirrored."""
    side = int(size * crop_range)
    image = transforms.adm_center_crop(image, side)
    far, middle = side - size, round((side - size) / 2)
    places = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    five = np.stack([image[y : y + size, x : x + size] for y, x in places])
    return np.concatenate([five, five[:, :, ::-1]])
