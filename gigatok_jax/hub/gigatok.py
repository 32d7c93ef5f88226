"""Published GigaTok tokenizer checkpoints ↔ ours (key names of SilentView/GigaTok)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gigatok_jax import config
from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import conv, dense, norm, resnet
from gigatok_jax.hub.keymap import Entry
from gigatok_jax.tokenizers.grid import latent_grid

# A ring buffer of recent ids, refilled by training; made anew as the published code starts it.
BUFFERS = {"quantize.codebook_used": np.zeros(65536, np.float32)}
HEAD = 64  # channels of an attention head, at every published size


def _conv_encoder(cfg: Mapping[str, Any]) -> Iterator[Entry]:
    widths = [cfg["conv_base"] * multiplier for multiplier in cfg["conv_multipliers"]]
    ours = "encoder/cnn"
    yield from conv("encoder.conv_in", f"{ours}/conv_in", cfg["conv_base"], 3, 3)
    inp = cfg["conv_base"]
    for level, out in enumerate(widths):
        for block in range(cfg["encoder_conv_blocks"]):
            yield from resnet(f"encoder.conv_blocks.{level}.res.{block}", f"{ours}/level{level}_block{block}", inp, out)
            inp = out
        if level < len(widths) - 1:
            yield from conv(f"encoder.conv_blocks.{level}.downsample.conv", f"{ours}/level{level}_down", out, out, 3)
    for block in range(2):
        yield from resnet(f"encoder.mid.{block}", f"{ours}/mid{block}", inp, inp)
    yield from norm("encoder.norm_out", f"{ours}/norm_out", inp)
    yield from conv("encoder.conv_out", f"{ours}/conv_out", cfg["features"], inp, 3)


def _conv_decoder(cfg: Mapping[str, Any]) -> Iterator[Entry]:
    widths = [cfg["conv_base"] * multiplier for multiplier in reversed(cfg["conv_multipliers"])]
    ours = "decoder/cnn"
    inp = widths[0]
    yield from conv("decoder.conv_in", f"{ours}/conv_in", inp, cfg["features"], 3)
    for block in range(2):
        yield from resnet(f"decoder.mid.{block}", f"{ours}/mid{block}", inp, inp)
    for level, out in enumerate(widths):
        for theirs, name in (("gamma", "scale"), ("beta", "bias")):
            path = f"{ours}/level{level}_adaptive/{name}"
            yield from dense(f"decoder.adaptive.{level}.{theirs}", path, inp, cfg["features"])
        for block in range(cfg["decoder_conv_blocks"]):
            yield from resnet(f"decoder.conv_blocks.{level}.res.{block}", f"{ours}/level{level}_block{block}", inp, out)
            inp = out
        if level < len(widths) - 1:
            path = f"{ours}/level{level}_up"
            yield from conv(f"decoder.conv_blocks.{level}.upsample.conv1", path, 4 * out, out, 3)
    yield from norm("decoder.norm_out", f"{ours}/norm_out", inp)
    yield from conv("decoder.conv_out", f"{ours}/conv_out", 3, inp, 3)


def _stack(key: str, path: str, width: int, depth: int, cross: bool) -> Iterator[Entry]:
    attentions = [("self_attn", "self_attention")] + ([("multihead_attn", "cross_attention")] if cross else [])
    norms = ["norm_self", "norm_cross", "norm_mlp"] if cross else ["norm_self", "norm_mlp"]
    for n in range(depth):
        for theirs, ours in attentions:
            packed = [f"{path}/{ours}/{name}" for name in ("query", "key", "value")]
            k = f"{key}.{n}.{theirs}"
            kernels, biases = tuple(p + "/kernel" for p in packed), tuple(p + "/bias" for p in packed)
            yield Entry(f"{k}.in_proj_weight", kernels, "dense", (3 * width, width), n)
            yield Entry(f"{k}.in_proj_bias", biases, "vector", (3 * width,), n)
            yield from dense(f"{k}.out_proj", f"{path}/{ours}/out", width, width, n)
        yield from dense(f"{key}.{n}.linear1", f"{path}/mlp/in", 4 * width, width, n)
        yield from dense(f"{key}.{n}.linear2", f"{path}/mlp/out", width, 4 * width, n)
        for index, ours in enumerate(norms, 1):
            yield from norm(f"{key}.{n}.norm{index}", f"{path}/{ours}", width, n)


def _table(key: str, path: str, positions: int, width: int) -> Entry:
    return Entry(key, (path,), "table", (positions, 1, width))


def _vit_encoder(cfg: Mapping[str, Any], cells: int, one_d: bool) -> Iterator[Entry]:
    key, width, features = ("s2to1encoder" if one_d else "s2dencoder"), cfg["encoder_width"], cfg["features"]
    yield _table(f"{key}.positional_embedding", "encoder/memory_pos", cells, width)
    yield from dense(f"{key}.encoder_embed", "encoder/embed", width, features)
    yield from norm(f"{key}.ln_pre", "encoder/norm_in", features)
    if one_d:
        latent = f"{key}.latent_token_positional_embedding"
        yield _table(latent, "encoder/query_pos", cfg["num_latent_tokens"], width)
        yield from dense(f"{key}.global_proj", "encoder/query_proj", width, width)
    cross = one_d or cfg["layer_2d"] == "qformer"
    yield from _stack(f"{key}.transformer", "encoder/stack/layers", width, cfg["encoder_depth"], cross)
    yield from norm(f"{key}.ln_post", "encoder/norm_out", width)
    yield from dense(f"{key}.conv_out", "encoder/project", features, width, kind="conv1x1")


def _vit_decoder(cfg: Mapping[str, Any], cells: int, one_d: bool) -> Iterator[Entry]:
    key, width, features = ("s1to2decoder" if one_d else "s2ddecoder"), cfg["decoder_width"], cfg["features"]
    yield _table(f"{key}.positional_embedding", "decoder/grid_pos", cells, width)
    if one_d:
        latent = f"{key}.latent_token_positional_embedding"
        yield _table(latent, "decoder/memory_pos", cfg["num_latent_tokens"], width)
    yield from dense(f"{key}.decoder_embed", "decoder/embed", width, features)
    yield from norm(f"{key}.ln_pre", "decoder/norm_in", features)
    cross = one_d or cfg["layer_2d"] == "qformer"
    yield from _stack(f"{key}.transformer", "decoder/stack/layers", width, cfg["decoder_depth"], cross)
    yield from norm(f"{key}.ln_post", "decoder/norm_out", width)
    yield from conv(f"{key}.conv_out", "decoder/project", features, width, 3)
    if cfg["teacher_dim"]:
        widths = (width, 4 * width, 4 * width, cfg["teacher_dim"])
        for index, (inp, out) in enumerate(zip(widths, widths[1:])):
            yield from dense(f"{key}.distill_mlp.{2 * index}", f"decoder/distill/layer{index}", out, inp)


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `tokenizer` section (GigaTok's yamls have no attention in the convolutions)."""
    if cfg["conv_attention"]:
        raise ValueError("no published GigaTok checkpoint has attention in its convolutions (conv_attention=True)")
    one_d = cfg["layout"] == "1d"
    height, width = latent_grid(cfg)
    return [
        *_conv_encoder(cfg),
        *_vit_encoder(cfg, height * width, one_d),
        *dense("quant_conv", "encoder/to_latents", cfg["code_dim"], cfg["features"], kind="conv1x1"),
        Entry("quantize.embedding.weight", ("bottleneck/codebook",), "vector", (cfg["codebook_size"], cfg["code_dim"])),
        *dense("post_quant_conv", "decoder/from_latents", cfg["features"], cfg["code_dim"], kind="conv1x1"),
        *_vit_decoder(cfg, height * width, one_d),
        *_conv_decoder(cfg),
    ]


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `tokenizer` section of a checkpoint, by the shapes of its tensors; what shapes do not tell is as published.

    Raises:
      KeyError, ValueError: where the tensors are no GigaTok tokenizer's.
    """
    one_d = "s2to1encoder.encoder_embed.weight" in shapes
    encoder, decoder = ("s2to1encoder", "s1to2decoder") if one_d else ("s2dencoder", "s2ddecoder")

    def rows(key: str) -> int:  # by another tensor's width, so that a transposed table is what does not fit
        return math.prod(shapes[key]) // shapes[f"{encoder}.encoder_embed.weight"][0]

    base, features = shapes["encoder.conv_in.weight"][0], shapes["encoder.conv_out.weight"][0]
    widths = [
        shapes[f"encoder.conv_blocks.{level}.res.0.conv2.weight"][0]
        for level in range(keymap.count(shapes, r"encoder\.conv_blocks\.(\d+)\."))
    ]
    cells, factor = rows(f"{encoder}.positional_embedding"), 2 ** (len(widths) - 1)
    code_dim = shapes["quant_conv.weight"][0]
    section = config.gigatok_tokenizer().to_dict()
    section |= {
        "layout": "1d" if one_d else "2d",
        "image_size": round(cells**0.5) * factor,
        "num_latent_tokens": rows(f"{encoder}.latent_token_positional_embedding") if one_d else cells,
        "features": features,
        "conv_base": base,
        "conv_multipliers": [width // base for width in widths],
        "encoder_conv_blocks": keymap.count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_conv_blocks": keymap.count(shapes, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "codebook_size": math.prod(shapes["quantize.embedding.weight"]) // code_dim,
        "code_dim": code_dim,
        "teacher_dim": shapes.get(f"{decoder}.distill_mlp.4.weight", (0,))[0],
    }
    for side, key in (("encoder", encoder), ("decoder", decoder)):
        width, depth = shapes[f"{key}.{side}_embed.weight"][0], keymap.count(shapes, rf"{key}\.transformer\.(\d+)\.")
        section |= {f"{side}_width": width, f"{side}_depth": depth, f"{side}_heads": max(width // HEAD, 1)}
    section["distill_layer"] = min(section["distill_layer"], section["decoder_depth"])
    if f"{encoder}.transformer.0.multihead_attn.in_proj_bias" in shapes and not one_d:
        section["layer_2d"] = "qformer"
    return section
