"""Train from a config: `python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

Started again with the same command it goes on from its newest checkpoint. SIGTERM or Ctrl-C saves and exits with
status 0, or with --preemption_code. In the workdir: `checkpoints/`, `metrics.jsonl` and TensorBoard events, `grids/`,
`curves.png`, `report.json`.
"""

import logging as stdlib_logging
import shlex
import signal
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gigatok_jax import process_flags, program
from gigatok_jax.data import NoUsableImages
from gigatok_jax.preemption import StopSignal
from gigatok_jax.run import NonFiniteRun, Run


def train(
    cfg: ConfigDict,
    workdir: str,
    *,
    allow_config_change: bool = False,
    preemption_code: int = 0,
    command: str | None = None,
) -> int:
    """Trains to the end or to a signal; returns the exit status. The report names the command."""
    with StopSignal(preemption_code=preemption_code) as stop:
        try:
            if "://" in workdir:
                raise ValueError(
                    f"--workdir={workdir}: metrics and pictures need a folder; mount the bucket and name that"
                )
            run = Run(cfg, Path(workdir), allow_config_change)
        except (ValueError, OSError, ImportError) as error:
            logging.debug("while building the run", exc_info=True)
            sys.exit(f"error: {error}")
        started, status = time.monotonic(), 1
        try:
            status = stop.exit_status if run.train(stop) else 0
            run.finish(time.monotonic() - started, command)
        except (NonFiniteRun, NoUsableImages) as error:
            run.finish(time.monotonic() - started, command)
            sys.exit(f"error: {error}")
        finally:
            stop.end_process_if_left_behind(status)
        return status


def define_flags() -> None:
    """The program's flags; defined only when it runs as one, so that entry points can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/gigatok.py:b-l.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, pictures, report.")
    flags.DEFINE_bool("allow_config_change", False, "Resume although the checkpoint's config computes something else.")
    flags.DEFINE_integer("preemption_code", 0, "Exit status after SIGTERM, for schedulers that requeue on one.")
    process_flags.define()
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.INFO)
    # Libraries log through absl too; only their warnings are news.
    own = str(Path(__file__).parent)
    logging.get_absl_handler().addFilter(lambda r: r.levelno >= stdlib_logging.WARNING or r.pathname.startswith(own))
    options = flags.FLAGS
    # Until there is a run, there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(options.preemption_code))
    try:
        process_flags.join()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    resume = {"allow_config_change": options.allow_config_change, "preemption_code": options.preemption_code}
    command = shlex.join(["python", "-m", "gigatok_jax.train", *sys.argv[1:]])
    sys.exit(train(options.config, options.workdir, command=command, **resume))


if __name__ == "__main__":
    define_flags()
    program.run(main)
