"""What a run is trained on besides its config: its images and its frozen networks, and whether they are still the same.

Stored beside every checkpoint: {"data": {"records", "names"}, "frozen": {role: hash}, "facts": {"class_names",
"tokenizer"}}; the last are not compared, they are what a bundle says of its data.
"""

from collections.abc import Mapping
from typing import Any

from gigatok_jax import data, distributed
from gigatok_jax.checkpoint import CheckpointMismatch
from gigatok_jax.hub import frozen


def identity(cfg: Mapping[str, Any], source: data.Source) -> dict[str, Any]:
    """The identity of a run.

    Raises:
      ValueError: the processes see different images or weights, or ids are not of the tokenizer that the config names.
      FileNotFoundError: the weights of a frozen network are missing.
    """
    found = {
        "data": data.fingerprint(source),
        "frozen": frozen.hashes(cfg),
        "facts": {"class_names": list(source.class_names), "tokenizer": frozen.id_writer(cfg, source)},
    }
    if not distributed.same_everywhere(str(found)):
        raise ValueError(
            f"the processes list different images under config.data.root={cfg['data']['root']!r}, or have different "
            "weights of frozen networks"
        )
    return found


def check(saved: Mapping[str, Any], now: Mapping[str, Any], root: str) -> None:
    """Compares a checkpoint's identity with a run's.

    Raises:
      CheckpointMismatch: naming what differs and the mend.
    """
    old, new = saved.get("data", now["data"]), now["data"]
    if old != new:
        raise CheckpointMismatch(
            f"the checkpoint was trained on {old['records']} images (names {old['names'][:8]}…), "
            f"config.data.root={root!r} has {new['records']} (names {new['names'][:8]}…): the order of samples would "
            "be another. Point config.data.root to the same images, use another --workdir, or --allow_config_change "
            "to go on all the same"
        )
    old, new = saved.get("frozen", now["frozen"]), now["frozen"]
    if (then := old.get("first_stage")) and then != new.get("first_stage", then):
        raise CheckpointMismatch(
            f"the checkpoint was trained on ids of the tokenizer {then[:12]}…, config.first_stage.bundle is "
            f"{new['first_stage'][:12]}…: name the bundle that the run began with, use another --workdir, or "
            "--allow_config_change to go on all the same"
        )
    if old != new:
        raise CheckpointMismatch(
            f"the checkpoint was trained against other frozen weights (SHA-256 {old}) than those in the weights folder "
            f"({new}): put the former there, use another --workdir, or --allow_config_change to go on all the same"
        )
