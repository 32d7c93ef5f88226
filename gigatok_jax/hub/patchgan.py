"""Published PatchGAN weights ↔ the variables of `discriminators.patchgan.PatchGAN`.

The published network is one `Sequential`: `main.0` is the first convolution, block n has its convolution at
`main.{3n-1}` and its batch norm at `main.{3n}`, and the logits are `main.{3N+2}` for N layers. Kernels are
OIHW there and HWIO here. `main.*.num_batches_tracked` is dropped and regenerated as 0: PyTorch reads it
only without a momentum.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_COUNTER = "num_batches_tracked"


class _Entry(NamedTuple):
    """One tensor in both worlds."""

    key: str
    path: tuple[str, str, str]  # (collection, module, leaf)
    shape: tuple[int, ...]  # published layout


def patchgan_from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a published state dict into `{"params": …, "batch_stats": …}`.

    Base channels, layers, kernel and image channels are read off the state.

    Args:
      state: published name → array, e.g. `main.0.weight` (64, 3, 4, 4) OIHW.

    Returns:
      Nested dicts of arrays that share their memory and dtype with the state.

    Raises:
      ValueError: naming every missing, unknown and misshapen tensor.
    """
    first = state.get("main.0.weight")
    if first is None or first.ndim != 4:
        shape = "missing" if first is None else first.shape
        raise ValueError(f"not a PatchGAN state: main.0.weight must be an OIHW kernel, it is {shape}")
    indices = [int(match[1]) for key in state if (match := re.fullmatch(r"main\.(\d+)\.\w+", key))]
    # Rounded up, so that a state cut short reports the missing end.
    num_layers = max(math.ceil((max(indices) - 2) / 3), 0)
    base, channels, kernel, _ = first.shape
    entries = _entries(base, num_layers, kernel, channels)

    counters = {f"main.{3 * n}.{_COUNTER}" for n in range(1, num_layers + 1)}
    weights = {key: np.asarray(value) for key, value in state.items() if key not in counters}
    _check(_shapes(weights), {entry.key: entry.shape for entry in entries})
    return unflatten_dict({entry.path: _to_ours(weights[entry.key]) for entry in entries})


def patchgan_to_published(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `patchgan_from_published`, complete enough for PyTorch's strict `load_state_dict`.

    Args:
      variables: `{"params": …, "batch_stats": …}` of a `PatchGAN`.

    Returns:
      Published name → array (kernels OIHW, contiguous), with every `num_batches_tracked` an int64 zero.

    Raises:
      ValueError: naming every missing, unknown and misshapen leaf.
    """
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(dict(variables)).items()}
    first = flat.get("params/conv_0/kernel")
    if first is None or first.ndim != 4:
        shape = "missing" if first is None else first.shape
        raise ValueError(f"not a PatchGAN's variables: conv_0/kernel must be an HWIO kernel, it is {shape}")
    num_layers = max(int(match[1]) for path in flat if (match := re.search(r"/(?:conv|norm)_(\d+)/", path)))
    kernel, _, channels, base = first.shape
    entries = _entries(base, num_layers, kernel, channels)
    _check(_shapes(flat), {"/".join(entry.path): _our_shape(entry.shape) for entry in entries})

    state = {entry.key: _to_published(flat["/".join(entry.path)]) for entry in entries}
    counters = [f"main.{3 * n}.{_COUNTER}" for n in range(1, num_layers + 1)]
    return state | {key: np.zeros((), np.int64) for key in counters}


def _entries(base: int, num_layers: int, kernel: int, channels: int) -> list[_Entry]:
    """Every tensor of a PatchGAN of these sizes."""
    widths = [base * min(2**n, 8) for n in range(num_layers + 1)]
    last = 3 * num_layers + 2
    entries = [
        _Entry("main.0.weight", ("params", "conv_0", "kernel"), (base, channels, kernel, kernel)),
        _Entry("main.0.bias", ("params", "conv_0", "bias"), (base,)),
        _Entry(f"main.{last}.weight", ("params", "logits", "kernel"), (1, widths[-1], kernel, kernel)),
        _Entry(f"main.{last}.bias", ("params", "logits", "bias"), (1,)),
    ]
    for n in range(1, num_layers + 1):
        conv, norm = f"main.{3 * n - 1}", f"main.{3 * n}"
        width, kernel_shape = widths[n], (widths[n], widths[n - 1], kernel, kernel)
        entries += [
            _Entry(f"{conv}.weight", ("params", f"conv_{n}", "kernel"), kernel_shape),
            _Entry(f"{norm}.weight", ("params", f"norm_{n}", "scale"), (width,)),
            _Entry(f"{norm}.bias", ("params", f"norm_{n}", "bias"), (width,)),
            _Entry(f"{norm}.running_mean", ("batch_stats", f"norm_{n}", "mean"), (width,)),
            _Entry(f"{norm}.running_var", ("batch_stats", f"norm_{n}", "var"), (width,)),
        ]
    return entries


def _check(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in wanted]
    problems += [
        f"misshapen {name} {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError("PatchGAN weights do not fit:\n  " + "\n  ".join(problems))


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _our_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else shape


def _to_ours(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _to_published(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
