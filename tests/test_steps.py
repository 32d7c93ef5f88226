"""What the tests train with says so itself where a signal to the tests has cut it short."""

import os
import signal
from types import SimpleNamespace

import pytest

from tests import steps


@pytest.mark.parametrize(
    ("number", "left", "until", "words"),
    [
        (signal.SIGTERM, True, None, "SIGTERM or Ctrl-C came while this run trained"),
        (None, True, None, "the run ended at step 3 of 6"),
        (None, False, 3, "the run ended at step 3 of 6"),
    ],
)
def test_a_run_that_is_cut_short_is_no_result(monkeypatch, number, left, until, words):
    def train(stop):
        if number:
            os.kill(os.getpid(), number)
        return left

    short = SimpleNamespace(train=train, finish=lambda seconds: None, state=SimpleNamespace(step=3))
    monkeypatch.setattr(steps.run, "Run", lambda cfg, workdir: short)
    with pytest.raises(AssertionError, match=words):
        steps.train(SimpleNamespace(num_steps=6), "nowhere", until)
