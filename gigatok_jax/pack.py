"""Turns a folder, tars, a TFDS dataset or the emoji into ArrayRecord shards, which train at full speed everywhere.

    python -m gigatok_jax.pack --source=folder --root=imagenet/train --out=packed/train
    python -m gigatok_jax.pack --source=emoji --out=data/emoji

Killed and started again with the same command it goes on from its last whole shard; over a finished set it checks every
shard. Where the source's files have changed in between, it says so and does nothing. Images that cannot be used are
named, left out and listed in `dataset.json`. `emoji` is fetched with npm, or read from the two archives in --root, and
becomes `train/` and `eval/`. The last line printed is one JSON object.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from gigatok_jax import data, program
from gigatok_jax.data import emoji
from gigatok_jax.data.packing import finished_records, pack
from gigatok_jax.metrics import Progress

SOURCES = ("folder", "webdataset", "tfds", "imagenet2012", "emoji")
_NAMED = 20  # bad records printed; all are in dataset.json


def pack_set(source: data.EncodedSource, out: Path, made_from: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Packs one source with a progress line; returns the summary that `main` prints.

    Raises:
      ValueError, OSError: as `packing.pack`.
    """
    done = finished_records(out)
    if done:
        print(f"{out}: {done:,} of {len(source):,} records were packed before; checking their shards", flush=True)
    progress = Progress(len(source), start_step=done, global_batch=1, warmup_updates=0, window=2000)

    def show(records: int) -> None:
        nonlocal done
        if records < done:  # a shard was damaged, and is made again
            progress.restart_timing(records)
        done = records
        progress.update(records)

    index = pack(source, out, made_from=made_from, on_progress=show, **options)
    for name, reason in list(index["dropped"].items())[:_NAMED]:
        print(f"left out: {name}: {reason}")
    if len(index["dropped"]) > _NAMED:
        print(f"... and {len(index['dropped']) - _NAMED} more, in {out / 'dataset.json'}")
    size = sum(shard["bytes"] for shard in index["shards"])
    shards = f"{len(index['shards'])} shards, {size / 2**20:,.1f} MiB"
    print(f"{out}: {index['records']:,} records, {shards}, hash {index['hash']}", flush=True)
    return {name: index[name] for name in ("records", "hash")} | {"bytes": size, "dropped": len(index["dropped"])}


def run(source: str, root: str, out: Path, split: str, **options: Any) -> dict[str, Any]:
    """Packs a source by name; returns "records", "hash", "bytes" and "dropped", for emoji by split.

    A leading ~ of `root` or `out` is the home folder.

    Raises:
      ValueError, OSError: naming what is wrong and the mend.
    """
    # make_source does so too, but the root is also written down, and the emoji's read, here.
    root, out = os.path.expanduser(root), Path(os.path.expanduser(out))
    if source != "emoji":
        made_from = {"source": source, "split": split, "root": str(Path(root).resolve())}
        return pack_set(data.make_source(source, root=root or None, split=split), out, made_from, **options)
    made_from = {"source": source, "packages": [emoji.PICTURES.name, emoji.NAMES.name]}
    with tempfile.TemporaryDirectory() as folder:
        if not root:
            print("fetching two npm packages, 90 MB", flush=True)
            emoji.fetch(folder)
        archives = {name: emoji.EmojiArchives(root or folder, name) for name in emoji.SPLITS}
    return {n: pack_set(a, out / n, {**made_from, "split": n}, **options) for n, a in archives.items()}


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called only where this module is the program, so that importing it leaves other programs' flags alone."""
    flags.DEFINE_enum("source", None, SOURCES, "Where the images are.")
    flags.DEFINE_string("root", "", "Path of the source, as in config.data.root; emoji: folder of the archives.")
    flags.DEFINE_string("out", None, "Folder of the shards and their dataset.json.")
    flags.DEFINE_string("split", "train", "Split of tfds and imagenet2012: train, eval, or as TFDS writes them.")
    flags.DEFINE_integer("shard_records", 4096, "Records of the source per shard.", lower_bound=1)
    flags.DEFINE_integer("num_threads", 8, "Threads that read and decode.", lower_bound=1)
    flags.mark_flags_as_required(["source", "out"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.WARNING)
    options = {"shard_records": FLAGS.shard_records, "num_threads": FLAGS.num_threads}
    try:
        facts = run(FLAGS.source, FLAGS.root, Path(FLAGS.out), FLAGS.split, **options)
    except (ValueError, OSError, ImportError) as error:
        logging.debug("while packing", exc_info=True)
        sys.exit(f"error: {error}")
    print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
