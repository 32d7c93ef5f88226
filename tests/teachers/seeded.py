"""Weights drawn from numpy seeds, in published layouts."""

import numpy as np

from gigatok_jax.hub import teachers


def seeded_vgg16() -> dict[str, np.ndarray]:
    """The recorded comparisons' VGG16 (without heads): convolution i from seeds 1000 + i and 2000 + i."""
    state, index = {}, 0
    for entry in teachers.entries("vgg16"):
        if entry.key.startswith("features") and entry.key.endswith("weight"):
            kernel = np.random.RandomState(1000 + index).standard_normal(entry.shape).astype(np.float32)
            state[entry.key] = kernel * np.float32(np.sqrt(2 / np.prod(entry.shape[1:])))
            bias = np.random.RandomState(2000 + index).standard_normal(entry.shape[0]).astype(np.float32)
            state[entry.key.replace("weight", "bias")] = bias * np.float32(0.05)
            index += 1
    return state


def seeded(entries: list, seed: int = 0) -> dict[str, np.ndarray]:
    """A state with every tensor of a key list, at scales that keep activations near 1."""
    rng, state = np.random.default_rng(seed), {}
    for entry in entries:
        fan_in = max(int(np.prod(entry.shape[1:])), 1) if len(entry.shape) > 1 else 100
        state[entry.key] = (rng.standard_normal(entry.shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        if entry.key.startswith("lin"):
            state[entry.key] = np.abs(state[entry.key])
    return state


def seeded_inception(entries: list, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of an Inception whose features differ between pictures, with batch norms that are not trivial."""
    state, rng = seeded(entries, seed), np.random.default_rng(seed + 1)
    for key, value in state.items():
        if key.endswith("bn.weight"):
            state[key] = value + 1
        elif key.endswith("bn.running_var"):
            state[key] = rng.uniform(0.4, 1.2, value.shape).astype(np.float32)
        elif key.endswith("conv.weight"):  # blind to the mean of its map, which is all that would be left in the end
            state[key] = value - value.mean((1, 2, 3), keepdims=True)
    return state
