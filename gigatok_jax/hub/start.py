"""The weights that a run starts from, where these are a bundle's."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gigatok_jax import config
from gigatok_jax.hub import bundle, frozen
from gigatok_jax.hub.sections import RUN_ONLY
from gigatok_jax.train_state import TrainState

SHOWN = 5  # fields in an error
# Fields that trained weights do not depend on.
FREE = (*RUN_ONLY, "estimator", "clustering", "dropout", "class_dropout", "kernel_gain", "position_std")


def from_bundle(cfg: Mapping[str, Any], state: TrainState, mesh: Mesh) -> TrainState:
    """A fresh state with the weights of `config.start.bundle` in the place of the tokenizer's, or the generator's.

    Averages start there too; the optimisers and what else is trained stay fresh. Without a bundle nothing is changed.

    Raises:
      FileNotFoundError, ImportError: as `bundle.load`.
      ValueError: the bundle is of another model; or none is, and untrained weights would stay as drawn.
    """
    name, kind = cfg["start"]["bundle"], "generator" if "generator" in cfg else "tokenizer"
    trainable = cfg["groups"][kind]["trainable"]
    if not name and trainable != ".*":
        raise ValueError(
            f"config.groups.{kind}.trainable={trainable!r} would keep weights as they are drawn: name the bundle that "
            f"they come from with --config.start.bundle=FOLDER, or train all with --config.groups.{kind}.trainable='.*'"
        )
    if not name:
        return state
    found = bundle.load(name, kind)
    _check(name, found.section, config.to_json(cfg[kind]))
    params = frozen.place({kind: found.params}, mesh, cfg["sharding"]["preset"])[kind]
    averages = {kind: jax.tree.map(jax.numpy.copy, params)} if kind in state.ema else {}
    return state._replace(params={**state.params, kind: params}, ema={**state.ema, **averages})


def _check(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [field for field in ours if field not in FREE and theirs.get(field) != ours[field]]
    if "family" in differing:  # all other fields would only say so again
        differing = ["family"]
    if differing:
        told = ", ".join(f"{field}={theirs.get(field)!r} (here {ours[field]!r})" for field in differing[:SHOWN])
        raise ValueError(
            f"config.start.bundle={name!r} is of another model: it has {told}; name a bundle of this model, or "
            "give the config its fields"
        )
