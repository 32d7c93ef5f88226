"""GigaTok tokenizers, 1-D and 2-D (arXiv 2504.08736, Table 1; sizes as published)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gigatok_jax.decoders.hybrid import HybridDecoder
from gigatok_jax.encoders.hybrid import HybridEncoder
from gigatok_jax.nn.conv import ConvDecoder, ConvEncoder
from gigatok_jax.nn.initializers import kernels, positions
from gigatok_jax.nn.transformer import Stack
from gigatok_jax.tokenizers import bottleneck
from gigatok_jax.tokenizers.grid import check_channels, latent_grid
from gigatok_jax.tokenizers.tokenizer import Tokenizer

MAX_POOLING = 2**28  # entries of the table that makes a 1-D tokenizer's latent tokens of its cells


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Tokenizer:
    """The tokenizer of a config's `tokenizer` section (see `config.gigatok_tokenizer` for the fields).

    Raises:
      ValueError: for an image size, token count or channel count that cannot work.
    """
    grid = latent_grid(cfg)
    one_d = cfg["layout"] == "1d"
    if cfg["layout"] not in ("1d", "2d"):
        raise ValueError(f"tokenizer.layout={cfg['layout']!r} is neither '1d' nor '2d'")
    if not one_d and cfg["num_latent_tokens"] != grid[0] * grid[1]:
        raise ValueError(
            f"tokenizer.num_latent_tokens={cfg['num_latent_tokens']}, but a 2-D tokenizer at image_size="
            f"{cfg['image_size']} has {grid[0]}x{grid[1]}={grid[0] * grid[1]}"
        )
    if one_d and grid[0] * grid[1] * cfg["num_latent_tokens"] > MAX_POOLING:
        raise ValueError(
            f"tokenizer.num_latent_tokens={cfg['num_latent_tokens']} of {grid[0] * grid[1]} cells are too many: their "
            f"product is {MAX_POOLING} at most; take fewer, or a smaller image_size"
        )
    check_channels(cfg)
    convs = dict(
        base=cfg["conv_base"],
        multipliers=tuple(cfg["conv_multipliers"]),
        groups=cfg["norm_groups"],
        attention=cfg["conv_attention"],
        remat=cfg["remat_convs"],
        dtype=dtype,
        kernel_init=kernels(cfg["kernel_gain"]),
    )
    latent_tokens = cfg["num_latent_tokens"] if one_d else None
    layer = "qformer" if one_d else cfg["layer_2d"]

    def part(side: str) -> dict[str, Any]:
        width, depth, heads = (cfg[f"{side}_{field}"] for field in ("width", "depth", "heads"))
        if width % heads:
            raise ValueError(f"tokenizer.{side}_width={width} does not divide into {heads} heads")
        return dict(
            stack=Stack(
                layer, depth, heads, cfg["attention"], cfg["remat"], cfg["unroll"], dtype, convs["kernel_init"]
            ),
            width=width,
            features=cfg["features"],
            num_latent_tokens=latent_tokens,
            dtype=dtype,
            kernel_init=convs["kernel_init"],
            position_init=positions(cfg["position_std"]),
        )

    return Tokenizer(
        encoder=HybridEncoder(
            cnn=ConvEncoder(features=cfg["features"], blocks=cfg["encoder_conv_blocks"], **convs),
            code_dim=bottleneck.width(cfg),
            **part("encoder"),
        ),
        bottleneck=bottleneck.build(cfg),
        decoder=HybridDecoder(
            cnn=ConvDecoder(blocks=cfg["decoder_conv_blocks"], scale_init=cfg["adaptive_scale_init"], **convs),
            grid=grid,
            distill_layer=cfg["distill_layer"],
            teacher_dim=cfg["teacher_dim"] or None,
            **part("decoder"),
        ),
        num_latent_tokens=cfg["num_latent_tokens"],
        image_size=cfg["image_size"],
        factor=cfg["image_size"] // grid[0],
        grid=None if one_d else grid,
    )
