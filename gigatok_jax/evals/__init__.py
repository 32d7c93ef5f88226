"""Scores of reconstructions and of generators."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from gigatok_jax.evals.evaluator import Evaluator
from gigatok_jax.evals.likelihood import LikelihoodEvaluator


def build(
    cfg: Mapping[str, Any], objective: Any, mesh: Mesh, train: Any, frozen: Mapping[str, Any]
) -> Evaluator | LikelihoodEvaluator:
    """The evaluation that a training run of this objective repeats.

    Args:
      train: the training source.
      frozen: the parameters of frozen networks.
    Raises:
      ValueError: for held-out images that cannot serve.
    """
    if "generator" in cfg:
        return LikelihoodEvaluator(cfg, objective, mesh, train, frozen)
    return Evaluator(cfg, objective.reconstruct, mesh, frozen)
