"""Class labels → ids by a masked generator's bundle."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from gigatok_jax.hub.bundle import Bundle
from gigatok_jax.sampling import ar, masked
from gigatok_jax.sampling.base import LabelPipeline


class MaskedPipeline(LabelPipeline):
    """Class labels → ids by a masked generator's bundle."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **dict(seed=0, **masked.PUBLISHED["l-32"]),
        **dict(power=3.0, anneal=True, mask_schedule="arccos"),
    }

    def __init__(self, bundle: Bundle, *, dtype: str = "float32", mesh: Mesh | None = None):
        super().__init__(bundle, dtype=dtype, mesh=mesh)
        self.params = jax.jit(lambda params: masked.held(params, dtype))(self.params)

    def sample(self, labels: Sequence[int], *, first: int = 0, seed: int = 0, **options: Any) -> np.ndarray:
        """(B, K) int32 ids of one image per label; image number `first` + i depends on the seed, its number and label.

        Args:
          labels: class numbers; the number of classes itself is the null class.
          options: of `sampling.masked.make_steps`: num_steps, scale, schedule, temperature, power, anneal,
            mask_schedule. What is not given is as TiTok samples its 32 ids; `sampling.masked.PUBLISHED` has the others.
        Raises:
          ValueError: for a label, seed or option out of range.
        """
        steps = self.check(labels, seed=seed, **options)
        placed, count = self._numbered(labels, first)
        sampler = self._sampler(masked.is_guided(steps))
        return np.asarray(sampler(self.params, *placed, np.uint32(seed), steps))[:count]

    def check(self, labels: Sequence[int], *, seed: int = 0, **options: Any) -> masked.Steps:
        """The steps of a sampling run; arguments and errors are `sample`'s."""
        self.check_labels(labels, seed)
        return masked.make_steps(self.model.num_latent_tokens, **options)

    # By whether anything is guided, not by how much: a search over scales runs one program.
    @functools.cache  # noqa: B019 (a pipeline and its programs live as long as each other)
    def _sampler(self, guided: bool) -> Any:
        def sample(params: Any, class_B: Any, number_B: jax.Array, seed: jax.Array, steps: masked.Steps) -> jax.Array:
            return masked.generate(self.model, params, class_B, ar.image_keys(seed, number_B), steps, guided)

        return self._jit(sample)
