"""Vision transformer over patches and learned latent tokens, which alone are kept (TiTok, arXiv 2406.07550, §3.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Condition
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import Init, position_table, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.transformer import Stack
from gigatok_jax.nn.vit import PatchEmbed


class ViTLatentEncoder(nn.Module):
    """Image (B, H, W, 3) in [−1, 1] → latents before the bottleneck (B, K, `features`).

    The sequence is a class token, the patches and the K latent tokens, each with a learned position. `reinterpreted`
    reads the K × D numbers of an image's latent tokens as D × K before the last projection, as the released two-stage
    models do: each latent then mixes several tokens. Taps in `out`: `encoder_block_n`, `encoder_features` (B, K, D).
    """

    stack: Stack
    width: int
    patch: int
    grid: tuple[int, int]
    num_latent_tokens: int
    features: int
    reinterpreted: bool = False
    taps: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    position_init: Init = position_table
    centre: float = 0.0  # of pixels in [0, 1]: a patch of this grey starts as 0

    @nn.compact
    def __call__(
        self, image_BHWC: jax.Array, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del cond, key, train
        B, K, width = image_BHWC.shape[0], self.num_latent_tokens, self.width
        pixels = image_BHWC * 0.5 + 0.5  # published weights read [0, 1]
        x_BND = PatchEmbed(width, self.patch, self.dtype, True, self.kernel_init, self.centre, name="embed")(pixels)
        first_1D = self.param("class_token", self.position_init, (1, width))
        pos_ND = self.param("token_pos", self.position_init, (1 + self.grid[0] * self.grid[1], width))
        latent_KD = self.param("latent_tokens", self.position_init, (K, width))
        latent_pos_KD = self.param("latent_pos", self.position_init, (K, width))
        x_BND = jnp.concatenate([shared(first_1D, B, self.dtype), x_BND], 1) + pos_ND.astype(self.dtype)
        x_BND = jnp.concatenate([x_BND, shared(latent_KD + latent_pos_KD, B, self.dtype)], 1)
        x_BND = constrain(layer_norm(self.dtype, "norm_in")(x_BND), "batch", None, "embed")
        x_BND, tapped = self.stack(x_BND, taps=self.taps)
        x_BKD = layer_norm(self.dtype, "norm_out")(x_BND[:, -K:])
        out = {"encoder_features": x_BKD, **{f"encoder_block_{tap}": value for tap, value in tapped.items()}}
        if self.reinterpreted:
            x_BKD = x_BKD.reshape(B, width, K).swapaxes(1, 2)
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="to_latents")(x_BKD), out


def shared(tokens_ND: jax.Array, batch: int, dtype: Any) -> jax.Array:
    """Learned tokens, the same for every image: (batch, N, D)."""
    return jnp.broadcast_to(tokens_ND.astype(dtype), (batch, *tokens_ND.shape))
