"""The map that convolutions make of an image, and the sizes that go with it."""

from collections.abc import Mapping
from typing import Any


def latent_grid(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of the feature map.

    Raises:
      ValueError: if the image size is not a multiple of the convolutions' factor.
    """
    factor = 2 ** (len(cfg["conv_multipliers"]) - 1)
    if cfg["image_size"] % factor or cfg["image_size"] < 2 * factor:
        below = max(2, cfg["image_size"] // factor) * factor  # one cell has no spread, which the decoder's norm needs
        raise ValueError(
            f"image_size={cfg['image_size']} is not a multiple of {factor} (the factor of "
            f"{len(cfg['conv_multipliers'])} convolution levels) from {2 * factor} on; the nearest that work are "
            f"{below} and {below + factor}"
        )
    return (cfg["image_size"] // factor,) * 2


def check_channels(cfg: Mapping[str, Any]) -> None:
    """Raises ValueError where a convolution level's channels do not divide into the norms' groups."""
    for channels in (cfg["conv_base"] * multiplier for multiplier in cfg["conv_multipliers"]):
        if channels % cfg["norm_groups"]:
            raise ValueError(
                f"{channels} convolution channels do not divide into tokenizer.norm_groups={cfg['norm_groups']}"
            )


def check_cells(cfg: Mapping[str, Any], grid: tuple[int, int]) -> None:
    """Raises ValueError where a grid's latent tokens are not its cells."""
    if cfg["num_latent_tokens"] != grid[0] * grid[1]:
        raise ValueError(
            f"tokenizer.num_latent_tokens={cfg['num_latent_tokens']}, but at image_size={cfg['image_size']} the grid "
            f"is {grid[0]}x{grid[1]}: set it to {grid[0] * grid[1]}"
        )
