"""Images written by a generator's bundle and drawn by its tokenizer's.

    python -m gigatok_jax.sample --generator=bundles/ar --tokenizer=bundles/tokenizer --labels=all --num_images=64 \\
        --scale=2 --schedule=step --out=samples

In --out: `images/NNNNNN.png`, `grid.png`, `samples.npz` (`arr_0` uint8 (N, S, S, 3), `arr_1` labels, as ADM's
evaluation reads them) and `sampling.json`. Image n depends on the seed, n and its label alone, so that started again
with the same command it goes on with the images that are missing. Several processes share out the batches. The last
line printed is one JSON object.

A masked generator takes --num_steps, --power, --anneal and --mask_schedule, and its own kinds of guidance; as TiTok's
L-32 was evaluated by default (see `gigatok_jax.sampling.masked.PUBLISHED` for the others).

--dtype=bfloat16 and int8 (of the weights; needs the package qwix) read less memory per id, and draw other ids where two
are about as good; --agreement=N says how often, over N of the images (see `gigatok_jax.sampling.agreement`).
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from PIL import Image

from gigatok_jax import distributed, process_flags, program, sharding
from gigatok_jax.evals.grid import picture_grid
from gigatok_jax.generators.masked import MASK_SCHEDULES
from gigatok_jax.hub import bundle
from gigatok_jax.metrics import Progress
from gigatok_jax.sampling.agreement import agreement
from gigatok_jax.sampling.base import MAX_SEED, LabelPipeline
from gigatok_jax.sampling.pipelines import TokenizerPipeline, generator_pipeline
from gigatok_jax.sampling.precision import DTYPES
from gigatok_jax.sampling.samplers import SAMPLERS
from gigatok_jax.settings import keep

SHOWN = 64  # images on the grid at most
GUIDANCE = ("scale", "schedule", "start", "end", "peak", "interval")


def labels_of(text: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """(count,) labels: "all" goes round the classes, "random" draws them uniformly (as published), "3,7" those two.

    Raises:
      ValueError: for anything else, or a class that there is not.
    """
    if text == "all":
        return np.arange(count) % num_classes
    if text == "random":
        return np.random.default_rng([seed, 0]).integers(0, num_classes, count)
    try:
        chosen = np.array([int(part) for part in text.split(",")])
    except ValueError:
        raise ValueError(f"--labels={text} is neither all, random, nor class numbers such as 3,7") from None
    if chosen.min() < 0 or chosen.max() > num_classes:
        raise ValueError(f"--labels={text}: this generator has the classes 0..{num_classes - 1} ({num_classes}: none)")
    return chosen[np.arange(count) % len(chosen)]


def check_pair(generator: LabelPipeline, tokenizer: TokenizerPipeline) -> None:
    """Raises ValueError where the generator was trained on another tokenizer's ids, or this one makes no images."""
    tokenizer.bundle.check_images()
    bundle.check_pair(generator.bundle, tokenizer.bundle.hash)


def sample_images(
    generator: LabelPipeline,
    tokenizer: TokenizerPipeline,
    labels: np.ndarray,
    out: Path,
    *,
    batch: int,
    settings: dict[str, Any],
    process: tuple[int, int] = (0, 1),
) -> None:
    """Writes this process' images that are not there yet.

    Args:
      settings: of the generator's `sample`.
      process: (this process' number, how many there are): batch b belongs to process b mod P.
    Raises:
      ValueError: settings out of range, or `out` holds images of others.
    """
    generator.check(labels, **settings)
    asked = {"generator": generator.bundle.hash, "tokenizer": tokenizer.bundle.hash, "dtype": generator.dtype}
    (out / "images").mkdir(parents=True, exist_ok=True)
    keep(out / "sampling.json", {**asked, **settings, "labels": labels.tolist()}, "images")
    stream = None if process[0] == 0 else io.StringIO()
    starts = range(process[0] * batch, len(labels), process[1] * batch)
    progress = Progress(len(starts), global_batch=batch, warmup_updates=1, stream=stream)
    for done, start in enumerate(starts, 1):
        numbers = np.arange(start, min(start + batch, len(labels)))
        paths = [image_path(out, n) for n in numbers]
        if not all(path.is_file() for path in paths):
            at = np.minimum(np.arange(start, start + batch), len(labels) - 1)  # one batch size, so one program
            ids = generator.sample(labels[at], first=start, **settings)
            for path, image in zip(paths, tokenizer.detokenize(ids)):
                partial = path.with_suffix(".partial")
                Image.fromarray(image).save(partial, "PNG")
                os.replace(partial, path)
        progress.update(done)
    progress.end_line()


def image_path(out: Path, number: int) -> Path:
    """Where an image is written."""
    return out / "images" / f"{number:06d}.png"


def collect(out: Path, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Writes `samples.npz` and `grid.png` from the images."""
    images = np.empty((len(labels), *np.asarray(Image.open(image_path(out, 0))).shape), np.uint8)
    for number in range(len(labels)):
        images[number] = Image.open(image_path(out, number))
    partial = out / "samples.partial.npz"
    np.savez(partial, arr_0=images, arr_1=labels.astype(np.int64))
    os.replace(partial, out / "samples.npz")
    names = [class_names[label] if label < len(class_names) else "" for label in labels[:SHOWN]]
    picture_grid(images[:SHOWN], names).save(out / "grid.png")


def compare(generator: LabelPipeline, labels: np.ndarray, *, batch: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The `agreement` of a generator that follows ids with itself in float32, under `settings`' seed and guidance."""
    print(f"comparing the ids of {len(labels)} images with float32's", file=sys.stderr)
    line = Progress(-(-len(labels) // batch), global_batch=batch, warmup_updates=1)
    reference = generator_pipeline(bundle.load(generator.bundle.folder, "generator"), mesh=generator.mesh)
    kept = {name: settings[name] for name in ("seed", *GUIDANCE) if name in settings}
    facts = agreement(reference, generator, labels, batch=batch, on_batch=lambda done, _: line.update(done), **kept)
    line.end_line()
    return facts


FLAGS = flags.FLAGS
DEFAULTS = {family: sampler.pipeline.defaults for family, sampler in SAMPLERS.items()}
OPTIONS = sorted({name for defaults in DEFAULTS.values() for name in defaults})


def settings_of(generator: LabelPipeline) -> dict[str, Any]:
    """What the flags say of sampling, and the generator's defaults.

    Raises:
      ValueError: for a flag that this family of generators has not.
    """
    given = {name: FLAGS[name].value for name in OPTIONS if FLAGS[name].value is not None}
    if strange := sorted(given.keys() - generator.defaults.keys()):
        raise ValueError(
            f"--{strange[0]} is no option of this generator's family; it has {', '.join(sorted(generator.defaults))}"
        )
    return {**generator.defaults, **given}


def default(name: str) -> str:
    """What an option is by default, in words, of each family that has it."""
    found = [f"{defaults[name]} ({family})" for family, defaults in DEFAULTS.items() if name in defaults]
    return f"By default {', '.join(found)}."


def define_flags() -> None:
    """Called only where this module is the program."""
    flags.DEFINE_string("generator", None, "The generator's bundle.", required=True)
    flags.DEFINE_string("tokenizer", None, "The bundle of the tokenizer whose ids it writes.", required=True)
    flags.DEFINE_string("labels", "all", "all, random, or class numbers such as 3,7.")
    flags.DEFINE_integer("num_images", 64, "How many images.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_integer("seed", 0, "Of all images.", lower_bound=0, upper_bound=MAX_SEED)
    flags.DEFINE_integer("batch", 16, "Images at once, over a process' devices.", lower_bound=1)
    schedules = list(dict.fromkeys(name for sampler in SAMPLERS.values() for name in sampler.schedules))
    flags.DEFINE_float("scale", None, f"Guidance scale; 1 is none, masked 0. {default('scale')}", lower_bound=0.0)
    flags.DEFINE_enum("schedule", None, schedules, f"How the guidance goes along a sequence. {default('schedule')}")
    flags.DEFINE_float("start", None, "Of step and rectangular: share of the sequence where guidance begins.")
    flags.DEFINE_float("end", None, f"Of rectangular: where it ends. {default('end')}")
    flags.DEFINE_float("peak", None, f"Of triangular. {default('peak')}")
    flags.DEFINE_integer("interval", None, "No guidance from this id on; -1, the default: to the end.")
    temperature = "Divides the logits, masked: of the noise; 0: the best id."
    flags.DEFINE_float("temperature", None, f"{temperature} {default('temperature')}", lower_bound=0.0)
    flags.DEFINE_integer("top_k", None, "Draw among the k best ids; 0, the default: all.", lower_bound=0)
    flags.DEFINE_float("top_p", None, "Draw among the best ids of this probability; all by default.")
    flags.DEFINE_integer("num_steps", None, f"Steps of drawing. {default('num_steps')}", lower_bound=1)
    flags.DEFINE_float("power", None, f"Of power-cosine. {default('power')}")
    flags.DEFINE_bool("anneal", None, f"Whether logits grow along the steps. {default('anneal')}")
    flags.DEFINE_enum("mask_schedule", None, MASK_SCHEDULES, f"How many ids stay masked. {default('mask_schedule')}")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the generator's weights, and of its cache (int8: float32).")
    flags.DEFINE_integer("agreement", 0, "Of how many images the ids are compared with float32's.", lower_bound=0)
    process_flags.define()


def run() -> dict[str, Any]:
    """What the flags ask for; returns the summary that `main` prints."""
    mesh = sharding.make_mesh({"data": jax.local_device_count(), "fsdp": 1, "tensor": 1}, jax.local_devices())
    generator = generator_pipeline(bundle.load(FLAGS.generator, "generator"), dtype=FLAGS.dtype, mesh=mesh)
    settings = settings_of(generator)
    if FLAGS.agreement and not generator.follows:
        raise ValueError(
            "--agreement compares position by position, and this generator writes all at once: leave it out"
        )
    tokenizer = TokenizerPipeline(bundle.load(FLAGS.tokenizer, "tokenizer"), mesh=mesh)
    check_pair(generator, tokenizer)
    out, classes = Path(FLAGS.out).expanduser(), generator.model.num_classes
    labels = labels_of(FLAGS.labels, FLAGS.num_images, classes, FLAGS.seed)
    process = jax.process_index(), jax.process_count()
    sample_images(generator, tokenizer, labels, out, batch=FLAGS.batch, settings=settings, process=process)
    if process[1] > 1:
        multihost_utils.sync_global_devices("every image is written")
    if not distributed.is_main():
        return {}
    collect(out, labels, generator.bundle.class_names)
    facts = {"images": len(labels), "grid": str(out / "grid.png"), "npz": str(out / "samples.npz")}
    if FLAGS.agreement:
        facts["agreement"] = compare(generator, labels[: FLAGS.agreement], batch=FLAGS.batch, settings=settings)
    return facts


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.WARNING)
    try:
        process_flags.join()
        facts = run()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.debug("while sampling", exc_info=True)
        sys.exit(f"error: {error}")
    if facts:
        print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
