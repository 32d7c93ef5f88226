"""The progress line of a run: where it is, how fast it goes, when it ends."""

import contextlib
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

_TERMINAL_SECONDS = 0.2  # a terminal line is rewritten at most this often


class Progress:
    """Prints one line about the run: rewritten in place on a terminal, plain lines now and then elsewhere.

    Speed is the mean over the last `window` updates. The time before the first update, where everything
    compiles, and time spent under `pause()` do not count. Call `update` when a step's result is known: right
    after an asynchronous dispatch it would time the dispatch.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        global_batch: int,
        unit: str = "images",
        every_seconds: float = 10.0,
        show: Sequence[str] | None = None,
        warmup_updates: int = 1,
        window: int = 100,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          total_steps: the step at which the run ends.
          start_step: steps done before (a resumed run).
          global_batch: images in one step over all devices.
          unit: what is counted, if not images.
          every_seconds: time between plain lines; a terminal is rewritten five times a second.
          show: names of the scalars to print, all by default.
          warmup_updates: updates whose duration is compilation; 0 starts the clock at construction.
          window: updates the speed is averaged over; a late compilation is forgotten after as many.
          stream: where to print, standard error by default.
          clock: seconds from any origin.
        """
        self._total, self._batch = total_steps, global_batch
        self._unit = unit
        self._every, self._show, self._warmup = every_seconds, show, warmup_updates
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._marks: deque[tuple[int, float]] = deque(maxlen=window + 1)  # (step, unpaused seconds)
        self._paused_seconds, self._paused_at = 0.0, None
        self._last_print, self._line_width = -math.inf, 0
        self._skip = 0
        self.restart_timing(start_step)

    def restart_timing(self, step: int):
        """Forgets the speed so far: for a new compiled step (a training phase begins) after `step`."""
        self._marks.clear()
        self._skip = self._warmup
        if not self._skip:
            self._marks.append((step, self._active_seconds()))

    def update(self, step: int, scalars: Mapping[str, Any] | None = None):
        """Notes that `step` steps are done and prints when a line is due.

        Args:
          step: steps done since the beginning of the run, larger than the last one.
          scalars: name → number. Read only when a line is printed, so that an array still being computed is
            not waited for at every step.

        Raises:
          RuntimeError: inside `pause()`, where steps would count and their time would not.
        """
        if self._paused_at is not None:
            raise RuntimeError("Progress.update inside Progress.pause(): its steps would take no time")
        self._skip = max(0, self._skip - 1)
        if not self._skip:
            self._marks.append((step, self._active_seconds()))
        wait = _TERMINAL_SECONDS if self._terminal else self._every
        if step >= self._total or self._clock() - self._last_print >= wait:
            self._print(self._line(step, scalars or {}))
            if step >= self._total:
                self.end_line()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock around work that is no training: evaluation, saving. May be nested."""
        outer = self._paused_at is None
        if outer:
            self.end_line()  # what is printed meanwhile starts on a line of its own
            self._paused_at = self._clock()
        try:
            yield
        finally:
            if outer:
                self._paused_seconds += self._clock() - self._paused_at
                self._paused_at = None

    @property
    def step_seconds(self) -> float | None:
        """Seconds for one step, None until two updates after the warm-up are known."""
        if len(self._marks) < 2:
            return None
        (first_step, first), (last_step, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_step - first_step) if last_step > first_step else None

    @property
    def images_per_second(self) -> float | None:
        """Training images a second over all devices, None until `step_seconds` is known."""
        seconds = self.step_seconds
        return self._batch / seconds if seconds else None

    def end_line(self):
        """Moves a terminal to a fresh line; nothing elsewhere."""
        if self._terminal and self._line_width:
            self._stream.write("\n")
            self._stream.flush()
            self._line_width = 0

    def _active_seconds(self) -> float:
        now = self._clock() if self._paused_at is None else self._paused_at
        return now - self._paused_seconds

    def _line(self, step: int, scalars: Mapping[str, Any]) -> str:
        parts = [f"step {step:,}/{self._total:,}", f"{100.0 * step / max(self._total, 1):.1f}%"]
        seconds, images = self.step_seconds, self.images_per_second
        if seconds and images:
            parts += [f"{format_number(images)} {self._unit}/s", f"{format_number(1000.0 * seconds)} ms/step"]
            parts += [f"ETA {format_duration(max(0, self._total - step) * seconds)}"]
        names = scalars.keys() if self._show is None else [n for n in self._show if n in scalars]
        parts += [f"{name} {float(scalars[name]):.4g}" for name in names]
        return "  ".join(parts)

    def _print(self, line: str):
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be rewritten
            self._stream.write("\r" + line.ljust(self._line_width))
            self._line_width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._last_print = self._clock()


def format_duration(seconds: float) -> str:
    """42 → "42s", 185 → "3m05s", 3720 → "1h02m", 190000 → "2d04h"; "?" for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h"


def format_number(value: float) -> str:
    """Three figures, all digits of large numbers: 0.316, 31.8, 318, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tensor_progress() -> Callable[[int, int], None]:
    """A progress line for work that goes tensor by tensor: told (how many are done, of how many)."""
    line: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal line
        line = line or Progress(total, global_batch=1, unit="tensors", warmup_updates=0)
        line.update(done)
        if done == total:
            line.end_line()

    return show
