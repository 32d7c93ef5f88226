"""The Inception-v3 (arXiv 1512.00567) that FID is measured with: TensorFlow's graph of 2015-12-05.

It is not torchvision's: average pools do not count what lies outside the map, the last block's pool takes maxima, and
there are 1008 classes. Units are called as pytorch-fid and torch-fidelity publish them. Always float32, at full
precision on every device: a score should not depend on where it is computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.resize import bilinear, bilinear_tf1, resize

SIZE, CLASSES = 299, 1008
# What a library enlarges pictures to 299 px with, and the value that it makes 0.
PREPROCESSING = {"pytorch-fid": (bilinear, 127.5), "torch-fidelity": (bilinear_tf1, 128.0)}


class Unit(NamedTuple):
    """A convolution without bias, batch norm and ReLU."""

    key: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @property
    def name(self) -> str:
        """What its parameters are called here."""
        return self.key.lower().replace(".", "_")


class Branch(NamedTuple):
    """A pool, if any, and steps after it; the units of one step see the same map and are joined.

    pool: "" for none, "average" or "max" over 3×3 at stride 1, "down" for the maximum over 3×3 at stride 2.
    """

    steps: tuple[tuple[Unit, ...], ...]
    pool: str = ""


Block = tuple[Branch, ...]  # they see the same map and are joined along its channels


class Outputs(NamedTuple):
    """features_BM: the last map's mean (M = 2048), which FID compares.   logits_BV: with the classifier's bias.

    unbiased_BV: without it, as the published inception scores take them.
    """

    features_BM: jax.Array
    logits_BV: jax.Array
    unbiased_BV: jax.Array


def _chain(*units: Unit, pool: str = "") -> Branch:
    return Branch(tuple((unit,) for unit in units), pool)


def _block35(key: str, pooled: int) -> Block:
    key, cube = f"{key}.branch", (3, 3)
    return (
        _chain(Unit(f"{key}1x1", 64)),
        _chain(Unit(f"{key}5x5_1", 48), Unit(f"{key}5x5_2", 64, (5, 5))),
        _chain(Unit(f"{key}3x3dbl_1", 64), Unit(f"{key}3x3dbl_2", 96, cube), Unit(f"{key}3x3dbl_3", 96, cube)),
        _chain(Unit(f"{key}_pool", pooled), pool="average"),
    )


def _block17(key: str, width: int) -> Block:
    key, row, column = f"{key}.branch", (1, 7), (7, 1)
    return (
        _chain(Unit(f"{key}1x1", 192)),
        _chain(Unit(f"{key}7x7_1", width), Unit(f"{key}7x7_2", width, row), Unit(f"{key}7x7_3", 192, column)),
        _chain(
            Unit(f"{key}7x7dbl_1", width),
            Unit(f"{key}7x7dbl_2", width, column),
            Unit(f"{key}7x7dbl_3", width, row),
            Unit(f"{key}7x7dbl_4", width, column),
            Unit(f"{key}7x7dbl_5", 192, row),
        ),
        _chain(Unit(f"{key}_pool", 192), pool="average"),
    )


def _block8(key: str, pool: str) -> Block:
    key = f"{key}.branch"

    def cross(step: str) -> tuple[Unit, Unit]:
        return Unit(f"{key}{step}a", 384, (1, 3)), Unit(f"{key}{step}b", 384, (3, 1))

    return (
        _chain(Unit(f"{key}1x1", 320)),
        Branch(((Unit(f"{key}3x3_1", 384),), cross("3x3_2"))),
        Branch(((Unit(f"{key}3x3dbl_1", 448),), (Unit(f"{key}3x3dbl_2", 384, (3, 3)),), cross("3x3dbl_3"))),
        _chain(Unit(f"{key}_pool", 192), pool=pool),
    )


def _half(key: str, width: int) -> Unit:
    return Unit(key, width, (3, 3), 2, "VALID")


INCEPTION: tuple[Block, ...] = (
    (
        _chain(
            _half("Conv2d_1a_3x3", 32),
            Unit("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
            Unit("Conv2d_2b_3x3", 64, (3, 3)),
        ),
    ),
    (_chain(Unit("Conv2d_3b_1x1", 80), Unit("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"), pool="down"),),
    (Branch((), "down"),),
    _block35("Mixed_5b", 32),
    _block35("Mixed_5c", 64),
    _block35("Mixed_5d", 64),
    (
        _chain(_half("Mixed_6a.branch3x3", 384)),
        _chain(
            Unit("Mixed_6a.branch3x3dbl_1", 64),
            Unit("Mixed_6a.branch3x3dbl_2", 96, (3, 3)),
            _half("Mixed_6a.branch3x3dbl_3", 96),
        ),
        Branch((), "down"),
    ),
    _block17("Mixed_6b", 128),
    _block17("Mixed_6c", 160),
    _block17("Mixed_6d", 160),
    _block17("Mixed_6e", 192),
    (
        _chain(Unit("Mixed_7a.branch3x3_1", 192), _half("Mixed_7a.branch3x3_2", 320)),
        _chain(
            Unit("Mixed_7a.branch7x7x3_1", 192),
            Unit("Mixed_7a.branch7x7x3_2", 192, (1, 7)),
            Unit("Mixed_7a.branch7x7x3_3", 192, (7, 1)),
            _half("Mixed_7a.branch7x7x3_4", 192),
        ),
        Branch((), "down"),
    ),
    _block8("Mixed_7b", "average"),
    _block8("Mixed_7c", "max"),
)
NETWORKS = {"inception": INCEPTION}


def num_features(blocks: tuple[Block, ...]) -> int:
    """M, the channels of the last map."""
    return sum(unit.width for branch in blocks[-1] for unit in branch.steps[-1])


def prepared(image_BHWC: jax.Array, library: str) -> jax.Array:
    """uint8 (B, H, W, 3) → (B, 299, 299, 3) float32 in [−1, 1], as `library` makes a network's input.

    "pytorch-fid" resizes bilinearly as PyTorch does, neither antialiased, and scales u to u/127.5 − 1;
    "torch-fidelity" resizes as TensorFlow 1 did and scales to (u − 128)/128.

    Raises:
      ValueError: for a name that is not in `PREPROCESSING`, or another dtype.
    """
    if library not in PREPROCESSING:
        raise ValueError(f"preprocessing {library!r} is not one of {', '.join(PREPROCESSING)}")
    if image_BHWC.dtype != jnp.uint8:
        raise ValueError(f"Inception sees 8-bit pictures, got {image_BHWC.dtype}: round them to uint8 first")
    weights, middle = PREPROCESSING[library]
    return (resize(image_BHWC, SIZE, SIZE, weights) - middle) / middle


def outputs(library: str) -> Callable[[Any, jax.Array], Outputs]:
    """(variables, uint8 images (B, H, W, 3)) → `Outputs`, with the images prepared as by `library`; see `prepared`."""
    net = Inception(NETWORKS["inception"])
    return lambda variables, image_BHWC: net.apply(variables, prepared(image_BHWC, library))


class ConvNorm(nn.Module):
    """One `Unit`; its batch norm has the statistics that it was published with."""

    unit: Unit

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        _, width, kernel, stride, padding = self.unit
        conv = nn.Conv(width, kernel, stride, padding, use_bias=False, precision="highest", name="conv")
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")
        return nn.relu(norm(conv(x_BHWC)))


class Inception(nn.Module):
    """Images (B, 299, 299, 3) in [−1, 1] → `Outputs`."""

    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> Outputs:
        for block in self.blocks:
            x_BHWC = jnp.concatenate([self._branch(branch, x_BHWC) for branch in block], -1)
        features = x_BHWC.mean((1, 2))
        unbiased = nn.Dense(CLASSES, use_bias=False, precision="highest", name="logits")(features)
        bias = self.param("logits_bias", nn.initializers.zeros, (CLASSES,))
        return Outputs(features, unbiased + bias, unbiased)

    def _branch(self, branch: Branch, x_BHWC: jax.Array) -> jax.Array:
        x = _pooled(branch.pool, x_BHWC)
        for step in branch.steps:
            x = jnp.concatenate([ConvNorm(unit, name=unit.name)(x) for unit in step], -1)
        return x


def _pooled(pool: str, x_BHWC: jax.Array) -> jax.Array:
    if pool == "average":
        return nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=False)
    if pool == "max":
        return nn.max_pool(x_BHWC, (3, 3), padding="SAME")
    return nn.max_pool(x_BHWC, (3, 3), (2, 2)) if pool == "down" else x_BHWC
