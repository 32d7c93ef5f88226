"""Vision transformers' files in every published layout: recognised, loaded alike, written back byte for byte."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gigatok_jax import convert, teachers
from gigatok_jax.hub import keymap, vit_keys, weight_files
from gigatok_jax.hub import teachers as hub
from gigatok_jax.nn.vit import ViTSizes
from tests.networks import tiny
from tests.teachers.seeded import seeded

LAYOUTS = [(name, layout) for name, layouts in vit_keys.LAYOUTS.items() for layout in layouts]
PAIRS = [(name, form) for form, (name, _) in weight_files.FORMS.items() if form == f"{name}-hf"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    for name, sizes in teachers.VITS.items():
        monkeypatch.setitem(teachers.VITS, name, tiny(sizes))


def published(name, layout):
    """A drawn state in a layout, with the mask token where the layout has one."""
    has_mask = layout in ("original", "dinov2-hf") and name.startswith("dinov2")
    return seeded(vit_keys.vit_entries(teachers.VITS[name], layout, has_mask))


def assert_same_file(path, state):
    written = load_file(path)
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert written[key].dtype == value.dtype and written[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_is_recognised_and_comes_back_to_the_byte(tmp_path, name, layout):
    state = published(name, layout)
    assert len(state) == len(set(state))
    entries = hub.entries(name, state)
    assert [entry.key for entry in entries] == list(state)
    back = keymap.into_published(entries, keymap.from_published(entries, state))
    assert all(back[key].tobytes() == value.tobytes() for key, value in state.items())
    save_file(state, tmp_path / "published.safetensors")
    (facts,) = weight_files.convert(name, [tmp_path / "published.safetensors"], tmp_path)
    assert facts["dropped"] == [] and "mask_token" not in hub.load(name, hub.find(name, tmp_path))["vit"]
    assert_same_file(facts["file"], state)  # with its mask token


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_one_layout_is_written_from_another_and_back(tmp_path, name, other):
    first, second = (weight_files.FORMS[form][1] for form in (name, other))
    state, a, b, c = published(name, first), *(tmp_path / f"{n}.safetensors" for n in "abc")
    save_file(state, a)
    (facts,) = convert.publish(other, [a], b)
    assert load_file(b).keys() == published(name, second).keys() and facts["tensors"] == len(load_file(b))
    assert facts["parameters"] == sum(value.size for value in state.values())
    convert.publish(name, [b], c)
    assert_same_file(c, state)
    convert.publish(name, [a], c)
    assert_same_file(c, state)
    want = hub.load(name, a, grid=(3, 4))
    jax.tree.map(np.testing.assert_array_equal, hub.load(name, b, grid=(3, 4)), want)


@pytest.mark.parametrize("name", ["vgg16", "dino-s16", "siglip-so400m"])
def test_what_has_one_layout_is_written_in_it_from_the_weights_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("GIGATOK_WEIGHTS", str(tmp_path))
    state = seeded(hub.entries(name))
    np.savez(tmp_path / f"{name}.npz", **state)
    convert.publish(name, [], tmp_path / "out" / "a.safetensors")
    assert_same_file(tmp_path / "out" / "a.safetensors", state)


def test_timms_registers_have_their_class_tokens_position_in_it(tmp_path):
    """The same network as with a first position of zeros; so it is written."""
    state = published("dinov2-s-reg", "timm")
    assert state["pos_embed"].shape == (1, 25, 16) and "reg_token" in state
    save_file(state, tmp_path / "a.safetensors")
    convert.publish("dinov2-s-reg", [tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert not written["pos_embed"][:, 0].any()
    np.testing.assert_array_equal(written["pos_embed"][:, 1:], state["pos_embed"])
    np.testing.assert_array_equal(written["register_tokens"], state["reg_token"])


def beside(name, layout):
    """Tensors of the text tower and the like, of one number each, in a layout."""
    other = "text_model." if layout == "clip-hf" else "transformer."
    keys = [key for key in hub.droppable(name) if layout == "clip-hf" or not key.startswith(("text_", "vision_model."))]
    assert sum(key.startswith(other) for key in keys) >= 12 * 12
    return {key: np.zeros(1, np.float32) for key in keys}


@pytest.mark.parametrize(
    ("name", "layout"), [("siglip-so400m", "clip-hf"), ("dfn-clip-l", "open_clip"), ("dfn-clip-l", "clip-hf")]
)
def test_text_towers_and_pooling_are_dropped_by_name(tmp_path, name, layout):
    state, dropped = published(name, layout), beside(name, layout)
    save_file(state | dropped, tmp_path / "whole.safetensors")
    hub.load(name, tmp_path / "whole.safetensors")
    (facts,) = weight_files.convert(name, [tmp_path / "whole.safetensors"], tmp_path)
    assert facts["dropped"] == sorted(dropped)
    assert_same_file(facts["file"], state)
    with safe_open(facts["file"], "np") as file:
        assert json.loads(file.metadata()["provenance"])["dropped"] == sorted(dropped)
    (facts,) = convert.publish(name, [tmp_path / "whole.safetensors"], tmp_path / "again.safetensors")
    assert facts["dropped"] == sorted(dropped)
    save_file(state | {"text_model.surprise": np.zeros(1, np.float32)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"unknown: text_model\.surprise"):
        weight_files.convert(name, [tmp_path / "whole.safetensors"], tmp_path)


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("dinov2-s", "dinov2-s-reg", "unknown: register_tokens"),
        ("dinov2-s-reg", "dinov2-s", "missing: register_tokens (1, 4, 16)"),
        ("dinov2-b", "dinov2-g", "unknown: blocks.0.mlp.w12.weight"),
        ("dinov2-g", "dino-s16", "missing: blocks.1.ls2.gamma (16,)"),
        ("siglip-so400m", "dfn-clip-l", "unknown: visual.class_embedding"),
        ("dfn-clip-l", "siglip-so400m", "missing: vision_model.pre_layrnorm.weight (16,)"),
    ],
)
def test_another_networks_file_is_refused_with_what_does_not_fit(tmp_path, name, other, told):
    save_file(published(other, vit_keys.LAYOUTS[other][0]), tmp_path / "a.safetensors")
    for read in (
        lambda path: hub.load(name, path),
        lambda path: weight_files.convert(name, [path], tmp_path / "out"),
        lambda path: convert.publish(name, [path], tmp_path / "out" / "b.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"does not hold the weights of {name}: ") as error:
            read(tmp_path / "a.safetensors")
        assert told in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_one_tensor_transposed_missing_extra_or_renamed(name, layout):
    state = published(name, layout)
    into = next(key for key in state if ".0.mlp." in key or ".0.mlp.c_fc" in key)
    changes = {
        f"misshapen: {into}": {**state, into: state[into].T},
        f"missing: {into}": {key: value for key, value in state.items() if key != into},
        "unknown: surprise": {**state, "surprise": np.zeros(1)},
        f"unknown: {into}s": {(f"{into}s" if key == into else key): value for key, value in state.items()},
    }
    for told, broken in changes.items():
        with pytest.raises(ValueError) as error:
            keymap.from_published(hub.entries(name, broken), broken, hub.droppable(name))
        assert told in str(error.value)
        assert str(error.value).startswith(("1 keys", "2 keys"))  # nothing else is said to be wrong


def test_publishing_says_what_it_wants(tmp_path):
    with pytest.raises(ValueError, match=r"--to=dinov2-b needs --out=FILE\.safetensors"):
        convert.publish("dinov2-b", [tmp_path / "a.safetensors"], tmp_path)
    with pytest.raises(ValueError, match=r"--to=dinov2-x is not one of gigatok, .*dinov2-b-hf"):
        convert.publish("dinov2-x", [tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors does not exist"):
        convert.publish("dinov2-b", [tmp_path / "a.safetensors"], tmp_path / "b.safetensors")


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "file", "sizes"),
    [
        ("dinov2-s", "dinov2_like_state", ViTSizes(48, 2, 3, 14, 16)),
        ("dino-s16", "dinodisc_backbone_state", ViTSizes(48, 4, 3, 16, 14, "gelu_tanh", layer_scale=False)),
    ],
)
def test_recorded_states_come_back_to_the_byte(golden, tmp_path, monkeypatch, name, file, sizes):
    monkeypatch.setitem(teachers.VITS, name, sizes)
    path = golden / "gigatok" / f"{file}.safetensors"
    for form in (form for form, (network, _) in weight_files.FORMS.items() if network == name):
        convert.publish(form, [path], tmp_path / "a.safetensors")
        convert.publish(name, [tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
        assert_same_file(tmp_path / "b.safetensors", load_file(path))
