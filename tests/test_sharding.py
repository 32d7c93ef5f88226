"""One device and eight take the same step, and the batch is really split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.extend import core

from gigatok_jax import config, evals, sharding, train_state, train_step
from gigatok_jax.bottlenecks import vq
from gigatok_jax.hub import bundle
from gigatok_jax.nn.constrain import constrain, placing
from gigatok_jax.nn.conv import Conv
from gigatok_jax.planning.topology import ALONE
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from tests.steps import (
    MESHES,
    ONE,
    QUIET,
    adam_groups,
    assert_same_leaves,
    build,
    fake_batch,
    full_step,
    sgd_groups,
    tiny_objective,
)
from tests.tiny import tiny_run

# A row a device, and several.
BATCHES = (8, 24)


@pytest.fixture(scope="module", params=BATCHES)
def one_device(request):
    changes = QUIET | {"global_batch": request.param}
    return changes, full_step(ONE, *tiny_objective(**changes))[0]


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_take_the_step_of_one(one_device, name):
    """Loss, gradients, parameters after SGD, averages, running statistics and metrics; the batch is really split."""
    changes, (want, want_state, want_metrics) = one_device
    cfg, objective = tiny_objective(**changes)
    (grads, state, metrics), text = full_step(MESHES[name], cfg, objective)
    assert set(want) == {"tokenizer", "discriminator"}
    assert_same_leaves(grads, want, rtol=1e-5)
    assert_same_leaves((state.params, state.ema), (want_state.params, want_state.ema), rtol=1e-5)
    assert_same_leaves(state.state["discriminator"], want_state.state["discriminator"], rtol=1e-5)
    np.testing.assert_array_equal(state.state["last_used"], want_state.state["last_used"])
    for term, value in want_metrics.items():
        if term.startswith(("loss/", "codebook/", "logits/")):
            np.testing.assert_allclose(metrics[term], value, rtol=1e-5, atol=1e-6, err_msg=term)
    size = cfg.tokenizer.image_size
    shards = MESHES[name][0]["data"] * MESHES[name][0]["fsdp"]
    assert f"u8[{cfg.global_batch // shards},{size},{size},3]" in text
    assert cfg.global_batch == 8 or not full_batch_arrays(text)  # 8 is a width, too


def compiled_text(name):
    """The program that a run would execute on a mesh, and its config."""
    cfg, objective = tiny_objective(**QUIET)
    sizes, preset = MESHES[name]
    mesh = sharding.make_mesh(sizes, jax.devices())
    groups = adam_groups(cfg)
    compiled = train_step.compile_step(
        objective,
        groups,
        objective.phase(1),
        seed=0,
        accumulate=1,
        mesh=mesh,
        preset=preset,
        abstract=train_state.abstract(objective, groups, 0, mesh, preset),
        frozen={},
        batch=sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch),
    )
    return compiled.as_text()


def full_batch_arrays(text):
    """Arrays of a program that hold the whole batch's images or maps (4-d), or tokens (8 or 16, width 16)."""
    return re.findall(r"(?:f32|u8|bf16)\[24,(?:\d+,\d+,\d+|8,16|16,16)\]", text)


def test_the_compiled_step_keeps_the_batch_split():
    """Also where the convolutions' kernels are split over the batch's own axis."""
    text = compiled_text("fsdp")
    assert "u8[3,8,8,3]" in text
    assert not full_batch_arrays(text)


def test_a_lost_batch_constraint_would_be_seen(monkeypatch):
    monkeypatch.setattr(sharding, "placement", lambda mesh, preset: None)
    assert full_batch_arrays(compiled_text("fsdp"))


def constrained_shapes(jaxpr, found):
    """Shapes of what is pinned anywhere in a program to lie whole on every device."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint" and equation.params["sharding"].is_fully_replicated:
            found.add(equation.invars[0].aval.shape)
        for inner in core.jaxprs_in_params(equation.params):
            constrained_shapes(inner, found)
    return found


def test_weights_are_gathered_before_they_are_used():
    """Otherwise the partitioner may gather the batch and split channels: TPUs' did, for gradients of convolutions."""
    cfg, objective = tiny_objective(**QUIET)
    mesh = sharding.make_mesh(MESHES["fsdp"][0])
    groups = adam_groups(cfg)
    state = train_state.abstract(objective, groups, 0, mesh, "fsdp")
    step = train_step.make_train_step(objective, groups, objective.phase(1), seed=0, placement=sharding.placement(mesh))
    pinned = constrained_shapes(jax.make_jaxpr(step)(state, {}, objective.batch(cfg.global_batch)).jaxpr, set())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = sharding.path_name(path)
        used = leaf.shape[1:] if sharding.STACKED in name else leaf.shape  # layers: one at a time, never all together
        assert used in pinned, name
        assert sharding.STACKED not in name or leaf.shape not in pinned, name


def used_by(what, mesh):
    """A program of the tokenizer beside its train step, and what it takes: parameters in parts, and images or ids."""
    cfg, objective = tiny_objective(data__eval_source="photographs")
    state = train_state.init(objective, sgd_groups(cfg), 0, mesh, "fsdp")
    images = np.zeros((8, 8, 8, 3), np.float32)
    if what == "evaluate":
        return evals.build(cfg, objective, mesh, None, {})._reconstruct, state.params, {}, images
    params = jax.device_get(state.params["tokenizer"])
    section = cfg.tokenizer.to_dict()
    pipeline = TokenizerPipeline(bundle.Bundle("tokenizer", section, params, (), None, {}, ""), mesh=mesh)
    if what == "tokenize":
        return pipeline._encode, pipeline.params, images
    return pipeline._decode_float, pipeline.params, np.zeros((8, cfg.tokenizer.num_latent_tokens), np.int32)


@pytest.mark.parametrize("what", ["evaluate", "tokenize", "detokenize"])
def test_weights_are_gathered_outside_training_too(what):
    """A convolution whose kernel lies in parts, split by its input, was wrong where heights are split."""
    program, params, *rows = used_by(what, sharding.make_mesh(MESHES["mixed"][0]))
    pinned = constrained_shapes(jax.make_jaxpr(program)(params, *rows).jaxpr, set())
    side = "decoder" if what == "detokenize" else "encoder"
    kernels = {
        sharding.path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if f"{side}/cnn" in sharding.path_name(path) and not leaf.sharding.is_fully_replicated
    }
    assert len(kernels) > 5
    for name, shape in kernels.items():
        assert shape in pinned, name


def test_per_device_entropy_would_be_seen(monkeypatch):
    """The comparison above fails when entropy statistics are each device's own."""
    (want, _, want_metrics), _ = full_step(ONE, *tiny_objective(global_batch=24))
    real = vq.entropy_loss

    def per_device(z_NZ, codebook_VZ, **kwargs):
        parts = z_NZ.reshape(8, -1, z_NZ.shape[-1])
        return jax.vmap(lambda z: real(z, codebook_VZ, **kwargs))(parts).mean()

    monkeypatch.setattr(vq, "entropy_loss", per_device)
    cfg, objective = tiny_objective(global_batch=24)
    (grads, _, metrics), _ = full_step(MESHES["data"], cfg, objective)
    assert abs(metrics["loss/total"] - want_metrics["loss/total"]) > 1e-2
    with pytest.raises(AssertionError):
        assert_same_leaves(grads, want, rtol=1e-2)


def test_heights_that_do_not_divide_are_not_split():
    """Two devices share a height of 4 and one of 2, not the discriminator's 3 between them: what reads it is whole.

    Split on one side only, the gradient of such a convolution was four times as large, once for each part of the batch.
    """
    results = []
    for layout in (ONE, MESHES["fsdp+tensor"]):
        cfg, objective = tiny_objective()
        step, state, batch = build(cfg, objective, sgd_groups(cfg), layout)
        before = jax.device_get(state.params)
        state, metrics = jax.device_get(step(state, {}, batch))
        results.append((jax.tree.map(np.subtract, state.params, before), metrics))
    (want, one), (moved, eight) = results
    assert one["loss/adversarial"] != 0
    np.testing.assert_allclose(eight["grad_norm/discriminator"], one["grad_norm/discriminator"], rtol=1e-4)
    np.testing.assert_allclose(eight["grad_norm/tokenizer"], one["grad_norm/tokenizer"], rtol=1e-4)
    kernel, wanted = (one["discriminator"]["conv_0"]["kernel"] for one in (moved, want))
    np.testing.assert_allclose(kernel, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("height", [2, 4, 8])
def test_a_convolution_of_few_rows_is_that_of_one_device(height):
    """With the batch and the height split; at one row a device its gradient was four times as large."""
    network, mesh = Conv(4, kernel_size=(3, 3)), sharding.make_mesh(MESHES["mixed"][0])
    x, w = jax.random.normal(jax.random.key(0), (2, 4, height, height, 4))
    params = network.init(jax.random.key(1), x)

    def moved(params, x):
        return jnp.sum(w * network.apply(params, constrain(x, "batch", "height", None, None)))

    def on_mesh(params, x):
        with placing(sharding.placement(mesh)):
            return jax.value_and_grad(moved, (0, 1))(params, x)

    want = jax.jit(jax.value_and_grad(moved, (0, 1)))(params, x)
    got = jax.device_get(jax.jit(on_mesh)(params, jax.device_put(x, sharding.batch_sharding(mesh))))
    assert_same_leaves(got, want, rtol=1e-5)


def test_microbatches_span_the_devices():
    """With entropy, batch norm and LeCam: each microbatch's statistics are over all devices, as on one."""
    results = []
    for layout in (ONE, MESHES["mixed"]):
        cfg, objective = tiny_objective(accumulate=2, **QUIET)
        step, state, batch = build(cfg, objective, sgd_groups(cfg), layout)
        results.append(jax.device_get(step(state, {}, batch)))
    (one, want), (eight, metrics) = results
    assert_same_leaves((eight.params, eight.state), (one.params, one.state), rtol=1e-5)
    for name, value in want.items():
        if name.startswith("loss/"):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("discriminator", ["patchgan", "dino"])
def test_moments_lie_as_their_parameters(discriminator):
    cfg, objective = tiny_objective(discriminator__name=discriminator)
    mesh = sharding.make_mesh(MESHES["mixed"][0])
    state = train_state.abstract(objective, adam_groups(cfg), 0, mesh, "fsdp+tensor")
    where = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where[sharding.path_name(path)] = leaf.sharding.spec
    moments = {name: spec for name, spec in where.items() if "/mu/" in name or "/nu/" in name}
    assert len(moments) > 100
    for name, spec in moments.items():
        group, own = name.removeprefix("opt/").split("/", 1)
        assert spec == where[f"params/{group}/" + re.split("/(?:mu|nu)/", own)[1]], name


def test_dimensions_that_do_not_divide_leave_their_axis_to_another():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    spec = lambda path, *shape: tuple(sharding.spec(path, shape, mesh, "fsdp"))  # noqa: E731
    mlp, out = "params/decoder/stack/layers/mlp/in/kernel", "params/x/self_attention/out/kernel"
    assert spec(mlp, 6, 16, 64) == (None, "fsdp", None)
    assert spec(mlp, 8, 12, 64) == (None, None, "fsdp")  # never the layer axis
    assert spec(out, 6, 12, 12) == (None, None, None)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaves = {"split": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where),
              "whole": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=sharding.replicated(mesh))}  # fmt: skip
    assert sharding.whole_leaves(leaves) == (0.25, ["whole"])


@pytest.mark.parametrize("part", ["in", "gate"])
def test_both_matrices_of_a_gated_mlp_are_cut_alike(part):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 8})
    for leaf, shape in (("kernel", (2, 16, 64)), ("bias", (2, 64))):
        spec = sharding.spec(f"semantic/vit/stack/layers/mlp/{part}/{leaf}", shape, mesh, "fsdp+tensor")
        assert tuple(spec)[-1] == "tensor"


def test_mesh_and_batch_errors():
    cfg = tiny_run()
    cfg.mesh.update(data=3, fsdp=1, tensor=1)
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        config.check_mesh(cfg, 8)
    cfg.mesh.update(data=-1, fsdp=1, tensor=1)
    cfg.global_batch = 12
    with pytest.raises(ValueError, match="does not divide over data x fsdp = 8"):
        config.check_mesh(cfg, 8)


def pins(jaxpr, found):
    """(shape, spec) of everything that a program pins."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            found.append((equation.invars[0].aval.shape, tuple(equation.params["sharding"].spec)))
        for inner in core.jaxprs_in_params(equation.params):
            pins(inner, found)
    return found


@pytest.fixture(scope="module")
def pinned():
    """What the step pins on a mesh with all three axes, and the abstract state."""
    cfg, objective = tiny_objective(**QUIET)
    sizes, preset = MESHES["mixed"]
    mesh, groups = sharding.make_mesh(sizes), adam_groups(cfg)
    state = train_state.abstract(objective, groups, 0, mesh, preset)
    placement = sharding.placement(mesh, preset)
    step = train_step.make_train_step(objective, groups, objective.phase(1), seed=0, placement=placement)
    return cfg, state, pins(jax.make_jaxpr(step)(state, {}, objective.batch(cfg.global_batch)).jaxpr, [])


def test_maps_are_split_by_their_height_and_tokens_by_their_heads(pinned):
    cfg, _, found = pinned
    size, width = cfg.tokenizer.image_size, cfg.tokenizer.encoder_width
    maps = {spec[:3] for shape, spec in found if shape[:3] == (cfg.global_batch, size, size)}
    assert maps == {(("data", "fsdp"), "tensor", None)}
    heads = (cfg.global_batch, cfg.tokenizer.num_latent_tokens, cfg.tokenizer.encoder_heads)
    assert {spec[:3] for shape, spec in found if shape[:3] == heads} == {(("data", "fsdp"), None, "tensor")}
    hidden = (cfg.global_batch, cfg.tokenizer.num_latent_tokens, 4 * width)
    assert {spec for shape, spec in found if shape == hidden} == {(("data", "fsdp"), None, "tensor")}


def test_gradients_are_pinned_as_their_parameters_are_stored(pinned):
    _, state, found = pinned
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        spec, name = tuple(leaf.sharding.spec), sharding.path_name(path)
        if any(spec):
            stacked = sharding.STACKED in name
            assert (leaf.shape[stacked:], spec[stacked:]) in found, name


def test_what_an_axis_does_not_divide_stays_whole():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.activation_axes(mesh, 12, "batch") == ("data", "fsdp")
    assert sharding.activation_axes(mesh, 6, "batch") is None and sharding.activation_axes(mesh, 31, "height") is None
    assert sharding.activation_axes(mesh, 2, "height") is None and sharding.activation_axes(mesh, 4, "height")
    assert sharding.activation_axes(mesh, 3, "heads") is None and sharding.activation_axes(mesh, 8, None) is None


@pytest.mark.tpu
@pytest.mark.parametrize("where", ["v6e:8x8", "v5p:4x4x4"])
def test_tensor_parallel_chips_are_neighbours_on_the_torus(monkeypatch, where):
    """Also four of the eight along a side."""
    pytest.importorskip("libtpu")
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    devices = list(topologies.get_topology_desc(topology_name=where, platform="tpu").devices)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 16, "tensor": 4}, devices)
    for group in mesh.devices.reshape(-1, 4):
        first = np.array(group[0].coords)
        assert max(np.abs(np.array(chip.coords) - first).sum() for chip in group) <= 3
