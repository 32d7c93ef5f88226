"""One training run: what is built once from a config, and the loop over it."""

import functools
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from gigatok_jax import config, data, distributed, evals, identity, metrics, objectives, optim, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.data.shards import write_json
from gigatok_jax.evals.report import write_report
from gigatok_jax.hub import frozen, start
from gigatok_jax.preemption import Stopped, StopSignal
from gigatok_jax.train_step import broken_terms, check_phases, compile_step


class NonFiniteRun(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Run:
    """Everything between a config and its report.

    Raises, when built:
      ValueError, OSError, ImportError: a config, path, mesh, checkpoint or package that cannot work, naming the mend.
    """

    def __init__(self, cfg: ConfigDict, workdir: Path, allow_config_change: bool = False):
        config.validate(cfg, jax.device_count())
        cfg = frozen.resolved(cfg)
        self.cfg, self.workdir = cfg, workdir
        self.resolved = config.to_json(cfg)
        self.mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
        self.objective = objectives.build(cfg)
        self.groups = optim.make_groups(cfg)
        self.source = data.make_source(cfg.data.source, root=cfg.data.root or None, split="train")
        self.objective.check(self.source)
        self.frozen = frozen.of_config(cfg, self.mesh)
        evaluated = cfg, self.objective, self.mesh, self.source, self.frozen
        self.evaluator = evals.build(*evaluated) if cfg.data.eval_source else None
        self.identity = identity.identity(cfg, self.source)
        layout = cfg.sharding.preset, cfg.sharding.offload
        self._state_args = self.objective, self.groups, cfg.seed, self.mesh, *layout
        self.abstract = train_state.abstract(*self._state_args)
        microbatch = cfg.global_batch // cfg.accumulate
        check_phases(self.objective, cfg.num_steps, microbatch, self.abstract, self.frozen)
        if warning := sharding.warning(self.abstract, self.mesh):
            logging.warning("%s", warning)
        workdir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpointer(
            workdir / "checkpoints", keep_last=cfg.checkpoint.keep_last, keep_period=cfg.checkpoint.keep_period or None
        )
        self.state = self._first_state(allow_config_change)
        self.start = int(self.state.step)
        self._steps: dict[Any, Any] = {}
        self.input_wait, self.loop_seconds, self.compile_seconds, self.bad_records = 0.0, 0.0, 0.0, {}
        self._pending: tuple[int, Mapping[str, jax.Array], np.ndarray] | None = None
        main = distributed.is_main()
        # Without a checkpoint there is nothing to go on from: lines of an attempt that died before one are dropped.
        self.writer = metrics.make_writer(workdir, is_main=main, resume_step=self.start if self.start else -1)
        self.progress = metrics.Progress(
            cfg.num_steps,
            start_step=self.start,
            global_batch=cfg.global_batch,
            show=self.objective.shown,
            stream=None if main else io.StringIO(),
        )
        window = self.objective.usage_window(cfg.global_batch)
        self.alarm = metrics.UsageAlarm(window_steps=window) if window else None
        if main:
            write_json(workdir / "config.json", self.resolved)

    def _first_state(self, allow_config_change: bool) -> train_state.TrainState:
        """The newest checkpoint, or a fresh start."""
        if self.checkpoints.latest_step() is None:
            start.check(self.cfg, self.abstract.params)
            return start.from_bundle(self.cfg, train_state.init(*self._state_args), self.mesh)
        same = {"config": self.resolved, "allow_config_change": allow_config_change}
        state, extra = self.checkpoints.restore(self.abstract, **same)
        if not allow_config_change:
            identity.check(extra, self.identity, self.cfg.data.root)
        logging.info("resumed from step %d", int(state.step))
        return state

    def loader(self) -> data.TrainLoader:
        """The batches from the state's step on; a pure function of (seed, step)."""
        cfg = self.cfg
        return data.TrainLoader(
            self.source,
            global_batch=cfg.global_batch,
            seed=cfg.seed,
            num_steps=cfg.num_steps,
            start_step=self.start,
            element=data.element(cfg),
            rows=sharding.process_rows(self.mesh, cfg.global_batch),
            num_threads=cfg.data.num_threads,
            num_workers=cfg.data.num_workers,
            prefetch=cfg.data.prefetch,
        )

    def step_fn(self, step: int, batch: Mapping[str, jax.Array], stop: StopSignal) -> Any:
        """The compiled step of this step's phase; raises Stopped where a stop is asked for while it compiles."""
        phase = self.objective.phase(step)
        if phase not in self._steps:
            logging.info("compiling the step of %s", phase)
            started = time.monotonic()
            compiling = functools.partial(
                compile_step,
                self.objective,
                self.groups,
                phase,
                seed=self.cfg.seed,
                accumulate=self.cfg.accumulate,
                mesh=self.mesh,
                preset=self.cfg.sharding.preset,
                abstract=self.abstract,
                frozen=self.frozen,
                batch=batch,
            )
            self._steps[phase] = stop.during(compiling)
            self.compile_seconds += time.monotonic() - started
            self.progress.restart_timing(step)
        return self._steps[phase]

    def train(self, stop: StopSignal) -> bool:
        """Runs to the last step, or to the step at which a stop was agreed; True if something is left to do."""
        try:
            if self._evaluation_due(self.start):
                self.evaluate(self.start, stop)
            with self.loader() as loader:
                self._loop(loader, stop)
            if int(self.state.step) < self.cfg.num_steps:
                return True
            if self._evaluation_due(self.cfg.num_steps):
                self.evaluate(self.cfg.num_steps, stop)
            return False
        except Stopped:  # in a compilation or an evaluation, which the process leaves behind
            self._report_pending()
            self.save(int(self.state.step))
            return True
        except data.NoUsableImages:
            self._report_pending()
            self.save(int(self.state.step))
            raise
        finally:
            self.checkpoints.wait()

    def _loop(self, loader: data.TrainLoader, stop: StopSignal) -> None:
        for step in range(self.start, self.cfg.num_steps):
            began, compiled = time.monotonic(), self.compile_seconds
            batch = next(loader)
            self.input_wait, self.bad_records = loader.wait_seconds, loader.bad_records
            inputs = {name: value for name, value in batch.items() if name != "id"}
            placed = sharding.place_batch(inputs, self.mesh, self.cfg.global_batch)
            self.state, values = self.step_fn(step, placed, stop)(self.state, self.frozen, placed)
            # Metrics are read one step late, so the device never waits for the host.
            self._report_pending()
            self._pending = step, values, batch["id"]
            self.loop_seconds += time.monotonic() - began - (self.compile_seconds - compiled)
            last, stopped = step + 1 == self.cfg.num_steps, stop.agreed(step)
            evaluating = _every(step, self.cfg.eval.every) and not (stopped or last)
            saving = stopped or last or _every(step, self.cfg.checkpoint.every)
            # Evaluating and saving come before the next batch is asked for: what is stored is what was seen.
            if evaluating or saving:
                self._report_pending()
            if evaluating:
                self.evaluate(step + 1, stop)
            if saving:
                self.save(step + 1)
            if stopped:
                return

    def _evaluation_due(self, step: int) -> bool:
        """Whether an evaluation belongs to `step` and was not written down: a stop may have come in between."""
        belongs = step in (0, self.cfg.num_steps) or _every(step - 1, self.cfg.eval.every)
        if self.evaluator is None or not belongs:
            return False
        path = self.workdir / "metrics.jsonl"
        name = f"eval/{self.evaluator.primary}"
        series = metrics.read_metrics(path, [name]).get(name) if path.exists() else None
        return distributed.from_main(series is None or step not in series[0])

    def _report_pending(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.report_step(*pending)

    def report_step(self, step: int, values: Mapping[str, jax.Array], ids: np.ndarray) -> None:
        """Logs a finished step, and stops the run where too many updates in a row were skipped.

        Raises:
          NonFiniteRun: naming the terms that broke.
        """
        scalars = {name: float(value) for name, value in jax.device_get(values).items()}
        self.progress.update(step + 1, scalars)
        last = step + 1 == self.cfg.num_steps
        pace = {"images_per_second": self.progress.images_per_second, "step_seconds": self.progress.step_seconds}
        scalars |= {name: value for name, value in pace.items() if value is not None}
        if step == 0 or last or _every(step, self.cfg.log.every) or scalars["skipped_in_row"]:
            self.writer.write_scalars(step + 1, scalars)
        if self.alarm and (message := self.alarm.check(step + 1, scalars["codebook/usage"])):
            logging.warning("%s", message)
        if not scalars["skipped_in_row"]:
            return
        terms = broken_terms(scalars)
        logging.warning("step %d: update skipped, not finite: %s", step + 1, ", ".join(terms))
        if scalars["skipped_in_row"] >= self.cfg.max_skipped:
            self._give_up(step, int(scalars["skipped_in_row"]), terms, ids)

    def _give_up(self, step: int, skipped: int, terms: list[str], ids: np.ndarray) -> None:
        """Saves, writes down what rebuilds the batch of `step`, and raises NonFiniteRun."""
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
            f"{skipped} updates in a row were not finite in: {', '.join(terms)}. The state is saved without them; "
            f"{path} has the sample ids and key of step {step}. Raise --config.max_skipped to go on past them, or "
            "lower the learning rate or the term's weight with --allow_config_change"
        )

    def evaluate(self, step: int, stop: StopSignal) -> None:
        """Scores held-out images with the averaged weights where there are any, and draws them.

        Raises:
          Stopped: a stop was asked for meanwhile; whoever goes on from here evaluates first.
        """
        if self.evaluator is None:
            return
        with self.progress.pause():
            scores, grid = stop.during(lambda: self.evaluator({**self.state.params, **self.state.ema}))
            self.writer.write_scalars(step, {f"eval/{name}": value for name, value in scores.items()})
            if grid is not None and distributed.is_main():
                (self.workdir / "grids").mkdir(exist_ok=True)
                grid.save(self.workdir / "grids" / f"step_{step:08d}.png")
                self.writer.write_images(step, {"eval/reconstructions": np.asarray(grid.convert("RGB"))[None]})
        logging.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def save(self, step: int) -> None:
        """Starts writing a checkpoint."""
        with self.progress.pause():
            self.checkpoints.save(step, self.state, config=self.resolved, extra=self.identity)

    def _input_wait_fraction(self) -> float | None:
        """The share of this start's steps, without compiling, that was waiting for input."""
        return self.input_wait / self.loop_seconds if self.loop_seconds else None

    def finish(self, seconds: float, command: str | None = None) -> None:
        """Writes the curves and `report.json`, which names the command, and says where they are."""
        self.progress.end_line()
        if (step := int(self.state.step)) < self.cfg.num_steps:
            logging.warning("stopped at step %d of %d; the same command goes on from there", step, self.cfg.num_steps)
        self.writer.flush()
        if distributed.is_main():
            idle = int(self.state.step) == self.start  # nothing was trained: times of the run before stay
            facts = {
                **self.objective.facts(),
                "command": command,
                "num_steps": int(self.state.step),
                "images_per_second": self.progress.images_per_second,
                "step_seconds": self.progress.step_seconds,
                "compile_seconds": None if idle else self.compile_seconds,
                "input_wait_fraction": None if idle else self._input_wait_fraction(),
                "seconds": None if idle else seconds,
                "bad_records": {**self.bad_records, **(self.evaluator.bad_records if self.evaluator else {})},
                "devices": jax.device_count(),
            }
            for path in write_report(self.workdir, facts):
                print(path)
        self.writer.close()
        self.checkpoints.close()


def _every(step: int, interval: int) -> bool:
    return interval > 0 and (step + 1) % interval == 0
