"""The kernel gradient of wide 3×3 convolutions on a CPU, as one matrix product per image.

XLA's CPU backend computes that gradient with a plain loop nest, several times slower than the rest of the step. Seen as
patches (im2col) it is a matrix product. Other platforms keep their own gradient: the choice is made where a program is
lowered, so that an accelerator's program does not hold this one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Input channels times output channels from which the matrix product wins on 2 cores.
LEAST_CHANNELS = 32 * 32

Padding = tuple[tuple[int, int], ...]
_NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(
    x_BHWC: jax.Array, kernel: jax.Array, window_strides: Any, padding: Any, *, precision: Any = None, **rest: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of BHWC maps; what flax's `nn.Conv` calls with its own arguments."""
    h, w, inp, out = kernel.shape if kernel.ndim == 4 else (0, 0, 0, 0)
    dilated = any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in rest.get(name) or ())
    if (h, w) != (3, 3) or inp * out < LEAST_CHANNELS or dilated or rest.get("feature_group_count", 1) != 1:
        return jax.lax.conv_general_dilated(x_BHWC, kernel, window_strides, padding, precision=precision, **rest)
    strides = tuple(window_strides)
    pads = (
        tuple(map(tuple, jax.lax.padtype_to_pads(x_BHWC.shape[1:3], (3, 3), strides, padding)))
        if isinstance(padding, str)
        else tuple(map(tuple, padding))
    )
    return _conv3x3(x_BHWC, kernel, strides, pads, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv3x3(x_BHWC: jax.Array, kernel: jax.Array, strides: Any, padding: Padding, precision: Any) -> jax.Array:
    return _plain(x_BHWC, kernel, strides, padding, precision)


def _plain(x_BHWC: jax.Array, kernel: jax.Array, strides: Any, padding: Padding, precision: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, padding, dimension_numbers=_NHWC, precision=precision)


def _forward(x_BHWC: jax.Array, kernel: jax.Array, strides: Any, padding: Padding, precision: Any) -> Any:
    return _plain(x_BHWC, kernel, strides, padding, precision), (x_BHWC, kernel)


def _backward(strides: Any, padding: Padding, precision: Any, kept: Any, dy_BHWF: jax.Array) -> Any:
    x_BHWC, kernel = kept
    conv = functools.partial(_plain, strides=strides, padding=padding, precision=precision)
    (dx_BHWC,) = jax.linear_transpose(lambda x: conv(x, kernel), x_BHWC)(dy_BHWF)

    def own(x_BHWC: jax.Array, dy_BHWF: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda k: conv(x_BHWC, k), kernel)(dy_BHWF)[0]

    patches = functools.partial(_by_patches, strides=strides, padding=padding)
    return dx_BHWC, jax.lax.platform_dependent(x_BHWC, dy_BHWF, cpu=patches, default=own)


def _by_patches(x_BHWC: jax.Array, dy_BHWF: jax.Array, *, strides: Any, padding: Padding) -> jax.Array:
    """Σ over images and places of patchᵀ · dy; one image's patches (9 times its map) are in memory at a time."""
    _, H, W, F = dy_BHWF.shape
    C = x_BHWC.shape[-1]

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_HWC, dy_HWF = pair
        x_HWC = jnp.pad(x_HWC, (*padding, (0, 0)))
        ends = (H - 1) * strides[0] + 1, (W - 1) * strides[1] + 1
        shifts = [x_HWC[i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(shifts, -1).reshape(H * W, 9 * C)
        return total + jnp.matmul(patches.T, dy_HWF.reshape(H * W, F), preferred_element_type=total.dtype), None

    total, _ = jax.lax.scan(add, jnp.zeros((9 * C, F), jnp.float32), (x_BHWC, dy_BHWF))
    return total.reshape(3, 3, C, F).astype(x_BHWC.dtype)


_conv3x3.defvjp(_forward, _backward)
