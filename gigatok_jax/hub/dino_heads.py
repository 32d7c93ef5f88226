"""The trained heads of a published DINO discriminator ↔ the variables of `discriminators.dino.DinoDiscriminator`.

Per head h: `heads.h.0` is the 1×1 block, `heads.h.1.fn` the block of nine neighbours, `heads.h.2` the logits; `.0` is
its spectrally normalised convolution, `.1` its batch norm. The frozen backbone is not in a published state.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import norm
from gigatok_jax.hub.keymap import Entry


def entries(num_heads: int, width: int) -> list[Entry]:
    """Every tensor of `num_heads` heads over features of `width` channels."""
    return [entry for head in range(num_heads) for entry in _head(head, width)]


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes of published heads as the section of a bundle; raises KeyError, ValueError where they are none."""
    heads = {int(key.split(".")[1]) for key in shapes if key.startswith("heads.")}
    return {"family": "dino", "width": shapes["heads.0.0.0.bias"][0], "num_heads": 1 + max(heads)}


def section_entries(section: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the heads of a section."""
    return entries(section["num_heads"], section["width"])


def dino_heads_from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published name → array, as `{"params": …, "spectral": …}`; heads and width are read off the state.

    Raises:
      ValueError: naming every missing, unknown and misshapen tensor.
    """
    first = state.get("heads.0.0.0.bias")
    if first is None:
        raise ValueError("not the heads of a DINO discriminator: heads.0.0.0.bias is missing")
    heads = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("heads."))
    return keymap.from_published(entries(heads, first.shape[0]), state)


def dino_heads_to_published(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `dino_heads_from_published`; what is `frozen` is left out.

    Raises:
      ValueError: naming every missing, unknown and misshapen leaf.
    """
    params = variables["params"]
    heads = {name: value for name, value in variables.items() if name != "frozen"}
    return keymap.into_published(entries(len(params), params["head_0"]["point_conv"]["bias"].shape[0]), heads)


def _head(head: int, width: int) -> Iterator[Entry]:
    key, path = f"heads.{head}", f"head_{head}"
    yield from _conv(f"{key}.0.0", f"{path}/point_conv", width, width, 1)
    yield from norm(f"{key}.0.1", f"params/{path}/point_norm", width)
    yield from _conv(f"{key}.1.fn.0", f"{path}/circle_conv", width, width, 9)
    yield from norm(f"{key}.1.fn.1", f"params/{path}/circle_norm", width)
    yield from _conv(f"{key}.2", f"{path}/logits", 1, width, 1)


def _conv(key: str, path: str, out: int, inp: int, size: int) -> Iterator[Entry]:
    yield Entry(f"{key}.weight_orig", (f"params/{path}/kernel",), "conv1d", (out, inp, size))
    yield Entry(f"{key}.bias", (f"params/{path}/bias",), "vector", (out,))
    yield Entry(f"{key}.weight_u", (f"spectral/{path}/u",), "vector", (out,))
    yield Entry(f"{key}.weight_v", (f"spectral/{path}/v",), "vector", (inp * size,))
