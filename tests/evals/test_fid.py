"""The Fréchet distance's properties, and the rFID that a tokenizer's evaluation reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax import config, data, sharding
from gigatok_jax.evals import evaluator
from gigatok_jax.evals.evaluator import Evaluator
from gigatok_jax.evals.fid import Statistics, TooFewImages, frechet_distance
from gigatok_jax.hub import teachers as hub
from gigatok_jax.teachers import inception
from tests.networks import TINY_INCEPTION
from tests.teachers.seeded import seeded_inception
from tests.tiny import tiny_run


def drawn(seed, count=400, features=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, features)) @ rng.standard_normal((features, features)) + rng.uniform(0, 5)


def exactly(mean, scales):
    """Statistics of features with this mean and, to rounding, a diagonal covariance of these squared scales."""
    x = np.random.default_rng(0).standard_normal((50, len(scales)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return Statistics.of(x * scales + mean)


def test_equal_sets_are_at_distance_zero():
    a = Statistics.of(drawn(0))
    assert 0 <= frechet_distance(a, a) < 1e-9 * np.trace(a.moments()[1])


def test_the_distance_of_gaussians_that_is_known_on_paper():
    """Diagonal covariances commute: |μ − ν|² + Σ (s − t)²."""
    a, b = exactly([0, 0, 0], [1, 2, 3]), exactly([1, -2, 0], [2, 2, 0.5])
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 6.25, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(12.25, rel=1e-9)


def test_parts_add_up_to_the_whole():
    x = drawn(1)
    parts = Statistics.of(x[:1]) + Statistics.of(x[1:150]) + Statistics.of(x[150:])
    mean, covariance = parts.moments()
    assert parts.count == 400 and mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-10)


def test_too_few_images_are_named_with_the_mend():
    enough, few = Statistics.of(drawn(0, 7)), Statistics.of(drawn(0, 6))
    assert frechet_distance(enough, enough) >= 0
    for pair in ((enough, few), (few, enough)):
        with pytest.raises(TooFewImages, match=r"at least 7 images, 6 are given.*eval\.num_images=7"):
            frechet_distance(*pair)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A folder with the weights of a narrow network that looks at small pictures."""
    monkeypatch.setitem(inception.NETWORKS, "inception", TINY_INCEPTION)
    monkeypatch.setattr(inception, "SIZE", 96)
    save_file(seeded_inception(hub.entries("inception")), tmp_path / "inception.safetensors")
    return tmp_path


def settings(folder, **changes):
    changes = {"eval__fid": True, "eval__num_images": 45, "eval__batch": 16, **changes}
    return tiny_run(data__eval_source="photographs", frozen__folder=str(folder), **changes)


def mesh_of(count):
    return sharding.make_mesh({"data": count, "fsdp": 1, "tensor": 1}, jax.devices()[:count])


def dimmed(params, frozen, image):
    return params["gain"] * image, jnp.zeros((len(image), 8), jnp.int32)


def test_eight_devices_report_the_rfid_of_one(tiny):
    """And it is that of the features of the rounded pictures."""
    cfg, scores = settings(tiny), []
    for count in (1, 8):
        evaluate = Evaluator(cfg, dimmed, mesh_of(count), {})
        scores.append(evaluate({"gain": 0.6})[0])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    images = np.concatenate(list(evaluate._batches()))
    rounded = np.floor(np.clip(0.6 * (images.astype(np.float32) / 127.5 - 1) * 127.5 + 128, 0, 255)).astype(np.uint8)
    network = jax.jit(inception.outputs("torch-fidelity"))
    variables = hub.load("inception", tiny / "inception.safetensors")
    a, b = (Statistics.of(network(variables, x).features_BM) for x in (images, rounded))
    assert scores[0]["rfid"] == pytest.approx(frechet_distance(a, b), rel=1e-3) and scores[0]["rfid"] > 1e-3
    exact, broken = (evaluate({"gain": gain})[0] for gain in (1.0, np.nan))
    assert exact["rfid"] < 1e-3 * scores[0]["rfid"] and np.isnan(broken["rfid"])


def test_images_that_cannot_be_read_are_missed(tiny, monkeypatch):
    evaluate = Evaluator(settings(tiny), dimmed, mesh_of(1), {})
    read = list(evaluate._batches())
    monkeypatch.setattr(evaluate, "_batches", lambda: read[:2])
    evaluate.bad_records["a.jpg"] = "cut"
    with pytest.raises(data.NoUsableImages, match=r"1 held-out images cannot be read: .*at least 34 images, 32 are"):
        evaluate({"gain": 1.0})


def test_what_cannot_work_is_said_before_training(tiny):
    with pytest.raises(ValueError, match=r"at least 34 images, 33 are given.*--config\.eval\.fid=False"):
        Evaluator(settings(tiny, eval__num_images=33), dimmed, mesh_of(1), {})
    (tiny / "inception.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)network inception .*pt_inception-2015-12-05.*--from=inception"):
        Evaluator(settings(tiny), dimmed, mesh_of(1), {})
    with pytest.raises(ValueError, match=r"eval\.fid=True, but nothing is evaluated.*eval_source"):
        config.validate(tiny_run(eval__fid=True))


def test_the_published_network_needs_2049_images():
    with pytest.raises(ValueError, match="at least 2049 images, 512 are given"):
        Evaluator(settings("", eval__num_images=512), dimmed, mesh_of(1), {})


def test_off_it_is_not_there(monkeypatch):
    monkeypatch.setattr(evaluator, "fid", None)
    evaluate = Evaluator(settings("", eval__fid=False, eval__num_images=4), dimmed, mesh_of(1), {})
    assert "rfid" not in evaluate({"gain": 0.6})[0]
