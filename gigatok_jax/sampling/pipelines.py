"""What a loaded bundle is used by: images ↔ ids, and class labels → ids or images."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.evals.reconstruction import to_uint8
from gigatok_jax.hub.bundle import Bundle, load
from gigatok_jax.nn.constrain import gathered
from gigatok_jax.objectives.tokenizer import image_codes, image_ids
from gigatok_jax.sampling.base import LabelPipeline, Pipeline
from gigatok_jax.sampling.samplers import SAMPLERS

ROUNDING = 1e-3  # by which floats may leave [0, 1]


def from_pretrained(
    path: str | os.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None
) -> "TokenizerPipeline | LabelPipeline":
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


def generator_pipeline(bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None) -> LabelPipeline:
    """The pipeline of a generator's bundle, by its family; arguments and errors are `from_pretrained`'s."""
    return SAMPLERS[bundle.section["family"]].pipeline(bundle, dtype=dtype, mesh=mesh)


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
