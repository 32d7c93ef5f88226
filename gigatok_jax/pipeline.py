"""From a tokenizer's run to images of a generator, stage by stage, and one page about all of it.

    python -m gigatok_jax.pipeline --config=configs/pipelines/quickstart.py --run=runs/quickstart

Exports the tokenizer, encodes the training and held-out images, trains the generator that the config names, exports it
and samples from it (see `gigatok_jax.stages` for the folders). Each stage is a command of its own, printed before it
runs. Started again, it goes on where it was; SIGTERM goes on to the stage, and the status is then 128 + 15. At the end
`report.json` of --run has gained the generator's `ar_val_loss` or `masked_val_loss` and `unigram_entropy`, and
`report.html` lies beside it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from PIL import Image

from gigatok_jax import config, data, objectives, program, stages
from gigatok_jax.data.shards import write_json
from gigatok_jax.evals.grid import picture_grid
from gigatok_jax.evals.page import LOSSES, write_page
from gigatok_jax.sampling.pipelines import TokenizerPipeline, from_pretrained

SHOWN, COLUMNS = 36, 6  # pictures of each kind on the page
GENERATORS = tuple(name for name, kind in objectives.OBJECTIVES.items() if kind.generates)
COUNTED = 65_536  # training images, evenly spaced, whose ids are counted at most


def run(cfg: ConfigDict, folder: Path) -> Path:
    """Runs the stages and writes the page; returns its path.

    Raises:
      ValueError, OSError: the config cannot be used, or there is no finished tokenizer's run in `folder`.
      StageFailed: a stage failed or was told to stop.
    """
    planned = stages.plan(cfg.to_dict(), folder)
    check_finished(folder)
    check_generator(planned)
    notes = stages.run(planned, folder / stages.NOTES)
    return write_reports(folder, planned, {name: note["seconds"] for name, note in notes.items()})


def check_finished(folder: Path) -> None:
    """Raises ValueError or FileNotFoundError where a run has not come to its end."""
    train = "`python -m gigatok_jax.train --config=… --workdir=" + str(folder) + "`"
    report, config = folder / "report.json", folder / "config.json"
    if not (report.is_file() and config.is_file()):
        raise FileNotFoundError(f"{folder} holds no run of a tokenizer: train one there first, {train}")
    steps, wanted = json.loads(report.read_text())["num_steps"], json.loads(config.read_text())["num_steps"]
    if steps < wanted:
        raise ValueError(f"the run in {folder} is at step {steps} of {wanted}: let it go on to its end, {train}")


def check_generator(planned: Sequence[stages.Stage]) -> None:
    """Raises ValueError or OSError, before hours have gone into other stages, where the generator cannot be trained."""
    arguments = next(stage.arguments for stage in planned if stage.name == "train_generator")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(arguments))
    try:
        values(arguments, known_only=True)
    except (flags.Error, AttributeError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"the generator's config cannot be read: {program.told(error)}") from error
    config.validate(values.config)
    if values.config.objective not in GENERATORS:
        raise ValueError(
            f"the generator's config has objective={values.config.objective!r}, and the page is about one of "
            f"{', '.join(GENERATORS)}: name such a config in train_generator"
        )
    if not values.config.data.eval_source:
        raise ValueError(
            "the generator's config has no data.eval_source, and the page shows its loss on held-out ids: set "
            'cfg.data.eval_source = "tokens" there'
        )


def write_reports(folder: Path, planned: Sequence[stages.Stage], seconds: dict[str, float]) -> Path:
    """Adds the generator's scores to the run's `report.json` and writes `report.html` beside it."""
    report = json.loads((folder / "report.json").read_text())
    scores = json.loads((folder / "generator" / "report.json").read_text())
    report = {name: value for name, value in report.items() if name not in LOSSES}  # maybe of another generator before
    report |= {name: scores[name] for name in (*LOSSES, "unigram_entropy") if name in scores}
    write_json(folder / "report.json", report)
    tokenizer = from_pretrained(folder / "bundles" / "tokenizer")
    train, held_out = (data.TokenSet(folder / "tokens" / split) for split in ("train", "eval"))
    ids_NK = some_ids(train, COUNTED)
    samples = np.load(folder / "samples" / "samples.npz")["arr_0"]
    path = folder / "report.html"
    first = ("train_tokenizer", report.get("seconds"), report.get("command") or "")
    write_page(
        path,
        title=folder.name,
        report=report,
        reconstructions=next(iter(sorted((folder / "grids").glob("*.png"))[-1:]), None),
        drawn=[
            ("Samples:", "ids drawn by the generator", grid(samples)),
            ("Shuffled ids:", "training ids, each position from another image", decoded(tokenizer, shuffled(ids_NK))),
            ("Held-out images:", "as their own ids draw them", decoded(tokenizer, some_ids(held_out, SHOWN))),
        ],
        curves=[("Tokenizer", folder / "curves.png"), ("Generator", folder / "generator" / "curves.png")],
        counts_V=np.bincount(ids_NK.reshape(-1), minlength=report["codebook_size"]),
        stages=[first, *((stage.name, seconds[stage.name], stage.line()) for stage in planned)],
    )
    return path


def some_ids(tokens: data.TokenSet, count: int) -> np.ndarray:
    """(N, K) ids of all views of at most `count` evenly spaced images; those that cannot be read are left out."""
    count, rows = min(count, len(tokens)), []
    for index in (j * len(tokens) // count for j in range(count)):
        try:
            rows.append(tokens[index].ids_RK)
        except data.BadRecord as error:
            logging.warning("left out: %s: %s", error.name, error.reason)
    return np.concatenate(rows)


def shuffled(ids_NK: np.ndarray) -> np.ndarray:
    """Ids whose every position comes from another image: what is known of them without a generator."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(ids_N, SHOWN) for ids_N in ids_NK.T], axis=1)


def decoded(tokenizer: TokenizerPipeline, ids_NK: np.ndarray) -> Image.Image:
    """The pictures of the first ids."""
    return grid(tokenizer.detokenize(ids_NK[:SHOWN]))


def grid(images: np.ndarray) -> Image.Image:
    """The first pictures side by side."""
    return picture_grid(images[:SHOWN], [""] * len(images[:SHOWN]), COLUMNS)


def define_flags() -> None:
    """Called only where this module is the program."""
    config_flags.DEFINE_config_file("config", None, "Flags of each stage, e.g. configs/pipelines/quickstart.py.")
    flags.DEFINE_string("run", None, "The --workdir of the tokenizer's finished run.")
    flags.mark_flags_as_required(["config", "run"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the stages
    try:
        print(run(flags.FLAGS.config, Path(flags.FLAGS.run)))
    except stages.StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    program.run(main)
