"""The rate at which two pipelines of one generator draw the same ids."""

import numpy as np
import pytest

from gigatok_jax import from_pretrained
from gigatok_jax.hub import bundle
from gigatok_jax.sampling.agreement import agreement
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from tests.tiny import tiny_generator, tiny_run


def write(folder, kind, section, std=0.2):
    """A bundle of drawn parameters."""
    rng = np.random.default_rng(0)
    shapes = bundle.parameter_shapes(kind, section)
    arrays = {name: rng.normal(0, std, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    bundle.save(folder, kind, section, arrays.__getitem__)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("generator"), "generator", tiny_generator().to_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_generator_agrees_with_itself_as_far_as_it_rounds(folder, dtype):
    if dtype == "int8":
        pytest.importorskip("qwix", reason="int8 weights need the package qwix: pip install -e .[test]")
    seen = []
    facts = agreement(
        from_pretrained(folder),
        from_pretrained(folder, dtype=dtype),
        np.arange(24) % 5,
        batch=16,
        on_batch=lambda *counts: seen.append(counts),
        seed=3,
        scale=2.0,
        schedule="step",
    )
    assert facts["dtype"] == dtype and facts["positions"] == 24 * 16 and seen == [(1, 2), (2, 2)]
    if dtype == "float32":
        assert facts["same_ids"] == 1 and facts["log_p_error"] < 1e-5
    else:
        assert 0.95 < facts["same_ids"] <= 1 and 1e-4 < facts["log_p_error"] < 0.1


def test_another_generator_does_not_agree(folder, tmp_path):
    other = from_pretrained(write(tmp_path, "generator", tiny_generator().to_dict(), std=0.5))
    facts = agreement(from_pretrained(folder), other, np.arange(8) % 5)
    assert facts["same_ids"] < 0.8 and facts["log_p_error"] > 0.1


def test_following_its_own_ids_a_generator_draws_them(folder):
    generator = from_pretrained(folder)
    labels, settings = [0, 3, 2], {"seed": 5, "scale": 3.0, "schedule": "rectangular", "start": 0.3, "end": 0.6}
    ids = generator.sample(labels, **settings)
    drawn, log_p = generator.follow(labels, ids, **settings)
    np.testing.assert_array_equal(drawn, ids)
    assert (log_p < 0).all()
    # Another id at one place changes what is drawn after it, not before it.
    changed = ids.copy()
    changed[:, 6] = (ids[:, 6] + 1) % 16
    drawn, other = generator.follow(labels, changed, **settings)
    np.testing.assert_array_equal(drawn[:, :7], ids[:, :7])
    np.testing.assert_allclose(other[:, :6], log_p[:, :6], rtol=1e-5)
    assert (np.abs(other[:, 7:] - log_p[:, 7:]) > 1e-3).any()


def test_int8_is_of_generators_alone(tmp_path):
    write(tmp_path, "tokenizer", tiny_run().tokenizer.to_dict())
    with pytest.raises(ValueError, match="a tokenizer runs in one of float32, bfloat16"):
        from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="a generator runs in one of float32, bfloat16, int8"):
        GeneratorPipeline(bundle.load(write(tmp_path / "g", "generator", tiny_generator().to_dict())), dtype="int4")
