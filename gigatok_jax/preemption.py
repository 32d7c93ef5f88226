"""Being asked to stop: a signal sets a flag, the loop finishes its step, saves and leaves.

    with StopSignal(preemption_code=42) as stop:
        for step in range(first, num_steps):
            state = update(state)
            if stop.agreed(step):
                checkpointer.save(step + 1, state, config=config, wait=True)
                break
    sys.exit(stop.exit_status)

The handler does nothing but set the flag, so a signal is safe at any moment: while a step is dispatched, during an
evaluation, in the middle of a save. Python runs handlers in the main thread between two bytecodes, so one long C++
call (a compilation, above all) would hold the flag back: `during` runs such work beside the main thread. Several
processes have to stay together, so there the work is finished first: allow for the longest compilation in the grace
period asked of the scheduler.
"""

import functools
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class Stopped(Exception):
    """A stop was asked for while something ran that need not be finished first."""


class StopSignal:
    """Context manager: SIGTERM and the first SIGINT ask for a stop; a second SIGINT is a KeyboardInterrupt.

    Enter it after `jax.distributed.initialize`, whose own SIGTERM listener it replaces (for good: on leaving, the
    handlers that Python knew of come back, and that listener is not among them).

    Args:
      every: in several processes, how many steps apart they compare flags. A stop takes effect at most
        2 * every steps after the signal. One process alone stops at its next step.
      preemption_code: exit status after a stop by signal. 0 says the run ended well; a scheduler that requeues
        on a certain status wants that status here.

    Raises:
      ValueError: `every` below 1, or entered outside the main thread (where Python takes no handlers).
    """

    def __init__(self, *, every: int = 10, preemption_code: int = 0):
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self._every = every
        self._preemption_code = preemption_code
        self.requested = False  # this process was signalled
        self._stopping = False  # all processes know
        self._vote = None  # the comparison under way, a replicated scalar
        self._before = {}
        self._left_behind = False  # work goes on in a thread that nobody waits for

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            # None stands for a handler that was set from C, which Python cannot put back.
            signal.signal(number, handler or signal.SIG_DFL)

    def agreed(self, step: int) -> bool:
        """True from the step on at which all processes stop: call it once per step, with the same steps everywhere.

        In several processes every `every`-th step starts a comparison on the devices and reads the one before,
        which has long been computed: no step waits for it, and all processes read the same answer at the same step.
        """
        if jax.process_count() == 1:
            return self.requested
        if not self._stopping and step % self._every == 0:
            if self._vote is not None:
                self._stopping = bool(np.asarray(self._vote.addressable_data(0)))
            self._vote = _any_process(self.requested)
        return self._stopping

    def during(self, work: Callable[[], Any]) -> Any:
        """`work()`, given up where this process is alone and is asked to stop; then call
        `end_process_if_left_behind`.

        Raises:
          Stopped: it was; `work` goes on in a thread whose result nobody reads, so it must change nothing.
        """
        if jax.process_count() > 1:
            return work()
        outcome: queue.SimpleQueue = queue.SimpleQueue()

        def run():
            try:
                outcome.put((work(), None))
            except BaseException as error:
                outcome.put((None, error))

        if self.requested:
            raise Stopped
        threading.Thread(target=run, daemon=True).start()
        while True:
            try:
                result, error = outcome.get(timeout=0.1)
            except queue.Empty:
                if self.requested:
                    self._left_behind = True
                    raise Stopped from None
                continue
            if error is not None:
                raise error
            return result

    def end_process_if_left_behind(self, status: int) -> None:
        """Ends the process where `during` gave work up: a compiler still running would break Python's own way out."""
        if self._left_behind:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    @property
    def exit_status(self) -> int:
        """`preemption_code` after a stop, else 0."""
        return self._preemption_code if self.requested or self._stopping else 0

    def _on_signal(self, number, frame):
        if number == signal.SIGINT:
            # The next Ctrl-C is for someone who does not want to wait.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True


def _any_process(flag: bool) -> jax.Array:
    """Dispatches `any` over the processes' flags; the result is replicated and not waited for."""
    spread, reduce = _reduction()
    return reduce(jax.make_array_from_callback((jax.device_count(),), spread, lambda _: np.array([flag])))


@functools.cache  # a fresh jit per call would be compiled per call
def _reduction():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    spread, replicated = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*a)) for a in (["all"], []))
    return spread, jax.jit(lambda flags: flags.any(), out_shardings=replicated)
