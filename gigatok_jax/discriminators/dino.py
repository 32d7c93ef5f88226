"""The DINO discriminator: small trained heads over a frozen ViT (GigaTok `discriminator_dino.py`, after VAR)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.discriminators.diffaug import diffaug, draws
from gigatok_jax.nn.norms import LocalBatchNorm
from gigatok_jax.nn.resize import area, bicubic, resize
from gigatok_jax.nn.spectral import SpectralConv1d
from gigatok_jax.nn.vit import ViT, ViTSizes, imagenet_normalised

SIZE, PATCH = 224, 16  # DINO v1 ViT-S/16 at its own resolution


def to_backbone_size(image_BHWC: jax.Array, key: jax.Array | None) -> jax.Array:
    """(B, H, W, 3) → (B, 224, 224, 3): resized by area (bicubic where it is no higher than 224), or, with a key and
    both sides above 224, half of the time a crop, one place for the whole batch."""
    B, H, W, C = image_BHWC.shape
    resized = resize(image_BHWC, SIZE, SIZE, area if H > SIZE else bicubic)
    if key is None or min(H, W) <= SIZE:
        return resized
    coin, row, column = jax.random.split(key, 3)
    top, left = jax.random.randint(row, (), 0, H - SIZE + 1), jax.random.randint(column, (), 0, W - SIZE + 1)
    cropped = jax.lax.dynamic_slice(image_BHWC.astype(jnp.float32), (0, top, left, 0), (B, SIZE, SIZE, C))
    return jnp.where(jax.random.bernoulli(coin), cropped, resized)


class Head(nn.Module):
    """Features (B, N, C) → a logit per token: 1×1 block, a residual block of nine neighbours on a circle, 1×1."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC: jax.Array, train: bool) -> jax.Array:
        def block(name: str, size: int, x: jax.Array) -> jax.Array:
            x = SpectralConv1d(x.shape[-1], size, self.dtype, name=f"{name}_conv")(x, train)
            return nn.leaky_relu(LocalBatchNorm(dtype=self.dtype, name=f"{name}_norm")(x), 0.2)

        x_BNC = block("point", 1, x_BNC)
        x_BNC = (block("circle", 9, x_BNC) + x_BNC) * 2**-0.5
        return SpectralConv1d(1, 1, self.dtype, name="logits")(x_BNC, train)[..., 0]


class DinoDiscriminator(nn.Module):
    """Five heads over DINO v1 ViT-S/16: what enters its layers and what leaves layers 3, 6, 9 and 12.

    The backbone's parameters {"vit": …} are the collection `frozen`, given to `apply` and never trained:
    `apply({"params": …, "spectral": …, "frozen": …}, image, train=True, mutable=["spectral"],
    rngs={"augment": key})`. With the stream `augment` images are augmented (DiffAug) and sometimes cropped; without it
    they are only resized. 7.39M trained parameters at the published sizes.
    """

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    taps: tuple[int, ...] = (0, 3, 6, 9, 12)
    remat: str = "none"  # of the backbone's layers
    dtype: Any = jnp.float32  # of backbone and heads; resizing, batch statistics and power iterations are float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array, train: bool) -> jax.Array:
        """Images (B, H, W, 3) in [−1, 1], H and W any → (B, len(taps) · 196) logits of any range."""
        if self.is_initializing():  # the heads' shapes do not depend on the backbone's weights
            features = [jnp.zeros((1, 1, self.width), self.dtype)] * len(self.taps)
        else:
            features = self.features(image_BHWC)
        logits = [Head(self.dtype, name=f"head_{n}")(x_BNC, train) for n, x_BNC in enumerate(features)]
        return jnp.concatenate(logits, 1)

    def features(self, image_BHWC: jax.Array) -> list[jax.Array]:
        """One (B, 196, C) per tap: each patch token plus the class token."""
        crop_key = None
        if self.has_rng("augment"):
            aug_key, crop_key = jax.random.split(self.make_rng("augment"))
            image_BHWC = diffaug(image_BHWC, draws(aug_key, image_BHWC.shape[0]))
        x_BHWC = imagenet_normalised(to_backbone_size(image_BHWC, crop_key))
        sizes = ViTSizes(
            self.width, self.depth, self.num_heads, PATCH, SIZE // PATCH, mlp="gelu_tanh", layer_scale=False
        )
        vit = ViT(sizes, self.remat, self.dtype, parent=None)
        _, tapped = vit.apply({"params": self.variables["frozen"]["vit"]}, x_BHWC, self.taps)
        return [tapped[tap][:, 1:] + tapped[tap][:, :1] for tap in self.taps]
