"""How well a generator predicts held-out ids, beside what is known of them without one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import data, sharding
from gigatok_jax.nn.constrain import constraints
from gigatok_jax.objectives.ar import ARObjective

FITTED = 65_536  # training pictures, evenly spaced, that the unigram is fitted on at most
SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class LikelihoodEvaluator:
    """Nats per id of held-out pictures (their first crop), teacher-forced, with their true class.

    "ar_val_loss", "ar_val_accuracy", and "unigram_entropy": the cross-entropy of the same ids under each position's
    own distribution over the training ids.

    Raises:
      ValueError: for held-out ids of another tokenizer than the training ids', or fewer than asked for.
    """

    primary = "ar_val_loss"

    def __init__(self, cfg: Mapping[str, Any], objective: ARObjective, mesh: Mesh, train: data.TokenSet):
        section = cfg["data"]
        held_out = data.make_source(section["eval_source"], root=section["eval_root"] or None, split="eval")
        if held_out.tokenizer != train.tokenizer:
            raise ValueError(
                f"config.data.eval_root={section['eval_root']!r} was encoded with another tokenizer "
                f"({held_out.tokenizer}) than the training ids ({train.tokenizer}): encode both with one bundle"
            )
        count = cfg["eval"]["num_images"]
        if len(held_out) < count:
            raise ValueError(
                f"config.eval.num_images={count}, but {section['eval_root']} has {len(held_out)}; "
                f"set --config.eval.num_images={len(held_out)}"
            )
        self.bad_records: dict[str, str] = {}
        self._ids, self._classes = self._read(held_out, count)
        fitted, _ = self._read(train, min(FITTED, len(train)), every_crop=True)
        self._unigram = unigram_entropy(fitted, self._ids, objective.generator.codebook_size)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-min(cfg["eval"]["batch"], count) // shards) * shards
        self._mesh = mesh

        def scores(params: Any, ids_BK: jax.Array, class_B: jax.Array, valid_B: jax.Array) -> Any:
            with constraints(sharding.activation_constraint(mesh)):
                loss_BK, right_BK = objective.scores(params, ids_BK, class_B)
            return jax.tree.map(lambda x: jnp.sum(x.mean(-1) * valid_B), (loss_BK, right_BK))

        self._scores = jax.jit(scores, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Mapping[str, Any]) -> tuple[dict[str, float], None]:
        """Parameters by group → (scores by name, no picture)."""
        sums = np.zeros(2)
        for start in range(0, len(self._ids), self._batch):
            at = np.minimum(np.arange(start, start + self._batch), len(self._ids) - 1)
            valid = (np.arange(start, start + self._batch) < len(self._ids)).astype(np.float32)
            rows = (sharding.place_rows(x, self._mesh) for x in (self._ids[at], self._classes[at], valid))
            sums += np.array(jax.device_get(self._scores(params, *rows)), np.float64)
        loss, accuracy = (sums / len(self._ids)).tolist()
        scores = {"ar_val_loss": loss, "ar_val_accuracy": accuracy, "unigram_entropy": self._unigram}
        return {**scores, "num_images": len(self._ids)}, None

    def _read(self, source: data.TokenSet, count: int, every_crop: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(ids, classes) of `count` evenly spaced records; bad ones are named and left out."""
        ids, classes = [], []
        for index in (j * len(source) // count for j in range(count)):
            try:
                record = source[index]
            except data.BadRecord as error:
                self.bad_records[error.name] = error.reason
                continue
            rows = record.ids_RK if every_crop else record.ids_RK[:1]
            ids.extend(rows)
            classes.extend([record.label] * len(rows))
        if not ids:
            raise ValueError(f"none of {count} encoded pictures can be read; the first: {self.bad_records}")
        return np.stack(ids), np.array(classes, np.int32)


def unigram_entropy(train_NK: np.ndarray, held_out_MK: np.ndarray, codebook_size: int) -> float:
    """Cross-entropy (nats per id) of held-out ids under the training ids' distribution at each position.

    Each position's counts are smoothed towards the distribution over all positions, and that towards a uniform one;
    how much is chosen on the held-out ids themselves, so that nothing of the kind does better.
    """
    K = train_NK.shape[1]
    counts_KV = np.stack([np.bincount(train_NK[:, k], minlength=codebook_size) for k in range(K)]).astype(np.float64)
    everywhere_V = (counts_KV.sum(0) + 1) / (counts_KV.sum() + codebook_size)
    positions, total = np.arange(K)[None], len(train_NK)
    seen_MK, common_MK = counts_KV[positions, held_out_MK], everywhere_V[held_out_MK]
    weights = [share * codebook_size for share in SMOOTHING]
    return float(min(-np.log((seen_MK + w * common_MK) / (total + w)).mean() for w in weights))
