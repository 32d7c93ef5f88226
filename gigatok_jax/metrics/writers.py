"""Metric writers behind clu's `MetricWriter` interface: TensorBoard event files and a plain JSONL file.

Neither needs TensorFlow. The JSONL file is the one to script against: one object a line.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from clu.metric_writers import MetricWriter, MultiWriter
from tensorboardX import summary as tb_summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_SECONDS = 10.0  # TensorBoard sees new values after at most this long; a flush is an fsync
_RESERVED = ("step", "time")


def make_writer(workdir: str | os.PathLike, *, is_main: bool, resume_step: int | None = None) -> MetricWriter:
    """The writer of a run: TensorBoard events and `metrics.jsonl` in `workdir`.

    Args:
      workdir: local folder, made if missing.
      is_main: false on every process but one; those get a writer that accepts everything and writes nothing.
      resume_step: the last step that counts when a run goes on. Later values of the interrupted run are
        dropped from the JSONL file and hidden by TensorBoard, so that the steps trained again appear once.

    Returns:
      A clu `MetricWriter`. The JSONL file keeps scalars only.

    Raises:
      ValueError: for a remote folder ("gs://..."): an object store has no appending.
    """
    if "://" in os.fspath(workdir):
        raise ValueError(f"metrics are appended to local files, not to {os.fspath(workdir)!r}")
    if not is_main:
        return MultiWriter([])
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return MultiWriter(
        [
            TensorBoardWriter(folder, resume_step=resume_step),
            JsonlWriter(folder / "metrics.jsonl", resume_step=resume_step),
        ]
    )


def read_metrics(
    path: str | os.PathLike, keys: Sequence[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a `metrics.jsonl` back as columns.

    Args:
      path: the file. A last line cut short by a kill is passed over.
      keys: the names wanted, all by default. A name that never occurs is left out of the result.

    Returns:
      name → (steps (N,) int64, values (N,) float64) in file order; "nan", "inf" and "-inf" are numbers again.
    """
    columns: dict[str, tuple[list, list]] = {}
    for record in _complete_records(Path(path).read_text(encoding="utf-8")):
        for name, value in record.items():
            if name not in _RESERVED and (keys is None or name in keys):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return {name: (np.array(s, np.int64), np.array(v, np.float64)) for name, (s, v) in columns.items()}


class _Ignore(MetricWriter):
    """Says once what it cannot write; subclasses override what they can."""

    def _skip(self, kind: str):
        logging.log_first_n(logging.WARNING, "%s does not write %s", 1, type(self).__name__, kind)

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None):
        self._skip("raw summaries")

    def write_videos(self, step: int, videos: Mapping[str, Any]):
        self._skip("videos")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int):
        self._skip("audio")


class JsonlWriter(_Ignore):
    """Appends one line {"step": int, "time": seconds since 1970, name: value, ...} for each `write_scalars`.

    Values that are not finite are the strings "nan", "inf" and "-inf": the file stays strict JSON and `float`
    reads them. Every line is flushed as it is written; a line cut short by a kill is removed at the next
    opening.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None, clock=time.time):
        """Opens `path` to append, first dropping lines with a step above `resume_step` (None keeps all)."""
        self._path, self._clock = Path(path), clock
        if self._path.exists():
            _rewrite(self._path, math.inf if resume_step is None else resume_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        """Writes one line. Raises ValueError for the names "step" and "time", and for larger arrays."""
        clash = [name for name in _RESERVED if name in scalars]
        if clash:
            raise ValueError(f"scalar names {clash} are taken by the line's own fields")
        record = {"step": int(step), "time": round(self._clock(), 3)}
        record |= {name: _plain_number(value) for name, value in scalars.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, Any]):
        """Pictures go to TensorBoard."""

    def write_texts(self, step: int, texts: Mapping[str, str]):
        """Texts go to TensorBoard."""

    def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None):
        """Histograms go to TensorBoard."""

    def write_hparams(self, hparams: Mapping[str, Any]):
        """Hyper-parameters go to TensorBoard."""

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


class TensorBoardWriter(_Ignore):
    """TensorBoard event files by tensorboardX's protocol buffers, written on the calling thread.

    tensorboardX's own `SummaryWriter` hands events to a thread and its `flush` does not wait for that queue;
    here what is written before `flush` is on disk after it.
    """

    def __init__(self, logdir: str | os.PathLike, *, resume_step: int | None = None):
        """Starts a new event file in `logdir`; older files' values after `resume_step` are hidden."""
        Path(logdir).mkdir(parents=True, exist_ok=True)
        # Event files are named by the second: without a suffix two runs in one second would share, and
        # truncate, a file.
        self._events = EventsWriter(os.path.join(logdir, "events"), filename_suffix=f".{time.time_ns()}.{os.getpid()}")
        self._last_flush, self._closed = time.monotonic(), False
        if resume_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=restart))

    def _write(self, step: int, summary):
        self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=summary))
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        """Writes numbers or arrays of one value."""
        for name, value in scalars.items():
            self._write(step, tb_summary.scalar(name, np.asarray(value, np.float64).item()))

    def write_images(self, step: int, images: Mapping[str, Any]):
        """Writes pictures (N,H,W,C) or (H,W,C), C in {1, 3}, uint8 or float in [0,1] (clipped).

        Several pictures of one name become name/0, name/1, ... Raises ValueError for another rank or channel
        count.
        """
        for name, value in images.items():
            pictures = _as_uint8_batch(name, value)
            for i, picture in enumerate(pictures):
                tag = name if len(pictures) == 1 else f"{name}/{i}"
                self._write(step, tb_summary.image(tag, picture, dataformats="HWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]):
        """Writes texts, which TensorBoard shows as markdown."""
        for name, text in texts.items():
            self._write(step, tb_summary.text(name, text))

    def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None):
        """Writes histograms of arrays of any shape, 30 buckets unless told otherwise."""
        for name, value in arrays.items():
            buckets = (num_buckets or {}).get(name) or 30
            self._write(step, tb_summary.histogram(name, np.asarray(value), buckets))

    def write_hparams(self, hparams: Mapping[str, Any]):
        """Writes hyper-parameters; nested mappings become dotted names, other objects their text."""
        for part in tb_summary.hparams(_flatten(hparams), {}):
            self._write(0, part)

    def flush(self):
        self._events.flush()
        self._last_flush = time.monotonic()

    def close(self):
        if not self._closed:
            self._events.close()
            self._closed = True


def _rewrite(path: Path, last_step: float):
    """Drops lines after `last_step` and a broken tail. Goes through a second file: a kill loses nothing."""
    text = path.read_text(encoding="utf-8")
    kept = "".join(json.dumps(r) + "\n" for r in _complete_records(text) if r["step"] <= last_step)
    if kept != text:
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(kept, encoding="utf-8")
        os.replace(draft, path)


def _complete_records(text: str) -> list[dict]:
    """The lines that end in a newline: a kill breaks only the tail. Other damage raises JSONDecodeError."""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def _plain_number(value) -> float | int | str:
    value = np.asarray(value)
    if value.dtype.kind in "iub":
        return int(value.item())
    # 0.1 stored as float32 is written 0.1, not 0.10000000149011612.
    number = value.item() if value.dtype == np.float64 else float(str(np.float32(value.item())))
    return number if math.isfinite(number) else str(number)


def _as_uint8_batch(name: str, value) -> np.ndarray:
    images = np.asarray(value)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"image {name!r} must be (N,H,W,C) or (H,W,C), C 1 or 3, got {np.shape(value)}")
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images.astype(np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
