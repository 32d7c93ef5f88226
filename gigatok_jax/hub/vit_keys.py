"""What published layouts call a vision transformer's tensors, and the key lists made of these names."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gigatok_jax.hub.keymap import Entry
from gigatok_jax.nn.vit import ViTSizes
from gigatok_jax.teachers import VITS


class Names(NamedTuple):
    """What a layout calls the parts of a vision transformer; "" is a part that no model in it has.

    layer: what the names of layer {n} begin with.   attention: packed queries, keys and values, or one name for each,
    up to "weight" and "bias".   mlp, swiglu: in and out; SwiGLU's gate and in are packed.
    flat: tables of tokens have no leading axes of size 1.
    folded: with registers, the class token's position is added to it and left out of the table.
    """

    class_token: str
    positions: str
    patches: str
    norm_out: str
    layer: str
    norms: tuple[str, str]
    attention: tuple[str, ...]
    attention_out: str
    mlp: tuple[str, str]
    swiglu: tuple[str, str] = ("", "")
    layer_scales: tuple[str, str] = ("", "")
    registers: str = ""
    mask_token: str = ""
    norm_in: str = ""
    flat: bool = False
    folded: bool = False


_ORIGINAL = Names(
    class_token="cls_token",
    positions="pos_embed",
    patches="patch_embed.proj",
    norm_out="norm",
    layer="blocks.{n}.",
    norms=("norm1", "norm2"),
    attention=("attn.qkv.",),
    attention_out="attn.proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    swiglu=("mlp.w12", "mlp.w3"),
    layer_scales=("ls1.gamma", "ls2.gamma"),
    registers="register_tokens",
    mask_token="mask_token",
)
NAMES = {
    "original": _ORIGINAL,  # facebookresearch/dino and /dinov2
    "timm": _ORIGINAL._replace(swiglu=("mlp.fc1", "mlp.fc2"), registers="reg_token", folded=True),
    "dinov2-hf": Names(
        class_token="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        patches="embeddings.patch_embeddings.projection",
        norm_out="layernorm",
        layer="encoder.layer.{n}.",
        norms=("norm1", "norm2"),
        attention=tuple(f"attention.attention.{part}." for part in ("query", "key", "value")),
        attention_out="attention.output.dense",
        mlp=("mlp.fc1", "mlp.fc2"),
        swiglu=("mlp.weights_in", "mlp.weights_out"),
        layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        registers="embeddings.register_tokens",
        mask_token="embeddings.mask_token",
    ),
    "clip-hf": Names(  # SigLIP's too
        class_token="vision_model.embeddings.class_embedding",
        positions="vision_model.embeddings.position_embedding.weight",
        patches="vision_model.embeddings.patch_embedding",
        norm_out="vision_model.post_layernorm",
        layer="vision_model.encoder.layers.{n}.",
        norms=("layer_norm1", "layer_norm2"),
        attention=tuple(f"self_attn.{part}_proj." for part in "qkv"),
        attention_out="self_attn.out_proj",
        mlp=("mlp.fc1", "mlp.fc2"),
        norm_in="vision_model.pre_layrnorm",  # so it is spelt
        flat=True,
    ),
    "open_clip": Names(
        class_token="visual.class_embedding",
        positions="visual.positional_embedding",
        patches="visual.conv1",
        norm_out="visual.ln_post",
        layer="visual.transformer.resblocks.{n}.",
        norms=("ln_1", "ln_2"),
        attention=("attn.in_proj_",),
        attention_out="attn.out_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        norm_in="visual.ln_pre",
        flat=True,
    ),
}
# The layouts that are read; `convert --to=NAME` writes the first, NAME-hf the second, timm's is not written.
LAYOUTS = {
    **{name: ("original", "dinov2-hf", "timm") for name in VITS if name.startswith("dinov2")},
    "siglip-so400m": ("clip-hf",),
    "dfn-clip-l": ("open_clip", "clip-hf"),
    "dino-s16": ("original",),
}
# What the files of SigLIP and CLIP hold beside it.
_TEXT_DEPTHS = {"siglip-so400m": 27, "dfn-clip-l": 12}
_BESIDE_PAIRS = (  # of weight and bias
    "text_model.final_layer_norm.",
    "text_model.head.",
    "ln_final.",
    "vision_model.head.attention.in_proj_",
    *(f"vision_model.head.{part}." for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")),
)
_BESIDE_SINGLE = (
    *("logit_scale", "logit_bias", "text_projection", "text_projection.weight", "visual_projection.weight"),
    *("token_embedding.weight", "positional_embedding", "attn_mask", "visual.proj", "vision_model.head.probe"),
    *(f"text_model.embeddings.{part}_embedding.weight" for part in ("token", "position")),
    *(f"{side}_model.embeddings.position_ids" for side in ("text", "vision")),
)


def vit_entries(sizes: ViTSizes, layout: str = "original", mask_token: bool = False) -> list[Entry]:
    """The key list of a vision transformer in a layout of `NAMES`, with or without a mask token."""
    names = NAMES[layout]
    found = list(_frame(names, sizes))
    if mask_token:
        found.append(Entry(names.mask_token, ("vit/mask_token",), "vector", (1, sizes.width)))
    return found + [entry for n in range(sizes.depth) for entry in _layer(names, sizes, n)]


def layout_of(name: str, state: Mapping[str, Any]) -> str:
    """The layout of a network's file: the one most of whose names are there, the first where several are alike."""
    counts = {layout: sum(entry.key in state for entry in vit_entries(VITS[name], layout)) for layout in LAYOUTS[name]}
    return max(counts, key=counts.get)


def beside(name: str) -> tuple[str, ...]:
    """What a network's file may hold beside the vision transformer: the text tower, pooling, projections."""
    if name not in _TEXT_DEPTHS:
        return ()
    known = [*_BESIDE_PAIRS]
    for layout in LAYOUTS[name]:
        names = NAMES[layout]
        layer = names.layer.replace("visual.", "").replace("vision_model.", "text_model.")
        parts = (*names.attention, *(f"{part}." for part in (*names.norms, names.attention_out, *names.mlp)))
        known += [f"{layer.format(n=n)}{part}" for n in range(_TEXT_DEPTHS[name]) for part in parts]
    return (*_BESIDE_SINGLE, *(f"{key}{leaf}" for key in known for leaf in ("weight", "bias")))


def _frame(names: Names, sizes: ViTSizes) -> Iterator[Entry]:
    """What is around the layers."""
    width, patch = sizes.width, sizes.patch
    if sizes.class_token:
        kind, shape = ("token", (width,)) if names.flat else ("vector", (1, 1, width))
        yield Entry(names.class_token, ("vit/class_token",), kind, shape)
    if names.folded and sizes.num_registers:
        kind, shape = "cells", (1, sizes.side**2, width)
    else:
        rows = sizes.class_token + sizes.side**2
        kind, shape = ("rows", (rows, width)) if names.flat else ("vector", (1, rows, width))
    yield Entry(names.positions, ("vit/token_pos",), kind, shape)
    if sizes.num_registers:
        yield Entry(names.registers, ("vit/registers",), "vector", (1, sizes.num_registers, width))
    yield Entry(f"{names.patches}.weight", ("vit/embed/kernel",), "conv", (width, 3, patch, patch))
    if sizes.pre_norm:
        yield from _norm(names.norm_in, "vit/norm_in", width)
    else:
        yield Entry(f"{names.patches}.bias", ("vit/embed/bias",), "vector", (width,))
    yield from _norm(names.norm_out, "vit/norm_out", width)


def _layer(names: Names, sizes: ViTSizes, n: int) -> Iterator[Entry]:
    key, ours, width, hidden = names.layer.format(n=n), "vit/stack/layers", sizes.width, sizes.hidden or 4 * sizes.width
    for name, part in zip(names.norms, ("self", "mlp")):
        yield from _norm(f"{key}{name}", f"{ours}/norm_{part}", width, n)
    parts = [f"{ours}/self_attention/{part}" for part in ("query", "key", "value")]
    for name, paths in zip(names.attention, [parts] if len(names.attention) == 1 else [[path] for path in parts]):
        yield from _dense(f"{key}{name}", paths, width, width, n)
    yield from _dense(f"{key}{names.attention_out}.", [f"{ours}/self_attention/out"], width, width, n)
    gated = sizes.mlp == "swiglu"
    into, out = names.swiglu if gated else names.mlp
    paths = [f"{ours}/mlp/gate", f"{ours}/mlp/in"] if gated else [f"{ours}/mlp/in"]
    yield from _dense(f"{key}{into}.", paths, hidden, width, n)
    yield from _dense(f"{key}{out}.", [f"{ours}/mlp/out"], width, hidden, n)
    if sizes.layer_scale:
        for name, part in zip(names.layer_scales, ("self", "mlp")):
            yield Entry(f"{key}{name}", (f"{ours}/scale_{part}",), "vector", (width,), n)


def _dense(key: str, paths: list[str], out: int, inp: int, layer: int) -> Iterator[Entry]:
    """A matrix (len(paths) · out, inp) and its bias."""
    rows = len(paths) * out
    yield Entry(f"{key}weight", tuple(f"{path}/kernel" for path in paths), "dense", (rows, inp), layer)
    yield Entry(f"{key}bias", tuple(f"{path}/bias" for path in paths), "vector", (rows,), layer)


def _norm(key: str, path: str, width: int, layer: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (f"{path}/scale",), "vector", (width,), layer)
    yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (width,), layer)
