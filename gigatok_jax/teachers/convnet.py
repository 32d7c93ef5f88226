"""The convolutions of VGG16 and AlexNet (torchvision's), tapped where LPIPS looks (arXiv 1801.03924)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.conv import Conv

# LPIPS's own rounding of the ImageNet statistics, for images in [−1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@jax.custom_vjp
def _relu(x: jax.Array) -> jax.Array:
    """max(x, 0), of which the way back keeps what the next layer keeps too: x > 0 where the result is."""
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jax.lax.optimization_barrier(_relu(x))  # one copy for all that read it
    return y, y


def _relu_backward(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, g, jnp.zeros_like(g)),)


_relu.defvjp(_relu_forward, _relu_backward)


class Stage(NamedTuple):
    """A max-pool of window `pool` and stride 2 (0: none), then convolutions with ReLU; the last one is tapped."""

    pool: int
    widths: tuple[int, ...]
    kernel: int = 3
    stride: int = 1
    pad: int = 1


VGG16 = (  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    Stage(0, (64, 64)),
    Stage(2, (128, 128)),
    Stage(2, (256, 256, 256)),
    Stage(2, (512, 512, 512)),
    Stage(2, (512, 512, 512)),
)
ALEXNET = (  # relu1 … relu5
    Stage(0, (64,), kernel=11, stride=4, pad=2),
    Stage(3, (192,), kernel=5, pad=2),
    Stage(3, (384,)),
    Stage(0, (256,)),
    Stage(0, (256,)),
)


class ConvNet(nn.Module):
    """Images → the last ReLU of every stage; convolutions are conv0, conv1, … in order."""

    stages: tuple[Stage, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        """(B, H, W, 3) in [−1, 1] → a map (B, h, w, C) per stage, in `dtype`.

        Raises:
          ValueError: for an image so small that a map has no cell left.
        """
        x = (image_BHWC.astype(jnp.float32) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        x, maps, index = x.astype(self.dtype), [], 0
        for stage in self.stages:
            if stage.pool:
                x = nn.max_pool(x, (stage.pool, stage.pool), (2, 2))
            if min(x.shape[1:3]) + 2 * stage.pad < stage.kernel or not x.size:
                raise ValueError(
                    f"images {image_BHWC.shape} are too small for this network's {len(self.stages)} stages"
                )
            for width in stage.widths:
                conv = Conv(
                    width,
                    (stage.kernel, stage.kernel),
                    strides=stage.stride,
                    padding=stage.pad,
                    dtype=self.dtype,
                    name=f"conv{index}",
                )
                x, index = _relu(conv(x)), index + 1
            maps.append(x)
        return tuple(maps)
