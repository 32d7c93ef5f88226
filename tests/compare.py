"""One way to compare trees of arrays, for every test that replays recorded numbers."""

from typing import Any

import jax
import numpy as np


def assert_close_tree(got: Any, want: Any, rtol: float = 1e-4) -> None:
    """Asserts that two trees have the same structure and shapes, and that every element agrees to `rtol`.

    An element's error is |got − want| / max(|want|, rms of its leaf, 1e-6 · global norm of `want`): relative where
    the element has a typical size for its leaf, and not demanding digits that float32 cancellation has eaten where it
    is nearly zero. One wrong element fails, however large the leaf. NaN fails.
    """
    got_leaves, got_structure = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_structure = jax.tree_util.tree_flatten_with_path(want)
    assert got_structure == want_structure, f"structures differ:\n  got  {got_structure}\n  want {want_structure}"
    global_norm = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for _, leaf in want_leaves))

    problems = []
    for (path, a), (_, b) in zip(got_leaves, want_leaves):
        name = jax.tree_util.keystr(path) or "value"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape:
            problems.append(f"{name}: got shape {a.shape}, want {b.shape}")
            continue
        floor = max(np.sqrt(np.mean(np.square(b))), 1e-6 * global_norm, np.finfo(np.float32).tiny)
        error = np.abs(a - b) / np.maximum(np.abs(b), floor)
        if not np.all(error <= rtol):  # written so that NaN fails
            at = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
            at_text = f" at {tuple(int(i) for i in at)}" if at else ""
            problems.append(f"{name}: relative error {error[at]:.2e}{at_text}, got {a[at]:.8g}, want {b[at]:.8g}")
    assert not problems, f"{len(problems)} leaves differ by more than {rtol:g}:\n  " + "\n  ".join(problems)
