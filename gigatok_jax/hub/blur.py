"""Published weights of TiTok's discriminator ↔ the variables of `discriminators.blur.BlurDiscriminator`.

`block_in.0` is the first convolution; stage n has its convolution at `blocks.n.0` and its group norm at `blocks.n.2`;
`to_logits.0` and `to_logits.2` are the last two. The blurs' fixed kernels, `blocks.n.1.kernel`, are dropped and made
anew; a network that averages has none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gigatok_jax.discriminators.blur import blur_kernel
from gigatok_jax.hub import conv_keys
from gigatok_jax.hub.keymap import Entry


def entries(base: int, num_layers: int) -> list[Entry]:
    """Every tensor of a discriminator of these sizes."""
    found, inp = list(conv_keys.conv("block_in.0", "params/conv_in", base, 3, 5)), base
    for n in range(num_layers):
        width = base * 2**n
        found += conv_keys.conv(f"blocks.{n}.0", f"params/conv_{n}", width, inp, 3)
        found += conv_keys.norm(f"blocks.{n}.2", f"params/norm_{n}", width)
        inp = width
    found += conv_keys.conv("to_logits.0", "params/conv_out", inp, inp, 1)
    return [*found, *conv_keys.conv("to_logits.2", "params/logits", 1, inp, 5)]


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes of a published state as the section of a bundle; raises KeyError where it is no such network's."""
    layers = sum(key.startswith("blocks.") and key.endswith(".0.weight") for key in shapes)
    pooling = "blur" if "blocks.0.1.kernel" in shapes else "average"
    base = shapes["block_in.0.weight"][0]
    return {"family": "blur", "base_channels": base, "num_layers": layers, "pooling": pooling}


def section_entries(section: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the discriminator of a section."""
    return entries(section["base_channels"], section["num_layers"])


def buffers(section: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors that are dropped, as they are made anew."""
    layers = section["num_layers"] if section["pooling"] == "blur" else 0
    return {f"blocks.{n}.1.kernel": blur_kernel()[None, None] for n in range(layers)}
