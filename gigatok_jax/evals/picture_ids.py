"""Ids that the evaluation of a generator needs and that no shard holds: made of pictures by the run's first stage."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gigatok_jax import data, distributed, sharding
from gigatok_jax.metrics import Progress
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.objectives.generator import GeneratorObjective


class PictureIds:
    """Makes ids with the train step's own first stage: each process reads its rows of a batch, all know all ids.

    batch: pictures at once, a multiple of the mesh's data-parallel devices.   frozen: as the train step's.
    """

    def __init__(
        self, cfg: Mapping[str, Any], objective: GeneratorObjective, mesh: Mesh, frozen: Mapping[str, Any], batch: int
    ):
        self._cfg, self._mesh, self._frozen, self._batch = cfg, mesh, frozen, batch
        self._rows = sharding.process_rows(mesh, batch)

        def make(frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            with placing(sharding.placement(mesh)):
                return objective.ids(gathered(frozen), batch), batch["label"], batch["valid"]

        self._make = jax.jit(make, out_shardings=sharding.replicated(mesh))

    def held_out(self, source: data.Source, count: int, bad_records: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids (M, K), labels (M,)) of `count` evenly spaced pictures, centre-cropped; bad ones are left out."""
        size = self._cfg["first_stage"]["image_size"]
        options = {"rows": self._rows, "num_threads": self._cfg["data"]["num_threads"], "bad_records": bad_records}
        batches = data.eval_batches(source, image_size=size, batch=self._batch, count=count, **options)
        ids, labels = zip(*map(self._ids, batches))
        return np.concatenate(ids), np.concatenate(labels)

    def trained(self, source: data.Source, count: int, bad_records: dict[str, str]) -> Iterator[np.ndarray]:
        """Ids (B, K), batch by batch, of the run's first `count` crops, rounded up to whole batches; shows progress."""
        steps = -(-count // self._batch)
        logging.info("tokenising %d crops of the training pictures, for their unigram", steps * self._batch)
        stream = None if distributed.is_main() else io.StringIO()
        progress = Progress(steps, global_batch=self._batch, stream=stream)
        with data.TrainLoader(
            source,
            global_batch=self._batch,
            seed=self._cfg["seed"],
            num_steps=steps,
            element=data.element(self._cfg),
            rows=self._rows,
            num_threads=self._cfg["data"]["num_threads"],
        ) as loader:
            for step, batch in enumerate(loader, 1):
                yield self._ids({**batch, "valid": np.ones(len(batch["label"]), bool)})[0]
                progress.update(step)
            bad_records |= loader.bad_records

    def _ids(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a batch's valid rows."""
        inputs = {name: batch[name] for name in ("image", "label", "valid")}
        placed = sharding.place_batch(inputs, self._mesh, self._batch)
        ids, labels, valid = jax.device_get(self._make(self._frozen, placed))
        return ids[valid], labels[valid]
