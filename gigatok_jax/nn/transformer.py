"""Pre-norm transformer layers and the scanned stack of them."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.attention import MultiHeadAttention
from gigatok_jax.nn.constrain import constrain, gathered
from gigatok_jax.nn.initializers import Init, packed_xavier, small_normal
from gigatok_jax.nn.norms import layer_norm

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layers' inputs only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul results, recompute the rest
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


class Mlp(nn.Module):
    """Linear → activation → Linear; `kind` "swiglu": out(silu(gate x) · in x).

    `hidden` is the width in between, 0 for 4 · D.
    """

    hidden: int = 0
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    kind: str = "gelu"

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """Raises ValueError for a kind that is neither "swiglu" nor one of `ACTIVATIONS`."""
        width = x_BND.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x_BNF = dense(self.hidden or 4 * width, name="in")(x_BND)
        if self.kind == "swiglu":
            x_BNF = nn.silu(dense(x_BNF.shape[-1], name="gate")(x_BND)) * x_BNF
        elif self.kind in ACTIVATIONS:
            x_BNF = ACTIVATIONS[self.kind](x_BNF)
        else:
            raise ValueError(f"MLP {self.kind!r} is not one of swiglu, {', '.join(ACTIVATIONS)}")
        return dense(width, name="out")(constrain(x_BNF, "batch", None, "mlp"))


class ViTLayer(nn.Module):
    """x += γ·Attention(LN x); x += γ·MLP(LN x).

    γ is a learned scale per channel with `layer_scale`, else 1; `mlp` and `hidden` are the kind and width of the MLP,
    `epsilon` is LayerNorm's, `qkv_init` and `qkv_bias` are the attention's.
    """

    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    mlp: str = "gelu"
    hidden: int = 0
    layer_scale: bool = False
    epsilon: float = 1e-5
    qkv_init: Init = packed_xavier
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        def scaled(name: str, y_BND: jax.Array) -> jax.Array:
            if not self.layer_scale:
                return y_BND
            return y_BND * self.param(name, nn.initializers.ones, y_BND.shape[-1:]).astype(self.dtype)

        sizes = self.num_heads, self.attention, self.dtype, self.kernel_init, self.qkv_init, self.qkv_bias
        attention = MultiHeadAttention(*sizes, name="self_attention")
        a = layer_norm(self.dtype, "norm_self", self.epsilon)(x_BND)
        x_BND = x_BND + scaled("scale_self", attention(a, a, a))
        mlp = Mlp(self.hidden, self.dtype, self.kernel_init, self.mlp, name="mlp")
        return x_BND + scaled("scale_mlp", mlp(layer_norm(self.dtype, "norm_mlp", self.epsilon)(x_BND)))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention to a memory, MLP (GigaTok's ViT parts; DETR's pre-norm decoder layer).

    Positions are added to queries and keys of both attentions, never to values. The memory is not normalised. Without
    a memory the layer crosses to its own input (the published 2-D "S-S" yaml).
    """

    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(
        self,
        x_BQD: jax.Array,
        memory_BND: jax.Array | None = None,
        query_pos_QD: jax.Array | None = None,
        memory_pos_ND: jax.Array | None = None,
    ) -> jax.Array:
        memory_BND = x_BQD if memory_BND is None else memory_BND
        query_pos_QD, memory_pos_ND = query_pos_QD.astype(self.dtype), memory_pos_ND.astype(self.dtype)
        attention = self.num_heads, self.attention, self.dtype, self.kernel_init
        a = layer_norm(self.dtype, "norm_self")(x_BQD)
        q = a + query_pos_QD
        x_BQD = x_BQD + MultiHeadAttention(*attention, name="self_attention")(q, q, a)
        q = layer_norm(self.dtype, "norm_cross")(x_BQD) + query_pos_QD
        cross = MultiHeadAttention(*attention, name="cross_attention")
        x_BQD = x_BQD + cross(q, memory_BND + memory_pos_ND, memory_BND)
        return x_BQD + Mlp(dtype=self.dtype, kernel_init=self.kernel_init, name="mlp")(
            layer_norm(self.dtype, "norm_mlp")(x_BQD)
        )


LAYERS: dict[str, Callable[..., nn.Module]] = {"vit": ViTLayer, "qformer": QFormerLayer}


class Stack(nn.Module):
    """`depth` equal layers whose parameters are stacked on a leading axis, scanned and rematerialised.

    Taps are static: each rides along the scan as one activation that its layer writes, so neither activations nor
    copies of the weights grow with depth. `taps=(3,)` gives the output of the third layer. Where a "dropout" key is
    given, every layer gets one of its own.

    Attributes:
      layer: a name out of `LAYERS`, or what builds a layer from (num_heads, attention, dtype, kernel_init).
    """

    layer: str | Callable[..., nn.Module]
    depth: int
    num_heads: int
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(
        self,
        x_BND: jax.Array,
        *context: jax.Array | None,
        taps: tuple[int, ...] = (),
        keep: bool = False,
        beside_LBND: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the last layer's output and {tap: output of layer number `tap`, counted from 1}.

        Args:
          keep: in place of the taps, the outputs of all layers as one array (L, B, N, D).
          beside_LBND: what each layer has of its own, given to it after its input.
        Raises:
          ValueError: for a tap outside 1..depth, or an unknown layer or remat policy.
        """
        if bad := [tap for tap in taps if not 1 <= tap <= self.depth]:
            raise ValueError(f"taps {bad} are outside 1..{self.depth}, the layers of this stack")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not one of {list(REMAT_POLICIES)}")
        layer = self._layer()

        def init(key: jax.Array) -> Any:
            keys, own = jax.random.split(key, self.depth), () if beside_LBND is None else (beside_LBND[0],)
            return jax.vmap(lambda key: layer.init({"params": key}, x_BND, *own, *context)["params"])(keys)

        def apply(params: Any, x: jax.Array, key: jax.Array | None, own: jax.Array | None) -> jax.Array:
            rngs, inputs = None if key is None else {"dropout": key}, (x,) if own is None else (x, own)
            y = layer.apply({"params": gathered(params)}, *inputs, *context, rngs=rngs)
            return constrain(y, "batch", None, "embed")

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

        def body(carry: tuple[jax.Array, dict[int, jax.Array]], numbered: tuple[Any, ...]) -> tuple[Any, Any]:
            (x, tapped), (number, params, key, own) = carry, numbered
            x = apply(params, x, key, own)
            tapped = {tap: jnp.where(number == tap, x, before) for tap, before in tapped.items()}
            return (x, tapped), x if keep else None

        params = self.param("layers", init)
        tapped = {tap: constrain(jnp.zeros_like(x_BND), "batch", None, "embed") for tap in taps}
        keys = jax.random.split(self.make_rng("dropout"), self.depth) if self.has_rng("dropout") else None
        numbered = jnp.arange(1, self.depth + 1), params, keys, beside_LBND
        (x_BND, tapped), kept = jax.lax.scan(body, (x_BND, tapped), numbered, unroll=self.unroll)
        return x_BND, kept if keep else tapped

    def step(self, x_B1D: jax.Array, caches: list[Any], position: jax.Array, *context: Any) -> tuple[Any, list[Any]]:
        """One position through every layer, in a program without a scan; → (output, caches).

        A scan would copy each layer's weights at each position. `unstacked` parameters are not even sliced.
        """
        layers, layer = self.get_variable("params", "layers"), self._layer()
        layers = layers if isinstance(layers, (tuple, list)) else unstacked(layers, self.depth)
        kept = []
        for params, cache in zip(layers, caches, strict=True):
            x_B1D, cache = layer.apply({"params": params}, x_B1D, cache, position, *context, method="step")
            kept.append(cache)
        return x_B1D, kept

    def _layer(self) -> nn.Module:
        if isinstance(self.layer, str) and self.layer not in LAYERS:
            raise ValueError(f"layer {self.layer!r} is not one of {list(LAYERS)}")
        build = LAYERS[self.layer] if isinstance(self.layer, str) else self.layer
        return build(self.num_heads, self.attention, self.dtype, self.kernel_init, parent=None)


def unstacked(layers: Any, depth: int) -> tuple[Any, ...]:
    """Stacked parameters (a leading axis of layers) → one tree per layer."""
    return tuple(jax.tree.map(operator.itemgetter(n), layers) for n in range(depth))


def grid_context(stack: Stack, pos_ND: jax.Array) -> tuple[jax.Array | None, ...]:
    """What a stack over the map itself is given: nothing (plain ViT), or positions for self + cross layers."""
    return () if stack.layer == "vit" else (None, pos_ND, pos_ND)
