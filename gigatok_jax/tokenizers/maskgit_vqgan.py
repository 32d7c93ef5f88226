"""MaskGIT's VQGAN (arXiv 2202.04200): TiTok's proxy tokenizer in its first stage, its pixel decoder in the second."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gigatok_jax.decoders.conv import ConvolutionalDecoder
from gigatok_jax.encoders.conv import ConvolutionalEncoder
from gigatok_jax.nn.initializers import kernels
from gigatok_jax.nn.maskgit_conv import MaskGITDecoder, MaskGITEncoder
from gigatok_jax.tokenizers import bottleneck
from gigatok_jax.tokenizers.grid import check_cells, check_channels, latent_grid
from gigatok_jax.tokenizers.tokenizer import Tokenizer


def convolutions(cfg: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The fields that `MaskGITEncoder` and `MaskGITDecoder` share, but `blocks`.

    Raises:
      ValueError: where channels do not divide into the norms' groups.
    """
    check_channels(cfg)
    return dict(
        base=cfg["conv_base"],
        multipliers=tuple(cfg["conv_multipliers"]),
        groups=cfg["norm_groups"],
        remat=cfg["remat_convs"],
        dtype=dtype,
        kernel_init=kernels(cfg["kernel_gain"]),
    )


def pixel_decoder(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> MaskGITDecoder:
    """Map (B, h, w, `code_dim`) → image, of a section: the decoder without what makes a map of latents.

    Raises:
      ValueError: where channels do not divide into the norms' groups.
    """
    return MaskGITDecoder(blocks=cfg["decoder_conv_blocks"], **convolutions(cfg, dtype))


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Tokenizer:
    """The tokenizer of a config's `tokenizer` section (see `config.maskgit_vqgan_tokenizer` for the fields).

    Raises:
      ValueError: for an image size, token count or channel count that cannot work.
    """
    grid = latent_grid(cfg)
    check_cells(cfg, grid)
    features = bottleneck.width(cfg)
    cnn = MaskGITEncoder(blocks=cfg["encoder_conv_blocks"], features=features, **convolutions(cfg, dtype))
    return Tokenizer(
        encoder=ConvolutionalEncoder(cnn=cnn, code_dim=None, dtype=dtype),
        bottleneck=bottleneck.build(cfg, normalized=cfg["normalized"]),
        decoder=ConvolutionalDecoder(cnn=pixel_decoder(cfg, dtype=dtype), features=None, grid=grid, dtype=dtype),
        num_latent_tokens=cfg["num_latent_tokens"],
        image_size=cfg["image_size"],
        factor=cfg["image_size"] // grid[0],
        grid=grid,
    )
