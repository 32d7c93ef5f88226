"""Stopping on a signal: alone, and at one step in all processes."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gigatok_jax.preemption import StopSignal

LAUNCH = Path(__file__).parents[1] / "launch" / "local.py"


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number):
    with StopSignal(preemption_code=42) as stop:
        assert not stop.requested and not stop.agreed(0) and stop.exit_status == 0
        send(number)
        assert stop.requested
        assert stop.agreed(1) and stop.agreed(2)
        assert stop.exit_status == 42
    assert StopSignal().exit_status == 0


def test_status_is_0_by_default():
    with StopSignal() as stop:
        send(signal.SIGTERM)
    assert stop.requested and stop.exit_status == 0


def test_second_interrupt_does_not_wait():
    with StopSignal() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # a scheduler may repeat itself
        send(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_come_back_also_after_an_error():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(RuntimeError, match="step"), StopSignal():
        assert all(signal.getsignal(n) != handler for n, handler in before.items())
        send(signal.SIGINT)
        raise RuntimeError("step")
    assert {n: signal.getsignal(n) for n in before} == before


def test_wrong_use():
    with pytest.raises(ValueError, match="every"):
        StopSignal(every=0)
    raised = []

    def enter():
        try:
            StopSignal().__enter__()
        except ValueError as err:
            raised.append(err)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert raised


LOOP = """
import os, signal, sys
from gigatok_jax import distributed
from gigatok_jax.preemption import StopSignal
distributed.initialize()
import jax
me, signalled, at = jax.process_index(), *map(int, sys.argv[1:])
with StopSignal(every=3, preemption_code=17) as stop:
    for step in range(50):
        if me == signalled and step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed(step):
            break
print("stopped at", step, "requested", stop.requested, "handler", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
sys.exit(stop.exit_status)
"""


@pytest.mark.multiprocess
def test_all_processes_stop_at_the_same_step():
    command = [sys.executable, str(LAUNCH), "--num_processes=2", "--", sys.executable, "-c", LOOP, "1", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.findall(r"\[p(\d)\] stopped at (\d+) requested (\w+) handler (\w+)", done.stdout)
    # Signalled at 7: voted at 9, read at 12.
    assert sorted(said) == [("0", "12", "False", "True"), ("1", "12", "True", "True")], done.stdout + done.stderr
    assert done.returncode == 17
