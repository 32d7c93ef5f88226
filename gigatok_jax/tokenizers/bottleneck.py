"""The bottleneck that a section names, and what its encoder gives it."""

from collections.abc import Mapping
from typing import Any

from gigatok_jax.bottlenecks.kl import KLBottleneck
from gigatok_jax.bottlenecks.vq import VectorQuantizer


def build(cfg: Mapping[str, Any], **options: Any) -> VectorQuantizer | KLBottleneck:
    """The bottleneck of a section; `options` are the quantiser's.

    Raises:
      ValueError: for a codebook size that the bottleneck cannot have.
    """
    kl, size = cfg["bottleneck"] == "kl", cfg["codebook_size"]
    if kl != (size == 0):
        raise ValueError(
            f"tokenizer.codebook_size={size} with tokenizer.bottleneck={cfg['bottleneck']}: a KL bottleneck has no "
            "codebook (0), another has one"
        )
    if kl:
        return KLBottleneck(cfg["code_dim"])
    sizes = dict(codebook_size=size, code_dim=cfg["code_dim"], chunk_size=cfg["codebook_chunk"])
    return VectorQuantizer(estimator=cfg["estimator"], **sizes, **options)


def width(cfg: Mapping[str, Any]) -> int:
    """Numbers that an encoder gives for each latent token: means and log variances for a KL bottleneck."""
    return (2 if cfg["bottleneck"] == "kl" else 1) * cfg["code_dim"]
