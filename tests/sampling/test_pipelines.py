"""Image n of a generator's bundle: the same on any devices, in any batch, in any order, after a restart."""

import jax
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.hub import bundle
from gigatok_jax.sampling import ar
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from tests.tiny import tiny_generator

MESHES = {"eight": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}
LABELS = np.array([1, 2, 0, 4, 1, 1, 2, 3, 5, 0, 3])
SETTINGS = {"seed": 3, "scale": 2.5, "schedule": "step", "start": 0.3, "top_k": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle whose logits are far from equal."""
    folder, section, rng = tmp_path_factory.mktemp("generator"), tiny_generator().to_dict(), np.random.default_rng(0)
    shapes = bundle.parameter_shapes("generator", section)
    arrays = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    bundle.save(folder, "generator", section, arrays.__getitem__)
    return bundle.load(folder)


def on(made, sizes, dtype="float32"):
    """A pipeline on a mesh of these sizes."""
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes)), jax.devices()[: int(np.prod(sizes))])
    return GeneratorPipeline(made, mesh=mesh, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_image_depends_on_seed_number_and_label_alone(made, dtype):
    if dtype == "int8":
        pytest.importorskip("qwix", reason="int8 weights need the package qwix: pip install -e .[test]")
    one = on(made, (1, 1, 1), dtype)
    whole = one.sample(LABELS, **SETTINGS)
    assert len({row.tobytes() for row in whole}) == len(LABELS)
    # Other batches, one after another and backwards, as a run that was stopped would go on.
    for start, stop in ((8, 11), (4, 7), (0, 3)):
        np.testing.assert_array_equal(one.sample(LABELS[start:stop], first=start, **SETTINGS), whole[start:stop])
    for name in MESHES if dtype == "float32" else ["fsdp"]:
        many = on(made, MESHES[name], dtype)
        np.testing.assert_array_equal(many.sample(LABELS, **SETTINGS), whole, err_msg=name)
    assert (one.sample(LABELS, **{**SETTINGS, "seed": 4}) != whole).any(1).all()


def test_scales_are_no_part_of_the_program(made):
    one = on(made, (1, 1, 1))
    constant = [one.sample(LABELS, scale=scale) for scale in (1.5, 2.5)]
    assert (constant[0] != constant[1]).any()
    sampler = one._sampler(ar.PLAIN, 16)
    assert sampler._cache_size() == 1
    one.sample(LABELS, scale=2.5, schedule="linear")
    assert one._sampler(ar.PLAIN, 16) is sampler and sampler._cache_size() == 1
    for scale in (1.5, 2.5):
        one.follow(LABELS, constant[0], scale=scale)
    assert one._follower(16)._cache_size() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_held_lies_over_the_devices(made, dtype):
    if dtype == "int8":
        pytest.importorskip("qwix", reason="int8 weights need the package qwix: pip install -e .[test]")
    leaves = jax.tree.leaves(on(made, (1, 8, 1), dtype).params)
    width = 1 if dtype == "int8" else np.dtype(jax.numpy.dtype(dtype)).itemsize
    large = [leaf for leaf in leaves if leaf.dtype.itemsize == width and leaf.size > 600]
    assert len(large) > 20 and not [leaf.shape for leaf in large if leaf.sharding.is_fully_replicated]
