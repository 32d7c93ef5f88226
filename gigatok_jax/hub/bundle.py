"""Bundles: a folder with `config.json` and `model.safetensors` that a tokenizer or generator is used from.

`config.json` is data with a closed set of names, never an import path; weights are named by our parameter paths.
Nothing is unpickled, and nothing outside the folder is read.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gigatok_jax.hub import content as contents
from gigatok_jax.hub import huggingface, keymap
from gigatok_jax.hub.sections import build_model, completed, parameter_shapes
from gigatok_jax.hub.stored import read_values, starts
from gigatok_jax.hub.streaming import write_streamed
from gigatok_jax.hub.tensors import sha256
from gigatok_jax.tokenizers import bottleneck

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# A tokenizer's parts that make ids: who needs no images leaves the rest on disk.
FIRST_STAGE = ("encoder", "bottleneck")


class Bundle(NamedTuple):
    """What a folder holds.

    kind: "tokenizer", "generator" or "discriminator".   section: the config section of that name.
    params: nested numpy arrays; of a discriminator by collection, running statistics and spectral vectors too.
    class_names: of the data trained on.   tokenizer: of a generator, what wrote its ids ("hash" and sizes), else None.
    hash: names all of these.   provenance: resolved config, step, versions, for people.
    folder: where its files are; None where it was made in memory.
    """

    kind: str
    section: dict[str, Any]
    params: dict[str, Any]
    class_names: tuple[str, ...]
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any]
    hash: str
    folder: Path | None = None

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

    def check_ids(self) -> None:
        """Raises ValueError for a tokenizer that makes no ids."""
        bottleneck.check_ids(self.section, self.folder or "this bundle")

    def check_images(self) -> None:
        """Raises ValueError for a tokenizer whose decoder makes no images."""
        if self.model().proxy_codebook_size:
            raise ValueError(
                f"{self.folder or 'this bundle'} is of a tokenizer that decodes to a proxy tokenizer's ids, not to "
                "images: join it with that one's bundle, `python -m gigatok_jax.export … --proxy=BUNDLE`"
            )


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
    content = {
        "schema": contents.SCHEMA,
        "kind": kind,
        "section": completed(dict(section)),  # a run of before a field is exported too
        "class_names": list(class_names),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "provenance": dict(provenance or {}),
        **dict.fromkeys(("weights_sha256", "hash"), "0" * 64),  # until they are known
    }
    content = json.loads(json.dumps(content))
    contents.check(content, "the config")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    content["weights_sha256"] = write_streamed(
        folder / WEIGHTS, parameter_shapes(kind, content["section"]), read, on_tensor
    )
    content["hash"] = contents.digest(content)
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
    folder, _ = open_config(path, kind)
    with stored(folder) as (content, leaves):
        read = {name: leaf[:] for name, leaf in leaves.items() if parts is None or name.split("/")[0] in parts}
    kept = {name: content[name] for name in ("kind", "section", "tokenizer", "provenance", "hash")}
    return Bundle(**kept, params=keymap.unflatten(read), class_names=tuple(content["class_names"]), folder=folder)


class Leaf(NamedTuple):
    """A parameter in a file, from its byte `start` on; `leaf[n]` reads its layer n, `leaf[:]` all of it."""

    shape: tuple[int, ...]
    file: BinaryIO
    start: int

    def __getitem__(self, at: int | slice) -> np.ndarray:
        shape = self.shape if isinstance(at, slice) else self.shape[1:]
        count = math.prod(shape)
        first = 0 if isinstance(at, slice) else at * count
        return read_values(self.file, self.start + 4 * first, np.dtype(np.float32), count).reshape(shape)


@contextlib.contextmanager
def stored(path: str | os.PathLike, kind: str | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Leaf]]]:
    """A checked bundle (what `config.json` holds, its parameters by path) of which nothing is in memory; see `load`."""
    folder, content = open_config(path, kind)
    weights = _inside(folder, WEIGHTS)
    if (found := sha256(weights)) != content["weights_sha256"]:
        raise ValueError(
            f"{weights} has changed since it was exported (SHA-256 {found[:12]}…, {content['weights_sha256'][:12]}… is "
            "written down): copy or export the bundle again"
        )
    try:
        shapes = parameter_shapes(content["kind"], content["section"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    with contextlib.ExitStack() as stack:
        yield content, _open_weights(weights, shapes, stack)


def copy(folder: Path, out: str | os.PathLike, digest: str) -> None:
    """Copies the files of the bundle in `folder`, which is read through once to see that it still has this hash.

    Raises:
      FileNotFoundError, ValueError: as `load`, and where it is another one by now.
      OSError: `out` cannot be written.
    """
    with stored(folder) as (content, _):
        if content["hash"] != digest:
            raise ValueError(
                f"{folder} holds another bundle by now ({content['hash'][:12]}…, loaded was {digest[:12]}…)"
            )
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):  # the config last: without it there is no bundle
        shutil.copyfile(folder / name, out / (name + ".partial"))
        os.replace(out / (name + ".partial"), out / name)


def open_config(path: str | os.PathLike, kind: str | None = None) -> tuple[Path, dict[str, Any]]:
    """(a bundle's folder, what its checked `config.json` holds); the weights are not looked at.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `load`.
    """
    folder = (
        huggingface.fetched(str(path), (CONFIG, WEIGHTS)) if str(path).startswith("hf://") else Path(path).expanduser()
    )
    content = contents.read(_inside(folder, CONFIG))
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


def _open_weights(
    path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], stack: contextlib.ExitStack
) -> dict[str, Leaf]:
    """The parameters, after every name, shape and dtype was compared; metadata, which nothing reads, is refused."""
    try:
        with safe_open(path, framework="np") as checked:
            noted = checked.metadata()
        file = stack.enter_context(path.open("rb"))  # no memory map, whose pages would count as this process's
        found = starts(path, file)
        stored = {name: (shape, code) for name, (code, shape, _) in found.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy or export the bundle again") from None
    if noted:
        raise ValueError(
            f"{path} has metadata ({', '.join(sorted(noted))}), a bundle's weights have none: export it again"
        )
    wanted = {name: (leaf.shape, "F32") for name, leaf in shapes.items()}
    wrong = sorted({name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)})
    if wrong:
        raise ValueError(
            f"{path} does not hold this model's parameters; {len(wrong)} differ, such as {wrong[0]}: stored "
            f"{stored.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        )
    return {name: Leaf(stored[name][0], file, found[name][2]) for name in wanted}
