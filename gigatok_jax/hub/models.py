"""Published checkpoints of tokenizers, generators and discriminators ↔ bundles."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import ShapeDtypeStruct

import gigatok_jax
from gigatok_jax.hub import bundle, dino_heads, gigatok, gpt, keymap, llamagen, patchgan, sections
from gigatok_jax.hub.published import opened
from gigatok_jax.hub.streaming import write_streamed
from gigatok_jax.hub.tensors import sha256


class Keys(NamedTuple):
    """The tensors of a kind of model.

    section_of: shapes by published name → the config section.   entries: the section → its key list.
    buffers: the section → the closed set of tensors that are dropped, with what they are made anew as.
    """

    section_of: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    entries: Callable[[Mapping[str, Any]], list[keymap.Entry]]
    buffers: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] = lambda section: {}


class ModelLayout(NamedTuple):
    """The form in which a project publishes a model.

    part: of a training checkpoint that holds it; "": as the published loaders choose.
    requires: fields of the section that another layout of the same keys has otherwise.
    """

    kind: str
    what: str
    source: str
    licence: str
    tested: str
    keys: Keys
    requires: Mapping[str, Any]
    part: str = ""


_GIGATOK, _LLAMAGEN = "https://github.com/SilentView/GigaTok", "https://github.com/FoundationVision/LlamaGen"
_RECORDED = "recorded outputs of the published code; key lists of every published size"
_used = lambda section: gigatok.BUFFERS  # noqa: E731
LAYOUTS: dict[str, ModelLayout] = {
    "gigatok": ModelLayout(
        kind="tokenizer",
        what="GigaTok tokenizers, 1-D and 2-D",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(gigatok.section_of, gigatok.entries, _used),
        requires={"family": "gigatok"},
    ),
    "gigatok-gpt": ModelLayout(
        kind="generator",
        what="GigaTok's GPT-1D, B to XXL",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(gpt.section_of, gpt.entries),
        requires={"positions": "learned"},
    ),
    "gigatok-patchgan": ModelLayout(
        kind="discriminator",
        what="GigaTok's and LlamaGen's PatchGAN",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(patchgan.section_of, patchgan.section_entries, patchgan.buffers),
        requires={},
        part="discriminator",
    ),
    "gigatok-dino-disc": ModelLayout(
        kind="discriminator",
        what="the trained heads of GigaTok's DINO discriminator",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(dino_heads.section_of, dino_heads.section_entries),
        requires={},
        part="discriminator",
    ),
    "llamagen": ModelLayout(
        kind="tokenizer",
        what="LlamaGen's VQ-16 and VQ-8 tokenizers, for any image size",
        source=_LLAMAGEN,
        licence="MIT",
        tested="PyTorch on the same weights; key lists of the published code",
        keys=Keys(llamagen.section_of, llamagen.entries, _used),
        requires={"family": "llamagen"},
    ),
    "llamagen-gpt": ModelLayout(
        kind="generator",
        what="LlamaGen's class-conditional GPT, B to 3B",
        source=_LLAMAGEN,
        licence="MIT",
        tested=_RECORDED,
        keys=Keys(gpt.section_of, gpt.entries),
        requires={"positions": "rope_2d", "modulation": "none", "qk_norm": False},
    ),
}


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
      tokenizer: of a generator, the facts of the bundle whose ids it writes.
      name, fields: as in `convert`.

    Raises:
      ValueError: as `convert`, and for a damaged file.
      OSError: a file cannot be read or written.
    """
    layout = _layout(name)
    with opened(paths, part or layout.part) as state:
        provenance = {
            "from": name,
            "source": layout.source,
            "licence": layout.licence,
            "files": {path.name: sha256(path) for path in map(Path, paths)},
            "part": part or layout.part or "as the published loaders choose",
        }
        facts = {"tokenizer": tokenizer, "provenance": provenance, "on_tensor": on_tensor}
        return write(name, state, out, fields, **facts)


def write(
    name: str, state: Mapping[str, Any], out: Path, fields: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """As `convert`, into a folder; returns what its `config.json` holds."""
    layout = _layout(name)
    section = section_of(name, {key: tuple(np.shape(value)) for key, value in state.items()}, fields or {})
    entries, buffers = layout.keys.entries(section), layout.keys.buffers(section)
    try:
        keymap.check_keys(entries, state, tuple(buffers))
    except ValueError as error:
        raise ValueError(f"these are not the weights of {layout.what}: {error}") from None
    read = keymap.leaf_reader(entries, state)
    provenance = {
        **facts.pop("provenance", {}),
        "dropped": sorted(state.keys() & buffers.keys()),
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
        raise ValueError(f"these are not the weights of {layout.what}: {error} is missing or misshapen") from None
    if unknown := sorted(fields.keys() - section.keys()):
        raise ValueError(f"the {layout.kind} section has no {', '.join(unknown)}; it has {', '.join(section)}")
    section |= fields
    _check_form(name, section)
    return sections.checked_section(layout.kind, json.loads(json.dumps(section)), "the section")


def publish(
    name: str, folder: str | os.PathLike, out: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """A bundle → a safetensors file in a published layout, complete with the buffers that `convert` drops.

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
        shapes = {key: ShapeDtypeStruct(entry.shape, np.float32) for key, entry in entries.items()}
        buffers = layout.keys.buffers(content["section"])

        def read(key: str) -> np.ndarray:
            return keymap.published_tensor(entries[key], leaves) if key in entries else buffers[key]

        out.parent.mkdir(parents=True, exist_ok=True)
        digest = write_streamed(out, shapes | buffers, read, on_tensor)
    count = sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in entries.values())
    return {"file": str(out), "sha256": digest, "tensors": len(shapes | buffers), "parameters": count}


def _layout(name: str) -> ModelLayout:
    if name not in LAYOUTS:
        raise ValueError(f"no published model's layout is called {name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _check_form(name: str, section: Mapping[str, Any]) -> None:
    for field, value in _layout(name).requires.items():
        if section[field] != value:
            raise ValueError(f"{name} has {field}={value!r}, this model {field}={section[field]!r}")
