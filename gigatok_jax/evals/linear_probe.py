"""Linear probes: one layer trained on a frozen network's features, scored by the held-out images it classifies.

GigaTok's recipe (arXiv 2504.08736, after MAE's): LARS without weight decay, a rate of 0.1 per 256 images of a batch,
ten passes of linear warm-up from 0 out of ninety, then half a cosine to 0, ADM's random crops and flips in training,
its centre crop in scoring.
"""

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gigatok_jax import data, distributed, metrics, optim, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.evals.grid import curves_picture
from gigatok_jax.hub.bundle import Bundle
from gigatok_jax.hub.frozen import place
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.objectives.probe import Features, ProbeObjective
from gigatok_jax.preemption import Stopped, StopSignal
from gigatok_jax.train_step import compile_step

PASSES = 90  # over the training images, as published
WARMUP = 9  # one step out of so many is warm-up
SAVE_EVERY = 1000  # steps
MAX_SKIPPED = 20  # updates in a row that are not finite
DRAWN = 500  # points of a curve


class Recipe(NamedTuple):
    """How a head is trained.

    batch: images of a step over all devices.   learning_rate: of a batch of 256, in proportion for others.
    """

    num_steps: int
    warmup_steps: int
    batch: int
    learning_rate: float = 0.1
    seed: int = 0

    def group(self) -> optim.Group:
        """The head's optimiser."""
        peak = self.learning_rate * self.batch / 256
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup_steps, self.num_steps)
        return optim.Group(optim.lars(), rate, clip=0.0, ema=0.0, trainable=".*")

    def check(self, num_devices: int) -> None:
        """Raises ValueError for numbers that cannot work on so many devices."""
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below num_steps={self.num_steps}")
        if self.batch % num_devices:
            raise ValueError(f"a batch of {self.batch} does not divide over {num_devices} devices")


def published_steps(num_images: int, batch: int) -> int:
    """The steps of the published recipe over so many training images; a ninth of them is warm-up."""
    return max(1, PASSES * num_images // batch)


def features_of(
    kind: str, tokenizer: Bundle, generator: Bundle | None, mesh: Mesh, *, layer: int = 0, dtype: str = "float32"
) -> tuple[Features, dict[str, Any]]:
    """A place in a network and the placed parameters that lead there; layers behind it are left out.

    Args:
      kind: see `Features`; "generator" needs one.
      layer: of decoder or generator; 0 is the published one: the layer that was distilled, the middle.
    Raises:
      ValueError: there is no such layer.
    """
    if kind == "encoder" and layer:
        raise ValueError(f"layer={layer}: the encoder is probed after its last layer; leave it out")
    section, model, writer = tokenizer.section, tokenizer.model(dtype), None
    networks = {"tokenizer": {name: part for name, part in tokenizer.params.items() if name != "decoder"}}
    if kind == "decoder":
        layer = _layer(kind, layer or section["distill_layer"], section["decoder_depth"])
        shorter = {**section, "decoder_depth": layer, "teacher_dim": 0}
        model = tokenizer._replace(section=shorter).model(dtype)
        model = model.clone(decoder=model.decoder.clone(taps=(layer,)))
        networks["tokenizer"]["decoder"] = _first_layers(tokenizer.params["decoder"], layer)
    elif kind == "generator":
        depth = generator.section["depth"]
        layer = _layer(kind, layer or max(1, depth // 2), depth)
        writer = generator._replace(section={**generator.section, "depth": layer}).model(dtype)
        networks["generator"] = _first_layers(generator.params, layer)
    return Features(kind, model, writer, layer), place(networks, mesh, "fsdp")


def _layer(kind: str, layer: int, depth: int) -> int:
    if not 1 <= layer <= depth:
        raise ValueError(f"layer {layer} of the {kind}: it has the layers 1..{depth}, choose one with --layer")
    return layer


def _first_layers(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {**params, "stack": {"layers": jax.tree.map(lambda x: x[:count], params["stack"]["layers"])}}


def check_sources(train: data.Source, held_out: data.Source, batch: int, count: int) -> None:
    """Raises ValueError where these images cannot train and score a probe, naming the mend."""
    if len(train.class_names) < 2:
        raise ValueError("the training images have no classes: a folder has them as sub-folders, a tar as .cls files")
    if held_out.class_names != train.class_names:
        one, other = (f"{len(s.class_names)} ({', '.join(s.class_names[:3])}, …)" for s in (train, held_out))
        raise ValueError(f"the training images' classes are {one}, the held-out images' {other}: they must be the same")
    if data.fingerprint(train) == data.fingerprint(held_out):
        raise ValueError("the held-out images are the training images: give --eval_root, or another --eval_split")
    if len(train) < batch:
        raise ValueError(f"there are {len(train)} training images, fewer than a batch of {batch}: lower --batch")
    if count > len(held_out):
        raise ValueError(f"{count} held-out images are asked for, there are {len(held_out)}: lower --num_images")


class LinearProbe:
    """A head over fixed features: its training, which goes on from the newest checkpoint in `out`, and its scores.

    Args:
      frozen: parameters that the objective's features read, placed.
      train, held_out: sources that passed `check_sources`.
      num_images: of `held_out`, evenly spaced.
      out: folder of `checkpoints/`, `metrics.jsonl` and `curves.png`.
    Raises:
      ValueError: as `Recipe.check`.
    """

    def __init__(
        self,
        objective: ProbeObjective,
        frozen: Mapping[str, Any],
        mesh: Mesh,
        recipe: Recipe,
        *,
        train: data.Source,
        held_out: data.Source,
        image_size: int,
        num_images: int,
        out: Path,
        num_threads: int = 8,
    ):
        recipe.check(mesh.size)
        self.objective, self.frozen, self.mesh, self.recipe = objective, frozen, mesh, recipe
        self.groups = {"head": recipe.group()}
        self.train_source, self.held_out, self.num_images = train, held_out, num_images
        self.image_size, self.num_threads, self.out = image_size, num_threads, out
        self.bad_records: dict[str, str] = {}
        self._rows = sharding.process_rows(mesh, recipe.batch)
        args = self.objective, self.groups, recipe.seed, mesh, "replicated"
        self._abstract, self.state = train_state.abstract(*args), train_state.init(*args)

    def train(self, stop: StopSignal) -> bool:
        """Updates the head up to the last step, or to the step at which a stop was agreed; True if any are left.

        Raises:
          RuntimeError: the loss is not finite at many steps in a row, or images cannot be read.
        """
        total, main = self.recipe.num_steps, distributed.is_main()
        with Checkpointer(self.out / "checkpoints", keep_last=1) as checkpoints:
            if checkpoints.latest_step() is not None:
                self.state, _ = checkpoints.restore(self._abstract, config={})
            start = int(self.state.step)
            writer = metrics.make_writer(self.out, is_main=main, resume_step=start if start else -1)
            options = {"start_step": start, "global_batch": self.recipe.batch, "show": ("loss/probe", "accuracy")}
            progress = metrics.Progress(total, stream=None if main else io.StringIO(), **options)
            try:
                self._loop(start, checkpoints, stop, functools.partial(self._report, writer=writer, progress=progress))
            except Stopped:  # while it compiled: nothing has happened since the newest checkpoint
                return True
            finally:
                progress.end_line()
                writer.close()
        return int(self.state.step) < total

    def _loop(self, start: int, checkpoints: Checkpointer, stop: StopSignal, report: Callable[..., None]) -> None:
        compiled, pending = None, None
        with self._loader(start) as loader:
            for step, batch in enumerate(loader, start):
                placed = self._placed({name: batch[name] for name in ("image", "label")})
                compiled = compiled or stop.during(functools.partial(self._compiled, placed))
                self.state, values = compiled(self.state, self.frozen, placed)
                # Read one step late, so that the device never waits for the host.
                report(pending)
                pending = step + 1, values
                stopped = stop.agreed(step)
                if stopped or (step + 1) % SAVE_EVERY == 0 or step + 1 == self.recipe.num_steps:
                    checkpoints.save(step + 1, self.state, config={})
                if stopped:
                    break
            self.bad_records |= loader.bad_records
        report(pending)

    def score(self) -> dict[str, float]:
        """{"top1", "top5", "majority", "num_images"}: shares of the held-out images.

        "majority" is what the commonest class among them would score.

        Raises:
          ValueError: none of them can be read.
        """
        main, batch = distributed.is_main(), self.recipe.batch
        progress = metrics.Progress(
            -(-self.num_images // batch), global_batch=batch, stream=None if main else io.StringIO()
        )
        top, seen_C = np.zeros(2), np.zeros(self.objective.num_classes)
        options = {"count": self.num_images, "num_threads": self.num_threads, "bad_records": self.bad_records}
        sizes = {"image_size": self.image_size, "batch": batch, "rows": self._rows}
        compiled = self._scores()
        for done, rows in enumerate(data.eval_batches(self.held_out, **sizes, **options), 1):
            placed = self._placed({name: rows[name] for name in ("image", "label", "valid")})
            counts = jax.device_get(compiled(self.state.params, self.state.state, self.frozen, placed))
            top, seen_C = top + counts[0], seen_C + counts[1]
            progress.update(done)
        count = seen_C.sum()
        if not count:
            raise ValueError(f"none of {self.num_images} held-out images can be read")
        shares = [top[0] / count, top[1] / count, seen_C.max() / count]
        return {**dict(zip(("top1", "top5", "majority"), map(float, shares))), "num_images": int(count)}

    def draw(self) -> Path:
        """Writes `curves.png` of the training; returns its path."""
        keys = ["loss/probe", "accuracy", "learning_rate/head"]
        curves_picture(self.out / "metrics.jsonl", self.out / "curves.png", keys)
        return self.out / "curves.png"

    def _loader(self, start: int) -> data.TrainLoader:
        return data.TrainLoader(
            self.train_source,
            global_batch=self.recipe.batch,
            seed=self.recipe.seed,
            num_steps=self.recipe.num_steps,
            start_step=start,
            element=data.ImageElement(self.image_size),
            rows=self._rows,
            num_threads=self.num_threads,
        )

    def _placed(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.place_batch(rows, self.mesh, self.recipe.batch)

    def _compiled(self, batch: Mapping[str, jax.Array]) -> jax.stages.Compiled:
        settings = {"seed": self.recipe.seed, "accumulate": 1, "mesh": self.mesh, "preset": "replicated"}
        values = {"abstract": self._abstract, "frozen": self.frozen, "batch": batch}
        return compile_step(self.objective, self.groups, None, **settings, **values)

    def _report(self, pending: tuple[int, Mapping[str, jax.Array]] | None, writer: Any, progress: Any) -> None:
        if pending is None:
            return
        done, values = pending
        scalars = {name: float(value) for name, value in jax.device_get(values).items()}
        progress.update(done, scalars)
        if done % max(1, self.recipe.num_steps // DRAWN) == 0 or done in (1, self.recipe.num_steps):
            writer.write_scalars(done, scalars)
        if scalars["skipped_in_row"] >= MAX_SKIPPED:
            raise RuntimeError(f"the loss is not finite in {MAX_SKIPPED} steps in a row: lower --learning_rate")

    def _scores(self) -> Any:
        best = min(5, self.objective.num_classes)

        def scores(params: Any, state: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> Any:
            with placing(sharding.placement(self.mesh)):
                logits = self.objective.logits(params, state, gathered(frozen), batch["image"])
            right = (jax.lax.top_k(logits, best)[1] == batch["label"][:, None]) & batch["valid"][:, None]
            seen_C = jnp.zeros(self.objective.num_classes).at[batch["label"]].add(batch["valid"])
            return jnp.stack([right[:, 0].sum(), right.sum()]), seen_C

        return jax.jit(scores, out_shardings=sharding.replicated(self.mesh))
