"""Crops and flips: pure functions of an image, a size and the random draws. Images are (H, W, 3) uint8."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

# draw(low, high) -> an integer in [low, high): `random.randrange`, or `integers_of` a numpy Generator.
Draw = Callable[[int, int], int]


def integers_of(rng: np.random.Generator) -> Draw:
    """The draws of a numpy Generator in the form `adm_random_crop` takes."""
    return lambda low, high: int(rng.integers(low, high))


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size`, then the central square: the evaluation crop of guided diffusion (ADM).

    Args:
        image: (H, W, 3) uint8.
        size: side of the square.

    Returns:
        (size, size, 3) uint8.
    """
    scaled = _shorter_side_to(image, size)
    height, width = scaled.shape[:2]
    return _window(scaled, (height - size) // 2, (width - size) // 2, size)


def adm_random_crop(
    image: np.ndarray, size: int, draw: Draw, *, min_fraction: float = 0.8, max_fraction: float = 1.0
) -> np.ndarray:
    """Shorter side to a random length, then a random square: the training crop of ADM and of GigaTok.

    Draws, in this order: the shorter side, from ceil(size / max_fraction) to ceil(size / min_fraction)
    inclusive; the crop's top row; its left column.

    Args:
        image: (H, W, 3) uint8.
        size: side of the square.
        draw: draw(low, high) gives an integer in [low, high).
        min_fraction, max_fraction: range of the crop's side over the scaled shorter side.

    Returns:
        (size, size, 3) uint8.
    """
    shorter = draw(math.ceil(size / max_fraction), math.ceil(size / min_fraction) + 1)
    scaled = _shorter_side_to(image, shorter)
    top = draw(0, scaled.shape[0] - size + 1)
    left = draw(0, scaled.shape[1] - size + 1)
    return _window(scaled, top, left, size)


def random_scale_crop(image: np.ndarray, size: int, rng: np.random.Generator, *, min_scale: float = 1.0) -> np.ndarray:
    """A square of random side anywhere in the image, resized to `size`: for few and large photographs.

    The side is log-uniform between `min_scale * size` and the full shorter side, so that every octave of
    scale is seen equally often. Where the image is smaller than that, the side is the shorter side.

    Args:
        image: (H, W, 3) uint8.
        size: side of the result.
        rng: gives the side, the top row and the left column, in this order.
        min_scale: smallest side over `size`; below 1 the crop may be enlarged.

    Returns:
        (size, size, 3) uint8.
    """
    height, width = image.shape[:2]
    longest = min(height, width)
    shortest = min(max(1, round(size * min_scale)), longest)
    side = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
    top = int(rng.integers(0, height - side + 1))
    left = int(rng.integers(0, width - side + 1))
    return resize_square(_window(image, top, left, side), size)


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes (S, S, 3) uint8 to (size, size, 3) with an antialiased Lanczos filter."""
    if image.shape[0] == size:
        return image
    # reducing_gap: whole-number box reduction first, which is several times faster and cannot be seen.
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0))


def horizontal_flip(image: np.ndarray, flip: bool) -> np.ndarray:
    """Mirrors (H, W, 3) left to right where `flip` is true."""
    return image[:, ::-1] if flip else image


def _shorter_side_to(image: np.ndarray, length: int) -> np.ndarray:
    """Halves with a box filter while the shorter side is at least 2 * length, then bicubic to `length`."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * length:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = length / min(picture.size)
    target = (round(picture.width * factor), round(picture.height * factor))
    return np.asarray(picture.resize(target, Image.Resampling.BICUBIC))


def _window(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    return image[top : top + side, left : left + side]
