"""Linear probes of a bundle's features, and a generator's loss on held-out images.

    python -m gigatok_jax.probe --features=encoder --tokenizer=bundles/tokenizer --source=imagenet2012 --out=probes/enc
    python -m gigatok_jax.probe --features=generator --tokenizer=bundles/tokenizer --generator=bundles/ar \\
        --source=imagenet2012 --out=probes/ar
    python -m gigatok_jax.probe --what=ar_val_loss --generator=bundles/ar --tokenizer=bundles/tokenizer \\
        --source=imagenet2012 --out=probes/ar_val_loss

A probe (GigaTok's "Acc.") is one linear layer over the mean token of the encoder, of a decoder layer or of the
generator's middle layer, scored on the held-out split after its last step. The published recipe is the default: 90
passes over the images, 10 of them warm-up. Over ImageNet's 1,281,167 these are 14,075 and 1,563 steps at the authors'
8,192 images a step, 450,410 and 50,045 at 256. Few images give few steps, and the small ones of LARS then lead
nowhere: raise --learning_rate with them. SIGTERM or Ctrl-C saves and exits, as in training. Started again with the same
command it goes on from its newest checkpoint.

ar_val_loss (of GigaTok's AR probing) is the mean nats per id of held-out images under the generator, teacher-forced,
with their true class, centre-cropped; --source=tokens takes stored ids and no tokenizer.

In --out: `settings.json`, `probe.json`, `curves.png`, `metrics.jsonl`, TensorBoard events and `checkpoints/`; or
`ar_val_loss.json`. The last line printed is one JSON object.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from gigatok_jax import data, distributed, process_flags, program, sharding
from gigatok_jax.data.shards import write_json
from gigatok_jax.evals import likelihood, linear_probe
from gigatok_jax.hub import bundle, frozen
from gigatok_jax.metrics import Progress
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.objectives.probe import KINDS, ProbeObjective
from gigatok_jax.preemption import StopSignal
from gigatok_jax.sampling.base import MAX_SEED
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from gigatok_jax.settings import keep

FLAGS = flags.FLAGS


def linear(out: Path) -> dict[str, Any]:
    """Trains and scores the probe that the flags ask for; returns settings and scores."""
    tokenizer = bundle.load(FLAGS.tokenizer, "tokenizer")
    generator = ar_bundle(FLAGS.generator) if FLAGS.features == "generator" else None
    if generator is not None:
        bundle.check_pair(generator, tokenizer.hash)
    elif FLAGS.generator_dropout:
        raise ValueError(f"--generator_dropout: features of the {FLAGS.features} do not pass through a generator")
    train, held_out = data.make_source(FLAGS.source, root=FLAGS.root or None, split=FLAGS.split), _held_out()
    count = FLAGS.num_images or len(held_out)
    linear_probe.check_sources(train, held_out, FLAGS.batch, count)
    mesh = sharding.make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1})
    options = {"layer": FLAGS.layer, "dtype": FLAGS.dtype}
    features, networks = linear_probe.features_of(FLAGS.features, tokenizer, generator, mesh, **options)
    recipe = _recipe(len(train))
    settings = {
        "tokenizer": tokenizer.hash,
        "generator": generator and generator.hash,
        "features": FLAGS.features,
        "layer": features.layer,
        "generator_dropout": FLAGS.generator_dropout,
        "dtype": FLAGS.dtype,
        "images": data.fingerprint(train),
        **recipe._asdict(),
    }
    objective = ProbeObjective(features, features.width, len(train.class_names), FLAGS.generator_dropout)
    sources = {"train": train, "held_out": held_out, "num_images": count, "num_threads": FLAGS.num_threads}
    size = tokenizer.section["image_size"]
    probe = linear_probe.LinearProbe(objective, networks, mesh, recipe, image_size=size, out=out, **sources)
    keep(out / "settings.json", settings, "a probe")
    with StopSignal(preemption_code=FLAGS.preemption_code) as stop:
        status = 1
        try:
            left = probe.train(stop)
            status = stop.exit_status
        finally:
            stop.end_process_if_left_behind(status)
    if left:
        step = int(probe.state.step)
        print(f"stopped at step {step} of {recipe.num_steps}; the same command goes on from there", file=sys.stderr)
        sys.exit(status)
    scores = probe.score() | {"classes": len(train.class_names), "width": features.width}
    if distributed.is_main():
        print(probe.draw())
        write_json(out / "probe.json", {**settings, **scores, "bad_records": probe.bad_records})
    return {"features": FLAGS.features, "layer": features.layer, "num_steps": recipe.num_steps, **scores}


def ar_bundle(path: str) -> bundle.Bundle:
    """The bundle of an AR generator; raises ValueError for one of another family, and as `bundle.load`."""
    found = bundle.load(path, "generator")
    if found.section["family"] != "ar":
        raise ValueError(f"{path} is a bundle of a {found.section['family']} generator; probes are of AR generators")
    return found


def ar_val_loss(out: Path) -> dict[str, Any]:
    """The loss that the flags ask for; every process computes all of it."""
    mesh = sharding.make_mesh({"data": jax.local_device_count(), "fsdp": 1, "tensor": 1}, jax.local_devices())
    generator = ar_bundle(FLAGS.generator)
    source, names = _held_out(), generator.class_names
    if names and tuple(source.class_names) != names:
        raise ValueError(
            f"the images' {len(source.class_names)} classes ({', '.join(source.class_names[:3])}, …) are not the "
            f"{len(names)} that the generator was trained with ({', '.join(names[:3])}, …)"
        )
    count, bad = FLAGS.num_images or len(source), {}
    if count > len(source):
        raise ValueError(f"{count} held-out images are asked for, there are {len(source)}: lower --num_images")
    if FLAGS.source == "tokens":
        bundle.check_pair(generator, source.tokenizer["hash"])
        parts: Iterable[likelihood.Part] = [likelihood.stored_ids(source, count, bad)]
    else:
        tokenizer = TokenizerPipeline(bundle.load(FLAGS.tokenizer, "tokenizer", bundle.FIRST_STAGE), mesh=mesh)
        bundle.check_pair(generator, tokenizer.bundle.hash)
        options = {"image_size": tokenizer.model.image_size, "batch": FLAGS.batch}
        parts = _shown(
            likelihood.encoded_ids(source, tokenizer.tokenize, count=count, bad_records=bad, **options), count
        )
    objective = ARObjective(generator.model(FLAGS.dtype), class_dropout=0.0)
    params = frozen.place({"generator": generator.params}, mesh, "fsdp")
    scores = likelihood.Likelihood(objective, mesh, min(FLAGS.batch, count))(params, parts)
    if distributed.is_main():
        write_json(out / "ar_val_loss.json", {"generator": generator.hash, **scores, "bad_records": bad})
    return scores


def _held_out() -> data.Source:
    """The source of held-out images: the training images' other split, unless it is named."""
    name = FLAGS.eval_source or FLAGS.source
    return data.make_source(name, root=FLAGS.eval_root or FLAGS.root or None, split=FLAGS.eval_split)


def _recipe(num_images: int) -> linear_probe.Recipe:
    steps = FLAGS.num_steps or linear_probe.published_steps(num_images, FLAGS.batch)
    warmup = steps // linear_probe.WARMUP if FLAGS.warmup_steps is None else FLAGS.warmup_steps
    return linear_probe.Recipe(steps, warmup, FLAGS.batch, FLAGS.learning_rate, FLAGS.seed)


def _shown(parts: Iterable[likelihood.Part], count: int) -> Iterator[likelihood.Part]:
    """The parts, with a progress line over them."""
    stream = None if distributed.is_main() else io.StringIO()
    progress = Progress(-(-count // FLAGS.batch), global_batch=FLAGS.batch, stream=stream)
    for done, part in enumerate(parts, 1):
        yield part
        progress.update(done)


def define_flags() -> None:
    """Called only where this module is the program."""
    flags.DEFINE_enum("what", "linear", ("linear", "ar_val_loss"), "A linear probe, or the generator's loss.")
    flags.DEFINE_enum("features", None, KINDS, "What a linear probe reads.")
    flags.DEFINE_string("tokenizer", None, "The tokenizer's bundle.")
    flags.DEFINE_string("generator", None, "The generator's bundle.")
    flags.DEFINE_integer(
        "layer", 0, "Of decoder and generator, from 1; 0: the layer that was distilled, the middle.", lower_bound=0
    )
    flags.DEFINE_enum("source", None, sorted(data.SOURCES), "As config.data.source.", required=True)
    flags.DEFINE_string("root", "", "Path of the source, as config.data.root.")
    flags.DEFINE_string("split", "train", "Split that a probe is trained on.")
    flags.DEFINE_string("eval_source", "", "Source of the held-out images; empty: --source.")
    flags.DEFINE_string("eval_root", "", "Its path; empty: --root.")
    flags.DEFINE_string("eval_split", "eval", "Its split.")
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_integer("num_images", 0, "Held-out images, evenly spaced; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch", 256, "Images of a step, over all devices.", lower_bound=1)
    flags.DEFINE_integer("num_steps", None, "Updates of the head; 90 passes over the images by default.", lower_bound=1)
    flags.DEFINE_integer("warmup_steps", None, "Linear warm-up; a ninth of the steps by default.", lower_bound=0)
    flags.DEFINE_float("learning_rate", 0.1, "Peak for a batch of 256, in proportion for others.", lower_bound=0.0)
    flags.DEFINE_integer(
        "seed", 0, "Of the head, the order of images and their crops.", lower_bound=0, upper_bound=MAX_SEED
    )
    flags.DEFINE_bool("generator_dropout", False, "Train under the generator's dropout, as the published code does.")
    flags.DEFINE_integer("num_threads", 8, "Threads that read and decode.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the frozen networks' arithmetic.")
    flags.DEFINE_integer("preemption_code", 0, "Exit status after SIGTERM, for schedulers that requeue on one.")
    process_flags.define()


def run() -> dict[str, Any]:
    """What the flags ask for; returns the summary that `main` prints."""
    tokens = FLAGS.source == "tokens"
    if FLAGS.what == "linear":
        if tokens:
            raise ValueError("--source=tokens holds ids, a probe is trained on pictures: give the source of these")
        needed = ("features", "tokenizer", *(["generator"] if FLAGS.features == "generator" else []))
    else:
        needed = ("generator", *([] if tokens else ["tokenizer"]))
    if missing := [f"--{name}" for name in needed if FLAGS[name].value is None]:
        raise ValueError(f"--what={FLAGS.what} needs {' and '.join(missing)} as well")
    out = Path(FLAGS.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    return (linear if FLAGS.what == "linear" else ar_val_loss)(out)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.WARNING)
    try:
        process_flags.join()
        facts = run()
    except (ValueError, OSError, ImportError, RuntimeError, data.BadRecord) as error:
        logging.debug("while probing", exc_info=True)
        sys.exit(f"error: {error}")
    if distributed.is_main():
        print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
