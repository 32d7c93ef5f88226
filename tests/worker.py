"""One training process for the tests: a tiny run that writes down which samples it saw, and can kill itself.

python tests/worker.py WORKDIR [--kill=9|15 (--at=STEP | --during=compile|evaluate|save)] [--mesh=data,fsdp,tensor]
    [key=value …]
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from gigatok_jax import distributed, run, train
from tests.tiny import tiny_run

# As in conftest: one run's compilations serve the next.
jax.config.update("jax_compilation_cache_dir", os.environ.get("GIGATOK_TEST_CACHE", "/tmp/gigatok_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


class Recording(run.Run):
    """A run that appends every step's losses and sample ids to `seen_<process>.jsonl`."""

    kill, at, during = 0, -1, ""

    def evaluate(self, step, stop):
        if self.during == "evaluate" and step == 4:
            self.evaluator._reconstruct = self.killed_in
        super().evaluate(step, stop)

    def step_fn(self, step, batch, stop):
        if self.during == "compile" and step == 4:
            jax.config.update("jax_enable_compilation_cache", False)
            threading.Timer(1.5, os.kill, (os.getpid(), self.kill)).start()
        return super().step_fn(step, batch, stop)

    def save(self, step):
        super().save(step)
        if self.during == "save" and step == 4:
            os.kill(os.getpid(), self.kill)

    def killed_in(self, *args, **kwargs):
        """In place of a long piece of work: the signal comes, and nobody waits for the end."""
        os.kill(os.getpid(), self.kill)
        time.sleep(120)
        (self.workdir / "waited").touch()

    def report_step(self, step, values, ids):
        super().report_step(step, values, ids)
        scalars = {name: float(value) for name, value in values.items() if name.startswith("loss/")}
        line = json.dumps({"step": step, "ids": ids.tolist(), **scalars})
        with open(self.workdir / f"seen_{jax.process_index()}.jsonl", "a") as file:
            file.write(line + "\n")
        if step + 1 == self.at and self.kill:
            os.kill(os.getpid(), self.kill)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--at", type=int, default=-1)
    parser.add_argument("--during", default="")
    parser.add_argument("--mesh", default="-1,1,1")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("changes", nargs="*")
    args = parser.parse_args()
    distributed.initialize()
    changes = {key: json.loads(value) for key, value in (change.split("=", 1) for change in args.changes)}
    cfg = tiny_run(**changes)
    cfg.mesh.update(dict(zip(("data", "fsdp", "tensor"), map(int, args.mesh.split(",")))))
    Recording.kill, Recording.at, Recording.during = args.kill, args.at, args.during
    train.Run = Recording
    sys.exit(train.train(cfg.lock(), args.workdir, preemption_code=args.code))


if __name__ == "__main__":
    main()
