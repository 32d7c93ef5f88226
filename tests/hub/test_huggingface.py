"""Bundles of Hugging Face repositories: which commit is meant, and what is read without a network."""

import shutil
import sys
import types

import pytest

from gigatok_jax import convert
from gigatok_jax.hub import bundle, gigatok, models
from tests.teachers.seeded import seeded
from tests.tiny import published_nano

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    section = published_nano("1d").to_dict()
    fields = {field: section[field] for field in ("encoder_heads", "decoder_heads", "distill_layer")}
    models.write("gigatok", seeded(gigatok.entries(section)), path := tmp_path_factory.mktemp("bundle"), fields)
    return path


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A huggingface_hub whose repository has one tag and branch, and whose cache holds links."""
    found = types.ModuleType("huggingface_hub")
    found.calls, found.commit, found.online = [], FIRST, True

    def snapshot_download(name, revision, allow_patterns):
        found.calls.append(revision)
        if not found.online:
            raise OSError("no network")
        snapshot = tmp_path / "hub" / "snapshots" / (revision if len(revision) == 40 else found.commit)
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            (snapshot / file).exists() or (snapshot / file).symlink_to(folder / file)
        return str(snapshot)

    found.snapshot_download = snapshot_download
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    return found


def test_a_commit_is_fetched_once_and_then_read_without_a_network(hub, folder):
    assert bundle.load(f"hf://owner/name@{FIRST}").hash == bundle.load(folder).hash
    hub.online = False
    assert bundle.load(f"hf://owner/name@{FIRST}").hash == bundle.load(folder).hash
    assert hub.calls == [FIRST]
    with pytest.raises(ValueError, match=rf"name@{SECOND} cannot be fetched, nor is it in the cache: no network"):
        bundle.load(f"hf://owner/name@{SECOND}")


def test_a_branch_is_resolved_each_time(hub):
    assert bundle.open_config("hf://owner/name@main")[0].name == f"owner--name@{FIRST}"
    hub.commit = SECOND
    assert bundle.open_config("hf://owner/name@main")[0].name == f"owner--name@{SECOND}"
    hub.commit = "main"
    with pytest.raises(ValueError, match="cannot be resolved to a commit"):
        bundle.load("hf://owner/name@main")


@pytest.mark.parametrize(
    "address", ["owner@1", "owner/name", "owner/name@../../other", "owner/name@a/b", "../name@v1", "a/b/c@v1"]
)
def test_other_addresses_are_refused_before_anything_is_fetched(hub, address):
    with pytest.raises(ValueError, match=r"should read hf://owner/name@revision"):
        bundle.load(f"hf://{address}")
    assert not hub.calls


def test_a_fetched_bundle_is_published(hub, folder, tmp_path):
    (got,) = convert.publish("gigatok", [f"hf://owner/name@{FIRST}"], tmp_path / "a.safetensors")
    (want,) = convert.publish("gigatok", [folder], tmp_path / "b.safetensors")
    assert got["sha256"] == want["sha256"]


def test_the_package_is_named_where_it_is_missing(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'gigatok_jax\[hub\]'"):
        bundle.load("hf://owner/name@v1")
    shutil.copytree(folder, tmp_path / f".cache/gigatok_jax/bundles/owner--name@{FIRST}")
    assert bundle.load(f"hf://owner/name@{FIRST}").hash == bundle.load(folder).hash
