"""The DINO discriminator without recordings: augmentation, cropping, spectral norm, batch-norm groups, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gigatok_jax.discriminators.diffaug import diffaug, draws
from gigatok_jax.discriminators.dino import DinoDiscriminator, to_backbone_size
from gigatok_jax.nn.norms import LocalBatchNorm
from gigatok_jax.nn.resize import area
from gigatok_jax.nn.spectral import SpectralConv1d
from gigatok_jax.nn.vit import ViT, ViTSizes
from tests.compare import assert_close_tree

MODEL = DinoDiscriminator(width=16, depth=1, num_heads=2, taps=(0, 1))

AUGMENT = jax.jit(diffaug)


def images(seed, size=32, batch=4):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    vit = ViT(ViTSizes(16, 1, 2, 16, 14, "gelu_tanh", layer_scale=False))
    shapes = jax.eval_shape(vit.init, jax.random.key(1), jnp.zeros((1, 224, 224, 3)))["params"]
    rng = np.random.default_rng(0)
    backbone = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32), shapes)
    heads = jax.jit(MODEL.init, static_argnums=2)(jax.random.key(0), images(0), False)
    return {**heads, "frozen": {"vit": backbone}}


def test_published_size_and_logits():
    model = DinoDiscriminator()
    shapes = jax.eval_shape(lambda k: model.init(k, jnp.zeros((1, 256, 256, 3)), False), jax.random.key(0))
    assert set(shapes) == {"params", "spectral"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 7_386_245  # "7.39M"


def test_augmentation_and_crop_are_drawn_from_the_stream(variables):
    apply = jax.jit(lambda v, x, k: MODEL.apply(v, x, train=False, rngs={"augment": k}))
    image = images(0, 240)
    plain = jax.jit(lambda v, x: MODEL.apply(v, x, train=False))(variables, image)
    first, again, other = (apply(variables, image, jax.random.key(seed)) for seed in (1, 1, 2))
    assert plain.shape == (4, 2 * 196)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - plain).max() > 1e-3


def test_state_moves_in_training_only_and_once_per_call(variables):
    call = jax.jit(
        lambda v, train: MODEL.apply(v, images(0), train=train, mutable=["spectral"])[1]["spectral"], static_argnums=1
    )
    assert_close_tree(call(variables, False), variables["spectral"], 0.0)
    once = call(variables, True)
    kernel = np.asarray(variables["params"]["head_0"]["circle_conv"]["kernel"])
    matrix = kernel.transpose(2, 1, 0).reshape(16, -1)
    old, new = (np.asarray(s["head_0"]["circle_conv"]["u"]) for s in (variables["spectral"], once))
    want = matrix @ (matrix.T @ old)
    assert_close_tree(new, want / np.linalg.norm(want), 1e-5)


def test_gradients_reach_the_image_and_the_heads_and_not_the_spectral_vectors(variables):
    def mean(params, image):
        both, streams = {**variables, "params": params}, {"augment": jax.random.key(3)}
        return jnp.mean(MODEL.apply(both, image, train=True, rngs=streams) ** 2)

    params, image = jax.jit(jax.grad(mean, (0, 1)))(variables["params"], images(0))
    assert np.abs(image).max() > 0 and np.isfinite(image).all()
    assert all(np.abs(layer["kernel"]).max() > 0 for name, layer in params["head_1"].items() if "kernel" in layer)

    def vectors(params):
        _, moved = MODEL.apply({**variables, "params": params}, images(0), train=True, mutable=["spectral"])
        return sum(jnp.sum(x) for x in jax.tree.leaves(moved))

    assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(vectors))(variables["params"])))


@pytest.mark.parametrize("size", [1, 9])
def test_spectral_norm_converges_to_the_largest_singular_value(size):
    layer, x = SpectralConv1d(24, size), jnp.ones((1, 12, 16))
    variables = layer.init(jax.random.key(0), x, False)
    step = jax.jit(lambda v: {**v, **layer.apply(v, x, True, mutable=["spectral"])[1]})
    for _ in range(300):
        variables = step(variables)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    want = np.linalg.svd(kernel.transpose(2, 1, 0).reshape(24, -1), compute_uv=False)[0]
    u, v = (np.asarray(variables["spectral"][name], np.float64) for name in "uv")
    np.testing.assert_allclose(u @ kernel.transpose(2, 1, 0).reshape(24, -1) @ v, want, rtol=1e-3)
    # What the layer computes is the convolution with kernel / σ.
    impulse = jnp.zeros((1, 12, 16)).at[0, 6, 3].set(1.0)
    bias = np.asarray(variables["params"]["bias"])
    got = np.asarray(layer.apply(variables, impulse, False))[0] - bias
    near = got[6 - size // 2 : 7 + size // 2][::-1]
    assert_close_tree(near, kernel[:, 3] / want, 2e-3)


def test_the_circle_is_closed():
    layer = SpectralConv1d(4, 9)
    x = np.random.default_rng(0).standard_normal((2, 12, 4)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x, False)
    apply = jax.jit(lambda x: layer.apply(variables, x, False))
    assert_close_tree(apply(np.roll(x, 5, 1)), np.roll(apply(x), 5, 1), 1e-5)


def test_local_batch_norm_groups_neighbours():
    x = np.random.default_rng(0).standard_normal((16, 5, 3)).astype(np.float32)
    norm = LocalBatchNorm(group=8)
    variables = norm.init(jax.random.key(0), x)
    y = norm.apply(variables, x)
    for half in (slice(0, 8), slice(8, 16)):
        assert_close_tree(y[half], norm.apply(variables, x[half]), 1e-6)
        np.testing.assert_allclose(y[half].mean((0, 1)), 0.0, atol=1e-6)
    np.testing.assert_allclose(norm.apply(variables, x[:12]).reshape(2, 6, 5, 3).mean((1, 2)), 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="batch of 9 does not split into 2 groups"):
        norm.apply(variables, x[:9])


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("batch", [16, 64])
def test_groups_are_of_the_global_batch_whatever_the_devices(mesh, batch):
    """16: a group lies on four devices; 64: every device holds one."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((batch, 5, 3)) + rng.uniform(-3, 3, (batch, 1, 1))).astype(np.float32)
    norm = LocalBatchNorm(group=8)
    variables = norm.init(jax.random.key(0), x)
    on_eight = jax.jit(norm.apply, in_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))))
    y = on_eight(variables, x)
    assert len(y.sharding.device_set) == 8
    assert_close_tree(y, norm.apply(variables, x), 1e-6)


def test_eight_devices_equal_one(mesh, variables):
    """Logits, vectors and gradients, with augmentation."""

    def loss(params, image, key):
        logits, moved = MODEL.apply(
            {**variables, "params": params}, image, train=True, mutable=["spectral"], rngs={"augment": key}
        )
        return jnp.mean(jax.nn.relu(1 - logits)), (logits, moved)

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    arguments = variables["params"], images(0, 32, 16), jax.random.key(0)
    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    (_, (logits, moved)), (params, image) = jax.jit(step, in_shardings=shardings)(*arguments)
    (_, (want_logits, want_moved)), (want_params, want_image) = jax.jit(step)(*arguments)
    assert_close_tree([logits, moved, image], [want_logits, want_moved, want_image], 1e-4)
    no_bias = lambda tree: {k: {m: v for m, v in h.items() if m != "bias"} for k, h in tree.items()}  # noqa: E731
    for head in params:  # a bias in front of a batch norm has gradient 0
        assert_close_tree(no_bias(params[head]), no_bias(want_params[head]), 1e-4)


def test_diffaug_parts():
    """Draws in the middle change nothing but the cut; each other draw does its own work."""
    image = images(0, 40, 2)
    middle = np.full((7, 2), 0.5, np.float32)
    far = middle.copy()
    far[5:] = 0.999999  # the cut's centre in the corner
    got = np.asarray(AUGMENT(image, far))
    cut = np.all(got == 0, -1)
    assert cut[0].sum() == 4 * 4 and cut[0, -4:, -4:].all()
    assert_close_tree(got[~cut], image[~cut], 1e-5)
    shifted = np.asarray(AUGMENT(image, np.stack([far[0] * 0 + 0.999999, *far[1:]])))
    assert_close_tree(shifted[:, :30], image[:, 5:35], 1e-5)
    assert not shifted[:, 35:].any()
    brighter = np.asarray(AUGMENT(image, np.stack([*far[:2], far[2] + 0.25, *far[3:]])))
    assert_close_tree(brighter[~cut], image[~cut] + 0.25, 1e-5)
    grey = np.asarray(AUGMENT(image, np.stack([*far[:3], far[3] * 0, *far[4:]])))
    np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=1e-6)
    flat = np.asarray(AUGMENT(image, np.stack([*far[:4], far[4] * 0, *far[5:]])))
    assert_close_tree(flat[0][~cut[0]].std() / image[0][~cut[0]].std(), 0.5, 1e-2)


def test_diffaug_is_a_function_of_its_draws_and_passes_a_gradient():
    image, key = images(0, 24), jax.random.key(0)
    assert draws(key, 4).shape == (7, 4)
    np.testing.assert_array_equal(AUGMENT(image, draws(key, 4)), AUGMENT(image, draws(key, 4)))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(diffaug(x, draws(key, 4)) ** 2)))(image)
    assert np.isfinite(gradient).all() and np.abs(gradient).reshape(4, -1).max(1).min() > 0


def test_crops_are_windows_of_the_image_and_as_often_as_not():
    image = np.broadcast_to(np.arange(240.0)[None, :, None, None], (2, 240, 240, 3)).astype(np.float32)
    resized = np.einsum("hH,BHWC->BhWC", area(240, 224), image)[:, :, :224]
    resized_or_cropped, tops = jax.jit(to_backbone_size), []
    for seed in range(40):
        out = np.asarray(resized_or_cropped(image, jax.random.key(seed)))
        if np.allclose(out, resized, atol=1e-3):
            continue
        tops.append(out[0, 0, 0, 0])
        np.testing.assert_allclose(out, image[:, int(tops[-1]) : int(tops[-1]) + 224, :224], atol=1e-3)
    assert 10 <= len(tops) <= 30 and len(set(tops)) > 5 and min(tops) >= 0 and max(tops) <= 16
    small = to_backbone_size(image[:, :32, :32], jax.random.key(0))
    np.testing.assert_array_equal(small, to_backbone_size(image[:, :32, :32], None))
