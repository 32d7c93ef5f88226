"""FID's Inception without its peers: its key list, pools and preparations, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax.hub import keymap
from gigatok_jax.hub import teachers as hub
from gigatok_jax.teachers import inception
from gigatok_jax.teachers.inception import INCEPTION, Inception, prepared
from tests.networks import TINY_INCEPTION
from tests.teachers.seeded import seeded_inception


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(inception.NETWORKS, "inception", TINY_INCEPTION)


def pictures(size, batch=2):
    return np.random.default_rng(size).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def test_the_published_sizes():
    entries = hub.entries("inception")
    sizes = {entry.key: int(np.prod(entry.shape)) for entry in entries}
    statistics = sum(size for key, size in sizes.items() if "running" in key)
    assert (len(entries), len(sizes), len(hub.droppable("inception"))) == (472, 472, 94)
    # torchvision's Inception-v3 of 1000 classes without its auxiliary head has 23,834,568.
    assert (sum(sizes.values()) - statistics, statistics) == (23_834_568 + 8 * 2049, 34_432)
    assert inception.num_features(INCEPTION) == 2048


def test_every_leaf_has_its_published_tensor():
    net = Inception(INCEPTION)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32))
    keymap.check_leaves(hub.entries("inception"), keymap.flatten(shapes))
    out = jax.eval_shape(inception.outputs("torch-fidelity"), shapes, jax.ShapeDtypeStruct((3, 8, 8, 3), jnp.uint8))
    assert [x.shape for x in out] == [(3, 2048), (3, 1008), (3, 1008)]


def test_a_file_gives_features_and_logits(tiny, tmp_path):
    entries = hub.entries("inception")
    state = seeded_inception(entries)
    counts = {key: np.zeros((), np.int64) for key in hub.droppable("inception")}
    save_file(state | counts, tmp_path / "inception.safetensors")
    variables = hub.load("inception", hub.find("inception", tmp_path))
    for key, ours in (("running_mean", "mean"), ("running_var", "var")):
        stored = variables["batch_stats"]["mixed_7c_branch_pool"]["norm"][ours]
        np.testing.assert_array_equal(stored, state[f"Mixed_7c.branch_pool.bn.{key}"])
    out = jax.jit(inception.outputs("pytorch-fid"))(variables, pictures(16))
    assert out.features_BM.shape == (2, 33) and np.isfinite(out.features_BM).all()
    assert 0.05 < np.std(out.features_BM) < 20 and np.abs(out.features_BM[0] - out.features_BM[1]).max() > 1e-3
    np.testing.assert_allclose(out.logits_BV - out.unbiased_BV, [state["fc.bias"]] * 2, atol=1e-4)
    np.testing.assert_allclose(out.unbiased_BV, out.features_BM @ state["fc.weight"].T, rtol=1e-3, atol=1e-4)


def test_a_file_of_another_network_is_refused(tiny, tmp_path):
    state = seeded_inception(hub.entries("inception"))
    state["AuxLogits.fc.weight"] = state.pop("Mixed_6b.branch7x7_2.bn.running_var")
    save_file(state, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match=r"(?s)unknown: AuxLogits.+missing: Mixed_6b\.branch7x7_2\.bn\.running_var"):
        hub.load("inception", tmp_path / "inception.safetensors")


def test_pools():
    ones, ramp = jnp.ones((1, 5, 5, 1)), jnp.arange(25.0).reshape(1, 5, 5, 1) - 30
    np.testing.assert_array_equal(inception._pooled("average", ones), ones)  # 4/9 at the corners with the padding
    assert inception._pooled("max", ramp)[0, :2, :2, 0].tolist() == [[-24, -23], [-19, -18]]
    np.testing.assert_array_equal(inception._pooled("down", ramp)[0, ..., 0], [[-18, -16], [-8, -6]])
    assert inception._pooled("", ramp) is ramp


def test_preparations():
    flat = np.full((1, 8, 8, 3), 255, np.uint8)
    np.testing.assert_allclose(prepared(flat, "pytorch-fid"), 1.0, rtol=1e-6)
    np.testing.assert_allclose(prepared(flat, "torch-fidelity"), 127 / 128, rtol=1e-6)
    moved = np.asarray(prepared(pictures(8, 1), "torch-fidelity") * 128 + 128)[0]
    assert moved.shape == (299, 299, 3)
    np.testing.assert_allclose(moved[0, 0], pictures(8, 1)[0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(moved[-30:, -30:], np.broadcast_to(pictures(8, 1)[0, -1, -1], (30, 30, 3)), atol=1e-4)


def test_other_pictures_and_names_are_refused():
    with pytest.raises(ValueError, match="Inception sees 8-bit pictures, got float32"):
        prepared(jnp.zeros((1, 8, 8, 3)), "pytorch-fid")
    with pytest.raises(ValueError, match="preprocessing 'clean-fid' is not one of pytorch-fid, torch-fidelity"):
        prepared(pictures(8), "clean-fid")
