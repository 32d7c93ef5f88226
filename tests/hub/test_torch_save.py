"""What torch.save really writes, in both of its formats, read without torch: every tensor, bit for bit."""

import argparse
import pathlib

import numpy as np
import pytest

from gigatok_jax.hub import gigatok, models, published, stored
from tests.teachers.seeded import seeded
from tests.tiny import published_nano

pytestmark = pytest.mark.parity
FORMATS = pytest.mark.parametrize("zipped", [True, False])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def section():
    return published_nano("1d").to_dict()


@pytest.fixture(scope="module")
def fields(section):
    return {field: section[field] for field in ("encoder_heads", "decoder_heads", "distill_layer")}


@pytest.fixture(scope="module")
def state(torch, section):
    state = {key: torch.from_numpy(value) for key, value in seeded(gigatok.entries(section)).items()}
    return state | {key: torch.from_numpy(value.copy()) for key, value in gigatok.BUFFERS.items()}


def optimizer(torch):
    layer = torch.nn.Linear(3, 3)
    steps = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    steps.step()
    return steps.state_dict()


def went_round(torch, layout, path, folder, fields, part=""):
    """(What comes back of a file in the published layout, the bundle's provenance)."""
    content = models.convert_files(layout, [path], folder, fields=fields, part=part)
    models.publish(layout, folder, folder / "back.safetensors")
    with stored.open_safetensors(folder / "back.safetensors") as found:
        return {key: np.asarray(value) for key, value in found.items()}, content["provenance"]


def assert_same_bytes(torch, got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        value = value.detach().contiguous()
        assert str(got[key].dtype) == str(value.dtype).removeprefix("torch."), key
        assert got[key].tobytes() == value.reshape(-1).view(torch.uint8).numpy().tobytes(), key


@FORMATS
def test_each_part_of_a_training_checkpoint(torch, state, fields, tmp_path, zipped):
    judge = models.LAYOUTS["gigatok-patchgan"]
    sizes = {"family": "patchgan", "base_channels": 8, "num_layers": 2}
    discriminator = {key: torch.from_numpy(v) for key, v in seeded(judge.keys.entries(sizes)).items()}
    discriminator |= {key: torch.tensor(0) for key in judge.keys.buffers(sizes)}
    beside = {"folder": pathlib.Path("/a"), "kinds": {1, 2}, "dtype": torch.bfloat16, "size": torch.Size([1])}
    checkpoint = {
        "model": {key: value + 1 for key, value in state.items()},
        "ema": state,
        "discriminator": discriminator,
        "optimizer": optimizer(torch),
        "steps": 3,
        "args": argparse.Namespace(**beside, device=torch.device("cpu")),
        "masks": [torch.zeros(3, dtype=dtype) for dtype in (torch.bool, torch.int16, torch.int8)],
    }
    torch.save(checkpoint, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for part in ("", "ema", "model"):
        got, provenance = went_round(torch, "gigatok", tmp_path / "a.pt", tmp_path / f"bundle{part}", fields, part)
        assert provenance["part"] == (part or "ema")
        want = checkpoint[part or "ema"] | {key: torch.from_numpy(v) for key, v in gigatok.BUFFERS.items()}
        assert_same_bytes(torch, got, want)
    got, _ = went_round(torch, "gigatok-patchgan", tmp_path / "a.pt", tmp_path / "judge", {})
    assert_same_bytes(torch, got, discriminator)


@FORMATS
@pytest.mark.parametrize("name", ["bfloat16", "float16", "mixed", "parameters", "transposed", "flat", "halves"])
def test_every_way_that_tensors_are_kept(torch, state, fields, tmp_path, zipped, name):
    buffers = gigatok.BUFFERS.keys()
    state = {key: value for key, value in state.items() if key not in buffers}
    kept = dict(state)
    if name in ("bfloat16", "float16"):
        kept = {key: value.to(getattr(torch, name)) for key, value in state.items()}
    if name == "mixed":
        kept = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    if name == "parameters":
        kept = {key: torch.nn.Parameter(value) for key, value in state.items()}
    if name == "transposed":
        kept = {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in state.items()}
    if name == "flat":
        pieces = torch.cat([value.reshape(-1) for value in state.values()]).split([v.numel() for v in state.values()])
        kept = {key: piece.view(value.shape) for (key, value), piece in zip(state.items(), pieces)}
    if name == "halves":
        kept = {key: torch.stack([value, -value], -1)[..., 0] for key, value in state.items()}
    torch.save(kept, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    got, _ = went_round(torch, "gigatok", tmp_path / "a.pt", tmp_path / "bundle", fields)
    assert_same_bytes(torch, {key: value for key, value in got.items() if key not in buffers}, kept)


def test_dtypes_beside_the_model_need_not_be_known(torch, state, fields, tmp_path):
    others = [torch.zeros(3, dtype=dtype) for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint16)]
    torch.save({"ema": state, "others": others}, tmp_path / "a.pt")
    got, _ = went_round(torch, "gigatok", tmp_path / "a.pt", tmp_path / "bundle", fields)
    assert_same_bytes(torch, got, state)
    torch.save({"ema": {"w": others[0]}}, tmp_path / "b.pt")
    told = pytest.raises(ValueError, match=r"calls torch\.ComplexFloatStorage where tensors are wanted \(as w\)")
    with told, published.opened([tmp_path / "b.pt"]):
        pass


def test_negated_views_are_refused(torch, tmp_path):
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a negated or conjugated view"), published.opened([tmp_path / "a.pt"]):
        pass


def test_whole_modules_are_refused(torch, tmp_path):
    torch.save({"model": torch.nn.Linear(3, 3)}, tmp_path / "a.pt")
    told = pytest.raises(ValueError, match=r"calls torch\.nn\.modules\.linear\.Linear where tensors are wanted")
    with told, published.opened([tmp_path / "a.pt"]):
        pass
