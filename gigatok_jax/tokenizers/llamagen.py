"""LlamaGen's VQ tokenizers (arXiv 2406.06525, §2.2): VQGAN's convolutions around a small l2-normalised codebook."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gigatok_jax.decoders.conv import ConvolutionalDecoder
from gigatok_jax.encoders.conv import ConvolutionalEncoder
from gigatok_jax.nn.conv import ConvDecoder, ConvEncoder
from gigatok_jax.nn.initializers import kernels
from gigatok_jax.tokenizers import bottleneck
from gigatok_jax.tokenizers.grid import check_cells, check_channels, latent_grid
from gigatok_jax.tokenizers.tokenizer import Tokenizer


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Tokenizer:
    """The tokenizer of a config's `tokenizer` section (see `config.llamagen_tokenizer` for the fields).

    Raises:
      ValueError: for an image size, token count or channel count that cannot work.
    """
    grid = latent_grid(cfg)
    check_cells(cfg, grid)
    check_channels(cfg)
    convs = dict(
        base=cfg["conv_base"],
        multipliers=tuple(cfg["conv_multipliers"]),
        groups=cfg["norm_groups"],
        attention=True,
        remat=cfg["remat_convs"],
        dtype=dtype,
        kernel_init=kernels(cfg["kernel_gain"]),
    )
    features = cfg["features"]
    return Tokenizer(
        encoder=ConvolutionalEncoder(
            cnn=ConvEncoder(features=features, blocks=cfg["encoder_conv_blocks"], **convs),
            code_dim=bottleneck.width(cfg),
            dtype=dtype,
        ),
        bottleneck=bottleneck.build(cfg),
        decoder=ConvolutionalDecoder(
            cnn=ConvDecoder(blocks=cfg["decoder_conv_blocks"], plain=True, **convs),
            features=features,
            grid=grid,
            dtype=dtype,
        ),
        num_latent_tokens=cfg["num_latent_tokens"],
        image_size=cfg["image_size"],
        factor=cfg["image_size"] // grid[0],
        grid=grid,
    )
