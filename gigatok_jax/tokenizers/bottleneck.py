"""The bottleneck that a section names, and what its encoder gives it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from gigatok_jax.bottlenecks.kl import KLBottleneck
from gigatok_jax.bottlenecks.vq import VectorQuantizer


class Kind(NamedTuple):
    """build: section and the family's options → the module.   width: numbers that an encoder gives it for each of a
    latent's.   has_ids: whether it has a codebook."""

    build: Callable[..., nn.Module]
    width: int
    has_ids: bool


def _vq(cfg: Mapping[str, Any], **options: Any) -> VectorQuantizer:
    return VectorQuantizer(
        cfg["codebook_size"], cfg["code_dim"], cfg["estimator"], chunk_size=cfg["codebook_chunk"], **options
    )


def _kl(cfg: Mapping[str, Any], **options: Any) -> KLBottleneck:
    del options  # of quantisers
    return KLBottleneck(cfg["code_dim"])


KINDS = {
    "vq": Kind(_vq, width=1, has_ids=True),
    "kl": Kind(_kl, width=2, has_ids=False),  # means and log variances
}


def build(cfg: Mapping[str, Any], **options: Any) -> nn.Module:
    """The bottleneck of a section; `options` are a quantiser's.

    Raises:
      ValueError: for a codebook size that the bottleneck cannot have.
    """
    kind, size = KINDS[cfg["bottleneck"]], cfg["codebook_size"]
    if kind.has_ids != (size > 0):
        has = "has a codebook, of at least 1 entry" if kind.has_ids else "has no codebook (0)"
        raise ValueError(f"tokenizer.codebook_size={size}, but tokenizer.bottleneck={cfg['bottleneck']} {has}")
    return kind.build(cfg, **options)


def check_ids(cfg: Mapping[str, Any], where: Any) -> None:
    """Raises ValueError for the section of a tokenizer that makes no ids; `where` names its bundle."""
    if not KINDS[cfg["bottleneck"]].has_ids:
        raise ValueError(
            f"{where} is of a tokenizer with continuous latents (bottleneck={cfg['bottleneck']}), which have no ids: "
            "use `encode` and `decode` of its pipeline, or a tokenizer with a codebook where ids are wanted"
        )


def width(cfg: Mapping[str, Any]) -> int:
    """Numbers that an encoder gives for each latent token."""
    return KINDS[cfg["bottleneck"]].width * cfg["code_dim"]
