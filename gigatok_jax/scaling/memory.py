"""What a train step would hold, from its jaxpr alone: an ideal; and the compiler's figure that is held against it.

Of one device, in bytes:

    ideal = stored + gradients + saved + working

    stored     state, frozen networks and batch, as they lie on a device
    gradients  of what is trained, as it lies: all are there before the first update, for their norm
    saved      the least from which the way back follows without another product or reduction: inputs of rematerialised
               blocks (stacked, where they are scanned), and what the products, norms and pools outside of blocks need
    working    the largest block's: operands and results of its products and convolutions, its inputs and its output,
               once more for their gradients

Elementwise results (activations, casts, masks) are made again where they are read, if that keeps less: `saved` is a
minimum cut. A device's rows are traced alone, so what depends on the batch has the size that one device has of it.

A program may take less: what is saved goes as gradients come, and the largest block may not be at work when most is
saved.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow

PRODUCTS = ("dot_general", "conv_general_dilated")
BLOCKS = ("checkpoint", "remat", "remat2")
_ELEMENTWISE_NOT = (*PRODUCTS, *BLOCKS, "scan", "while", "cond", "sort", "gather", "scatter", "cum", "reduce", "arg")
_ELEMENTWISE_NOT += ("select_and_", "pallas_call", "custom_call", "ffi_call", "shard_map", "top_k")
_NO_LIMIT = 2**30  # KiB


class Ideal(NamedTuple):
    """Bytes of one device; see the module."""

    stored: int
    gradients: int
    saved: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def taken(sizes: Any, platform: str) -> dict[str, int]:
    """What a compiled program takes: its "peak", "arguments", "temporaries" beside them, and what is in "host" memory.

    On a GPU temporaries are one block, whose size is stated. On a TPU what is stated is more than what is laid out
    (`ar.py:xxl` compiles for v5e:2x2 with 128 rows a chip, arguments and temporaries being 17.4 GiB of 15.75): the peak
    is the most that is ever live at once, the processor's own memory (at most 128 MiB) included, without what the host
    holds throughout. The compiler's layout was seen to take between that and 4 % more.
    """
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    host = sizes.host_argument_size_in_bytes + sizes.host_output_size_in_bytes - sizes.host_alias_size_in_bytes
    peak = sizes.peak_memory_in_bytes - host if platform == "tpu" else held + sizes.temp_size_in_bytes
    return {
        "peak": peak,
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": peak - held,
        "host": host + sizes.host_temp_size_in_bytes,
    }


Parts = Callable[[tuple[int, ...]], int]  # an activation's shape → devices that hold a part of it each, beside its rows


def parts_by_tensor(tensor: int) -> Parts:
    """Of a tensor axis: feature maps (B, H, W, C) are split by height, heads and their logits (rank 4 too) by head."""

    def parts(shape: tuple[int, ...]) -> int:
        return tensor if len(shape) == 4 and any(size % tensor == 0 for size in shape[1:3]) else 1

    return parts


def saved_bytes(loss: Callable[..., Any], params: Any, batch: Any, *rest: Any, parts: Parts = lambda shape: 1) -> int:
    """`saved` of loss(params, batch, *rest) → (scalar, anything), differentiated by `params`.

    Args:
      batch: a device's rows, as every argument a pytree of `jax.ShapeDtypeStruct`.
      parts: into how many parts an activation is split beside that.
    """

    def backward(batch: Any, params: Any, *rest: Any) -> Any:
        return jax.vjp(lambda p: loss(p, batch, *rest), params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(backward)(batch, params, *rest).jaxpr
    rows = jaxpr.invars[: len(jax.tree.leaves(batch))]
    return _cut(jaxpr, set(rows), set(_variables(jaxpr.outvars)), parts)


def _cut(jaxpr: core.Jaxpr, batch: set[core.Var], wanted: set[core.Var], parts: Parts) -> int:
    """Bytes of the smallest set of values of which all `wanted` that depend on the batch are elementwise functions."""
    made: dict[core.Var, int] = {}  # a number for every value that depends on the batch
    edges: list[tuple[int, int, int]] = []
    source, sink = 0, 1
    depends = set(batch)
    for equation in jaxpr.eqns:
        inputs = [v for v in _variables(equation.invars) if v in depends]
        if not inputs:
            continue
        elementwise = _is_elementwise(equation)
        for out in equation.outvars:
            depends.add(out)
            node = made[out] = 2 * len(made) + 2  # and node + 1: what leaves it
            edges.append((node, node + 1, -(-_bytes(out) // parts(out.aval.shape) // 1024)))
            before = [made[v] + 1 for v in inputs if v in made] if elementwise else [source]
            edges += [(one, node, _NO_LIMIT) for one in before]
    edges += [(made[v] + 1, sink, _NO_LIMIT) for v in wanted & made.keys()]
    if not edges:
        return 0
    rows, columns, capacities = np.array(edges, np.int32).T
    size = 2 * len(made) + 2
    graph = coo_array((capacities, (rows, columns)), shape=(size, size)).tocsr()
    return 1024 * int(maximum_flow(graph, source, sink).flow_value)


def _is_elementwise(equation: core.JaxprEqn) -> bool:
    """Whether what an operation makes can be made again at no more than the cost of reading its inputs."""
    if equation.primitive.name.startswith(_ELEMENTWISE_NOT):
        return False
    return all(_is_elementwise(one) for inner in core.jaxprs_in_params(equation.params) for one in inner.eqns)


def working_bytes(loss: Callable[..., Any], *args: Any, parts: Parts = lambda shape: 1) -> int:
    """`working` of loss(*args); where nothing is rematerialised, the largest product's operands and result, twice.

    Kernels of convolutions have four dimensions too: `parts` says of them that they are split as activations.
    """
    closed = jax.make_jaxpr(loss)(*args)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return max((_working(block, parts) for block in _blocks(jaxpr)), default=0)


def _blocks(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Rematerialised blocks, and the products outside of them, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in (*BLOCKS, *PRODUCTS):
            yield equation
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from _blocks(inner)


def _working(block: core.JaxprEqn, parts: Parts) -> int:
    """A block's operands and results, once; its inputs and outputs once more, for their gradients."""

    def held(variables: Iterable[Any]) -> int:
        return sum(_bytes(v) // parts(v.aval.shape) for v in set(_variables(variables)))

    if block.primitive.name in PRODUCTS:
        return 2 * held([*block.invars, *block.outvars])
    (inner,) = core.jaxprs_in_params(block.params)
    products = list(_products(inner))
    read = held(v for one in products for v in one.invars)
    return read + held(v for one in products for v in one.outvars) + held([*block.invars, *block.outvars])


def _products(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from _products(inner)


def _variables(values: Iterable[Any]) -> list[core.Var]:
    return [value for value in values if not isinstance(value, core.Literal)]


def _bytes(variable: core.Var) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize if hasattr(variable.aval, "size") else 0
