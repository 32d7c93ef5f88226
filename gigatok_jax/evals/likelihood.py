"""How well a generator predicts held-out ids, beside what is known of them without one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import data, sharding
from gigatok_jax.nn.constrain import constraints
from gigatok_jax.objectives.ar import ARObjective

FITTED = 65_536  # training pictures, evenly spaced, that the unigram is fitted on at most
Part = tuple[np.ndarray, np.ndarray]  # ids (M, K) and true classes (M,) of M pictures, int32
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
        self._held_out = stored_ids(held_out, count, self.bad_records)
        model = objective.generator
        counts_KV = np.zeros((model.num_latent_tokens, model.codebook_size))
        for record in _spread(train, min(FITTED, len(train)), self.bad_records):
            np.add.at(counts_KV, (np.arange(len(counts_KV))[None], record.ids_RK), 1)
        self._unigram = unigram_entropy(counts_KV, self._held_out[0])
        self._likelihood = Likelihood(objective, mesh, min(cfg["eval"]["batch"], count))

    def __call__(self, params: Mapping[str, Any]) -> tuple[dict[str, float], None]:
        """Parameters by group → (scores by name, no picture)."""
        scores = self._likelihood(params, [self._held_out])
        return {**scores, "unigram_entropy": self._unigram}, None


class Likelihood:
    """Mean nats per id of pictures under a generator, teacher-forced, with their true class.

    Args:
      batch: pictures at once, rounded up to what divides over the mesh.
    """

    def __init__(self, objective: ARObjective, mesh: Mesh, batch: int):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch, self._mesh = -(-batch // shards) * shards, mesh

        def scores(params: Any, ids_BK: jax.Array, class_B: jax.Array, valid_B: jax.Array) -> Any:
            with constraints(sharding.activation_constraint(mesh)):
                loss_BK, right_BK = objective.scores(params, ids_BK, class_B)
            return jax.tree.map(lambda x: jnp.sum(x.mean(-1) * valid_B), (loss_BK, right_BK))

        self._scores = jax.jit(scores, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Mapping[str, Any], parts: Iterable[Part]) -> dict[str, float]:
        """Parameters by group and pictures, in parts → {"ar_val_loss", "ar_val_accuracy", "num_images"}.

        Raises:
          ValueError: there is no picture.
        """
        sums, total = np.zeros(2), 0
        for ids_MK, class_M in parts:
            for start in range(0, len(ids_MK), self._batch):
                at = np.minimum(np.arange(start, start + self._batch), len(ids_MK) - 1)
                valid = (np.arange(start, start + self._batch) < len(ids_MK)).astype(np.float32)
                rows = (sharding.place_rows(x, self._mesh) for x in (ids_MK[at], class_M[at], valid))
                sums += np.array(jax.device_get(self._scores(params, *rows)), np.float64)
            total += len(ids_MK)
        if not total:
            raise ValueError("there is no held-out picture that can be read")
        return {**dict(zip(("ar_val_loss", "ar_val_accuracy"), (sums / total).tolist())), "num_images": total}


def encoded_ids(
    source: data.Source,
    tokenize: Callable[[np.ndarray], np.ndarray],
    *,
    image_size: int,
    count: int,
    batch: int,
    bad_records: dict[str, str],
) -> Iterator[Part]:
    """The ids of `count` evenly spaced pictures, centre-cropped (ADM), in parts of at most `batch`.

    Args:
      tokenize: (batch, S, S, 3) uint8 → (batch, K) ids; it sees one batch size only.
    """
    for rows in data.eval_batches(source, image_size=image_size, batch=batch, count=count, bad_records=bad_records):
        yield tokenize(rows["image"])[rows["valid"]], rows["label"][rows["valid"]]


def stored_ids(source: data.TokenSet, count: int, bad_records: dict[str, str]) -> Part:
    """The ids of the first crop of `count` evenly spaced records.

    Bad ones are left out and named in `bad_records`.

    Raises:
      ValueError: all are bad.
    """
    records = list(_spread(source, count, bad_records))
    if not records:
        raise ValueError(f"none of {count} encoded pictures can be read; the first: {bad_records}")
    return np.stack([record.ids_RK[0] for record in records]), np.array([record.label for record in records], np.int32)


def _spread(source: data.TokenSet, count: int, bad_records: dict[str, str]) -> Iterator[data.TokenRecord]:
    for index in (j * len(source) // count for j in range(count)):
        try:
            yield source[index]
        except data.BadRecord as error:
            bad_records[error.name] = error.reason


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
