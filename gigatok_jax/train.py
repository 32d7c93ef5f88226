"""Train from a config: `python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

Started again with the same command it goes on from its newest checkpoint. SIGTERM or Ctrl-C saves and exits with
status 0, or with --preemption_code. In the workdir: `checkpoints/`, `metrics.jsonl` and TensorBoard events, `grids/`,
`curves.png`, `report.json`.
"""

import io
import json
import logging as stdlib_logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gigatok_jax import config, data, distributed, metrics, objectives, optim, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.evals.evaluator import Evaluator
from gigatok_jax.evals.report import write_report
from gigatok_jax.preemption import StopSignal
from gigatok_jax.train_step import broken_terms, compile_step

SHOWN = ("loss/total", "loss/l2", "codebook/usage")


class NonFiniteRun(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Run:
    """One training run: what is built once, and the loop over it."""

    def __init__(self, cfg: ConfigDict, workdir: Path, allow_config_change: bool = False):
        config.validate(cfg, jax.device_count())
        self.cfg, self.workdir = cfg, workdir
        self.resolved = config.to_json(cfg)
        self.mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
        self.objective = objectives.build(cfg)
        self.groups = {n: optim.make_group(g, cfg.schedule, cfg.num_steps) for n, g in cfg.groups.items()}
        self.source = data.make_source(cfg.data.source, root=cfg.data.root or None, split="train")
        self.evaluator = Evaluator(cfg, self.objective.reconstruct, self.mesh) if cfg.data.eval_source else None
        self.abstract = train_state.abstract(self.objective, self.groups, cfg.seed, self.mesh, cfg.sharding.preset)
        workdir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpointer(
            workdir / "checkpoints", keep_last=cfg.checkpoint.keep_last, keep_period=cfg.checkpoint.keep_period or None
        )
        if self.checkpoints.latest_step() is None:
            self.state = train_state.init(self.objective, self.groups, cfg.seed, self.mesh, cfg.sharding.preset)
        else:
            same = {"config": self.resolved, "allow_config_change": allow_config_change}
            self.state, _ = self.checkpoints.restore(self.abstract, **same)
            logging.info("resumed from step %d", int(self.state.step))
        self.start = int(self.state.step)
        self._steps: dict[Any, Any] = {}
        self.input_wait, self.compile_seconds, self.bad_records = 0.0, 0.0, {}
        main = distributed.is_main()
        # Without a checkpoint there is nothing to go on from: lines of an attempt that died before one are dropped.
        self.writer = metrics.make_writer(workdir, is_main=main, resume_step=self.start if self.start else -1)
        self.progress = metrics.Progress(
            cfg.num_steps,
            start_step=self.start,
            global_batch=cfg.global_batch,
            show=SHOWN,
            stream=None if main else io.StringIO(),
        )
        tokens = self.objective.tokenizer.num_latent_tokens * cfg.global_batch
        self.alarm = metrics.UsageAlarm(window_steps=-(-cfg.loss.usage_window // tokens))
        if main:
            (workdir / "config.json").write_text(json.dumps(self.resolved, indent=2) + "\n")

    def loader(self) -> data.TrainLoader:
        """The batches from the state's step on; a pure function of (seed, step)."""
        cfg = self.cfg
        return data.TrainLoader(
            self.source,
            global_batch=cfg.global_batch,
            seed=cfg.seed,
            num_steps=cfg.num_steps,
            start_step=self.start,
            image_size=cfg.tokenizer.image_size,
            crop=cfg.data.crop,
            flip=cfg.data.flip,
            permute_channels=cfg.data.permute_channels,
            rows=sharding.process_rows(self.mesh, cfg.global_batch),
            num_threads=cfg.data.num_threads,
            num_workers=cfg.data.num_workers,
            prefetch=cfg.data.prefetch,
        )

    def step_fn(self, step: int, batch: Mapping[str, jax.Array]) -> Any:
        """The compiled step of this step's phase."""
        phase = self.objective.phase(step)
        if phase not in self._steps:
            logging.info("compiling the step of %s", phase)
            started = time.monotonic()
            self._steps[phase] = compile_step(
                self.objective,
                self.groups,
                phase,
                seed=self.cfg.seed,
                accumulate=self.cfg.accumulate,
                mesh=self.mesh,
                abstract=self.abstract,
                frozen={},
                batch=batch,
            )
            self.compile_seconds += time.monotonic() - started
            self.progress.restart_timing(step)
        return self._steps[phase]

    def train(self, stop: StopSignal) -> bool:
        """Runs to the last step, or to the step at which a stop was agreed; True if it was stopped before the last."""
        # A signal reaches one process: only one that is alone may leave out what all of them do together.
        hurried = stop.requested and jax.process_count() == 1
        if self.start == 0 and not hurried:
            self.evaluate(0)
        with self.loader() as loader:
            self._loop(loader, stop)
            self.input_wait = loader.wait_seconds
            self.bad_records = dict(loader.bad_records)
        finished = int(self.state.step) == self.cfg.num_steps
        if finished and self.last_evaluation() != self.cfg.num_steps:
            self.evaluate(self.cfg.num_steps)
        self.checkpoints.wait()
        return not finished

    def _loop(self, loader: data.TrainLoader, stop: StopSignal) -> None:
        pending = None  # metrics are read one step late, so the device never waits for the host
        for step in range(self.start, self.cfg.num_steps):
            if stop.requested and step == self.start and jax.process_count() == 1:
                self.save(step)  # asked while starting up: nothing is gained by compiling first
                return
            batch = next(loader)
            inputs = {name: batch[name] for name in ("image", "label")}
            placed = sharding.place_batch(inputs, self.mesh, self.cfg.global_batch)
            self.state, values = self.step_fn(step, placed)(self.state, {}, placed)
            if pending is not None:
                self.report_step(*pending)
            pending = step, values, batch["id"]
            last, stopped = step + 1 == self.cfg.num_steps, stop.agreed(step)
            evaluating = _every(step, self.cfg.eval.every) and not (stopped or last)
            saving = stopped or last or _every(step, self.cfg.checkpoint.every)
            # Evaluating and saving come before the next batch is asked for: what is stored is what was seen.
            if evaluating or saving:
                self.report_step(*pending)
                pending = None
            if evaluating:
                self.evaluate(step + 1)
            if saving:
                self.save(step + 1)
            if stopped:
                return

    def last_evaluation(self) -> int | None:
        """The step of the newest evaluation that was written down."""
        if self.evaluator is None:
            return self.cfg.num_steps
        series = metrics.read_metrics(self.workdir / "metrics.jsonl", ["eval/psnr"]).get("eval/psnr")
        return int(series[0][-1]) if series else None

    def report_step(self, step: int, values: Mapping[str, jax.Array], ids: np.ndarray) -> None:
        """Logs a finished step, and stops the run where too many updates in a row were skipped.

        Raises:
          NonFiniteRun: naming the terms that broke; `nonfinite_<process>.json` holds what rebuilds the batch.
        """
        scalars = {name: float(value) for name, value in jax.device_get(values).items()}
        self.progress.update(step + 1, scalars)
        last = step + 1 == self.cfg.num_steps
        if step == 0 or last or _every(step, self.cfg.log.every) or scalars["skipped_in_row"]:
            self.writer.write_scalars(step + 1, scalars)
        if message := self.alarm.check(step + 1, scalars["codebook/usage"]):
            logging.warning("%s", message)
        if not scalars["skipped_in_row"]:
            return
        terms = broken_terms(scalars)
        logging.warning("step %d: update skipped, not finite: %s", step + 1, ", ".join(terms))
        if scalars["skipped_in_row"] >= self.cfg.max_skipped:
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), step)
            record = {
                "step": step,
                "seed": self.cfg.seed,
                "key": np.asarray(jax.random.key_data(key)).tolist(),
                "terms": terms,
                "ids_of_this_process": np.asarray(ids).tolist(),
            }
            path = self.workdir / f"nonfinite_{jax.process_index()}.json"
            path.write_text(json.dumps(record, indent=2) + "\n")
            # The count starts anew for whoever goes on from here.
            self.state = self.state._replace(skipped_in_row=self.state.skipped_in_row * 0)
            self.save(int(self.state.step))
            self.checkpoints.wait()
            raise NonFiniteRun(
                f"{int(scalars['skipped_in_row'])} updates in a row were not finite in: {', '.join(terms)}. The state "
                f"is saved without them; {path} has the sample ids and key of step {step}. Raise --config.max_skipped "
                "to go on past them, or lower the learning rate or the term's weight with --allow_config_change"
            )

    def evaluate(self, step: int) -> None:
        """Scores held-out images with the averaged weights where there are any, and draws them."""
        if self.evaluator is None:
            return
        with self.progress.pause():
            scores, grid = self.evaluator({**self.state.params, **self.state.ema})
            self.writer.write_scalars(step, {f"eval/{name}": value for name, value in scores.items()})
            if distributed.is_main():
                (self.workdir / "grids").mkdir(exist_ok=True)
                grid.save(self.workdir / "grids" / f"step_{step:08d}.png")
                self.writer.write_images(step, {"eval/reconstructions": np.asarray(grid.convert("RGB"))[None]})
        logging.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def save(self, step: int) -> None:
        """Starts writing a checkpoint."""
        with self.progress.pause():
            self.checkpoints.save(step, self.state, config=self.resolved, extra={"seed": self.cfg.seed})

    def finish(self, seconds: float) -> None:
        """Writes the curves and `report.json`, and says where they are."""
        self.progress.end_line()
        self.writer.flush()
        if distributed.is_main():
            idle = int(self.state.step) == self.start  # nothing was trained: times of the run before stay
            facts = {
                "image_size": self.cfg.tokenizer.image_size,
                "num_latent_tokens": self.objective.tokenizer.num_latent_tokens,
                "codebook_size": self.cfg.tokenizer.codebook_size,
                "num_steps": int(self.state.step),
                "images_per_second": self.progress.images_per_second,
                "step_seconds": self.progress.step_seconds,
                "compile_seconds": None if idle else self.compile_seconds,
                "input_wait_fraction": None if idle else self.input_wait / max(seconds, 1e-9),
                "seconds": None if idle else seconds,
                "bad_records": {**self.bad_records, **(self.evaluator.bad_records if self.evaluator else {})},
                "devices": jax.device_count(),
            }
            for path in write_report(self.workdir, facts):
                print(path)
        self.writer.close()
        self.checkpoints.close()


def train(cfg: ConfigDict, workdir: str, *, allow_config_change: bool = False, preemption_code: int = 0) -> int:
    """Trains to the end or to a signal; returns the exit status."""
    with StopSignal(preemption_code=preemption_code) as stop:
        try:
            run = Run(cfg, Path(workdir), allow_config_change)
        except (ValueError, OSError, ImportError) as error:
            logging.debug("while building the run", exc_info=True)
            sys.exit(f"error: {error}")
        started = time.monotonic()
        try:
            stopped = run.train(stop)
        except NonFiniteRun as error:
            run.finish(time.monotonic() - started)
            sys.exit(f"error: {error}")
        run.finish(time.monotonic() - started)
        return stop.exit_status if stopped else 0


def _every(step: int, interval: int) -> bool:
    return interval > 0 and (step + 1) % interval == 0


def define_flags() -> None:
    """The program's flags; defined only when it runs as one, so that entry points can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/gigatok.py:b-l.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, pictures, report.")
    flags.DEFINE_bool("allow_config_change", False, "Resume although the checkpoint's config computes something else.")
    flags.DEFINE_integer("preemption_code", 0, "Exit status after SIGTERM, for schedulers that requeue on one.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0 for several processes, or 'auto' on a cluster.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is.")
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    logging.set_verbosity(logging.INFO)
    # Libraries log through absl too; only their warnings are news.
    own = str(Path(__file__).parent)
    logging.get_absl_handler().addFilter(lambda r: r.levelno >= stdlib_logging.WARNING or r.pathname.startswith(own))
    options = flags.FLAGS
    try:
        distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    resume = {"allow_config_change": options.allow_config_change, "preemption_code": options.preemption_code}
    sys.exit(train(options.config, options.workdir, **resume))


if __name__ == "__main__":
    define_flags()
    app.run(main)
