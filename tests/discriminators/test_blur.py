"""TiTok's discriminator: sizes, pooling, its published weights, and the recorded published network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from gigatok_jax import objectives
from gigatok_jax.discriminators.blur import BlurDiscriminator, blur_kernel, blurred_half
from gigatok_jax.hub import blur, bundle, keymap, models
from gigatok_jax.losses.adversarial import hinge_d, hinge_g
from gigatok_jax.nn.pooling import adaptive_max_pool
from tests.compare import assert_close_tree
from tests.steps import MESHES, ONE, QUIET, assert_same_leaves, full_step
from tests.tiny import tiny_run

SMALL = BlurDiscriminator(32, 2)


def images(seed, size=32, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init, static_argnums=2)(jax.random.key(0), images(0), False)


def test_parameter_count_grid_and_start():
    model = BlurDiscriminator()
    for size in (64, 96, 256):
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        logits, shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), image)
        assert logits.shape == (1, 16, 16, 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_909_889
    params = jax.jit(SMALL.init, static_argnums=2)(jax.random.key(0), images(0), False)["params"]
    for name, fan_in in (("conv_in", 75), ("conv_1", 288), ("logits", 1600)):
        kernel = np.abs(params[name]["kernel"])
        assert 0.98 * fan_in**-0.5 < kernel.max() <= fan_in**-0.5 and np.abs(params[name]["bias"]).max() > 0


@pytest.mark.parametrize(("size", "out"), [(32, 16), (8, 16), (16, 16), (24, 16), (12, 16), (7, 5), (5, 7)])
def test_adaptive_maxima_cover_whatever_cell_they_touch(size, out):
    x = np.random.default_rng(size).standard_normal((2, size, size + 1, 3)).astype(np.float32)
    want = np.zeros((2, out, out, 3), np.float32)
    for i in range(out):
        for j in range(out):
            rows = slice(i * size // out, -((i + 1) * size // -out))
            columns = slice(j * (size + 1) // out, -((j + 1) * (size + 1) // -out))
            want[:, i, j] = x[:, rows, columns].max((1, 2))
    np.testing.assert_array_equal(adaptive_max_pool(x, out, out), want)


def test_the_blur_keeps_a_level_and_is_no_parameter(variables):
    np.testing.assert_array_equal(blurred_half(jnp.ones((1, 8, 8, 2)))[0, 1:-1, 1:-1], 1.0)
    assert blur_kernel().sum() == 1 and blur_kernel()[0, 1] == 3 / 64
    assert variables.keys() == {"params"} and variables["params"].keys() == {
        *("conv_in", "conv_0", "norm_0", "conv_1", "norm_1", "conv_out", "logits")
    }


def test_bfloat16_keeps_parameters_in_float32(variables):
    half = BlurDiscriminator(32, 2, dtype=jnp.bfloat16)
    logits, want = (jax.jit(lambda v, x, m=m: m.apply(v, x, train=True))(variables, images(1)) for m in (half, SMALL))
    assert logits.dtype == jnp.bfloat16 and np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="base_channels=48 does not split into 32 groups"):
        jax.eval_shape(lambda: BlurDiscriminator(48).init(jax.random.key(0), images(0), False))
    with pytest.raises(ValueError, match="too small for 3 halvings by averages: both sides need at least 8"):
        jax.eval_shape(lambda: BlurDiscriminator(32, 3, "average").init(jax.random.key(0), images(0, 7), False))


@pytest.mark.parametrize("pooling", ["blur", "average"])
def test_published_names_go_round(tmp_path, pooling):
    section = {"family": "blur", "base_channels": 32, "num_layers": 2, "pooling": pooling}
    model, rng = BlurDiscriminator(32, 2, pooling), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(0), False))
    drawn = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    state = keymap.into_published(blur.section_entries(section), drawn) | blur.buffers(section)
    made = models.convert("titok-disc", state)
    assert {**made.section} == section
    jax.tree.map(np.testing.assert_array_equal, made.params, drawn)
    made.save(tmp_path / "bundle")
    models.publish("titok-disc", tmp_path / "bundle", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(back[key].tobytes() == state[key].tobytes() for key in state)
    with pytest.raises(ValueError, match="gigatok-patchgan has family='patchgan', this model family='blur'"):
        models.publish("gigatok-patchgan", tmp_path / "bundle", tmp_path / "other.safetensors")


def test_eight_devices_equal_one(variables):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def loss_and_grads(variables, real, fake):
        judge = lambda v, x: SMALL.apply(v, x, train=True)  # noqa: E731
        loss = lambda v, x: hinge_d(judge(v, real), judge(v, x)) + hinge_g(judge(v, x))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(variables, fake)

    pair = images(1, batch=8), images(2, batch=8)
    want = jax.jit(loss_and_grads)(variables, *pair)
    on_eight = jax.jit(loss_and_grads, in_shardings=(replicated, sharded, sharded))
    assert len(on_eight(variables, *pair)[1][1].sharding.device_set) == 8
    assert_same_leaves(on_eight(variables, *pair), want, rtol=1e-5)


def test_a_step_on_a_mesh_is_that_of_one_device():
    """As a config names it; parameters split over fsdp and maps by height."""
    changes = QUIET | {"loss__direct": False, "loss__auxiliary_end": 0, "loss__lecam": "of_means"}
    cfg = tiny_run(discriminator__name="blur", discriminator__base_channels=32, **changes)
    objective = objectives.build(cfg)
    assert objective.discriminator == BlurDiscriminator(32, 1)
    (want, want_state, want_metrics), _ = full_step(ONE, cfg, objective)
    (grads, state, metrics), _ = full_step(MESHES["mixed"], cfg, objective)
    np.testing.assert_allclose(metrics["loss/total"], want_metrics["loss/total"], rtol=1e-6)
    assert metrics["loss/lecam"] > 0
    # At the start the hinge terms of its last layer cancel, and what is left is rounded: also data-parallel, by 7e-5.
    assert_same_leaves(grads, want, rtol=1e-4)
    assert_same_leaves(state.state["lecam"], want_state.state["lecam"], rtol=1e-5)


def test_a_stored_bundle_is_loaded(variables, tmp_path):
    section = {"family": "blur", "base_channels": 32, "num_layers": 2, "pooling": "blur"}
    flat = keymap.flatten(jax.device_get(variables))
    bundle.save(tmp_path, "discriminator", section, flat.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, bundle.load(tmp_path, "discriminator").params, variables)


@pytest.mark.golden
@pytest.mark.parametrize("size", [64, 128, 256])
def test_published_logits(golden, size):
    io, state = (np.load(golden / "titok" / "discriminator.npz"), golden / "titok" / "discriminator.safetensors")
    model = models.convert("titok-disc", load_file(state))
    image = 2 * io[f"image_{size}"].transpose(0, 2, 3, 1) - 1
    logits = jax.jit(lambda v, x: BlurDiscriminator(32).apply(v, x, train=False))(model.params, image)
    assert_close_tree(logits.transpose(0, 3, 1, 2), io[f"logits_{size}"], 1e-5)


@pytest.mark.golden
def test_published_blur(golden):
    io = np.load(golden / "titok" / "discriminator.npz")
    image = io["image_64"].transpose(0, 2, 3, 1)
    for name, x in (("blur_64", image), ("blur_63x61", image[:, :63, :61])):
        assert_close_tree(blurred_half(x).transpose(0, 3, 1, 2), io[name], 1e-6)


@pytest.mark.golden
def test_published_averages(golden):
    io, state = np.load(golden / "titok" / "discriminator_avgpool.npz"), "discriminator_avgpool.safetensors"
    model = models.convert("titok-disc", load_file(golden / "titok" / state))
    assert model.section["pooling"] == "average" and model.section["num_layers"] == 2
    image = 2 * io["image_64"].transpose(0, 2, 3, 1) - 1
    logits = jax.jit(lambda v, x: BlurDiscriminator(32, 2, "average").apply(v, x, train=False))(model.params, image)
    assert_close_tree(logits.transpose(0, 3, 1, 2), io["logits_64"], 1e-5)
