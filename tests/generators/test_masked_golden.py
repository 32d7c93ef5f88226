"""Masked generators against recorded logits, samples, masks, losses and gradients of the published ImageBert, UViTBert.

A number here may change only if the published model was misread: the weights, inputs and outputs are recorded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import config
from gigatok_jax.generators import masked
from gigatok_jax.hub import keymap
from gigatok_jax.hub import masked as hub
from tests.compare import assert_close_tree

pytestmark = pytest.mark.golden
SIZES = {"imagebert": ("l-32", 2), "uvitbert": ("s-128", 4)}


@functools.cache
def load(golden, name):
    """(model, its key list, parameters) of a recorded narrow model."""
    size, depth = SIZES[name]
    section = config.masked_generator(size)
    section.update(width=64, depth=depth, heads=4, hidden=128, codebook_size=64, num_latent_tokens=8, num_classes=10)
    entries = hub.entries(section)
    state = load_file(golden / "titok" / f"{name}.safetensors")
    return masked.build(section), entries, jax.tree.map(jnp.asarray, keymap.from_published(entries, state))


def recorded(golden, name, what):
    return np.load(golden / "titok" / f"{name}_{what}.npz")


@pytest.mark.parametrize("name", SIZES)
def test_logits(golden, name):
    model, _, params = load(golden, name)
    io = recorded(golden, name, "logits_and_greedy")
    for classes, want in ((io["condition"], "logits_cond"), (np.full(3, 10), "logits_uncond")):
        logits, _ = model.apply({"params": params}, io["input_ids"].astype(np.int32), classes.astype(np.int32))
        assert_close_tree(logits, io[want], 1e-4)
