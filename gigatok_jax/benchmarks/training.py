"""A config's real train step on synthetic batches."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gigatok_jax import config, objectives, optim, sharding, train_state
from gigatok_jax.benchmarks.timing import Call
from gigatok_jax.hub import frozen
from gigatok_jax.objectives.tokenizer import Phase
from gigatok_jax.scaling.flops import count_flops
from gigatok_jax.train_state import TrainState
from gigatok_jax.train_step import compile_step, make_train_step


class Setup(NamedTuple):
    """What train.py builds before its loop. `counted` is the objective whose FLOPs are counted: the same arithmetic
    with attention as plain matrix products, because a fused kernel cannot be looked into."""

    cfg: ConfigDict
    objective: Any
    counted: Any
    groups: Mapping[str, optim.Group]
    mesh: Mesh
    abstract: TrainState

    @property
    def state_args(self) -> tuple[Any, ...]:
        """The arguments of `train_state.init` and `train_state.abstract`."""
        return self.objective, self.groups, self.cfg.seed, self.mesh, self.cfg.sharding.preset


def build(cfg: ConfigDict) -> Setup:
    """Checks a config and builds what its run would.

    Raises:
      ValueError: for a config that cannot run here.
    """
    config.validate(cfg, jax.device_count())
    cfg = frozen.resolved(cfg)
    plain = cfg.copy_and_resolve_references().unlock()
    plain["generator" if "generator" in plain else "tokenizer"].attention = "xla"
    mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
    objective = objectives.build(cfg)
    groups = optim.make_groups(cfg)
    abstract = train_state.abstract(objective, groups, cfg.seed, mesh, cfg.sharding.preset)
    return Setup(cfg, objective, objectives.build(plain), groups, mesh, abstract)


def synthetic_batch(setup: Setup, images: int) -> dict[str, jax.Array]:
    """Noise in the form of the loader's batches."""
    rng, (first, last) = np.random.default_rng(setup.cfg.seed), sharding.process_rows(setup.mesh, images)
    batch, codebook_size = {}, setup.objective.facts()["codebook_size"]
    for name, like in setup.objective.batch(last - first).items():
        high = {"image": 256, "ids": codebook_size}.get(name, 1)
        batch[name] = rng.integers(0, high, like.shape, like.dtype)
    return sharding.place_batch(batch, setup.mesh, images)


def train_call(setup: Setup, phase: Phase) -> Call:
    """The run's train step on one batch, which it sees again at every call."""
    cfg, mesh, abstract = setup.cfg, setup.mesh, setup.abstract
    batch = synthetic_batch(setup, cfg.global_batch)
    options = dict(seed=cfg.seed, accumulate=cfg.accumulate)
    networks = frozen.of_config(cfg, mesh)
    started = time.monotonic()
    compiled = compile_step(
        setup.objective, setup.groups, phase, **options, mesh=mesh, abstract=abstract, frozen=networks, batch=batch
    )
    seconds = time.monotonic() - started
    flops = count_flops(make_train_step(setup.counted, setup.groups, phase, **options), abstract, networks, batch)
    return Call(lambda state: compiled(state, networks, batch), compiled, seconds, cfg.global_batch, flops)
