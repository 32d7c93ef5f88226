"""Pictures → shards of ids by a tokenizer's bundle; what a generator is trained on.

    python -m gigatok_jax.encode --bundle=bundles/tokenizer --source=imagenet2012 --crop=ten_crop --out=tokens/train
    python -m gigatok_jax.encode --bundle=bundles/tokenizer --source=emoji --split=eval --out=tokens/eval

Killed and started again with the same command it goes on from its whole shards. Several processes (each with its own
devices; same options as `gigatok_jax.train`) share out the shards. The last line printed is one JSON object.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils

from gigatok_jax import data, distributed, process_flags, program, sharding
from gigatok_jax.data.encoding import encode_shards, finish
from gigatok_jax.data.views import VIEWS, Views
from gigatok_jax.hub import bundle
from gigatok_jax.metrics import Progress
from gigatok_jax.sampling.pipelines import TokenizerPipeline


def encode_set(
    tokenizer: TokenizerPipeline,
    source: data.Source,
    out: Path,
    views: Views,
    made_from: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Encodes one source with a progress line; returns the content of its `dataset.json`.

    Args:
      options: batch, shard_records, num_threads.
    Raises:
      ValueError, OSError: as `data.encoding.encode_shards`.
    """
    process = jax.process_index(), jax.process_count()
    mine = -(-len(source) // process[1])
    stream = None if distributed.is_main() else io.StringIO()
    progress = Progress(mine, global_batch=views.count, warmup_updates=1, window=500, stream=stream)
    told = 0

    def show(done: int) -> None:
        nonlocal told
        if done > told:
            told = done
            progress.update(done)

    facts = tokenizer.bundle.facts()
    settings = {"tokenizer": facts, "made_from": made_from, "process": process, "on_progress": show, **options}
    encode_shards(source, out, tokenizer.tokenize, views, **settings)
    progress.end_line()
    if process[1] > 1:
        multihost_utils.sync_global_devices("every shard is written")
    return finish(out) if distributed.is_main() else {}


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called only where this module is the program."""
    flags.DEFINE_string("bundle", None, "The tokenizer's bundle.", required=True)
    flags.DEFINE_enum("source", None, sorted(set(data.SOURCES) - {"tokens"}), "As config.data.source.", required=True)
    flags.DEFINE_string("root", "", "Path of the source, as config.data.root.")
    flags.DEFINE_string("split", "train", "train or eval.")
    flags.DEFINE_string("out", None, "Folder of the shards and their dataset.json.", required=True)
    flags.DEFINE_enum("crop", "center", VIEWS, "Views of a picture: see gigatok_jax.data.views.")
    flags.DEFINE_integer("num_views", 1, "Random crops of a picture, for adm and scale.", lower_bound=1)
    flags.DEFINE_float(
        "crop_range", 1.1, "Of ten_crop: how much larger the picture is than its crops.", lower_bound=1.0
    )
    flags.DEFINE_bool("flip", False, "center: the mirror image too; adm and scale: half of the crops mirrored.")
    flags.DEFINE_bool("permute_channels", False, "adm and scale: red, green and blue in a random order.")
    flags.DEFINE_integer(
        "tiles", 0, "Take so many fixed crops of all octaves of a few pictures instead.", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "Of random crops.", lower_bound=0)
    flags.DEFINE_integer("batch", 64, "Pictures encoded at once by a process.", lower_bound=1)
    flags.DEFINE_integer("shard_records", 1024, "Records of the source per shard.", lower_bound=1)
    flags.DEFINE_integer("num_threads", 8, "Threads that read and decode.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the tokenizer's arithmetic.")
    process_flags.define()


def run() -> dict[str, Any]:
    """What the flags ask for; returns the summary that `main` prints."""
    mesh = sharding.make_mesh({"data": jax.local_device_count(), "fsdp": 1, "tensor": 1}, jax.local_devices())
    loaded = bundle.load(FLAGS.bundle, "tokenizer", bundle.FIRST_STAGE)
    loaded.check_ids()
    tokenizer = TokenizerPipeline(loaded, dtype=FLAGS.dtype, mesh=mesh)
    size = tokenizer.model.image_size
    source = data.make_source(FLAGS.source, root=FLAGS.root or None, split=FLAGS.split)
    root = FLAGS.root and os.path.realpath(os.path.expanduser(FLAGS.root))  # empty: the source's usual place
    made_from = {"source": FLAGS.source, "split": FLAGS.split, "root": root, "dtype": FLAGS.dtype}
    if FLAGS.tiles:
        source, made_from = data.Tiles(source, size, FLAGS.tiles), {**made_from, "tiles": FLAGS.tiles}
    names = ("crop", "num_views", "flip", "permute_channels", "crop_range", "seed")
    views = Views(size, **{name: FLAGS[name].value for name in names})
    options = {name: FLAGS[name].value for name in ("batch", "shard_records", "num_threads")}
    index = encode_set(tokenizer, source, Path(FLAGS.out).expanduser(), views, made_from, **options)
    if not index:
        return {}
    for name, reason in list(index["dropped"].items())[:20]:
        print(f"left out: {name}: {reason}")
    facts = {name: index[name] for name in ("records", "hash")} | {"views": views.count}
    return {**facts, "dropped": len(index["dropped"]), "tokenizer": index["tokenizer"]["hash"]}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.WARNING)
    try:
        process_flags.join()
        facts = run()
    except (ValueError, OSError, ImportError, RuntimeError, data.BadRecord) as error:
        logging.debug("while encoding", exc_info=True)
        sys.exit(f"error: {error}")
    if facts:
        print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
