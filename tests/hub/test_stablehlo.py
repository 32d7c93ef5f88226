"""Exported programs: the bundle's ids and pixels, in a process that cannot import this package or flax."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from gigatok_jax.hub import bundle, sections, stablehlo
from gigatok_jax.sampling.masked import make_steps
from gigatok_jax.sampling.pipelines import from_pretrained
from tests.probes import tiny_tokenizer
from tests.tiny import tiny_generator, tiny_masked

SCRIPT = """
import sys
for name in ("gigatok_jax", "flax", "optax", "orbax", "ml_collections"):
    sys.modules[name] = None
import jax, numpy as np, safetensors.numpy
folder, program, given, out = sys.argv[1:]
weights = safetensors.numpy.load_file(f"{folder}/model.safetensors")
call = jax.export.deserialize(open(f"{folder}/{program}.stablehlo", "rb").read()).call
inputs = np.load(given)
np.save(out, call(weights, *(inputs[name] for name in inputs.files)))
"""


def run(folder, program, tmp_path, *inputs):
    """The program's output for `inputs`, from another process."""
    np.savez(tmp_path / "given.npz", *inputs)
    args = [str(folder), program, str(tmp_path / "given.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", "import jax.export\n" + SCRIPT, *args], check=True, cwd=tmp_path, timeout=300)
    return np.load(tmp_path / "out.npy")


def saved(folder, kind, section):
    """A bundle of drawn parameters with its programs."""
    rng = np.random.default_rng(0)
    shapes = sections.parameter_shapes(kind, section)
    arrays = {name: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    bundle.save(folder, kind, section, arrays.__getitem__)
    return stablehlo.write(folder, kind, section)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer's bundle that tells pictures apart, with its programs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    stablehlo.write(folder, "tokenizer", tiny_tokenizer(folder).section)
    return folder


@pytest.mark.parametrize("count", [1, 5])
def test_ids_and_pixels_without_this_package(tokenizer, tmp_path, count):
    ours = from_pretrained(tokenizer)
    # Blocks of colour: all pictures of pure noise have much the same ids.
    images = np.random.default_rng(1).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    ids = run(tokenizer, "tokenize", tmp_path, images)
    assert len(np.unique(ids, axis=0)) == count
    np.testing.assert_array_equal(ids, ours.tokenize(images))
    pixels, floats = run(tokenizer, "detokenize", tmp_path, ids), ours.detokenize(ids, float_images=True)
    assert pixels.dtype == np.uint8 and len(np.unique(pixels.reshape(count, -1), axis=0)) == count
    assert ((floats > 0) & (floats < 1)).mean() > 0.8
    # Each is what a value within 1e-5 of ours is rounded to.
    assert np.abs(pixels / 255 - floats).max() <= 0.5 / 255 + 1e-5


def test_samples_without_this_package(tmp_path):
    folder = tmp_path / "generator"
    saved(folder, "generator", tiny_generator().to_dict())
    labels, scales = np.array([0, 3, 2], np.int32), np.full((16,), 1.5, np.float32)
    ids = run(folder, "sample", tmp_path, labels, np.arange(3, dtype=np.int32), np.uint32(7), scales)
    np.testing.assert_array_equal(ids, from_pretrained(folder).sample(labels, seed=7, scale=1.5))


def test_masked_samples_without_this_package(tmp_path):
    folder = tmp_path / "generator"
    saved(folder, "generator", tiny_masked("uvit").to_dict())
    labels, options = np.array([0, 1, 2], np.int32), dict(scale=2.0, schedule="constant", temperature=3.0)
    ids = run(folder, "sample", tmp_path, labels, np.arange(3, dtype=np.int32), np.uint32(7), *make_steps(8, **options))
    np.testing.assert_array_equal(ids, from_pretrained(folder).sample(labels, seed=7, **options))


def longest_constant(exported):
    """Characters of the longest constant in a program's text, which has them in full."""
    return max((len(line) for line in exported.mlir_module().splitlines() if "stablehlo.constant" in line), default=0)


def test_programs_hold_no_weights_and_are_of_every_platform(tokenizer):
    for path in tokenizer.glob("*.stablehlo"):
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        assert exported.platforms == stablehlo.PLATFORMS
        assert longest_constant(exported) < 1500  # the pooling that starts the queries is 1100
    weights = bundle.load(tokenizer).params["bottleneck"]["codebook"]
    baked = jax.export.export(jax.jit(lambda ids: jax.numpy.asarray(weights)[ids]))(jax.ShapeDtypeStruct((2,), "int32"))
    assert longest_constant(baked) > 2000  # as a program would that held its codebook
