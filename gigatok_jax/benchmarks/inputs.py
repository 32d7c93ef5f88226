"""How fast a config's real input comes."""

from typing import Any

import jax
from ml_collections import ConfigDict

from gigatok_jax import config, data, sharding
from gigatok_jax.data.speed import measure_input
from gigatok_jax.hub import frozen


def input_speed(cfg: ConfigDict, *, steps: int, warmup: int, pace_ms: float) -> dict[str, Any]:
    """The wait for this process' batches of a config (see `data.speed.measure_input`); nothing else is built."""
    config.validate(cfg, jax.device_count())
    cfg = frozen.resolved(cfg)
    mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
    rows = sharding.process_rows(mesh, cfg.global_batch)
    source = data.make_source(cfg.data.source, root=cfg.data.root or None, split="train")
    reading = {name: cfg.data[name] for name in ("num_threads", "num_workers", "prefetch")}
    reading |= {"rows": rows, "element": data.element(cfg)}
    total = 1 + warmup + steps
    loader = data.TrainLoader(source, global_batch=cfg.global_batch, seed=cfg.seed, num_steps=total, **reading)
    facts = measure_input(loader, steps=steps, warmup=warmup, pace_ms=pace_ms)
    print(
        f"input: waited {facts['wait_ms']:.2f} ms for a batch, {facts['wait_fraction']:.1%} of the time, at "
        f"{facts['images_per_second']:.1f} images/s; {facts['first_batch_ms']:.0f} ms for the first",
        flush=True,
    )
    return {"global_batch": cfg.global_batch, "input": facts}
