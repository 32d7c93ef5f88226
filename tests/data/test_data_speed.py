"""The wait for input at a given pace is measured; how long it is, is not judged here."""

import time

import numpy as np
import pytest

from gigatok_jax.data import ImageElement, Record, TrainLoader
from gigatok_jax.data.speed import measure_input


class Slow:
    """Images that take `seconds` each."""

    class_names = ("",)

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 50

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return Record(np.zeros((8, 8, 3), np.uint8), 0, str(index))


def measured(seconds, **options):
    loader = TrainLoader(
        Slow(seconds), global_batch=4, seed=0, num_steps=12, element=ImageElement(8), num_threads=1, prefetch=1
    )
    return measure_input(loader, steps=8, warmup=2, **options)


def test_a_fast_consumer_waits_and_a_slow_one_does_not():
    fast, slow = measured(0.01), measured(0.001, pace_ms=60)
    assert fast["wait_ms"] > 30 and fast["wait_fraction"] > 0.9 and 20 < fast["images_per_second"] < 101
    assert slow["wait_fraction"] < 0.3 and slow["images_per_second"] < 67
    assert fast["first_batch_ms"] > 35 and fast["bad_records"] == 0


@pytest.mark.parametrize("options, message", [({"steps": 0}, "steps 0"), ({"steps": 1, "pace_ms": -1}, "pace_ms -1")])
def test_refusals(options, message):
    loader = TrainLoader(Slow(0), global_batch=4, seed=0, num_steps=12, element=ImageElement(8))
    with loader, pytest.raises(ValueError, match=message):
        measure_input(loader, **options)
