"""The comparison that the golden tests rest on can fail: on one element, on NaN, on a shape, on a missing leaf."""

import numpy as np
import pytest

from tests.compare import assert_close_tree

LEAF = np.linspace(-1, 1, 10_001)  # one element is exactly 0


def _with(index, value):
    changed = LEAF.copy()
    changed[index] = value
    return changed


def test_round_off_passes():
    assert_close_tree({"a": LEAF + 1e-7, "b": LEAF * (1 + 5e-5)}, {"a": LEAF, "b": LEAF})


@pytest.mark.parametrize("wrong", [_with(0, -1.001), _with(5000, 1e-3), _with(5, np.nan), LEAF[1:], LEAF * 1.001])
def test_a_wrong_leaf_fails_and_is_named(wrong):
    with pytest.raises(AssertionError, match=r"\['b'\]"):
        assert_close_tree({"a": LEAF, "b": wrong}, {"a": LEAF, "b": LEAF})


def test_a_missing_leaf_fails():
    with pytest.raises(AssertionError, match="structures differ"):
        assert_close_tree({"a": LEAF}, {"a": LEAF, "b": LEAF})
