"""Published PatchGAN weights ↔ the variables of `discriminators.patchgan.PatchGAN`.

The published network is one `Sequential`: `main.0` is the first convolution, block n has its convolution at
`main.{3n-1}` and its batch norm at `main.{3n}`, and the logits are `main.{3N+2}` for N layers. The norms'
`num_batches_tracked` is dropped and regenerated as 0: PyTorch reads it only without a momentum.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gigatok_jax.hub import keymap
from gigatok_jax.hub.keymap import Entry


def entries(base: int, num_layers: int, kernel: int = 4, channels: int = 3) -> list[Entry]:
    """Every tensor of a PatchGAN of these sizes."""
    widths = [base * min(2**n, 8) for n in range(num_layers + 1)]
    return [
        *_conv(0, "conv_0", (base, channels, kernel, kernel)),
        *(entry for n in range(1, num_layers + 1) for entry in _block(n, (widths[n], widths[n - 1], kernel, kernel))),
        *_conv(3 * num_layers + 2, "logits", (1, widths[-1], kernel, kernel)),
    ]


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes of a published state as the section of a bundle; raises KeyError where it is no PatchGAN's."""
    layers = sum(key.endswith("running_mean") for key in shapes)
    return {"family": "patchgan", "base_channels": shapes["main.0.weight"][0], "num_layers": layers}


def section_entries(section: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the PatchGAN of a section."""
    return entries(section["base_channels"], section["num_layers"])


def buffers(section: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors that are dropped, as they are made anew."""
    return {key: np.zeros((), np.int64) for key in _counters(section["num_layers"])}


def patchgan_from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published name → array, as `{"params": …, "batch_stats": …}`; the sizes are read off the state.

    Raises:
      ValueError: naming every missing, unknown and misshapen tensor.
    """
    first = _kernel(state, "main.0.weight", "a PatchGAN state")
    indices = [int(match[1]) for key in state if (match := re.fullmatch(r"main\.(\d+)\.\w+", key))]
    # Rounded up, so that a state cut short reports the missing end.
    num_layers = max(math.ceil((max(indices) - 2) / 3), 0)
    base, channels, kernel, _ = first.shape
    return keymap.from_published(entries(base, num_layers, kernel, channels), state, _counters(num_layers))


def patchgan_to_published(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `patchgan_from_published`, complete enough for PyTorch's strict `load_state_dict`.

    Raises:
      ValueError: naming every missing, unknown and misshapen leaf.
    """
    flat = keymap.flatten(variables)
    kernel, _, channels, base = _kernel(flat, "params/conv_0/kernel", "a PatchGAN's variables").shape
    num_layers = max(int(match[1]) for path in flat if (match := re.search(r"/(?:conv|norm)_(\d+)/", path)))
    state = keymap.into_published(entries(base, num_layers, kernel, channels), variables)
    return state | {key: np.zeros((), np.int64) for key in _counters(num_layers)}


def _kernel(arrays: Mapping[str, Any], name: str, what: str) -> Any:
    """The first convolution's kernel, which tells the sizes."""
    found = arrays.get(name)
    if found is None or found.ndim != 4:
        raise ValueError(f"not {what}: {name} must be a kernel, it is {'missing' if found is None else found.shape}")
    return found


def _counters(num_layers: int) -> tuple[str, ...]:
    return tuple(f"main.{3 * n}.num_batches_tracked" for n in range(1, num_layers + 1))


def _conv(index: int, path: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    yield Entry(f"main.{index}.weight", (f"params/{path}/kernel",), "conv", shape)
    yield Entry(f"main.{index}.bias", (f"params/{path}/bias",), "vector", shape[:1])


def _block(n: int, shape: tuple[int, ...]) -> Iterator[Entry]:
    """A convolution without bias and its batch norm."""
    yield Entry(f"main.{3 * n - 1}.weight", (f"params/conv_{n}/kernel",), "conv", shape)
    leaves = {"weight": "params/{}/scale", "bias": "params/{}/bias"}
    leaves |= {"running_mean": "batch_stats/{}/mean", "running_var": "batch_stats/{}/var"}
    for leaf, path in leaves.items():
        yield Entry(f"main.{3 * n}.{leaf}", (path.format(f"norm_{n}"),), "vector", shape[:1])
