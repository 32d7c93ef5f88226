"""PatchGAN and its batch norm: sizes, initialisation, precision, refusals, and the recorded published network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.discriminators.patchgan import BatchNorm, PatchGAN, smallest_image_size
from gigatok_jax.hub.patchgan import patchgan_from_published, patchgan_to_published
from gigatok_jax.losses.adversarial import hinge_d, hinge_g
from tests.compare import assert_close_tree


def _images(seed, shape=(4, 32, 32, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    model = PatchGAN(base_channels=8)
    return model, jax.jit(model.init, static_argnums=2)(jax.random.key(0), _images(0), False)


def test_parameter_count_and_logit_grid():
    model, image = PatchGAN(), jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 2_765_633
    assert logits.shape == (1, 30, 30, 1)


def test_channels_stop_growing_at_eight_times_the_base():
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    init = lambda x: PatchGAN(base_channels=4, num_layers=5).init(jax.random.key(0), x, False)  # noqa: E731
    params = jax.eval_shape(init, image)["params"]
    assert [params[f"conv_{n}"]["kernel"].shape[-1] for n in range(6)] == [4, 8, 16, 32, 32, 32]
    assert [n for n in range(6) if "bias" in params[f"conv_{n}"]] == [0]


def test_initialisation():
    init = jax.jit(PatchGAN(base_channels=32).init, static_argnums=2)
    variables = init(jax.random.key(1), jnp.zeros((1, 24, 24, 3)), False)
    params, stats = variables["params"], variables["batch_stats"]
    for name in ("conv_1", "conv_2", "conv_3"):
        kernel = np.asarray(params[name]["kernel"])
        assert abs(kernel.std() / 0.02 - 1) < 0.02 and abs(kernel.mean()) < 1e-3, name
    scale = np.concatenate([params[f"norm_{n}"]["scale"] for n in (1, 2, 3)])
    assert abs(scale.mean() - 1) < 5e-3 and abs(scale.std() / 0.02 - 1) < 0.2
    assert all(np.all(params[f"norm_{n}"]["bias"] == 0) for n in (1, 2, 3))
    bias, bound = np.asarray(params["conv_0"]["bias"]), 48**-0.5
    assert 0.8 * bound < np.abs(bias).max() <= bound and bias.min() < 0 < bias.max()
    assert 0 < abs(float(params["logits"]["bias"][0])) <= (256 * 16) ** -0.5
    assert all(np.all(stats[f"norm_{n}"]["mean"] == 0) for n in (1, 2, 3))
    assert all(np.all(stats[f"norm_{n}"]["var"] == 1) for n in (1, 2, 3))


@pytest.mark.parametrize(("num_layers", "kernel"), [(3, 4), (2, 4), (5, 4), (3, 3), (2, 5)])
def test_smallest_image(num_layers, kernel):
    model, size = PatchGAN(4, num_layers, kernel), smallest_image_size(num_layers, kernel)
    init = lambda x: model.init_with_output(jax.random.key(0), x, False)[0]  # noqa: E731
    logits = jax.eval_shape(init, jax.ShapeDtypeStruct((1, size, size + 1, 3), jnp.float32))
    assert logits.shape[1] == 1 and logits.shape[2] >= 1
    with pytest.raises(ValueError, match=rf"at least {size} pixels"):
        jax.eval_shape(init, jax.ShapeDtypeStruct((1, size + 8, size - 1, 3), jnp.float32))


def test_smallest_image_of_the_published_network_is_24():
    assert smallest_image_size() == 24


def test_train_reads_the_batch_and_eval_the_running_statistics(small):
    model, variables = small
    _, moved = model.apply(variables, _images(1), train=True, mutable=["batch_stats"])
    stats = [variables["batch_stats"], moved["batch_stats"]]
    trained = [model.apply({**variables, "batch_stats": s}, _images(2), train=True) for s in stats]
    evaluated = [model.apply({**variables, "batch_stats": s}, _images(2), train=False) for s in stats]
    np.testing.assert_array_equal(*trained)
    assert np.abs(evaluated[0] - evaluated[1]).max() > 1e-3
    # In evaluation an image does not see its neighbours.
    alone = model.apply(variables, _images(2)[:1], train=False)
    assert_close_tree(alone, evaluated[0][:1], 1e-5)


def test_eval_moves_nothing_and_init_takes_no_step(small):
    model, variables = small
    _, kept = model.apply(variables, _images(1), train=False, mutable=["batch_stats"])
    assert_close_tree(kept["batch_stats"], variables["batch_stats"], 0.0)
    fresh = BatchNorm().init(jax.random.key(0), _images(1), True)["batch_stats"]
    assert_close_tree(fresh, {"mean": np.zeros(3), "var": np.ones(3)}, 0.0)


def test_running_statistics_receive_no_gradient(small):
    model, variables = small

    def sum_of_statistics(params):
        both = {**variables, "params": params}
        _, moved = model.apply(both, _images(1), train=True, mutable=["batch_stats"])
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved))

    grads = jax.tree.leaves(jax.jit(jax.grad(sum_of_statistics))(variables["params"]))
    assert all(np.all(grad == 0) for grad in grads)


def test_batch_norm_against_float64_with_a_large_mean():
    """Mean 300, spread 0.1: E[x²] − E[x]² in float32 has no correct digit of the variance (E[x²] is 90000 ± 0.004)."""
    x = (300 + 0.1 * np.random.default_rng(3).standard_normal((4, 6, 5, 8))).astype(np.float32)
    variables = BatchNorm().init(jax.random.key(0), x, False)
    y, moved = jax.jit(lambda v: BatchNorm().apply(v, x, True, mutable=["batch_stats"]))(variables)
    flat = x.astype(np.float64).reshape(-1, 8)
    want = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * np.asarray(variables["params"]["scale"])
    assert_close_tree(np.asarray(y).reshape(-1, 8), want, 1e-3)
    stats = {"mean": 0.1 * flat.mean(0), "var": 0.9 + 0.1 * flat.var(0, ddof=1)}
    assert_close_tree(moved["batch_stats"], stats, 1e-6)


def test_batch_norm_statistics_of_bfloat16_inputs_are_float32():
    x = jnp.asarray(3 + np.random.default_rng(4).standard_normal((4, 6, 5, 8)), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)
    _, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
    flat = np.asarray(x, np.float64).reshape(-1, 8)
    stats = {"mean": 0.1 * flat.mean(0), "var": 0.9 + 0.1 * flat.var(0, ddof=1)}
    assert_close_tree(moved["batch_stats"], stats, 1e-6)


def test_one_value_per_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNorm().init(jax.random.key(0), jnp.ones((1, 1, 1, 8)), True)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(small):
    model, variables = small
    half = PatchGAN(base_channels=8, dtype=jnp.bfloat16)
    logits, moved = half.apply(variables, _images(1), train=True, mutable=["batch_stats"])
    want, want_moved = model.apply(variables, _images(1), train=True, mutable=["batch_stats"])
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    assert_close_tree(logits, want, 0.1)
    assert_close_tree(moved, want_moved, 0.02)


@pytest.mark.golden
def test_published_network(golden):
    """Evaluation logits, then train-mode logits of real and fake in that order, and the statistics after both."""
    io = np.load(golden / "gigatok" / "patchgan_io.npz")
    variables = patchgan_from_published(load_file(golden / "gigatok" / "patchgan_state.safetensors"))
    real, fake = io["real"].transpose(0, 2, 3, 1), io["fake"].transpose(0, 2, 3, 1)
    model = PatchGAN(base_channels=8)

    got = {"logits_real_eval": model.apply(variables, real, train=False)}
    for name, image in (("logits_real", real), ("logits_fake", fake)):
        got[name], moved = model.apply(variables, image, train=True, mutable=["batch_stats"])
        variables = {**variables, **moved}
    got = {name: logits.transpose(0, 3, 1, 2) for name, logits in got.items()}
    assert_close_tree(got, {name: io[name] for name in got}, 1e-5)

    after = {name.removeprefix("after__"): io[name] for name in io if name.startswith("after__")}
    after = {name: value for name, value in after.items() if not name.endswith("num_batches_tracked")}
    published = patchgan_to_published(variables)
    assert len(after) == 6
    assert_close_tree({name: published[name] for name in after}, after, 1e-5)


@pytest.mark.golden
def test_published_gradients(golden):
    """d(0.5 · hinge_g)/d(fake) in full, and the norm of d(0.5 · hinge_d)/d(each parameter)."""
    io = np.load(golden / "gigatok" / "patchgan_io.npz")
    variables = patchgan_from_published(load_file(golden / "gigatok" / "patchgan_state.safetensors"))
    real, fake = io["real"].transpose(0, 2, 3, 1), io["fake"].transpose(0, 2, 3, 1)

    def logits(params, image):
        return PatchGAN(base_channels=8).apply({**variables, "params": params}, image, train=True)

    def d_loss(params):
        return 0.5 * hinge_d(logits(params, real), logits(params, fake))

    grad_fake = jax.jit(jax.grad(lambda x: 0.5 * hinge_g(logits(variables["params"], x))))(fake)
    assert_close_tree(grad_fake.transpose(0, 3, 1, 2), io["grad_fake"])

    grads = patchgan_to_published({**variables, "params": jax.jit(jax.grad(d_loss))(variables["params"])})
    want = {name.removeprefix("gradnorm__"): io[name] for name in io if name.startswith("gradnorm__")}
    assert len(want) == len(jax.tree.leaves(variables["params"]))
    assert_close_tree({name: np.linalg.norm(grads[name]) for name in want}, want)
