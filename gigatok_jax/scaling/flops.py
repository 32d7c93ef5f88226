"""Analytic FLOPs of a function: its jaxpr is walked, nothing is compiled or allocated."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

# Kernels that have no jaxpr to walk, or one per block of a grid.
OPAQUE = ("pallas_call", "mpmd_map", "ffi_call", "dot_product_attention", "ragged_dot")


class Flops(NamedTuple):
    """Floating-point operations of matrix products and convolutions, 2 per multiply-add.

    notes: what the numbers leave out, one sentence each, empty where nothing.
    """

    matmul: int = 0
    conv: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Matrix products and convolutions together."""
        return self.matmul + self.conv

    def times(self, count: int) -> "Flops":
        """The same work `count` times."""
        return self._replace(matmul=self.matmul * count, conv=self.conv * count)


def count_flops(fn: Callable[..., Any], *abstract_args: Any) -> Flops:
    """The FLOPs that one call of `fn` does over all devices.

    Counted is what runs: results that nobody reads are left out, recomputation under `jax.checkpoint` is in. A scan
    counts its length, a `cond` its dearest branch, `lax.platform_dependent` its last (the default). The body of a
    `while` counts once and kernels without a jaxpr count zero, each with a note. Products with the zeros of padding
    and dilation are not counted, so that a convolution's two gradients cost what it costs itself. Elementwise work,
    reductions and sorts count zero.

    Args:
      fn: traceable by jax; jitted or not.
      abstract_args: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    closed = jax.make_jaxpr(fn)(*abstract_args)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _jaxpr(jaxpr)


def flops_by_network(fn: Callable[..., Any], *abstract_args: Any) -> dict[str, Flops]:
    """`count_flops` by the flax module at the root of each operation's scope, in a tokenizer by its part.

    {"Tokenizer/encoder": …, "PatchGAN": …, "": what is outside of modules}.
    """
    closed = jax.make_jaxpr(fn)(*abstract_args)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    found: dict[str, list[Flops]] = {}
    for equation in jaxpr.eqns:
        if (flops := _equation(equation)).total:
            found.setdefault(_network(str(equation.source_info.name_stack)), []).append(flops)
    return {name: _sum(parts) for name, parts in sorted(found.items())}


def _network(scope: str) -> str:
    """ "transpose(jvp(Tokenizer))/Tokenizer.decode/decoder/cnn" → "Tokenizer/decoder"."""
    names = [re.sub(r"^(?:\w+\()*|\)*$", "", name) for name in scope.split("/")]
    names = [name for name in names if re.fullmatch(r"\w+", name)]
    if names and names[0] == "Tokenizer":
        return "/".join(names[:2])
    return names[0] if names else ""


def _sum(parts: Iterable[Flops]) -> Flops:
    parts = list(parts)
    notes = dict.fromkeys(note for part in parts for note in part.notes)  # a set that keeps the order
    return Flops(sum(part.matmul for part in parts), sum(part.conv for part in parts), tuple(notes))


def _jaxpr(jaxpr: core.Jaxpr) -> Flops:
    return _sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(matmul=_dot(equation))
    if name == "conv_general_dilated":
        return Flops(conv=_conv(equation))
    if name.startswith(OPAQUE):
        return Flops(notes=(f"{name}: not counted",))
    if name == "cond" and params.get("branches_platforms"):
        return _jaxpr(params["branches"][-1].jaxpr)
    if name == "cond":
        return max((_jaxpr(branch.jaxpr) for branch in params["branches"]), key=lambda flops: flops.total)
    inner = _sum(_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params))
    if name == "scan":
        return inner.times(params["length"])
    if name == "while" and inner.total:
        return inner._replace(notes=(*inner.notes, "while: trip count unknown, body counted once"))
    if name == "shard_map":  # its jaxpr has the shapes of one shard
        return inner.times(math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]))
    return inner


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv(equation: core.JaxprEqn) -> int:
    """2 · (output images and channels) · (input channels of a group) · (pairs of output position and tap that meet
    an input), which holds for feature and batch groups alike."""
    params = equation.params
    left, right, out = params["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars)
    result = equation.outvars[0].aval.shape
    pairs = 1
    for axis in range(len(left) - 2):
        pairs *= _taps(
            image[left[2 + axis]],
            kernel[right[2 + axis]],
            result[out[2 + axis]],
            stride=params["window_strides"][axis],
            pad=params["padding"][axis][0],
            image_dilation=params["lhs_dilation"][axis],
            kernel_dilation=params["rhs_dilation"][axis],
        )
    return 2 * result[out[0]] * result[out[1]] * kernel[right[1]] * pairs


def _taps(
    size: int, kernel: int, result: int, *, stride: int, pad: int, image_dilation: int, kernel_dilation: int
) -> int:
    """Pairs (output position, tap) of one axis that fall on an input value, not on padding or between two values."""
    position = stride * np.arange(result)[:, None] + kernel_dilation * np.arange(kernel) - pad
    inside = (position >= 0) & (position <= (size - 1) * image_dilation)
    return int(np.count_nonzero(inside & (position % image_dilation == 0)))
