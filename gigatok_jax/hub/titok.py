"""Published TiTok tokenizers (bytedance/1d-tokenizer `TiTok`) ↔ ours."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax import config
from gigatok_jax.hub import keymap, maskgit_vqgan
from gigatok_jax.hub.conv_keys import conv, dense, norm
from gigatok_jax.hub.keymap import Entry
from gigatok_jax.tokenizers.titok import proxy_section

HEAD = 64  # channels of an attention head at every published size


def _layers(key: str, path: str, width: int, depth: int) -> Iterator[Entry]:
    for n in range(depth):
        k, packed = f"{key}.{n}", [f"{path}/self_attention/{part}" for part in ("query", "key", "value")]
        kernels, biases = tuple(f"{part}/kernel" for part in packed), tuple(f"{part}/bias" for part in packed)
        yield Entry(f"{k}.attn.in_proj_weight", kernels, "dense", (3 * width, width), n)
        yield Entry(f"{k}.attn.in_proj_bias", biases, "vector", (3 * width,), n)
        yield from dense(f"{k}.attn.out_proj", f"{path}/self_attention/out", width, width, n)
        yield from dense(f"{k}.mlp.c_fc", f"{path}/mlp/in", 4 * width, width, n)
        yield from dense(f"{k}.mlp.c_proj", f"{path}/mlp/out", width, 4 * width, n)
        for published, ours in (("ln_1", "norm_self"), ("ln_2", "norm_mlp")):
            yield from norm(f"{k}.{published}", f"{path}/{ours}", width, n)


def _vit(cfg: Mapping[str, Any], side: str) -> Iterator[Entry]:
    width = cfg[f"{side}_width"]
    rows = 1 + (cfg["image_size"] // cfg["patch"]) ** 2
    tables = {
        "class_embedding": ("class_token", 1),
        "positional_embedding": ("token_pos", rows),
        "latent_token_positional_embedding": ("latent_pos", cfg["num_latent_tokens"]),
    }
    for published, (ours, count) in tables.items():
        yield Entry(f"{side}.{published}", (f"{side}/{ours}",), "vector", (count, width))
    yield from norm(f"{side}.ln_pre", f"{side}/norm_in", width)
    yield from norm(f"{side}.ln_post", f"{side}/norm_out", width)
    yield from _layers(f"{side}.transformer", f"{side}/stack/layers", width, cfg[f"{side}_depth"])


def _head(cfg: Mapping[str, Any]) -> Iterator[Entry]:
    width, path = cfg["decoder_width"], "decoder/head"
    if cfg["head"] == "pixels":
        yield from dense("decoder.ffn.0", f"{path}/patches", 3 * cfg["patch"] ** 2, width, kind="conv1x1")
        yield from conv("decoder.conv_out", f"{path}/conv_out", 3, 3, 3)
        return
    if cfg["patch"] != 2 ** (len(cfg["proxy_conv_multipliers"]) - 1):
        raise ValueError(f"no published TiTok has cells of several ids of its proxy (patch={cfg['patch']})")
    path += "/proxy" if cfg["head"] == "proxy_pixels" else ""
    yield from dense("decoder.ffn.0", f"{path}/hidden", 2 * width, width, kind="conv1x1")
    yield from dense("decoder.ffn.2", f"{path}/logits", cfg["proxy_codebook_size"], 2 * width, kind="conv1x1")
    if cfg["head"] == "proxy_pixels":
        proxy = proxy_section(cfg)
        yield maskgit_vqgan.codebook_entry("pixel_quantize", "decoder/head/quantizer/codebook", proxy)
        yield from maskgit_vqgan.decoder_entries("pixel_decoder", "decoder/head/cnn", proxy)


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `tokenizer` section."""
    encoder, decoder = cfg["encoder_width"], cfg["decoder_width"]
    patch, code_dim, kl = cfg["patch"], cfg["code_dim"], cfg["bottleneck"] == "kl"
    found = [
        Entry("latent_tokens", ("encoder/latent_tokens",), "vector", (cfg["num_latent_tokens"], encoder)),
        Entry("encoder.patch_embed.weight", ("encoder/embed/kernel",), "conv", (encoder, 3, patch, patch)),
        Entry("encoder.patch_embed.bias", ("encoder/embed/bias",), "vector", (encoder,)),
        *_vit(cfg, "encoder"),
        *dense("encoder.conv_out", "encoder/to_latents", (1 + kl) * code_dim, encoder, kind="conv1x1"),
        *dense("decoder.decoder_embed", "decoder/embed", decoder, code_dim),
        Entry("decoder.mask_token", ("decoder/mask_token",), "positions", (1, 1, decoder)),
        *_vit(cfg, "decoder"),
        *_head(cfg),
    ]
    if not kl:
        codes = cfg["codebook_size"], code_dim
        found.append(Entry("quantize.embedding.weight", ("bottleneck/codebook",), "vector", codes))
    return found


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `tokenizer` section of a checkpoint, by the shapes of its tensors; what shapes do not tell is as published.

    Raises:
      KeyError: where the tensors are no TiTok tokenizer's.
    """
    section = config.titok_tokenizer().to_dict()
    for side in ("encoder", "decoder"):
        width = shapes[f"{side}.ln_pre.weight"][0]
        depth = keymap.count(shapes, rf"{side}\.transformer\.(\d+)\.")
        section |= {f"{side}_width": width, f"{side}_depth": depth, f"{side}_heads": max(width // HEAD, 1)}
    width, patch = section["encoder_width"], shapes["encoder.patch_embed.weight"][-1]
    cells = math.prod(shapes["encoder.positional_embedding"]) // width - 1
    proxy, kl = "decoder.ffn.2.weight" in shapes, "quantize.embedding.weight" not in shapes
    code_dim = shapes["encoder.conv_out.weight"][0] // (1 + kl)
    section |= {
        "image_size": round(cells**0.5) * patch,
        "patch": patch,
        "num_latent_tokens": math.prod(shapes["latent_tokens"]) // width,
        "legacy": proxy,
        "bottleneck": "kl" if kl else "vq",
        "codebook_size": 0 if kl else math.prod(shapes["quantize.embedding.weight"]) // code_dim,
        "code_dim": code_dim,
        "normalized": proxy,
        "head": ("proxy_pixels" if "pixel_quantize.embedding.weight" in shapes else "proxy") if proxy else "pixels",
    }
    if proxy:
        section["proxy_codebook_size"] = shapes["decoder.ffn.2.weight"][0]
    if section["head"] == "proxy_pixels":
        sizes = maskgit_vqgan.decoder_sizes("pixel_decoder", "pixel_quantize", shapes)
        section |= {f"proxy_{field}": value for field, value in sizes.items()}
    return section
