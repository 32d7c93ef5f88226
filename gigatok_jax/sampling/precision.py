"""The weights that a generator decodes with: float32, bfloat16, or int8 matrices.

Decoding reads every weight at every position, so its speed is that of memory. With int8 every dense layer's matrix is
kept as int8 and one float32 scale per output channel (qwix's symmetric quantisation, after training); tables, norms,
biases, the cache and what lies between two products stay float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.transformer import unstacked

DTYPES = ("float32", "bfloat16", "int8")


def arithmetic(dtype: Any) -> jnp.dtype:
    """The dtype of activations and cache beside weights of `dtype`."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.int8 else dtype)


def held(params: Any, dtype: Any) -> Any:
    """A generator's parameters as decoding holds them: of `dtype`, and one tree per layer.

    Parameters that are held already come back as they are.

    Raises:
      ImportError: int8 without the package qwix.
    """
    layers = params["stack"]["layers"]
    if isinstance(layers, tuple):
        return params

    def hold(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        matrix = path[-1].key == "kernel"
        return quantized(leaf) if matrix and jnp.dtype(dtype) == jnp.int8 else leaf.astype(arithmetic(dtype))

    depth = jax.tree.leaves(layers)[0].shape[0]
    params = jax.tree_util.tree_map_with_path(hold, params)
    return {**params, "stack": {**params["stack"], "layers": unstacked(params["stack"]["layers"], depth)}}


def quantized(kernel: jax.Array) -> Any:
    """(…, D, F) → a `qwix.QArray` of int8 (…, D, F) and float32 scales (…, 1, F).

    Raises:
      ImportError: without the package qwix.
    """
    try:
        import qwix
    except ImportError:
        raise ImportError("int8 weights need the package qwix: pip install qwix") from None
    axes = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=axes)


def apply(model: nn.Module, params: Any, *args: Any, method: str) -> Any:
    """`model.apply` with parameters as `held` has made them."""
    with nn.intercept_methods(_int8_dense):
        return model.apply({"params": params}, *args, method=method)


def _int8_dense(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Does a dense layer's work where its kernel is int8."""
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not hasattr(kernel, "qvalue"):
        return next_fun(*args, **kwargs)
    y_BNF = product(args[0], kernel)
    return y_BNF + layer.get_variable("params", "bias") if layer.use_bias else y_BNF


def product(x_BND: jax.Array, kernel: Any) -> jax.Array:
    """x·W, (B, N, F) float32, in integers: a row of x is the sum of two int8 rows, each with its scale.

    Two, because one would round activations more coarsely than the weights; both go through one product, which reads W
    once. W is never converted: a compiler may move that out of the loop over positions, and read floats again.
    """
    import qwix

    axes = range(x_BND.ndim - 1)
    coarse = qwix.quantize(x_BND, jnp.int8, channelwise_axes=axes)
    fine = qwix.quantize(x_BND - qwix.dequantize(coarse), jnp.int8, channelwise_axes=axes)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), coarse, fine)
    return sum(jnp.split(qwix.dot(both, kernel), 2, axis=-2))
