"""How well a generator predicts held-out ids, beside what is known of them without one."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import data, sharding
from gigatok_jax.evals.picture_ids import PictureIds
from gigatok_jax.hub.frozen import id_writer
from gigatok_jax.nn.constrain import placing
from gigatok_jax.objectives.generator import GeneratorObjective

Part = tuple[np.ndarray, np.ndarray]  # ids (M, K) and true classes (M,) of M pictures, int32
SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class LikelihoodEvaluator:
    """Nats per id of held-out pictures (their first crop, or centre crop), with their true class.

    For an AR generator "ar_val_loss" and "ar_val_accuracy", teacher-forced; for a masked one "masked_val_loss" and
    "masked_val_accuracy", of ids masked as in training, of each picture always the same. "unigram_entropy": the
    cross-entropy of all ids under each position's own distribution over the training ids. Crops of whole photographs
    that were held out have no class: where the training set has classes, they are scored with the null class.

    Args:
      frozen: as the train step's; what makes ids of pictures, where a source gives pictures.
    Raises:
      ValueError: for held-out ids of another tokenizer than the training ids', fewer pictures than asked for, or other
        classes.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        objective: GeneratorObjective,
        mesh: Mesh,
        train: data.Source,
        frozen: Mapping[str, Any],
    ):
        self._cfg, self._train, self._model = cfg, train, objective.generator
        self.primary = f"{objective.name}_val_loss"
        self.bad_records: dict[str, str] = {}
        self._held_out = held_out(cfg, train, self._model.num_classes)
        self._likelihood = Likelihood(objective, mesh, min(cfg["eval"]["batch"], cfg["eval"]["num_images"]))
        self._pictures = PictureIds(cfg, objective, mesh, frozen, self._likelihood.batch)

    def __call__(self, params: Mapping[str, Any]) -> tuple[dict[str, float], None]:
        """Parameters by group → (scores by name, no picture).

        Raises:
          data.NoUsableImages: at the first call, for pictures of which none can be read.
        """
        scores = self._likelihood(params, [self._scored])
        return {**scores, "unigram_entropy": self._unigram}, None

    @functools.cached_property
    def _scored(self) -> Part:
        """The held-out pictures."""
        source, count = self._held_out, self._cfg["eval"]["num_images"]
        if hasattr(source, "tokenizer"):
            ids, classes = stored_ids(source, count, self.bad_records)
        else:
            ids, classes = self._pictures.held_out(source, count, self.bad_records)
            if not len(ids):
                raise data.NoUsableImages(f"none of {count} held-out pictures can be read: {self.bad_records}")
        if isinstance(source, data.Tiles) and source.class_names != self._train.class_names:
            classes = np.full(len(ids), self._model.num_classes)
        return ids, np.asarray(classes, np.int32)

    @functools.cached_property
    def _unigram(self) -> float:
        train, count = self._train, self._cfg["eval"]["unigram_images"]
        if hasattr(train, "tokenizer"):
            fitted = (record.ids_RK for record in _spread(train, min(count, len(train)), self.bad_records))
        else:
            fitted = self._pictures.trained(train, count, self.bad_records)
        counts_KV = np.zeros((self._model.num_latent_tokens, self._model.codebook_size))
        for ids_BK in fitted:
            np.add.at(counts_KV, (np.arange(len(counts_KV))[None], ids_BK), 1)
        return unigram_entropy(counts_KV, self._scored[0])


class Likelihood:
    """Mean nats per id of pictures under a generator, with their true class (see `GeneratorObjective.held_out`).

    Args:
      batch: pictures at once, rounded up to what divides over the mesh.
    """

    def __init__(self, objective: GeneratorObjective, mesh: Mesh, batch: int):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch, self._mesh = -(-batch // shards) * shards, mesh
        self._names = f"{objective.name}_val_loss", f"{objective.name}_val_accuracy"

        def scores(params: Any, ids_BK: jax.Array, class_B: jax.Array, number_B: jax.Array, valid_B: jax.Array) -> Any:
            with placing(sharding.placement(mesh)):
                per_image = objective.held_out(params, ids_BK, class_B, number_B)
            return jax.tree.map(lambda x_B: jnp.sum(x_B * valid_B), per_image)

        self._scores = jax.jit(scores, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Mapping[str, Any], parts: Iterable[Part]) -> dict[str, float]:
        """Parameters by group and pictures, in parts → {"ar_val_loss" or such, its accuracy, "num_images"}.

        Raises:
          ValueError: there is no picture.
        """
        sums, total = np.zeros(2), 0
        for ids_MK, class_M in parts:
            for start in range(0, len(ids_MK), self.batch):
                at = np.minimum(np.arange(start, start + self.batch), len(ids_MK) - 1)
                valid = (np.arange(start, start + self.batch) < len(ids_MK)).astype(np.float32)
                numbers = (total + at).astype(np.int32)
                rows = (sharding.place_rows(x, self._mesh) for x in (ids_MK[at], class_M[at], numbers, valid))
                sums += np.array(jax.device_get(self._scores(params, *rows)), np.float64)
            total += len(ids_MK)
        if not total:
            raise ValueError("there is no held-out picture that can be read")
        return {**dict(zip(self._names, (sums / total).tolist())), "num_images": total}


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
      data.NoUsableImages: all are bad.
    """
    records = list(_spread(source, count, bad_records))
    if not records:
        raise data.NoUsableImages(f"none of {count} encoded pictures can be read: {bad_records}")
    return np.stack([record.ids_RK[0] for record in records]), np.array([record.label for record in records], np.int32)


def _spread(source: data.TokenSet, count: int, bad_records: dict[str, str]) -> Iterator[data.TokenRecord]:
    for index in (j * len(source) // count for j in range(count)):
        try:
            yield source[index]
        except data.BadRecord as error:
            bad_records[error.name] = error.reason


def held_out(cfg: Mapping[str, Any], train: data.Source, num_classes: int) -> data.Source:
    """The source of held-out ids or pictures, compared with the training set.

    Raises:
      ValueError: as `LikelihoodEvaluator`.
    """
    section, count = cfg["data"], cfg["eval"]["num_images"]
    source = data.make_source(section["eval_source"], root=section["eval_root"] or None, split="eval")
    made, wanted = getattr(source, "tokenizer", None), id_writer(cfg, train)
    if made is not None and made != wanted:
        raise ValueError(
            f"config.data.eval_root={section['eval_root']!r} was encoded with another tokenizer ({made}) than the "
            f"training ids ({wanted}): encode both with one bundle"
        )
    if section["eval_source"] == "photographs":
        return data.Tiles(source, cfg["first_stage"]["image_size"], count)
    if len(source) < count:
        raise ValueError(
            f"config.eval.num_images={count}, but {section['eval_root']} has {len(source)}; "
            f"set --config.eval.num_images={len(source)}"
        )
    numbers = {name: number for number, name in enumerate(train.class_names)}
    for number, name in enumerate(source.class_names):
        if numbers.get(name, number) != number or number >= num_classes:
            raise ValueError(
                f"config.data.eval_root={section['eval_root']!r} has {name!r} as class {number}, the training set as "
                f"{numbers.get(name, 'none')}: hold out pictures of the same classes"
            )
    return source


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
