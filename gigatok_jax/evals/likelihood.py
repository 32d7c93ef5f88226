"""How well a generator predicts held-out ids, beside what is known of them without one."""

from collections.abc import Iterator, Mapping
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
        if getattr(held_out, "tokenizer", None) is None:
            raise ValueError(
                f"config.data.eval_source={section['eval_source']} gives pictures, a generator is scored on ids: "
                "encode them with `python -m gigatok_jax.encode` and set --config.data.eval_source=tokens"
            )
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
        records = list(self._records(held_out, count))
        if not records:
            raise ValueError(f"none of {count} encoded pictures can be read; the first: {self.bad_records}")
        self._ids = np.stack([record.ids_RK[0] for record in records])
        self._classes = np.array([record.label for record in records], np.int32)
        model = objective.generator
        counts_KV = np.zeros((model.num_latent_tokens, model.codebook_size))
        for record in self._records(train, min(FITTED, len(train))):
            np.add.at(counts_KV, (np.arange(len(counts_KV))[None], record.ids_RK), 1)
        self._unigram = unigram_entropy(counts_KV, self._ids)
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

    def _records(self, source: data.TokenSet, count: int) -> Iterator[data.TokenRecord]:
        """`count` evenly spaced records; bad ones are named and left out."""
        for index in (j * len(source) // count for j in range(count)):
            try:
                yield source[index]
            except data.BadRecord as error:
                self.bad_records[error.name] = error.reason


def unigram_entropy(counts_KV: np.ndarray, held_out_MK: np.ndarray) -> float:
    """Cross-entropy (nats per id) of held-out ids under the training ids' distribution at each position.

    Each position's counts are smoothed towards the distribution over all positions, and that towards a uniform one;
    how much is chosen on the held-out ids themselves, so that nothing of the kind does better.

    Args:
      counts_KV: how often each id stands at each position of the training ids.
    """
    K, V = counts_KV.shape
    everywhere_V = (counts_KV.sum(0) + 1) / (counts_KV.sum() + V)
    seen_MK, common_MK = counts_KV[np.arange(K)[None], held_out_MK], everywhere_V[held_out_MK]
    total, weights = counts_KV[0].sum(), [share * V for share in SMOOTHING]
    return float(min(-np.log((seen_MK + w * common_MK) / (total + w)).mean() for w in weights))
