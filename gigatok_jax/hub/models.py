"""Published checkpoints of tokenizers, generators and discriminators ↔ bundles."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

import gigatok_jax
from gigatok_jax.hub import bundle, keymap, sections
from gigatok_jax.hub.layouts import LAYOUTS, ModelLayout
from gigatok_jax.hub.published import opened
from gigatok_jax.hub.streaming import published_metadata, write_streamed
from gigatok_jax.hub.tensors import sha256


def convert(
    name: str, state: Mapping[str, Any], fields: Mapping[str, Any] | None = None, **facts: Any
) -> bundle.Bundle:
    """A published state dict as a bundle in memory.

    Args:
      name: of `LAYOUTS`.
      state: published name → array.
      fields: of the section, where they are not as published and shapes do not tell (see `section_of`).
      facts: `tokenizer` and `class_names` as in `Bundle`, `provenance`.

    Raises:
      ValueError: listing every unknown, missing and misshapen key, or for a field that the section does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(name, state, Path(folder), fields, **facts)
        return bundle.load(folder)._replace(folder=None)


def convert_files(
    name: str,
    paths: Sequence[Path],
    out: Path,
    *,
    part: str = "",
    fields: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Published files → a bundle's folder, one parameter in memory at a time; returns what its `config.json` holds.

    Args:
      part: of a training checkpoint, such as "ema" or "model"; as the published loaders choose if empty.
      tokenizer: of a generator, the facts of the bundle whose ids it writes, which its sizes are compared with.
      name, fields: as in `convert`.

    Raises:
      ValueError: as `convert`, and for a damaged file.
      OSError: a file cannot be read or written.
    """
    with opened(paths, part, _layout(name).parts) as (state, taken):
        provenance = {"files": {path.name: sha256(path) for path in map(Path, paths)}, "part": taken}
        facts = {"tokenizer": tokenizer, "provenance": provenance, "on_tensor": on_tensor}
        return write(name, state, out, fields, **facts)


def write(
    name: str, state: Mapping[str, Any], out: Path, fields: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """As `convert`, into a folder; returns what its `config.json` holds."""
    layout = _layout(name)
    fields, tokenizer = dict(fields or {}), facts.get("tokenizer")
    if tokenizer and "positional_embedding" not in state:  # such a generator is for any number of ids
        fields.setdefault("num_latent_tokens", tokenizer["num_latent_tokens"])
    section = section_of(name, {key: tuple(np.shape(value)) for key, value in state.items()}, fields)
    entries, buffers = layout.keys.entries(section), layout.keys.buffers(section)
    try:
        keymap.check_keys(entries, state, (*buffers, *layout.keys.old))
    except ValueError as error:
        raise ValueError(f"these are not the weights of {layout.what}: {error}") from None
    read = keymap.leaf_reader(entries, state)
    provenance = {
        "from": name,
        "source": layout.source,
        "licence": layout.licence,
        **facts.pop("provenance", {}),
        "dtypes": _dtypes(entries, state),
        "dropped": sorted(state.keys() & {*buffers, *layout.keys.old}),
        "versions": {"gigatok_jax": gigatok_jax.__version__},
    }
    float32 = lambda path: np.require(read(path), np.float32, "C")  # noqa: E731
    return bundle.save(out, layout.kind, section, float32, provenance=provenance, **facts)


def section_of(name: str, shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config section of a published state dict.

    Raises:
      ValueError: where it is another layout's, or a field is not the section's.
    """
    layout = _layout(name)
    try:
        section = layout.keys.section_of(shapes)
    except (KeyError, ValueError, IndexError) as error:
        told = error if isinstance(error, KeyError) else "a tensor that tells the sizes"
        raise ValueError(f"these are not the weights of {layout.what}: {told} is missing or misshapen") from None
    if unknown := sorted(fields.keys() - section.keys()):
        raise ValueError(f"the {layout.kind} section has no {', '.join(unknown)}; it has {', '.join(section)}")
    section |= fields
    _check_form(name, section)
    return sections.checked_section(layout.kind, json.loads(json.dumps(section)), "the section")


def recognised(name: str, section: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(The fields that tell one published model from another, whether they are a published model's)."""
    layout = _layout(name)
    sizes = {field: section[field] for field in layout.sizes}
    return sizes, tuple(sizes.values()) in layout.known


def publish(
    name: str, folder: str | os.PathLike, out: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """A bundle → a safetensors file in a published layout, complete with the buffers that `convert` drops.

    Tensors that were converted from a 16-bit dtype are written in it.

    Returns:
      {"file", "sha256", "tensors", "parameters"}.
    Raises:
      ValueError: the bundle is damaged, or of a model that the layout does not have.
      OSError: a file cannot be read or written.
    """
    layout = _layout(name)
    with bundle.stored(folder) as (content, leaves):
        if content["kind"] != layout.kind:
            raise ValueError(f"{folder} is a bundle of a {content['kind']}; {name} is the form of a {layout.kind}")
        _check_form(name, content["section"])
        entries = {entry.key: entry for entry in layout.keys.entries(content["section"])}
        keymap.check_leaves(entries.values(), leaves)
        dtypes = _stored_dtypes(name, content["provenance"])
        shapes = {key: ShapeDtypeStruct(entry.shape, dtypes(key)) for key, entry in entries.items()}
        buffers = layout.keys.buffers(content["section"])

        def read(key: str) -> np.ndarray:
            if key not in entries:
                return buffers[key]
            return keymap.published_tensor(entries[key], leaves).astype(dtypes(key), copy=False)

        kept = {field: content["provenance"].get(field) for field in ("from", "source", "licence")}
        metadata = published_metadata({"bundle": content["hash"], **kept})
        out.parent.mkdir(parents=True, exist_ok=True)
        digest = write_streamed(out, shapes | buffers, read, on_tensor, metadata)
    count = sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in entries.values())
    return {"file": str(out), "sha256": digest, "tensors": len(shapes | buffers), "parameters": count}


def _dtypes(entries: Sequence[keymap.Entry], state: Mapping[str, Any]) -> str | dict[str, str]:
    """What the published tensors were stored in: one dtype, or that of each."""
    found = {entry.key: str(getattr(state[entry.key], "dtype", "float32")) for entry in entries}
    found = {key: dtype.removeprefix("torch.") for key, dtype in found.items()}
    return found if len(set(found.values())) > 1 else next(iter(found.values()))


def _stored_dtypes(name: str, provenance: Mapping[str, Any]) -> Callable[[str], np.dtype]:
    """Gives the dtype to write a tensor in: a 16-bit one that it came in, float32 otherwise."""
    recorded = provenance.get("dtypes") if provenance.get("from") == name else None

    def dtype(key: str) -> np.dtype:
        told = recorded.get(key) if isinstance(recorded, dict) else recorded
        return np.dtype(jnp.dtype(told if told in ("float16", "bfloat16") else "float32"))

    return dtype


def _layout(name: str) -> ModelLayout:
    if name not in LAYOUTS:
        raise ValueError(f"no published model's layout is called {name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _check_form(name: str, section: Mapping[str, Any]) -> None:
    for field, value in _layout(name).requires.items():
        if section[field] != value:
            raise ValueError(
                f"{name} has {field}={value!r}, this model {field}={section[field]!r}: no published model of this form "
                "does, keep the bundle as it is"
            )
