"""Bundles: a folder with `config.json` and `model.safetensors` that a tokenizer or generator is used from.

`config.json` is data with a closed set of names, never an import path; weights are named by our parameter paths.
Nothing is unpickled, and nothing outside the folder is read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gigatok_jax.hub import keymap
from gigatok_jax.hub.sections import RUN_ONLY, build_model, checked_section, parameter_shapes
from gigatok_jax.hub.streaming import write_streamed
from gigatok_jax.hub.tensors import sha256

SCHEMA = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELDS = ("schema", "kind", "section", "class_names", "tokenizer", "provenance", "weights_sha256", "hash")
MAX_CONFIG_BYTES = 16 * 2**20


class Bundle(NamedTuple):
    """What a folder holds.

    kind: "tokenizer", "generator" or "discriminator".   section: the config section of that name.
    params: nested numpy arrays; of a discriminator by collection, running statistics and spectral vectors too.
    class_names: of the data trained on.   tokenizer: of a generator, what wrote its ids ("hash" and sizes), else None.
    provenance: resolved config, step, versions, for people.   hash: names section and weights.
    """

    kind: str
    section: dict[str, Any]
    params: dict[str, Any]
    class_names: tuple[str, ...]
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any]
    hash: str

    def model(self, dtype: str = "float32") -> Any:
        """The network that the parameters are of."""
        return build_model(self.kind, self.section, dtype)

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes it; returns what `config.json` holds. Raises OSError where the folder cannot be written."""
        flat, kept = keymap.flatten(self.params), ("class_names", "tokenizer", "provenance")
        facts = {name: getattr(self, name) for name in kept}
        return save(folder, self.kind, self.section, lambda path: np.asarray(flat[path]), **facts)

    def facts(self) -> dict[str, Any]:
        """Of a tokenizer: what token shards and generators keep of it."""
        return facts(self.section, self.hash)


def save(
    folder: str | os.PathLike,
    kind: str,
    section: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    *,
    class_names: tuple[str, ...] = (),
    tokenizer: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes a bundle, one tensor at a time; returns what `config.json` holds.

    Args:
      kind, section, class_names, tokenizer, provenance: as in `Bundle`.
      read: the float32 parameter of a path such as "encoder/cnn/conv_in/kernel".
      on_tensor: told how many tensors are written, of how many.

    Raises:
      ValueError: a section that cannot be built, or a parameter of another shape.
      OSError: the folder cannot be written.
    """
    section = checked_section(kind, json.loads(json.dumps(dict(section))), "the config")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_streamed(folder / WEIGHTS, parameter_shapes(kind, section), read, on_tensor)
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "section": section,
        "class_names": list(class_names),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "provenance": dict(provenance or {}),
        "weights_sha256": weights,
        "hash": _hash(kind, section, weights),
    }
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / CONFIG)
    return content


def load(path: str | os.PathLike, kind: str | None = None, parts: tuple[str, ...] | None = None) -> Bundle:
    """Reads and checks a bundle.

    Args:
      path: its folder, or "hf://owner/name@revision", downloaded once from Hugging Face.
      kind: what it must be.
      parts: the parameters to read, by the first names of their paths; all of them if None.

    Raises:
      FileNotFoundError: there is no bundle.
      ValueError: the folder does not hold what a bundle holds, it is damaged, or is of another kind.
      ImportError: "hf://" without the package huggingface_hub.
    """
    with stored(path, kind) as (content, leaves):
        read = {name: leaf[:] for name, leaf in leaves.items() if parts is None or name.split("/")[0] in parts}
    kept = (content[name] for name in ("tokenizer", "provenance", "hash"))
    params = keymap.unflatten(read)
    return Bundle(content["kind"], content["section"], params, tuple(content["class_names"]), *kept)


class Leaf(NamedTuple):
    """A parameter in a file; `leaf[n]` reads its layer n, `leaf[:]` all of it."""

    shape: tuple[int, ...]
    piece: Any

    def __getitem__(self, at: Any) -> np.ndarray:
        return self.piece[at]


@contextlib.contextmanager
def stored(path: str | os.PathLike, kind: str | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Leaf]]]:
    """A checked bundle (what `config.json` holds, its parameters by path) of which nothing is in memory; see `load`."""
    folder, content = open_config(path, kind)
    section = content["section"]
    weights = _inside(folder, WEIGHTS)
    digest = sha256(weights)
    if digest != content["weights_sha256"] or content["hash"] != _hash(content["kind"], section, digest):
        raise ValueError(
            f"{weights} or {CONFIG} beside it has changed since it was exported (SHA-256 {digest[:12]}…, "
            f"{content['weights_sha256'][:12]}… is written down): copy or export the bundle again"
        )
    with contextlib.ExitStack() as stack:
        leaves = _open_weights(weights, parameter_shapes(content["kind"], section), stack)
        yield content, leaves


def open_config(path: str | os.PathLike, kind: str | None = None) -> tuple[Path, dict[str, Any]]:
    """(a bundle's folder, what its checked `config.json` holds); the weights are not looked at.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `load`.
    """
    folder = _downloaded(str(path)) if str(path).startswith("hf://") else Path(path).expanduser()
    content = _read_config(folder)
    checked_section(content["kind"], content["section"], str(folder / CONFIG))
    if kind is not None and content["kind"] != kind:
        raise ValueError(f"{folder} is a bundle of a {content['kind']}, a {kind} is wanted")
    return folder, content


def facts(section: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """What token shards and generators keep of the tokenizer of a section and hash."""
    return {"hash": digest, **{name: section[name] for name in ("codebook_size", "num_latent_tokens", "image_size")}}


def check_pair(generator: Bundle, tokenizer_hash: str) -> None:
    """Raises ValueError where the generator was trained on the ids of another tokenizer."""
    made = generator.tokenizer
    if made is None or made["hash"] != tokenizer_hash:
        raise ValueError(
            f"the generator writes ids of the tokenizer {made and made['hash'][:12]}…, the one given is "
            f"{tokenizer_hash[:12]}…: give the bundle that its training ids were encoded with"
        )


def _hash(kind: str, section: Mapping[str, Any], weights: str) -> str:
    computed = {name: value for name, value in section.items() if name not in RUN_ONLY}
    return hashlib.sha256(json.dumps([kind, computed, weights], sort_keys=True).encode()).hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """A file of a bundle; raises where it is missing or lies, by a link, outside of it."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a bundle is a folder with {CONFIG} and {WEIGHTS}, written by "
            "`python -m gigatok_jax.export --checkpoint=… --bundle=…`"
        )
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is a link to {path.resolve()}: a bundle's files lie in its folder, copy them there")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = _inside(folder, CONFIG)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: this is no bundle's config")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or (wrong := sorted(content.keys() ^ set(FIELDS))):
        wrong = wrong if isinstance(content, dict) else ["it is no JSON object"]
        raise ValueError(f"{path} has unknown or missing fields: {', '.join(wrong)}")
    if content["schema"] != SCHEMA:
        raise ValueError(f"{path} has form {content['schema']}, this version reads form {SCHEMA}")
    return content


def _open_weights(
    path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], stack: contextlib.ExitStack
) -> dict[str, Leaf]:
    """The parameters, after every name, shape and dtype was compared."""
    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy or export the bundle again") from None
    wanted = {name: (leaf.shape, "F32") for name, leaf in shapes.items()}
    wrong = sorted({name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)})
    if wrong:
        raise ValueError(
            f"{path} does not hold this model's parameters; {len(wrong)} differ, such as {wrong[0]}: stored "
            f"{stored.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        )
    return {name: Leaf(stored[name][0], slices[name]) for name in wanted}


def _downloaded(address: str) -> Path:
    """The folder of a bundle of a Hugging Face repository; fetched once, then read without a network."""
    name, _, revision = address.removeprefix("hf://").partition("@")
    if name.count("/") != 1 or not revision:
        raise ValueError(
            f"{address} should read hf://owner/name@revision: a commit or tag says which weights are meant"
        )
    # A folder of its own: in the hub's cache the files are links that leave theirs.
    folder = Path("~/.cache/gigatok_jax/bundles").expanduser() / f"{name.replace('/', '--')}@{revision}"
    if all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{address} needs the package huggingface_hub: pip install 'gigatok_jax[hub]'") from None
    return Path(snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=[CONFIG, WEIGHTS]))
