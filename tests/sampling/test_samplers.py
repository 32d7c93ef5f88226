"""What every family of generators says of its sampling, and that nothing but tables knows the families."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import objectives, sample
from gigatok_jax.evals.report import write_report
from gigatok_jax.hub import keymap, sections, stablehlo
from gigatok_jax.hub.bundle import Bundle
from gigatok_jax.sampling import ar, masked
from gigatok_jax.sampling.pipelines import generator_pipeline
from gigatok_jax.sampling.samplers import SAMPLERS
from tests.tiny import drawn_generator, drawn_masked, tiny_masked

DRAWN = {"ar": lambda: drawn_generator("plain"), "masked": lambda: drawn_masked("bert")}


def test_every_family_that_can_be_built_can_be_sampled_from():
    assert SAMPLERS.keys() == objectives.GENERATORS.keys() == sections.SECTIONS["generator"].keys() == DRAWN.keys()
    for name, family in SAMPLERS.items():
        defaults = family.pipeline.defaults
        assert {"seed", "scale", "schedule", "temperature"} <= defaults.keys() <= set(sample.OPTIONS)
        assert defaults["schedule"] in family.schedules and f"{defaults['scale']} ({name})" in sample.default("scale")
        assert family.pipeline.follows == hasattr(family.pipeline, "follow")


@pytest.mark.parametrize("name", SAMPLERS)
def test_ids_are_those_of_the_class_unless_guided_away_from_the_null_class(name):
    family, (model, params) = SAMPLERS[name], DRAWN[name]()
    K, classes = model.num_latent_tokens, jnp.arange(6, dtype=jnp.int32) % 2
    plain, guided = (family.constant(K, scale) for scale in (1.0, 3.0))
    assert not family.guided(plain) and family.guided(guided)
    held, keys = family.held(params, "float32"), ar.image_keys(0, jnp.arange(6))

    def ids(steps, guided):
        return np.asarray(jax.jit(lambda held: family.generate(model, held, classes, keys, steps, guided=guided))(held))

    found = ids(plain, family.guided(plain))
    assert found.shape == (6, K) and found.min() >= 0 and found.max() < model.codebook_size
    np.testing.assert_array_equal(ids(plain, family.guided(guided)), found)  # beside a null class of no weight
    assert (ids(guided, family.guided(guided)) != found).any()
    weights = 10**6
    assert family.bytes_read(model, guided, weights, 6) >= family.bytes_read(model, plain, weights, 6) >= 8 * weights


def test_a_family_more_is_a_row_of_each_table(monkeypatch):
    """As `masked`, but that it takes three steps."""
    more = SAMPLERS["masked"]._replace(constant=lambda K, scale: masked.make_steps(K, num_steps=3, scale=scale))
    monkeypatch.setitem(SAMPLERS, "more", more)
    monkeypatch.setitem(objectives.GENERATORS, "more", objectives.GENERATORS["masked"])
    section = {**tiny_masked("bert").to_dict(), "family": "more"}
    program, *inputs = stablehlo.programs("generator", section)["sample"]
    assert [leaf.shape for leaf in inputs[3:]] == [(3,)] * 4
    weights, rows = keymap.flatten(drawn_masked("bert")[1]), jnp.arange(2, dtype=jnp.int32)
    assert jax.eval_shape(program, weights, rows, rows, jnp.uint32(0), *more.constant(8, 2.0)).shape == (2, 8)
    found = Bundle("generator", section, jax.device_get(drawn_masked("bert")[1]), (), None, {}, "")
    assert type(generator_pipeline(found)) is more.pipeline


def test_a_report_draws_whatever_likelihood_was_scored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/more_val_loss": 2.5}\n')
    report = write_report(tmp_path, {"bad_records": {}})
    assert tmp_path / "curves.png" in report
    assert json.loads((tmp_path / "report.json").read_text())["more_val_loss"] == 2.5
