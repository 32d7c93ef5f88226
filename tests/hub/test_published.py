"""Which part of a file is taken, and in what dtypes it is read."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gigatok_jax import teachers
from gigatok_jax.hub import published, vit_keys, weight_files
from gigatok_jax.hub import teachers as hub
from gigatok_jax.hub.layouts import LAYOUTS
from gigatok_jax.hub.pickles import Inert
from gigatok_jax.hub.stored import StoredTensor, open_safetensors
from gigatok_jax.hub.streaming import DTYPES, write_streamed
from tests.networks import tiny
from tests.teachers.seeded import seeded


def tensor(value):
    array = np.full(2, value, np.float32)
    return StoredTensor("a.pt", array.shape, array.dtype, lambda: array)


PARTS = {"args": Inert("argparse.Namespace"), "optimizer": {"state": {}, "lr": 1e-3}, "steps": 3}
PARTS |= {name: {"w": tensor(n)} for n, name in enumerate(("model", "ema", "discriminator"))}


@pytest.fixture
def holds(monkeypatch, tmp_path):
    """Opens a tree as if a .pt held it."""

    def opened(tree, *args):
        monkeypatch.setattr(published, "open_torch", lambda path: contextlib.nullcontext(tree))
        return published.opened([tmp_path / "a.pt"], *args)

    return opened


@pytest.mark.parametrize(
    ("layout", "taken"),
    [
        ("gigatok", "ema"),
        ("gigatok-gpt", "model"),
        ("llamagen", "model"),
        ("llamagen-gpt", "model"),
        ("maskgit-vqgan", "model"),
        ("titok-imagebert", "model"),
        ("gigatok-patchgan", "discriminator"),
        ("gigatok-dino-disc", "discriminator"),
    ],
)
def test_the_part_is_the_one_that_the_published_loader_takes(holds, layout, taken):
    parts = LAYOUTS[layout].parts
    with holds(PARTS, "", parts) as found:
        assert found.part == taken and np.asarray(found.state["w"])[0] == ("model", "ema", "discriminator").index(taken)
    with holds(PARTS["model"], "", parts) as found:
        assert found.part == "" and found.state.keys() == {"w"}
    with holds(PARTS, "model", parts) as found:
        assert found.part == "model"
    with pytest.raises(ValueError, match=r"no part 'head'; it holds optimizer, model, ema"), holds(PARTS, "head"):
        pass
    with pytest.raises(ValueError, match=r"--part, one of optimizer"), holds({"optimizer": {}}, "", parts):
        pass


def test_what_is_no_tensor_in_the_part_is_named_by_what_it_calls(holds):
    bad = {"model": {"w": Inert("posix.system")}}
    for tree, part in ((bad, ""), (bad["model"], ""), (Inert("posix.system"), "")):
        with pytest.raises(ValueError, match=r"refused: this pickle calls posix\.system"), holds(tree, part):
            pass


def test_files_of_tensors_alone_have_no_part(tmp_path):
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", w=np.zeros(2))
    for name in ("a.safetensors", "a.npz"):
        told = pytest.raises(ValueError, match="it has no part 'ema': leave out --part")
        with told, published.opened([tmp_path / name], "ema"):
            pass


def test_every_dtype_that_is_written_is_read(tmp_path):
    state = {name: np.arange(6).reshape(2, 3).astype(np.dtype(name)) for name in DTYPES}
    write_streamed(tmp_path / "a.safetensors", state, state.__getitem__)
    with open_safetensors(tmp_path / "a.safetensors") as found:
        for name, value in state.items():
            got = np.asarray(found[name])
            assert (got.dtype, found[name].dtype, got.shape) == (value.dtype, value.dtype, (2, 3))
            assert got.tobytes() == value.tobytes()


@pytest.fixture
def vit(monkeypatch):
    monkeypatch.setitem(teachers.VITS, "dinov2-s", tiny(teachers.VITS["dinov2-s"]))
    return seeded(vit_keys.vit_entries(teachers.VITS["dinov2-s"], "original", True))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_frozen_files_keep_each_tensor_s_dtype_in_every_layout(vit, tmp_path, dtype):
    state = {key: value.astype(dtype if "attn" in key else np.float32) for key, value in vit.items()}
    write_streamed(tmp_path / "in.safetensors", state, state.__getitem__)
    weight_files.convert("dinov2-s", [tmp_path / "in.safetensors"], tmp_path)
    assert hub.load("dinov2-s", tmp_path / "dinov2-s.safetensors")["vit"]["embed"]["kernel"].dtype == np.float32
    weight_files.publish("dinov2-s-hf", [tmp_path / "dinov2-s.safetensors"], tmp_path / "hf.safetensors")
    weight_files.publish("dinov2-s", [tmp_path / "hf.safetensors"], tmp_path / "back.safetensors")
    with open_safetensors(tmp_path / "back.safetensors") as found:
        assert found.keys() == state.keys()
        for key, value in state.items():
            assert found[key].dtype == value.dtype and np.asarray(found[key]).tobytes() == value.tobytes(), key


def test_numbers_that_are_no_weights_are_refused_by_name(vit, tmp_path):
    key = next(key for key in vit if "attn" in key)
    save_file(vit | {key: vit[key].astype(np.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"no weights: {key} is int64"):
        weight_files.convert("dinov2-s", [tmp_path / "a.safetensors"], tmp_path)


def test_what_is_published_says_where_it_is_from(vit, tmp_path):

    save_file(vit, tmp_path / "a.safetensors")
    weight_files.publish("dinov2-s-hf", [tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt" and "Apache-2.0" in file.metadata()["provenance"]
    assert load_file(tmp_path / "b.safetensors")
