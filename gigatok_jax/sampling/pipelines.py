"""What a loaded bundle is used by: images ↔ ids, and class labels → ids or images."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.evals.reconstruction import to_uint8
from gigatok_jax.hub.bundle import Bundle, load
from gigatok_jax.nn.constrain import gathered
from gigatok_jax.objectives.tokenizer import image_codes, image_ids
from gigatok_jax.sampling import ar, guidance, precision
from gigatok_jax.sampling.base import LabelPipeline, Pipeline
from gigatok_jax.sampling.masked_pipeline import MaskedPipeline

ROUNDING = 1e-3  # by which floats may leave [0, 1]


def from_pretrained(
    path: str | os.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None
) -> "TokenizerPipeline | GeneratorPipeline | MaskedPipeline":
    """A bundle, ready for use: a `TokenizerPipeline`, or the pipeline of a generator's family.

    Args:
      path: the bundle's folder, or "hf://owner/name@revision".
      dtype: of the arithmetic, "float32" or "bfloat16"; of an AR generator also "int8", of its matrices.
      mesh: devices to spread batches over; all of them by default.
    Raises:
      FileNotFoundError, ValueError, ImportError: as `hub.bundle.load`; for a dtype that it does not run in; for int8
        without the package qwix.
    """
    bundle = load(path)
    kinds = {"tokenizer": TokenizerPipeline, "generator": generator_pipeline}
    if bundle.kind not in kinds:
        raise ValueError(f"{path} is a bundle of a {bundle.kind}; one of a {' or '.join(kinds)} is wanted")
    return kinds[bundle.kind](bundle, dtype=dtype, mesh=mesh)


def generator_pipeline(
    bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None
) -> "GeneratorPipeline | MaskedPipeline":
    """The pipeline of a generator's bundle, by its family; arguments and errors are `from_pretrained`'s."""
    families = {"ar": GeneratorPipeline, "masked": MaskedPipeline}
    return families[bundle.section["family"]](bundle, dtype=dtype, mesh=mesh)


class TokenizerPipeline(Pipeline):
    """Images ↔ ids by a tokenizer's bundle, or ↔ latents where these are continuous or ids say too little."""

    def tokenize(self, images: Any) -> np.ndarray:
        """(B, S, S, 3) images, uint8 or float in [0, 1], → (B, K) int32 ids.

        Raises:
          ValueError: for images of another form, size or range; for a tokenizer without ids.
        """
        self.bundle.check_ids()
        placed, count = self._placed(self._checked(images))
        return np.asarray(self._tokenize(self.params, placed))[:count]

    def detokenize(self, ids: Any, *, float_images: bool = False) -> np.ndarray:
        """(B, K) ids → (B, S, S, 3) images, uint8, or float32 in [0, 1].

        Raises:
          ValueError: for another number of ids, or ids outside the codebook; for a tokenizer without ids or images.
        """
        self.bundle.check_ids()
        self.bundle.check_images()
        ids, K, V = np.asarray(ids), self.model.num_latent_tokens, self.bundle.section["codebook_size"]
        if ids.ndim != 2 or ids.shape[1] != K or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}, this tokenizer takes integers [B, {K}]")
        if ids.min() < 0 or ids.max() >= V:
            raise ValueError(f"ids lie in {ids.min()}..{ids.max()}, this tokenizer's codebook in 0..{V - 1}")
        return self._images(ids.astype(np.int32), float_images)

    def encode(self, images: Any) -> np.ndarray:
        """(B, S, S, 3) images, uint8 or float in [0, 1], → (B, K, Z) float32 latents (codes, or a KL's means).

        Raises:
          ValueError: as `tokenize`.
        """
        placed, count = self._placed(self._checked(images))
        return np.asarray(self._encode(self.params, placed))[:count]

    def decode(self, latents: Any, *, float_images: bool = False) -> np.ndarray:
        """(B, K, Z) latents → (B, S, S, 3) images, uint8, or float32 in [0, 1].

        Raises:
          ValueError: for latents of another form; for a tokenizer without images.
        """
        self.bundle.check_images()
        latents, sizes = np.asarray(latents), (self.model.num_latent_tokens, self.bundle.section["code_dim"])
        if latents.ndim != 3 or latents.shape[1:] != sizes or not len(latents) or latents.dtype.kind != "f":
            raise ValueError(
                f"latents are {latents.dtype}{list(latents.shape)}, this tokenizer takes floats "
                f"[B, {', '.join(map(str, sizes))}]"
            )
        return self._images(latents.astype(np.float32), float_images)

    def _checked(self, images: Any) -> np.ndarray:
        """Images as uint8, or float in [−1, 1]."""
        images, size = np.asarray(images), self.model.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"images are {list(images.shape)}, this tokenizer takes [B, {size}, {size}, 3]: crop them")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}; uint8, or float in [0, 1], is wanted")
        if images.dtype != np.uint8 and not (images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING):
            raise ValueError(
                f"images lie in {images.min():.4g}..{images.max():.4g}; floats in [0, 1], or uint8, are wanted"
            )
        return images if images.dtype == np.uint8 else 2 * images.astype(np.float32) - 1

    def _images(self, rows: np.ndarray, float_images: bool) -> np.ndarray:
        """Images of ids (B, K) or latents (B, K, Z)."""
        placed, count = self._placed(rows)
        images = (self._decode_float if float_images else self._decode_uint8)(self.params, placed)
        return np.asarray(images)[:count]

    @functools.cached_property
    def _tokenize(self) -> Any:
        return self._jit(lambda params, images: image_ids(self.model, gathered(params), images))

    @functools.cached_property
    def _encode(self) -> Any:
        return self._jit(lambda params, images: image_codes(self.model, gathered(params), images).latents_BKZ)

    def _decode(self, params: Any, rows: jax.Array) -> jax.Array:
        variables = {"params": gathered(params)}
        codes = self.model.apply(variables, rows, method="lookup") if rows.ndim == 2 else Codes.of_latents(rows)
        return self.model.apply(variables, codes, method="decode")[0].astype(jnp.float32)

    @functools.cached_property
    def _decode_uint8(self) -> Any:
        return self._jit(lambda params, rows: to_uint8(self._decode(params, rows)))

    @functools.cached_property
    def _decode_float(self) -> Any:
        return self._jit(lambda params, rows: jnp.clip(0.5 * self._decode(params, rows) + 0.5, 0, 1))


class GeneratorPipeline(LabelPipeline):
    """Class labels → ids by an AR generator's bundle, with weights and cache as `precision` has them."""

    dtypes = precision.DTYPES
    defaults: ClassVar[Mapping[str, Any]] = {
        **dict(seed=0, scale=1.0, schedule="constant", start=None, end=1.0, peak=0.5, interval=-1),
        **dict(temperature=1.0, top_k=0, top_p=1.0),
    }

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
        self.check_labels(labels, seed)
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
