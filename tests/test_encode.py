"""`python -m gigatok_jax.encode` by its flags."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from gigatok_jax import encode
from gigatok_jax.hub import bundle
from tests.entry_points import defined
from tests.probes import tiny_tokenizer, write_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the bundle "tokenizer" and the images "pictures"."""
    root = tmp_path_factory.mktemp("files")
    tiny_tokenizer(root / "tokenizer")
    write_folder(root / "pictures", 9, 0)
    return root


@pytest.fixture
def call(files, tmp_path, capsys):
    """Runs the program; returns its last line as data, or the error that it ends with."""

    def run(**options):
        usual = {"bundle": str(files / "tokenizer"), "out": str(tmp_path / "out"), "batch": 8, "num_threads": 1}
        with flagsaver.flagsaver(**{**usual, "source": "folder", "root": str(files / "pictures"), **options}):
            try:
                encode.main(["encode"])
            except SystemExit as end:
                return str(end)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    with defined("gigatok_jax.encode"):
        flags.FLAGS.mark_as_parsed()
        yield run


def test_the_decoder_stays_on_disk(call, monkeypatch):
    parts, place = [], encode.TokenizerPipeline

    def placed(loaded, **options):
        parts.extend(loaded.params)
        return place(loaded, **options)

    monkeypatch.setattr(encode, "TokenizerPipeline", placed)
    assert call()["records"] == 9 and sorted(parts) == sorted(bundle.FIRST_STAGE)


def test_a_source_without_a_root_is_the_same_from_any_folder(call, tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        assert call(source="photographs", root="", split="eval")["records"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop": "ten_crop", "flip": True}, "mirror images already"),
        ({"permute_channels": True}, "of random crops, adm and scale"),
        ({"root": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_refused(call, tmp_path, options, words):
    message = call(**options)
    assert message.startswith("error: ") and words in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_continuous_latents_are_refused(call, tmp_path):
    tiny_tokenizer(tmp_path / "kl", bottleneck="kl", codebook_size=0)
    message = call(bundle=str(tmp_path / "kl"))
    assert message.startswith("error: ") and "continuous latents (bottleneck=kl)" in message
    assert not (tmp_path / "out").exists()
