"""A convolution with a faster kernel gradient on CPUs, where XLA's own is the slowest part of a wide network's step.

The gradient of a 3×3 kernel is one matrix product of the image's patches with the output's gradient. XLA's CPU compiler
writes it as a convolution whose window is the whole map: up to five times slower than patches where the map outgrows
the caches. Patches are in the CPU's lowering alone, a few rows at a time: another platform's program has XLA's, and
so has one of several devices, which would sum over the devices after every few rows instead of once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gigatok_jax.nn.constrain import is_split

# Least channels on either side and least entries of a batch's maps from which patches are faster.
MIN_CHANNELS, MIN_ENTRIES = 64, 2**22
MAX_ROW_CELLS = 2048  # of the whole batch, whose patches are made and multiplied at a time
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    image_BHWC: jax.Array,
    kernel_HWIO: jax.Array,
    window_strides: tuple[int, ...],
    padding: Any,
    *,
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` as `flax.linen.Conv` calls it; the same value and, to rounding, gradients.

    Raises:
      TypeError: when a convolution large enough for patches is differentiated forwards, as any `jax.custom_vjp`.
    """
    same = padding == "SAME" or all(tuple(pad) == (1, 1) for pad in padding)
    plain = {*window_strides, *lhs_dilation, *rhs_dilation, feature_group_count} == {1} and precision is None
    if plain and same and patches_are_faster(image_BHWC.shape, kernel_HWIO.shape) and not is_split():
        return _conv(image_BHWC, kernel_HWIO)
    return lax.conv_general_dilated(
        image_BHWC,
        kernel_HWIO,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )


def patches_are_faster(image_BHWC: tuple[int, ...], kernel_HWIO: tuple[int, ...]) -> bool:
    """Whether a 3×3 kernel's gradient is faster by patches on a CPU, by the shapes alone."""
    wide = kernel_HWIO[:2] == (3, 3) and min(kernel_HWIO[2:]) >= MIN_CHANNELS
    entries = math.prod(image_BHWC)
    return wide and isinstance(entries, int) and entries >= MIN_ENTRIES  # no number: a program of any batch


def _plain(image_BHWC: jax.Array, kernel_HWIO: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(image_BHWC, kernel_HWIO, (1, 1), "SAME", dimension_numbers=LAYOUT)


_conv = jax.custom_vjp(_plain)


def _forward(image_BHWC: jax.Array, kernel_HWIO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(image_BHWC, kernel_HWIO), (image_BHWC, kernel_HWIO)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    image, kernel = kept

    def of_kernel(image: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: _plain(image, kernel), kernel)[1](gradient)[0]

    (of_image,) = jax.vjp(lambda image: _plain(image, kernel), image)[1](gradient_BHWC)
    return of_image, lax.platform_dependent(image, gradient_BHWC, cpu=by_patches, default=of_kernel)


_conv.defvjp(_forward, _backward)


def by_patches(image_BHWC: jax.Array, gradient_BHWO: jax.Array) -> jax.Array:
    """The gradient (3, 3, I, O) of a "same" 3×3 kernel, summed in float32 or wider."""
    B, H, W, C = image_BHWC.shape
    rows = max(r for r in range(1, H + 1) if H % r == 0 and (r == 1 or B * r * W <= MAX_ROW_CELLS))
    padded = jnp.pad(image_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    dtype = jnp.promote_types(jnp.float32, image_BHWC.dtype)

    def add_rows(kernel: jax.Array, top: jax.Array) -> tuple[jax.Array, None]:
        image = lax.dynamic_slice_in_dim(padded, top, rows + 2, axis=1)
        gradient = lax.dynamic_slice_in_dim(gradient_BHWO, top, rows, axis=1)
        patches = jnp.concatenate([image[:, i : i + rows, j : j + W] for i in range(3) for j in range(3)], axis=-1)
        by_rows = (((0,), (0,)), ((), ()))
        pair = patches.reshape(B * rows * W, -1), gradient.reshape(B * rows * W, -1)
        return kernel + lax.dot_general(*pair, by_rows, preferred_element_type=dtype), None

    kernel = jnp.zeros((9 * C, gradient_BHWO.shape[-1]), dtype)
    kernel, _ = lax.scan(add_rows, kernel, jnp.arange(0, H, rows))
    return kernel.reshape(3, 3, C, -1).astype(image_BHWC.dtype)
