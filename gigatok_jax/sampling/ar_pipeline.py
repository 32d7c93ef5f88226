"""Class labels → ids by an AR generator's bundle."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from gigatok_jax.hub.bundle import Bundle
from gigatok_jax.sampling import ar, guidance, precision
from gigatok_jax.sampling.base import LabelPipeline


class GeneratorPipeline(LabelPipeline):
    """Class labels → ids by an AR generator's bundle, with weights and cache as `precision` has them."""

    dtypes = precision.DTYPES
    follows = True
    defaults: ClassVar[Mapping[str, Any]] = {
        **dict(seed=0, scale=1.0, schedule="constant", start=None, end=1.0, peak=0.5, interval=-1),
        **dict(temperature=1.0, top_k=0, top_p=1.0),
    }

    def __init__(self, bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None):
        super().__init__(bundle, dtype=dtype, mesh=mesh)
        # Once: a program that began with this would hold both, and do it at every call.
        self.params = jax.jit(lambda params: precision.held(params, dtype))(self.params)

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
            return ar.generate(self.model, params, class_B, keys_B, scales_K, draw, guided=guided)

        return self._jit(sample)

    @functools.cache  # noqa: B019
    def _follower(self, guided: int) -> Any:
        def follow(params: Any, class_B: Any, number_B: Any, seed: Any, scales_K: Any, ids_BK: jax.Array) -> Any:
            keys_B = ar.image_keys(seed, number_B)
            return ar.follow(self.model, params, class_B, keys_B, scales_K, ids_BK, guided=guided)

        return self._jit(follow)
