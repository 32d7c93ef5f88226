"""A published checkpoint's tensors ↔ our parameter tree, as data: a total, bijective list of `Entry`.

Each model's list is enumerated from its config, so a key is unknown, missing or misshapen by comparison with the list
and never by a pattern that happens to match.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gigatok_jax.hub.streaming import FLOATING

SHOWN = 40  # of the keys that do not fit


class Entry(NamedTuple):
    """One published tensor, and the leaf (or the rows or layer of it) that holds it here.

    paths: our leaves, "/"-joined; several where the published tensor packs them along axis 0 (q|k|v).
    kind: how the layout turns, see `to_ours`.   layer: index on our leading stack axis, or None.
    shape: the published shape.
    """

    key: str
    paths: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    layer: int | None = None


def to_ours(array: np.ndarray, kind: str) -> np.ndarray:
    """Published layout → ours."""
    if kind == "conv":  # OIHW → HWIO
        return array.transpose(2, 3, 1, 0)
    if kind == "dense":  # (out, in) → (in, out)
        return array.T
    if kind == "conv1x1":  # (out, in, 1, 1) → (in, out)
        return array[:, :, 0, 0].T
    if kind == "table":  # (positions, 1, D) → (positions, D)
        return array[:, 0]
    if kind == "conv1d":  # (out, in, size) → (size, in, out)
        return array.transpose(2, 1, 0)
    if kind == "head":  # (1, in, 1, 1) → (in,)
        return array[0, :, 0, 0]
    if kind == "shared_table":  # (1, 1, rows, D) → (rows, D)
        return array[0, 0]
    if kind == "positions":  # (1, rows, D) → (rows, D)
        return array[0]
    if kind == "token":  # (D,) → (1, 1, D)
        return array[None, None]
    if kind == "rows":  # (rows, D) → (1, rows, D)
        return array[None]
    if kind == "cells":  # (1, cells, D) → (1, 1 + cells, D), zeros first
        return np.pad(array, ((0, 0), (1, 0), (0, 0)))
    if kind == "channels":  # (C, 1, 1) → (C,)
        return array[:, 0, 0]
    return array


def to_published(array: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `to_ours`."""
    if kind == "conv":
        return array.transpose(3, 2, 0, 1)
    if kind == "dense":
        return array.T
    if kind == "conv1x1":
        return array.T[:, :, None, None]
    if kind == "table":
        return array[:, None]
    if kind == "conv1d":
        return array.transpose(2, 1, 0)
    if kind == "head":
        return array[None, :, None, None]
    if kind == "shared_table":
        return array[None, None]
    if kind == "positions":
        return array[None]
    if kind == "token":
        return array[0, 0]
    if kind == "rows":
        return array[0]
    if kind == "cells":
        return array[:, 1:]
    if kind == "channels":
        return array[:, None, None]
    return array


def check_keys(entries: Iterable[Entry], state: Mapping[str, Any], droppable: tuple[str, ...] = ()) -> None:
    """Every published key is accounted for.

    Raises:
      ValueError: listing all unknown, missing and misshapen keys, and such as hold no floating numbers.
    """
    want = {entry.key: entry.shape for entry in entries}
    dtypes = {key: str(getattr(value, "dtype", "float32")).removeprefix("torch.") for key, value in state.items()}
    others = [f"no weights: {key} is {dtype}" for key, dtype in dtypes.items() if key in want and dtype not in FLOATING]
    _compare(want, state, droppable, others)


def leaf_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """The shapes of our leaves by path."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        part = entry.shape if len(entry.paths) == 1 else (entry.shape[0] // len(entry.paths), *entry.shape[1:])
        shape = to_ours(np.broadcast_to(0, part), entry.kind).shape
        for path in entry.paths:  # layers come in ascending order: the last one tells how many there are
            shapes[path] = shape if entry.layer is None else (entry.layer + 1, *shape)
    return shapes


def check_leaves(entries: Iterable[Entry], flat: Mapping[str, Any]) -> None:
    """As `check_keys`, for our leaves by path (anything with a shape)."""
    _compare(leaf_shapes(entries), flat)


def _compare(
    want: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Any],
    droppable: tuple[str, ...] = (),
    others: Iterable[str] = (),
) -> None:
    problems = [f"unknown: {key}" for key in found if key not in want and key not in droppable]
    problems += [f"missing: {key} {shape}" for key, shape in want.items() if key not in found]
    problems += [
        f"misshapen: {key} is {np.shape(found[key])}, expected {shape}"
        for key, shape in want.items()
        if key in found and np.shape(found[key]) != shape
    ]
    problems += others
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        shown = "\n  ".join(problems[:SHOWN] + more)
        raise ValueError(f"{len(problems)} keys do not fit this model:\n  {shown}")


def from_published(
    entries: list[Entry], state: Mapping[str, np.ndarray], droppable: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Published tensors → our nested parameter dict (numpy)."""
    check_keys(entries, state, droppable)
    read = leaf_reader(entries, state)
    return unflatten({path: read(path) for path in dict.fromkeys(path for entry in entries for path in entry.paths)})


def leaf_reader(entries: Iterable[Entry], state: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    """Gives our leaf of a path; of `state`, whose keys were checked, no more is read than it takes."""
    sources: dict[str, list[tuple[Entry, int]]] = {}
    for entry in entries:
        for part, path in enumerate(entry.paths):
            sources.setdefault(path, []).append((entry, part))

    def read(path: str) -> np.ndarray:
        leaf: np.ndarray | None = None
        for entry, part in sources[path]:
            piece = to_ours(np.split(np.asarray(state[entry.key]), len(entry.paths))[part], entry.kind)
            if entry.layer is None:
                return np.ascontiguousarray(piece)
            leaf = np.empty((len(sources[path]), *piece.shape), piece.dtype) if leaf is None else leaf
            leaf[entry.layer] = piece
        return leaf

    return read


def into_published(entries: list[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters → published tensors.

    Raises:
      ValueError: listing all unknown, missing and misshapen leaves.
    """
    flat = flatten(params)
    check_leaves(entries, flat)
    return {entry.key: published_tensor(entry, flat) for entry in entries}


def published_tensor(entry: Entry, flat: Mapping[str, Any]) -> np.ndarray:
    """One published tensor of our leaves by path, which were checked; of a stack one layer is read."""
    at = slice(None) if entry.layer is None else entry.layer
    parts = [to_published(np.asarray(flat[path][at]), entry.kind) for path in entry.paths]
    return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


def translated(
    entries: Iterable[Entry], state: Mapping[str, Any], wanted: Iterable[Entry]
) -> Callable[[str], np.ndarray]:
    """Reads tensors of one layout out of a state in another, whose keys were checked, one at a time."""
    sources = {(path, entry.layer): (entry, part) for entry in entries for part, path in enumerate(entry.paths)}
    by_key = {entry.key: entry for entry in wanted}

    def read(key: str) -> np.ndarray:
        entry, parts = by_key[key], []
        for path in entry.paths:
            source, part = sources[path, entry.layer]
            piece = np.split(np.asarray(state[source.key]), len(source.paths))[part]
            parts.append(to_published(to_ours(piece, source.kind), entry.kind))
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

    return read


def translated_dtypes(
    entries: Iterable[Entry], state: Mapping[str, Any], wanted: Iterable[Entry]
) -> dict[str, np.dtype]:
    """The dtypes of what `translated` reads."""
    sources = {(path, entry.layer): state[entry.key].dtype for entry in entries for path in entry.paths}
    return {entry.key: np.result_type(*(sources[path, entry.layer] for path in entry.paths)) for entry in wanted}


def count(keys: Iterable[str], pattern: str) -> int:
    """How many layers, levels or blocks there are: numbers that a pattern's group finds from the start of keys."""
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} → {"a/b": x}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
