"""The Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500) between two sets of pictures.

Pictures are seen as torch-fidelity sees them: 8 bits, enlarged as TensorFlow 1 did. Statistics are float64 sums on the
host: they are taken batch by batch, and those of parts add up to those of the whole.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from gigatok_jax.evals.rows import by_rows
from gigatok_jax.hub import frozen
from gigatok_jax.teachers import inception

Features = Callable[[np.ndarray], np.ndarray]


class TooFewImages(ValueError):
    """A set is too small for a covariance of its features."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How many pictures, and the float64 sums of their features and of these features' outer products."""

    count: int
    total_M: np.ndarray
    outer_MM: np.ndarray

    @classmethod
    def of(cls, features_BM: np.ndarray) -> "Statistics":
        """The statistics of some pictures' features."""
        features = np.asarray(features_BM, np.float64)
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of both sets together."""
        return Statistics(self.count + other.count, self.total_M + other.total_M, self.outer_MM + other.outer_MM)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (M,) and unbiased covariance (M, M); raises TooFewImages as `check_count`."""
        check_count(self.count, len(self.total_M))
        mean = self.total_M / self.count
        return mean, (self.outer_MM - self.count * np.outer(mean, mean)) / (self.count - 1)


def num_features() -> int:
    """M, what `build`'s function gives of each picture."""
    return inception.num_features(inception.NETWORKS["inception"])


def check_count(count: int, features: int) -> None:
    """Raises TooFewImages where `count` pictures leave the covariance of M features singular."""
    if count <= features:
        raise TooFewImages(
            f"the Fréchet inception distance needs at least {features + 1} images, {count} are given: with fewer the "
            f"covariance of the {features} features is singular. Set --config.eval.num_images={features + 1} or more, "
            "with as many under --config.data.eval_root, or --config.eval.fid=False"
        )


def build(folder: str, mesh: Mesh, batch: int) -> Features:
    """uint8 images (b, H, W, 3) with b ≤ `batch` → (b, M) float32 features of FID's Inception.

    Args:
      folder: of the weights; empty for the usual one.
      batch: rows of the compiled program, a multiple of the mesh's data-parallel devices.

    Raises:
      FileNotFoundError: the weights are not there.
    """
    section = {"folder": folder, "dtype": "float32"}
    variables = frozen.load({"fid": "inception"}, section, grid=(1, 1), mesh=mesh, preset="replicated")["fid"]
    network = inception.outputs("torch-fidelity")
    return by_rows(lambda variables, images: network(variables, images).features_BM, variables, mesh, batch)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|μ − ν|² + tr(A + B − 2 (AB)^½) of Gaussians with the two sets' means μ, ν and covariances A, B; at least 0.

    Raises:
      TooFewImages: one of the sets has no more pictures than features.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.moments(), b.moments()
    # tr (AB)^½ is that of (A^½ B A^½)^½, which is symmetric: real eigenvalues, and fast.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
    difference = mean_a - mean_b
    return float(max(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * shared, 0.0))
