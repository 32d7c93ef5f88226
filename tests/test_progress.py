"""The progress line under a fake clock, the usage alarm under made-up usages."""

import io

import jax.numpy as jnp
import pytest

from gigatok_jax.metrics import Progress, UsageAlarm, format_duration, tensor_progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_progress(stream, **kwargs):
    clock = Clock()
    kwargs = {"total_steps": 1000, "global_batch": 64, "every_seconds": 10.0} | kwargs
    return Progress(**kwargs, stream=stream, clock=clock), clock


def test_speed_leaves_out_compilation_and_pauses():
    progress, clock = make_progress(io.StringIO())
    clock.now += 60.0  # compiling
    progress.update(1)
    assert progress.step_seconds is None and progress.images_per_second is None
    for step in range(2, 12):
        clock.now += 0.5
        progress.update(step)
        with progress.pause():
            clock.now += 30.0
            with progress.pause():
                clock.now += 5.0
    assert progress.step_seconds == pytest.approx(0.5)
    assert progress.images_per_second == pytest.approx(128.0)


def test_speed_follows_recent_steps_and_can_be_restarted():
    progress, clock = make_progress(io.StringIO(), window=4, warmup_updates=0)
    for step, seconds in enumerate([1, 1, 1, 3, 3, 3, 3], start=1):
        clock.now += seconds
        progress.update(step)
    assert progress.step_seconds == pytest.approx(3.0)
    progress.restart_timing(7)
    assert progress.step_seconds is None
    clock.now += 2.0
    progress.update(9)
    assert progress.step_seconds == pytest.approx(1.0)


def test_update_inside_a_pause_is_refused():
    progress, _ = make_progress(io.StringIO())
    with progress.pause(), pytest.raises(RuntimeError, match="pause"):
        progress.update(1)
    with pytest.raises(KeyError), progress.pause():
        raise KeyError
    progress.update(1)  # an error inside ends the pause


def test_plain_lines_are_rare_and_complete():
    stream = io.StringIO()
    progress, clock = make_progress(stream, start_step=500, show=["loss", "absent"])
    for step in range(501, 551):
        clock.now += 0.5
        progress.update(step, {"loss": jnp.float32(0.125), "other": 1.0})
    printed = stream.getvalue().splitlines()
    assert len(printed) == 3 and "\r" not in stream.getvalue()
    assert printed[0] == "step 501/1,000  50.1%  loss 0.125"
    assert printed[1] == "step 521/1,000  52.1%  128 images/s  500 ms/step  ETA 4m00s  loss 0.125"


def test_scalars_are_not_read_for_lines_that_are_not_printed():
    class Unread:
        def __float__(self):
            raise AssertionError("this would wait for the device")

    progress, clock = make_progress(io.StringIO())
    progress.update(1)
    clock.now += 1.0
    progress.update(2, {"loss": Unread()})


def test_the_last_step_is_always_printed():
    stream = io.StringIO()
    progress, _ = make_progress(stream, total_steps=2)
    progress.update(1)
    progress.update(2)
    assert stream.getvalue().splitlines()[-1].startswith("step 2/2  100.0%")


def test_a_terminal_line_is_rewritten():
    stream = Terminal()
    progress, clock = make_progress(stream, total_steps=3)
    progress.update(1, {"a_name_much_longer_than_speed_and_time_left": 1.0})
    clock.now += 1.0
    progress.update(2)
    with progress.pause():
        assert stream.getvalue().endswith("\n")
    first, second = stream.getvalue().rstrip("\n").split("\r")[1:]
    assert "\n" not in first
    assert len(first) > len(second.rstrip())
    assert len(second) == len(first)  # nothing of the longer line stays visible
    clock.now += 1.0
    progress.update(3)
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (3720, "1h02m"),
        (190_000, "2d04h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_alarm_speaks_once_after_patience():
    alarm = UsageAlarm(0.1, patience_steps=50, window_steps=100)
    said = {step: alarm.check(step, jnp.float32(0.02)) for step in range(0, 300, 10)}
    assert [step for step, message in said.items() if message] == [150]
    assert "0.02" in said[150] and "entropy" in said[150] and "since step 100" in said[150]


def test_alarm_starts_again_after_recovery():
    alarm = UsageAlarm(0.1, patience_steps=20)
    usages = [0.05, 0.05, 0.3, 0.05, 0.05, 0.05, 0.05, float("nan"), 0.1, 0.05, 0.05, 0.05]
    said = [step for step, usage in enumerate(usages) if alarm.check(10 * step, usage)]
    assert said == [5, 11]


def test_alarm_threshold_is_a_fraction():
    with pytest.raises(ValueError, match="fraction"):
        UsageAlarm(10)


def test_tensors_are_counted_as_tensors(capsys):
    show = tensor_progress()
    show(1, 2)
    show(2, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step 2/2" in line and " tensors/s" in line and "images" not in line
