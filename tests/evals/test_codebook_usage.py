import jax
import numpy as np
import pytest
from scipy import stats

from gigatok_jax.evals.codebook import count_ids, entropy, perplexity, usage


def test_counts_leave_out_padding_and_foreign_ids():
    ids = np.array([[0, 2, 2], [-1, 3, 7]])
    counts = jax.jit(count_ids, static_argnums=1)(ids, 4)
    np.testing.assert_array_equal(counts, [1, 0, 2, 1])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_equal_scipy(dtype):
    counts = np.random.default_rng(0).integers(0, 4, size=1000).astype(dtype)
    assert float(usage(counts)) == pytest.approx(np.count_nonzero(counts) / 1000)
    assert float(entropy(counts)) == pytest.approx(stats.entropy(counts), rel=1e-5)
    assert float(perplexity(counts)) == pytest.approx(np.exp(stats.entropy(counts)), rel=1e-5)


def test_extremes():
    uniform, single, empty = np.full(64, 5), np.eye(64, dtype=int)[3] * 9, np.zeros(64, int)
    assert [float(usage(c)) for c in (uniform, single, empty)] == [1.0, 1 / 64, 0.0]
    assert [float(perplexity(c)) for c in (uniform, single, empty)] == pytest.approx([64.0, 1.0, 1.0], rel=1e-5)


def test_counts_beyond_int32():
    assert float(entropy(np.array([2**40, 2**40]))) == pytest.approx(np.log(2.0))
