"""A training checkpoint → a bundle that a tokenizer or generator is used from.

    python -m gigatok_jax.export --checkpoint=runs/quickstart --bundle=bundles/tokenizer --stablehlo

--stablehlo adds the programs that run without this package (see `gigatok_jax.hub.stablehlo`). --proxy=BUNDLE joins a
first-stage TiTok with its proxy tokenizer, by whose decoder it makes images. Works on one host without an accelerator,
for the largest size too: one tensor at a time is in memory (all of them with --proxy). The last line printed is one
JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

import gigatok_jax
from gigatok_jax import program
from gigatok_jax.blueprint import model_group
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.hub import bundle, join, stablehlo
from gigatok_jax.metrics import tensor_progress

WEIGHTS = ("auto", "ema", "raw")


def export(checkpoint: Path, out: Path, *, step: int | None = None, weights: str = "auto") -> dict[str, Any]:
    """Writes a bundle from a run's folder, or its `checkpoints`; returns what its `config.json` holds.

    Args:
      step: which checkpoint; the newest if None.
      weights: "ema", "raw", or "auto": the average where the run kept one.

    Raises:
      FileNotFoundError: no checkpoint there, or not that step.
      ValueError: no average was kept, or the checkpoint's config cannot be built.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"--weights={weights} is not one of {', '.join(WEIGHTS)}")
    folder = checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; --checkpoint is a run's --workdir")
    with Checkpointer(folder, read_only=True) as checkpoints:
        step, cfg, extra = checkpoints.stored(step)
        kind = model_group(cfg)
        if kind not in cfg:
            raise ValueError(
                f"{folder} is of no tokenizer and no generator (of a probe?): name a run of gigatok_jax.train"
            )
        leaves, read = checkpoints.read_leaves(step)
        averaged = any(name.startswith(f"ema.{kind}.") for name in leaves)
        if weights == "ema" and not averaged:
            raise ValueError(f"{folder} keeps no average of the {kind} (config.groups.{kind}.ema=0): use --weights=raw")
        source = "ema" if averaged and weights != "raw" else "params"
        facts = extra.get("facts", {})
        provenance = {
            "config": cfg,
            "step": step,
            "weights": source,
            "data": extra.get("data"),
            "frozen": extra.get("frozen", {}),
            "versions": {"gigatok_jax": gigatok_jax.__version__, "jax": jax.__version__},
        }
        return bundle.save(
            out,
            kind,
            cfg[kind],
            lambda path: read(f"{source}.{kind}." + path.replace("/", ".")),
            class_names=tuple(facts.get("class_names", ())),
            tokenizer=facts.get("tokenizer"),
            provenance=provenance,
            on_tensor=tensor_progress(),
        )


def joined(folder: Path, proxy: str) -> dict[str, Any]:
    """Writes the bundle of a first-stage TiTok anew, joined with its proxy tokenizer; returns its `config.json`.

    Raises:
      ValueError: as `hub.join.with_pixel_decoder`.
      FileNotFoundError, ImportError: as `hub.bundle.load`.
    """
    return join.with_pixel_decoder(bundle.load(folder), bundle.load(proxy, "tokenizer")).save(folder)


def define_flags() -> None:
    """Called only where this module is the program."""
    flags.DEFINE_string("checkpoint", None, "A run's --workdir, or its checkpoints folder.", required=True)
    flags.DEFINE_string("bundle", None, "Folder to write.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
    flags.DEFINE_string("proxy", "", "Of a first-stage TiTok: the bundle of the proxy tokenizer to join it with.")
    flags.DEFINE_bool("stablehlo", False, "Add the programs that run without this package.")
    flags.DEFINE_enum("weights", "auto", WEIGHTS, "Averaged or raw weights; auto: averaged where the run kept them.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    options = flags.FLAGS
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is opened to be read is not written
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be taken by the run
    try:
        folder = Path(options.bundle).expanduser()
        content = export(Path(options.checkpoint), folder, step=options.step, weights=options.weights)
        if options.proxy:
            content = joined(folder, options.proxy)
        programs = stablehlo.write(folder, content["kind"], content["section"]) if options.stablehlo else []
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    for path in programs:
        print(path)
    shown = {"bundle": options.bundle, "kind": content["kind"], "hash": content["hash"]}
    print(json.dumps({**shown, "step": content["provenance"]["step"], "weights": content["provenance"]["weights"]}))


if __name__ == "__main__":
    define_flags()
    program.run(main)
