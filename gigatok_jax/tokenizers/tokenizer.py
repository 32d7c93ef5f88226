"""Tokenizer = encoder → bottleneck → decoder; everything else is composition."""

from typing import Any

import flax.linen as nn
import jax

from gigatok_jax.bottlenecks.codes import Codes, Condition


class Tokenizer(nn.Module):
    """Fields are its parts; `bottlenecks/codes.py` says what crosses between them.

    Every part is told the condition, a key of its own and whether it is trained; what has no use for them ignores them:
    `encoder(image, cond, key=, train=)` → (latents before the bottleneck, taps), `bottleneck(latents, key=, train=)` →
    codes, `decoder(codes, cond, key=, train=)` → (target, taps).

    Attributes:
      grid: (h, w) of a 2-D tokenizer whose ids are a raster-order grid, None for 1-D latent tokens.
      proxy_codebook_size, num_proxy_ids: of the tokenizer whose grid of ids the decoder gives logits of; 0: it makes
        images.
      factor: how many pixels of a side one cell of the feature map covers.
    """

    encoder: nn.Module
    bottleneck: nn.Module
    decoder: nn.Module
    num_latent_tokens: int
    image_size: int
    factor: int
    grid: tuple[int, int] | None = None
    proxy_codebook_size: int = 0
    num_proxy_ids: int = 0

    def encode(
        self, image_BHWC: jax.Array, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Codes, dict[str, jax.Array]]:
        """Images in [−1, 1] → (codes, taps)."""
        pre_BKZ, out = self.encoder(image_BHWC, cond, key=_stream(key, 1), train=train)
        return self.bottleneck(pre_BKZ, key=key, train=train), out

    def decode(
        self, codes: Codes, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Codes → (image, unbounded around [−1, 1], or what else the decoder's head gives; taps)."""
        return self.decoder(codes, cond, key=key, train=train)

    def decode_features(self, map_BHWC: jax.Array) -> jax.Array:
        """Feature map → image, by the decoder's convolutional part alone."""
        return self.decoder.decode_features(map_BHWC)

    def lookup(self, ids_BK: jax.Array) -> Codes:
        """Stored ids → codes."""
        return self.bottleneck.lookup(ids_BK)

    def __call__(
        self, image_BHWC: jax.Array, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, Codes, dict[str, Any]]:
        codes, encoder_out = self.encode(image_BHWC, cond, key=key, train=train)
        image, decoder_out = self.decode(codes, cond, key=_stream(key, 2), train=train)
        return image, codes, {**encoder_out, **decoder_out}


def _stream(key: jax.Array | None, number: int) -> jax.Array | None:
    """The key of a part; the bottleneck's is the given one itself."""
    return None if key is None else jax.random.fold_in(key, number)
