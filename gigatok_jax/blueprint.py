"""What a config's run is built of, before there are arrays, on the devices at hand or on others."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gigatok_jax import config, objectives, optim, sharding, train_state
from gigatok_jax.hub import frozen
from gigatok_jax.train_state import TrainState

NO_REMAT = {"remat": "none", "remat_convs": False}


class Blueprint(NamedTuple):
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
        layout = self.cfg.sharding.preset, self.cfg.sharding.offload
        return self.objective, self.groups, self.cfg.seed, self.mesh, *layout

    @property
    def model(self) -> str:
        """See `model_group`."""
        return model_group(self.cfg)


def model_group(cfg: Mapping[str, Any]) -> str:
    """What a config trains, "tokenizer" or "generator": the name of its section and of its group."""
    return "generator" if "generator" in cfg else "tokenizer"


def build(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Blueprint:
    """Checks a config and builds what its run would on `devices`, all that are at hand by default.

    Raises:
      ValueError: for a config that cannot run there.
    """
    devices = jax.devices() if devices is None else list(devices)
    config.validate(cfg, len(devices))
    cfg = frozen.resolved(cfg)
    mesh = sharding.make_mesh(config.check_mesh(cfg, len(devices)), devices)
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    abstract = train_state.abstract(objective, groups, cfg.seed, mesh, cfg.sharding.preset, cfg.sharding.offload)
    return Blueprint(cfg, objective, counted(cfg), groups, mesh, abstract)


def counted(cfg: ConfigDict, *, recomputed: bool = True) -> Any:
    """The objective of a config with attention as plain products, and on wish without any recomputation."""
    plain = cfg.copy_and_resolve_references().unlock()
    section = plain[model_group(plain)]
    section.attention = "xla"
    if not recomputed:
        section.update({field: off for field, off in NO_REMAT.items() if field in section})
        if "discriminator" in plain:
            plain.discriminator.remat, plain.frozen.remat = "none", False
    return objectives.build(plain)
