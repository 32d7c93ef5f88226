"""TiTok tokenizers (arXiv 2406.07550; sizes and recipes as released): an image in as few as 32 latent tokens."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gigatok_jax.bottlenecks.vq import VectorQuantizer
from gigatok_jax.decoders.vit import PixelHead, ProxyHead, ProxyPixelHead, ViTMaskDecoder
from gigatok_jax.encoders.vit_latents import ViTLatentEncoder
from gigatok_jax.nn.initializers import kernels, positions
from gigatok_jax.nn.transformer import Stack, ViTLayer
from gigatok_jax.tokenizers import bottleneck, maskgit_vqgan
from gigatok_jax.tokenizers.tokenizer import Tokenizer


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Tokenizer:
    """The tokenizer of a config's `tokenizer` section (see `config.titok_tokenizer` for the fields).

    Raises:
      ValueError: for an image size, width or choice that cannot work.
    """
    grid, init = _grid(cfg), kernels(cfg["kernel_gain"])
    layer = functools.partial(ViTLayer, qkv_init=init) if cfg["kernel_gain"] else "vit"

    def part(side: str) -> dict[str, Any]:
        width, depth, heads = (cfg[f"{side}_{field}"] for field in ("width", "depth", "heads"))
        if width % heads:
            raise ValueError(f"tokenizer.{side}_width={width} does not divide into {heads} heads")
        stack = Stack(layer, depth, heads, cfg["attention"], cfg["remat"], cfg["unroll"], dtype, init)
        sizes = dict(width=width, grid=grid, num_latent_tokens=cfg["num_latent_tokens"])
        return dict(stack=stack, dtype=dtype, kernel_init=init, position_init=positions(cfg["position_std"]), **sizes)

    return Tokenizer(
        encoder=ViTLatentEncoder(
            patch=cfg["patch"],
            features=bottleneck.width(cfg),
            reinterpreted=cfg["legacy"],
            centre=0.5 if cfg["kernel_gain"] else 0.0,
            **part("encoder"),
        ),
        bottleneck=bottleneck.build(cfg, normalized=cfg["normalized"], clustering=cfg["clustering"]),
        decoder=ViTMaskDecoder(
            head=_head(cfg, grid, dtype),
            distill_layer=cfg["distill_layer"],
            teacher_dim=cfg["teacher_dim"] or None,
            **part("decoder"),
        ),
        num_latent_tokens=cfg["num_latent_tokens"],
        image_size=cfg["image_size"],
        factor=cfg["patch"],
        **(_proxy_ids(cfg) if cfg["head"] == "proxy" else {}),
    )


def _grid(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of the patches."""
    if cfg["image_size"] % cfg["patch"]:
        raise ValueError(f"image_size={cfg['image_size']} is no multiple of tokenizer.patch={cfg['patch']}")
    return (cfg["image_size"] // cfg["patch"],) * 2


def _head(cfg: Mapping[str, Any], grid: tuple[int, int], dtype: Any) -> nn.Module:
    """What reads the decoder's cells: pixels, the proxy's ids, or pixels through the proxy's decoder."""
    init = kernels(cfg["kernel_gain"])
    if cfg["head"] == "pixels":
        # A loud random convolution of three channels would mix colours and blur: it starts as a rotation of colours.
        last_init = nn.initializers.delta_orthogonal() if cfg["kernel_gain"] else init
        return PixelHead(cfg["patch"], dtype, init, last_init)
    proxy = ProxyHead(cfg["proxy_codebook_size"], cfg["patch"] // _proxy_factor(cfg), dtype, init)
    if cfg["head"] == "proxy":
        return proxy
    section = proxy_section(cfg)
    quantizer = VectorQuantizer(section["codebook_size"], section["code_dim"], normalized=section["normalized"])
    return ProxyPixelHead(proxy, quantizer, maskgit_vqgan.pixel_decoder(section, dtype=dtype))


def _proxy_factor(cfg: Mapping[str, Any]) -> int:
    """How many pixels of a side the proxy's decoder makes of an id."""
    factor = 2 ** (len(cfg["proxy_conv_multipliers"]) - 1)
    if cfg["patch"] % factor:
        raise ValueError(
            f"tokenizer.patch={cfg['patch']} is no multiple of the {factor} pixels a side that the proxy makes of an "
            "id: take a multiple, or fewer levels in tokenizer.proxy_conv_multipliers"
        )
    return factor


def _proxy_ids(cfg: Mapping[str, Any]) -> dict[str, int]:
    """The size of the proxy's codebook, and of how many ids its grid is."""
    side = cfg["image_size"] // _proxy_factor(cfg)
    return {"proxy_codebook_size": cfg["proxy_codebook_size"], "num_proxy_ids": side**2}


def proxy_section(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What `maskgit_vqgan.pixel_decoder` and its key list read of a section."""
    fields = {name.removeprefix("proxy_"): value for name, value in cfg.items() if name.startswith("proxy_")}
    return {**fields, "remat_convs": cfg["remat_convs"], "kernel_gain": cfg["kernel_gain"]}
