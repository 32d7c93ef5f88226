"""The weights that a run starts from, where these are a bundle's."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gigatok_jax import config, objectives, optim, sharding
from gigatok_jax.hub import bundle, frozen
from gigatok_jax.hub.sections import RUN_ONLY
from gigatok_jax.train_state import TrainState

SHOWN = 5  # fields in an error
STARTS = ("kernel_gain", "position_std", "adaptive_scale_init")  # how drawn weights start
# Fields that trained weights do not depend on.
FREE = (*RUN_ONLY, *STARTS, "estimator", "clustering", "dropout", "class_dropout")


def from_bundle(cfg: Mapping[str, Any], state: TrainState, mesh: Mesh) -> TrainState:
    """A fresh state with the weights of `config.start.bundle` in the place of the tokenizer's, or the generator's.

    Averages start there too; the optimisers and what else is trained stay fresh. Without a bundle nothing is changed.

    Raises:
      FileNotFoundError, ImportError: as `bundle.load`.
      ValueError: the bundle is of another model, or its decoder makes no images as the config's does.
    """
    name, kind = cfg["start"]["bundle"], _kind(cfg)
    if not name:
        return state
    found = bundle.load(name, kind)
    if kind == "tokenizer" and not objectives.build_tokenizer(cfg[kind], jax.numpy.float32).proxy_codebook_size:
        found.check_images()
    _check(name, found.section, config.to_json(cfg[kind]))
    params = frozen.place({kind: found.params}, mesh, cfg["sharding"]["preset"])[kind]
    averages = {kind: jax.tree.map(jax.numpy.copy, params)} if kind in state.ema else {}
    return state._replace(params={**state.params, kind: params}, ema={**state.ema, **averages})


def check(cfg: Mapping[str, Any], params: Any) -> None:
    """Raises ValueError where a fresh run would keep weights as they are drawn; `params` by group, or their shapes."""
    kind = _kind(cfg)
    trainable = cfg["groups"][kind]["trainable"]
    mask = jax.tree_util.tree_leaves_with_path(optim.matching(trainable, params[kind]))
    kept = [path for path, trained in mask if not trained]
    if kept and not cfg["start"]["bundle"]:
        first, more = sharding.path_name(kept[0]), len(kept) - 1
        raise ValueError(
            f"config.groups.{kind}.trainable={trainable!r} would keep {first} and {more} more as they are drawn: name "
            "the bundle that they come from with --config.start.bundle=FOLDER, or train all with "
            f"--config.groups.{kind}.trainable='.*'"
        )


def _kind(cfg: Mapping[str, Any]) -> str:
    return "generator" if "generator" in cfg else "tokenizer"


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
