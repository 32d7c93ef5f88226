"""What a loaded bundle is used by: images ↔ ids, and class labels → ids or images."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import sharding
from gigatok_jax.evals.reconstruction import to_uint8
from gigatok_jax.hub import frozen
from gigatok_jax.hub.bundle import Bundle, copy, load
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.objectives.tokenizer import image_ids
from gigatok_jax.sampling import ar, guidance, precision

MAX_SEED = 2**32 - 1
ROUNDING = 1e-3  # by which floats may leave [0, 1]


def from_pretrained(
    path: str | os.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None
) -> "TokenizerPipeline | GeneratorPipeline":
    """A bundle, ready for use: a `TokenizerPipeline` or a `GeneratorPipeline`.

    Args:
      path: the bundle's folder, or "hf://owner/name@revision".
      dtype: of the arithmetic, "float32" or "bfloat16"; of a generator also "int8", of its matrices.
      mesh: devices to spread batches over; all of them by default.
    Raises:
      FileNotFoundError, ValueError, ImportError: as `hub.bundle.load`; for a dtype that it does not run in; for int8
        without the package qwix.
    """
    bundle = load(path)
    kinds = {"tokenizer": TokenizerPipeline, "generator": GeneratorPipeline}
    if bundle.kind not in kinds:
        raise ValueError(f"{path} is a bundle of a {bundle.kind}; one of a {' or '.join(kinds)} is wanted")
    return kinds[bundle.kind](bundle, dtype=dtype, mesh=mesh)


class _Pipeline:
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


class TokenizerPipeline(_Pipeline):
    """Images ↔ ids by a tokenizer's bundle."""

    def tokenize(self, images: Any) -> np.ndarray:
        """(B, S, S, 3) images, uint8 or float in [0, 1], → (B, K) int32 ids.

        Raises:
          ValueError: for images of another form, size or range.
        """
        images, size = np.asarray(images), self.model.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"images are {list(images.shape)}, this tokenizer takes [B, {size}, {size}, 3]: crop them")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}; uint8, or float in [0, 1], is wanted")
        if images.dtype != np.uint8 and not (images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING):
            raise ValueError(
                f"images lie in {images.min():.4g}..{images.max():.4g}; floats in [0, 1], or uint8, are wanted"
            )
        placed, count = self._placed(images if images.dtype == np.uint8 else 2 * images.astype(np.float32) - 1)
        return np.asarray(self._encode(self.params, placed))[:count]

    def detokenize(self, ids: Any, *, float_images: bool = False) -> np.ndarray:
        """(B, K) ids → (B, S, S, 3) images, uint8, or float32 in [0, 1].

        Raises:
          ValueError: for another number of ids, or ids outside the codebook.
        """
        ids, K, V = np.asarray(ids), self.model.num_latent_tokens, self.bundle.section["codebook_size"]
        if ids.ndim != 2 or ids.shape[1] != K or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}, this tokenizer takes integers [B, {K}]")
        if ids.min() < 0 or ids.max() >= V:
            raise ValueError(f"ids lie in {ids.min()}..{ids.max()}, this tokenizer's codebook in 0..{V - 1}")
        placed, count = self._placed(ids.astype(np.int32))
        images = np.asarray((self._decode_float if float_images else self._decode_uint8)(self.params, placed))
        return images[:count]

    @functools.cached_property
    def _encode(self) -> Any:
        return self._jit(lambda params, images: image_ids(self.model, gathered(params), images))

    def _decode(self, params: Any, ids_BK: jax.Array) -> jax.Array:
        params = gathered(params)
        codes = self.model.apply({"params": params}, ids_BK, method="lookup")
        return self.model.apply({"params": params}, codes, method="decode")[0].astype(jnp.float32)

    @functools.cached_property
    def _decode_uint8(self) -> Any:
        return self._jit(lambda params, ids: to_uint8(self._decode(params, ids)))

    @functools.cached_property
    def _decode_float(self) -> Any:
        return self._jit(lambda params, ids: jnp.clip(0.5 * self._decode(params, ids) + 0.5, 0, 1))


class GeneratorPipeline(_Pipeline):
    """Class labels → ids by a generator's bundle, with weights and cache as `precision` has them."""

    dtypes = precision.DTYPES

    def __init__(self, bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None):
        super().__init__(bundle, dtype=dtype, mesh=mesh)
        # Once: a program that began with this would hold both, and do it at every call.
        depth = self.model.stack.depth
        self.params = jax.jit(lambda params: precision.held(params, depth, dtype))(self.params)

    def sample(
        self,
        labels: Sequence[int],
        *,
        seed: int = 0,
        first: int = 0,
        scale: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        **guidance_options: Any,
    ) -> np.ndarray:
        """(B, K) int32 ids of one image per label; image number `first` + i depends on the seed, its number and label.

        Args:
          labels: class numbers; the number of classes itself is the null class.
          scale, schedule, guidance_options: see `sampling.guidance.scales`.
          temperature, top_k, top_p: see `sampling.ar.Draw`.
        Raises:
          ValueError: for a label, seed, scale or filter out of range.
        """
        options = {"seed": seed, "scale": scale, "schedule": schedule, **guidance_options}
        draw, scales = self.check(labels, temperature=temperature, top_k=top_k, top_p=top_p, **options)
        placed, count = self._numbered(labels, first)
        sampler = self._sampler(draw, ar.num_guided(scales))
        return np.asarray(sampler(self.params, *placed, np.uint32(seed), scales))[:count]

    def check(
        self,
        labels: Sequence[int],
        *,
        seed: int = 0,
        scale: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        **guidance_options: Any,
    ) -> tuple[ar.Draw, np.ndarray]:
        """How ids are drawn and the guidance scale of each, (K,) float32; arguments and errors are `sample`'s."""
        labels, classes = np.asarray(labels), self.model.num_classes
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels are {labels.dtype}{list(labels.shape)}; a list of integers is wanted")
        if labels.min() < 0 or labels.max() > classes:
            raise ValueError(
                f"labels lie in {labels.min()}..{labels.max()}, this generator's classes in 0..{classes - 1}"
            )
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed} is not in 0..{MAX_SEED}")
        draw = ar.Draw(float(temperature), int(top_k), float(top_p))
        draw.check(self.model.codebook_size)
        return draw, guidance.scales(schedule, scale, self.model.num_latent_tokens, **guidance_options)

    def follow(
        self,
        labels: Sequence[int],
        ids: np.ndarray,
        *,
        seed: int = 0,
        first: int = 0,
        scale: float = 1.0,
        schedule: str = "constant",
        **guidance_options: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids that `sample` would draw at each position after the given ids before it, and log p of the given ids.

        Both (B, K); log p in nats, under guidance. Drawn at temperature 1, without filters.

        Args:
          ids: (B, K) ids of these labels.   Others: as of `sample`.
        """
        _, scales = self.check(labels, seed=seed, scale=scale, schedule=schedule, **guidance_options)
        placed, count = self._numbered(labels, first)
        ids, _ = self._placed(np.asarray(ids, np.int32))
        follower = self._follower(ar.num_guided(scales))
        drawn, log_p = follower(self.params, *placed, np.uint32(seed), scales, ids)
        return np.asarray(drawn)[:count], np.asarray(log_p)[:count]

    def _numbered(self, labels: Any, first: int) -> tuple[tuple[jax.Array, jax.Array], int]:
        """((labels, image numbers) over the devices, how many are real)."""
        numbers = np.arange(first, first + len(labels), dtype=np.int32)
        (placed, count), (numbers, _) = self._placed(np.asarray(labels, np.int32)), self._placed(numbers)
        return (placed, numbers), count

    # By how many ids are guided, not by how much: a search over scales runs one program.
    @functools.cache  # noqa: B019 (a pipeline and its programs live as long as each other)
    def _sampler(self, draw: ar.Draw, guided: int) -> Any:
        def sample(params: Any, class_B: Any, number_B: jax.Array, seed: jax.Array, scales_K: jax.Array) -> jax.Array:
            keys_B = ar.image_keys(seed, number_B)
            return ar.generate(self.model, params, class_B, keys_B, scales_K, draw, self.dtype, guided)

        return self._jit(sample)

    @functools.cache  # noqa: B019
    def _follower(self, guided: int) -> Any:
        def follow(params: Any, class_B: Any, number_B: Any, seed: Any, scales_K: Any, ids_BK: jax.Array) -> Any:
            keys_B = ar.image_keys(seed, number_B)
            return ar.follow(self.model, params, class_B, keys_B, scales_K, ids_BK, dtype=self.dtype, guided=guided)

        return self._jit(follow)
