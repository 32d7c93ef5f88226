"""The stages that follow a tokenizer's run: their commands, and running them one after another.

Under the run's folder: `bundles/tokenizer`, `tokens/train` and `tokens/eval`, `generator` (a run of its own),
`bundles/generator`, `samples`; and `pipeline.json`, which says of every stage what it was made by and how long it took.
"""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gigatok_jax.config import STAGES
from gigatok_jax.data.shards import write_json
from gigatok_jax.metrics import format_duration

NOTES = "pipeline.json"
UNFINISHED = 128 + signal.SIGTERM  # status of a training that was told to stop: elsewhere that is a success

# What a stage is sent. It saves at SIGTERM, which is what a terminal that is gone asks for as well.
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}


class StageFailed(RuntimeError):
    """A stage ended before it was whole; `status` is the exit status that the pipeline ends with."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Stage(NamedTuple):
    """One command.

    arguments: module and flags, what follows `python -m`.
    reads: files that name its inputs: where they or the command have changed, it is run again.
    folder: where it writes, and nothing else does.
    writes: files that are there once it is whole.
    """

    name: str
    arguments: tuple[str, ...]
    reads: tuple[Path, ...]
    folder: Path
    writes: tuple[Path, ...]

    def line(self, python: str = "python") -> str:
        """The command, to be pasted into a shell."""
        return shlex.join([python, "-m", *self.arguments])

    def digest(self) -> str:
        """SHA-256 of the command and of the files it reads."""
        parts = [self.line().encode(), *(path.read_bytes() for path in self.reads if path.is_file())]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def plan(cfg: Mapping[str, Any], run: Path) -> list[Stage]:
    """The stages of a pipeline's config, in order; the paths between them come from here, other flags from the config.

    Raises:
      ValueError: the config has other sections than `config.STAGES`, or names no config of the generator.
    """
    if wrong := sorted(set(cfg) ^ set(STAGES)):
        raise ValueError(f"the config has unknown or missing stages: {', '.join(wrong)}; there are {', '.join(STAGES)}")
    if "config" not in cfg["train_generator"]:
        raise ValueError("the config's train_generator has no \"config\", the file of the generator's config")
    tokens, training, samples = run / "tokens", run / "generator", run / "samples"
    tokenizer, generator = run / "bundles" / "tokenizer", run / "bundles" / "generator"
    bundle_files = ("config.json", "model.safetensors")
    made = [tokens / split / "dataset.json" for split in ("train", "eval")]
    generator_config = Path(cfg["train_generator"]["config"].partition(":")[0])
    roots = {"config.data.root": tokens, "config.data.eval_root": tokens, "preemption_code": UNFINISHED}
    paths = {
        "export_tokenizer": {"checkpoint": run, "bundle": tokenizer},
        "encode_train": {"bundle": tokenizer, "out": tokens / "train"},
        "encode_eval": {"bundle": tokenizer, "out": tokens / "eval"},
        "train_generator": {"workdir": training, **roots},
        "export_generator": {"checkpoint": training, "bundle": generator},
        "sample": {"generator": generator, "tokenizer": tokenizer, "out": samples},
    }
    files = {  # (read, folder, written there); a run is known by its log
        "export_tokenizer": ([run / "metrics.jsonl"], tokenizer, bundle_files),
        "encode_train": ([tokenizer / "config.json"], tokens / "train", ["dataset.json"]),
        "encode_eval": ([tokenizer / "config.json"], tokens / "eval", ["dataset.json"]),
        "train_generator": ([generator_config, *made], training, ["report.json"]),
        "export_generator": ([training / "metrics.jsonl"], generator, bundle_files),
        "sample": ([generator / "config.json", tokenizer / "config.json"], samples, ["samples.npz"]),
    }
    return [
        Stage(
            name,
            (f"gigatok_jax.{name.partition('_')[0]}", *_flags({**cfg[name], **paths[name]})),
            tuple(reads),
            folder,
            tuple(folder / file for file in written),
        )
        for name, (reads, folder, written) in files.items()
    ]


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no'}{name}"


class Running:
    """Runs commands; SIGTERM, SIGHUP and Ctrl-C go on to the one that runs, and are remembered."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.signalled = 0

    def __enter__(self) -> "Running":
        # Under nohup a hang-up is ignored, and stays so.
        heard = [n for n in FORWARDED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._forward) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, command: Sequence[str]) -> int:
        """Runs a command to its end; returns its status, 128 + n after signal n."""
        # A session of its own: Ctrl-C in a terminal would otherwise arrive twice, from the terminal and from here.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.signalled:  # while it was starting
            self._process.send_signal(FORWARDED[self.signalled])
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = number
        if self._process is not None:
            self._process.send_signal(FORWARDED[number])


def run(stages: Sequence[Stage], notes_path: Path) -> dict[str, dict[str, Any]]:
    """Runs what is not whole yet, in order, and returns the notes of every stage.

    Returns:
      {stage: {"digest", "seconds" over all attempts, "whole", "foreign": whether its folder held what another command
      or other inputs had made}}.
    Raises:
      StageFailed: a stage failed or was told to stop; those after it were not begun.
    """
    notes = json.loads(notes_path.read_text()) if notes_path.is_file() else {}
    with Running() as running:
        for number, stage in enumerate(stages, 1):
            title, digest = f"[{number}/{len(stages)}] {stage.name}", stage.digest()
            note = notes.get(stage.name, {"digest": "", "seconds": 0.0, "whole": False, "foreign": False})
            same, there = note["digest"] == digest, all(path.is_file() for path in stage.writes)
            if same and there and note["whole"]:
                print(f"{title}: done before, in {format_duration(note['seconds'])}", flush=True)
                continue
            foreign = stage.folder.exists() and (not same or note.get("foreign", False))
            before = note["seconds"] if same or there else 0.0  # it goes on from there
            print(f"{title}\n{stage.line(sys.executable)}", flush=True)
            started = time.monotonic()
            status = running([sys.executable, "-m", *stage.arguments])
            seconds = before + time.monotonic() - started
            whole = status == 0
            facts = {"seconds": round(seconds, 1), "whole": whole, "foreign": foreign and not whole}
            notes[stage.name] = {"digest": digest, **facts}
            write_json(notes_path, notes)
            _check(stage, status, running.signalled, foreign)
    return notes


def _check(stage: Stage, status: int, signalled: int, foreign: bool) -> None:
    """Raises StageFailed unless a stage is whole and the next may begin."""
    if signalled:
        raise StageFailed(f"stopped in stage {stage.name}; the same command goes on from here", 128 + signalled)
    if status:
        mend = (
            f"; {stage.folder} holds what another command or other inputs have made: where that is refused above, "
            f"delete {stage.folder} and give the same command again"
        )
        raise StageFailed(
            f"stage {stage.name} failed with status {status}: {stage.line(sys.executable)}{mend * foreign}", status
        )
