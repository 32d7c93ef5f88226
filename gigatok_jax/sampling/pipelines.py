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
from gigatok_jax.hub.bundle import Bundle, load
from gigatok_jax.nn.constrain import placing
from gigatok_jax.objectives.tokenizer import image_ids
from gigatok_jax.sampling import ar, guidance, precision


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
    """A bundle's network with its parameters on a mesh; programs are compiled once per batch shape."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def __init__(self, bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None):
        if dtype not in self.dtypes:
            raise ValueError(f"dtype={dtype!r}: a {bundle.kind} runs in one of {', '.join(self.dtypes)}")
        self.bundle, self.dtype = bundle, dtype
        self.model = bundle.model(precision.arithmetic(dtype).name)
        self.mesh = mesh or sharding.make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1})
        # By the name of its group, as in training: the table's rules know a generator by it.
        self.params = frozen.place({bundle.kind: bundle.params}, self.mesh, "fsdp")[bundle.kind]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the bundle that it was made from; raises OSError where the folder cannot be written."""
        self.bundle.save(folder)

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
          ValueError: for images of another form or size.
        """
        images, size = np.asarray(images), self.model.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"images are {list(images.shape)}, this tokenizer takes [B, {size}, {size}, 3]: crop them")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}; uint8, or float in [0, 1], is wanted")
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
        return self._jit(functools.partial(image_ids, self.model))

    def _decode(self, params: Any, ids_BK: jax.Array) -> jax.Array:
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
          ValueError: for a label, scale or filter out of range.
        """
        draw = ar.Draw(float(temperature), int(top_k), float(top_p))
        draw.check(self.model.codebook_size)
        scales = guidance.scales(schedule, scale, self.model.num_latent_tokens, **guidance_options)
        placed, count = self._numbered(labels, first)
        return np.asarray(self._sampler(draw, scales.tobytes())(self.params, *placed, np.uint32(seed)))[:count]

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
        scales = guidance.scales(schedule, scale, self.model.num_latent_tokens, **guidance_options)
        placed, count = self._numbered(labels, first)
        ids, _ = self._placed(np.asarray(ids, np.int32))
        drawn, log_p = self._follower(scales.tobytes())(self.params, *placed, np.uint32(seed), ids)
        return np.asarray(drawn)[:count], np.asarray(log_p)[:count]

    def _numbered(self, labels: Any, first: int) -> tuple[tuple[jax.Array, jax.Array], int]:
        """((labels, image numbers) over the devices, how many are real)."""
        labels, classes = np.asarray(labels), self.model.num_classes
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels are {labels.dtype}{list(labels.shape)}; a list of integers is wanted")
        if labels.min() < 0 or labels.max() > classes:
            raise ValueError(
                f"labels lie in {labels.min()}..{labels.max()}, this generator's classes in 0..{classes - 1}"
            )
        numbers = np.arange(first, first + len(labels), dtype=np.int32)
        (placed, count), (numbers, _) = self._placed(labels.astype(np.int32)), self._placed(numbers)
        return (placed, numbers), count

    @functools.cache  # noqa: B019 (a pipeline and its programs live as long as each other)
    def _sampler(self, draw: ar.Draw, scales: bytes) -> Any:
        def sample(params: Any, class_B: jax.Array, number_B: jax.Array, seed: jax.Array) -> jax.Array:
            keys_B, by_position = ar.image_keys(seed, number_B), np.frombuffer(scales, np.float32)
            return ar.generate(self.model, params, class_B, keys_B, by_position, draw, self.dtype)

        return self._jit(sample)

    @functools.cache  # noqa: B019
    def _follower(self, scales: bytes) -> Any:
        def follow(params: Any, class_B: jax.Array, number_B: jax.Array, seed: jax.Array, ids_BK: jax.Array) -> Any:
            keys_B, by_position = ar.image_keys(seed, number_B), np.frombuffer(scales, np.float32)
            return ar.follow(self.model, params, class_B, keys_B, by_position, ids_BK, dtype=self.dtype)

        return self._jit(follow)
