"""ConvNeXt and the loss on its logits: sizes, files, refusals, the objective, and torchvision on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gigatok_jax import objectives, sharding, teachers
from gigatok_jax.hub import frozen, keymap, weight_files
from gigatok_jax.hub import teachers as hub
from gigatok_jax.nn.resize import bilinear_antialias, resize
from gigatok_jax.objectives.teachers import logits
from gigatok_jax.teachers.convnext import CONVNEXT_S, ConvNeXt, ConvNeXtSizes
from tests.compare import assert_close_tree
from tests.steps import MESHES, ONE, QUIET, assert_planned, assert_same_leaves, full_step, tiny_objective
from tests.teachers.seeded import seeded
from tests.tiny import tiny_run
from tests.torch_shims import with_torchvision_declared

NARROW = ConvNeXtSizes((1, 1, 3, 1), (8, 12, 16, 24), classes=10)


@pytest.fixture
def narrow(monkeypatch, tmp_path):
    """Narrow networks under the published name, drawn so that every block matters; their weights' folder."""
    monkeypatch.setitem(teachers.CONVNEXTS, "convnext-s", NARROW)
    save_file(drawn(), tmp_path / "convnext-s.safetensors")
    return tmp_path


@functools.cache
def drawn():
    """Norms' and blocks' scales about 1: about 0, logits would hardly differ between images."""
    state = seeded(hub.convnext.entries(NARROW))
    scales = {key for key in state if key.endswith("layer_scale") or (key.endswith("weight") and state[key].ndim == 1)}
    return {key: value + 1 if key in scales else value for key, value in state.items()}


def images(seed, size, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def test_published_sizes():
    entries = hub.entries("convnext-s")
    assert sum(int(np.prod(entry.shape)) for entry in entries) == 50_223_688
    model, image = ConvNeXt(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)["params"], image)
    keymap.check_leaves(entries, keymap.flatten({"cnn": shapes}))


def test_files_go_round_and_back(narrow):
    (facts,) = weight_files.convert("convnext-s", [narrow / "convnext-s.safetensors"], narrow / "out")
    assert facts["dropped"] == []
    weight_files.publish("convnext-s", [narrow / "out" / "convnext-s.safetensors"], narrow / "back.safetensors")
    back = load_file(narrow / "back.safetensors")
    assert back.keys() == drawn().keys() and all(back[key].tobytes() == drawn()[key].tobytes() for key in back)
    assert hub.abstract("convnext-s").keys() == hub.load("convnext-s", narrow / "convnext-s.safetensors").keys()


def test_distance_is_of_logits_and_pulls_the_image_only(narrow):
    params = hub.load("convnext-s", narrow / "convnext-s.safetensors")
    a, b = images(0, 32), images(1, 32)
    distance = jax.jit(jax.value_and_grad(logits("convnext-s"), (1, 2)))
    value, (to_image, to_target) = distance(params, a, b)
    assert distance(params, a, a)[0] < 1e-9 * value  # but for rounding 0
    assert np.all(to_target == 0) and np.abs(to_image).max() > 0
    given = jax.jit(teachers.logits("convnext-s"))
    assert given(params, a).shape == (2, 10)
    assert_close_tree(value, np.mean((given(params, a) - given(params, b)) ** 2), 1e-5)
    kept, (again, _) = jax.jit(jax.value_and_grad(logits("convnext-s", remat=True), (1, 2)))(params, a, b)
    assert_close_tree((kept, again), (value, to_image), 1e-4)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert abs(jax.jit(logits("convnext-s", jnp.bfloat16))(half, a, b) / value - 1) < 0.05


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="classifier 'convnext-x' is not one of convnext-s"):
        teachers.logits("convnext-x")
    with pytest.raises(ValueError, match="too small: both sides need 32 pixels"):
        jax.eval_shape(lambda: ConvNeXt(NARROW).init(jax.random.key(0), jnp.zeros((1, 31, 40, 3))))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 37), (37, 16), (256, 224), (64, 224)])
def test_antialiased_weights_are_means_about_their_place(sizes):
    matrix = bilinear_antialias(*sizes)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    line = (matrix @ np.arange(sizes[0]))[6:-6]
    np.testing.assert_allclose(line, ((np.arange(sizes[1]) + 0.5) * (sizes[0] / sizes[1]) - 0.5)[6:-6], atol=0.07)


def test_the_objective_adds_it_beside_the_perceptual_loss(narrow):
    """TiTok's 1.1 · "lpips-convnext_s-1.0-0.1" is perceptual_weight 1.0 and convnext_weight 0.1."""
    cfg = tiny_run(loss__convnext_weight=0.1, discriminator__name="none", loss__lecam_weight=0.0, global_batch=2)
    cfg.frozen.update(folder=str(narrow), dtype="float32")
    assert objectives.networks(cfg) == {"logits": "convnext-s"}
    objective = objectives.build(cfg)
    mesh = sharding.make_mesh(ONE[0], jax.devices()[:1])
    weights = frozen.of_config(cfg, mesh)
    a, b = images(0, 8), images(1, 8)
    terms = jax.jit(lambda weights: objective._image_terms({"": a}, b, weights))(weights)
    want = jax.jit(logits("convnext-s"))(weights["logits"], a, b)
    assert terms.keys() == {"l2", "convnext"}
    assert_close_tree(terms["convnext"], 0.1 * want, 1e-5)
    with pytest.raises(FileNotFoundError, match=r"convnext_small-0c510722\.pth.*\n.*--from=convnext-s --in=FILE"):
        cfg.frozen.folder = str(narrow / "nowhere")
        frozen.of_config(cfg, mesh)


def test_eight_devices_take_the_step_of_one(narrow):
    changes = QUIET | {"loss__direct": False, "loss__auxiliary_end": 0, "loss__convnext_weight": 0.1}
    cfg, objective = tiny_objective(**changes, frozen__folder=str(narrow), frozen__dtype="float32")
    results = []
    for layout in (ONE, MESHES["fsdp"]):
        sizes, cfg.sharding.preset = layout
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        weights = frozen.of_config(cfg, mesh)
        assert_planned(frozen.abstract(cfg, mesh), weights)
        results.append(full_step(layout, cfg, objective, weights)[0])
    assert not weights["logits"]["cnn"]["stage_2"]["layers"]["in"]["kernel"].sharding.is_fully_replicated
    (want, _, want_metrics), (grads, _, metrics) = results
    np.testing.assert_allclose(metrics["loss/total"], want_metrics["loss/total"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/convnext"], want_metrics["loss/convnext"], rtol=1e-5)
    assert_same_leaves(grads, want, rtol=1e-4)


@pytest.fixture(scope="module")
def torchvision():
    return with_torchvision_declared()


@pytest.mark.parity
@pytest.mark.parametrize("size", [64, 256])
def test_torchvision_on_drawn_weights(torchvision, narrow, size):
    """The distance and its gradient, through torch's own resizing, at sizes that are enlarged and reduced.

    In float64: of torch's own float32, one element in 393,216 is 1.5e-3 away, where rounding of both sides adds up.
    """
    torch = pytest.importorskip("torch")
    kinds = torchvision.models.convnext
    stages = zip(NARROW.widths, (*NARROW.widths[1:], None), NARROW.depths)
    net = kinds.ConvNeXt([kinds.CNBlockConfig(*stage) for stage in stages], num_classes=NARROW.classes).eval().double()
    net.load_state_dict({key: torch.from_numpy(value) for key, value in drawn().items()})

    def classified(image):
        x = torch.nn.functional.interpolate(0.5 * image + 0.5, (224, 224), mode="bilinear", antialias=True)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=image.dtype)
        return net((x - mean[:, None, None]) / std[:, None, None])

    a, b = images(0, size), images(1, size)
    image = torch.from_numpy(a.transpose(0, 3, 1, 2)).double().requires_grad_()
    made, target = classified(image), classified(torch.from_numpy(b.transpose(0, 3, 1, 2)).double()).detach()
    value = torch.nn.functional.mse_loss(made, target)
    value.backward()

    params = hub.load("convnext-s", narrow / "convnext-s.safetensors")
    got, gradient = jax.jit(jax.value_and_grad(logits("convnext-s"), 1))(params, a, b)
    assert_close_tree(jax.jit(teachers.logits("convnext-s"))(params, a), made.detach().numpy(), 1e-4)
    assert_close_tree(got, value.item(), 1e-4)
    assert_close_tree(gradient.transpose(0, 3, 1, 2), image.grad.numpy(), 1e-3)


@pytest.mark.parity
def test_every_published_tensor_is_read(torchvision):
    """At the published sizes, of which nothing is allocated."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = torchvision.models.convnext_small()
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {entry.key: entry.shape for entry in hub.convnext.entries(CONVNEXT_S)} == state
    weights = torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1
    assert weights.url == hub.SOURCES["convnext-s"].url and weights.meta["num_params"] == 50_223_688


@pytest.mark.parity
@pytest.mark.parametrize("sizes", [(64, 224), (256, 224), (300, 224), (37, 16)])
def test_torch_resizes_alike(sizes):
    torch = pytest.importorskip("torch")
    x = images(0, sizes[0])
    given = torch.from_numpy(x.transpose(0, 3, 1, 2))
    want = torch.nn.functional.interpolate(given, (sizes[1], sizes[1]), mode="bilinear", antialias=True).numpy()
    got = resize(x, sizes[1], sizes[1], bilinear_antialias).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, atol=1e-4)  # torch rounds its weights to float32
