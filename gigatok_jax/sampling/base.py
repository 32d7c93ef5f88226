"""What all pipelines share: a bundle's network with its parameters on a mesh, and rows spread over it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import sharding
from gigatok_jax.hub import frozen
from gigatok_jax.hub.bundle import Bundle, copy
from gigatok_jax.nn.constrain import placing
from gigatok_jax.sampling import precision

MAX_SEED = 2**32 - 1


class Pipeline:
    """A bundle's network with its parameters on a mesh; programs are compiled once per batch shape.

    bundle: without its parameters, which are not held a second time on the host.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def __init__(self, bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None):
        if dtype not in self.dtypes:
            raise ValueError(f"dtype={dtype!r}: a {bundle.kind} runs in one of {', '.join(self.dtypes)}")
        self.dtype = dtype
        self.model = bundle.model(precision.arithmetic(dtype).name)
        self.mesh = mesh or sharding.make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1})
        # By the name of its group, as in training: the table's rules know a generator by it.
        self.params = frozen.place({bundle.kind: bundle.params}, self.mesh, "fsdp")[bundle.kind]
        self.bundle = bundle._replace(params={})

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Copies the bundle that it was made from.

        Raises:
          ValueError: it is not there any more as it was, or was never in a folder.
          OSError: `folder` cannot be written.
        """
        if self.bundle.folder is None:
            raise ValueError("this pipeline was made from a bundle in memory: use that bundle's own `save`")
        copy(self.bundle.folder, folder, self.bundle.hash)

    def _placed(self, rows: np.ndarray) -> tuple[jax.Array, int]:
        """(rows over the devices, filled up with copies of the last one; how many are real)."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = np.asarray(rows)
        filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % shards, axis=0)])
        return sharding.place_rows(filled, self.mesh), len(rows)

    def _jit(self, fn: Any) -> Any:
        def constrained(*args: Any) -> Any:
            with placing(sharding.placement(self.mesh)):
                return fn(*args)

        return jax.jit(constrained, out_shardings=sharding.batch_sharding(self.mesh))


class LabelPipeline(Pipeline):
    """Class labels → ids.

    defaults: what `sample` takes beside the labels, and what it takes it to be.
    follows: whether `follow` says what would be drawn after given ids.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    follows: ClassVar[bool] = False

    def check_labels(self, labels: Sequence[int], seed: int) -> None:
        """Raises ValueError for a label or seed out of range."""
        labels, classes = np.asarray(labels), self.model.num_classes
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels are {labels.dtype}{list(labels.shape)}; a list of integers is wanted")
        if labels.min() < 0 or labels.max() > classes:
            raise ValueError(
                f"labels lie in {labels.min()}..{labels.max()}, this generator's classes in 0..{classes - 1}"
            )
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed} is not in 0..{MAX_SEED}")

    def _numbered(self, labels: Any, first: int) -> tuple[tuple[jax.Array, jax.Array], int]:
        """((labels, image numbers) over the devices, how many are real)."""
        numbers = np.arange(first, first + len(labels), dtype=np.int32)
        (placed, count), (numbers, _) = self._placed(np.asarray(labels, np.int32)), self._placed(numbers)
        return (placed, numbers), count
