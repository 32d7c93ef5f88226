"""Checkpoints for resuming a run: sharded state, config and a little JSON, written together or not at all.

    <directory>/<step>/state/…             one entry per leaf, each device writes and reads its own part
    <directory>/<step>/config/config.json  the resolved config, to be read by people too
    <directory>/<step>/extra/extra.json    what the data were

Orbax is named in this module and nowhere else. The state goes in as a flat `{"params.encoder.w": array}`, so
the stored tree depends on leaf names alone, not on which container class held them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gigatok_jax.checkpoint.comparison import (
    CheckpointMismatch,
    checked_leaves,
    config_diff,
    json_only,
    leaf_mismatches,
    named_leaves,
    require_same_run,
    some,
    state_message,
)


class Checkpointer:
    """Saves and restores one run's state in `directory`.

    Args:
      directory: folder of this run's checkpoints, created if absent (unless `read_only`).
      keep_last, keep_period: the newest `keep_last` steps stay, and every step divisible by `keep_period`.
      asynchronous: write in the background. `save` returns once the values are safe: the caller may donate or
        overwrite the state at once. (On TPU and GPU Orbax has copied it to the host by then. On CPU it holds a
        view of the buffer, and XLA never reuses a donated buffer that is being viewed; a test watches this.)
      read_only: for evaluation beside a running job: never writes, and never clears the temporary folder of a
        save that the job is in the middle of.

    In several processes all of them call every method. As a context manager it waits and closes at the end.
    """

    def __init__(
        self,
        directory,
        *,
        keep_last: int = 2,
        keep_period: int | None = None,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        """Raises ValueError: `keep_last` or `keep_period` below 1."""
        if keep_last < 1 or (keep_period is not None and keep_period < 1):
            raise ValueError(f"keep_last ({keep_last}) and keep_period ({keep_period}) must be at least 1")
        # Remote folders (gs://...) must not go through Path, which would fold the double slash.
        name = str(directory)
        self.directory = name if "://" in name else str(Path(name).expanduser().absolute())
        keep = [policies.LatestN(keep_last), *([policies.EveryNSteps(keep_period)] if keep_period else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            enable_async_checkpointing=asynchronous,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = {name: _ReadableJson(f"{name}.json") for name in ("config", "extra")}
        handlers["state"] = ocp.StandardCheckpointHandler()
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, step: int, state, *, config: dict, extra: dict | None = None, wait: bool = False) -> bool:
        """Writes `state` (a pytree of jax.Arrays, any shardings) as `step`; True if a save was started.

        The newest step is never written again (False): it is what a resumed run would repeat. A save still
        running is waited for. An error of a background write is raised by the next `save`, `wait` or `close`.

        Raises:
          ValueError: a newer step exists (a run resumed from an older one needs its own folder), a leaf has
            no elements, two leaves share a name, or, in several processes, a leaf is on one process only.
          TypeError: a leaf is no jax.Array, or a config or extra value is no JSON.
          RuntimeError: opened read-only.
        """
        if self._read_only:
            raise RuntimeError(f"{self.directory} was opened read-only")
        items = {
            "state": ocp.args.StandardSave(checked_leaves(state)),
            "config": _Json(json_only(config, "config")),
            "extra": _Json(json_only(extra or {}, "extra")),
        }
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {latest}. A run that goes on "
                "from an older step needs its own --workdir, else the next start resumes the abandoned run"
            )
        # `force` skips Orbax's own opinion on when to save; the caller's cadence is the only one.
        started = step != latest and self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if wait:
            self.wait()
        return started

    def all_steps(self) -> list[int]:
        """Steps on disk or being written, ascending."""
        if self._read_only:
            self._manager.reload()  # the job beside us may have saved since
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None where nothing was saved."""
        steps = self.all_steps()
        return steps[-1] if steps else None

    def restore(self, abstract_state, *, config: dict, step: int | None = None, allow_config_change=False):
        """Reads a step onto the shardings of `abstract_state`: any mesh, whatever mesh wrote it.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings (arrays serve too).
          config: this run's resolved config, compared with the stored one outside `RUN_ONLY_KEYS`.
          step: which step; the newest if None.
          allow_config_change: let the configs differ. The state must still fit.

        Returns:
          (state, extra): the state in `abstract_state`'s containers, and the `extra` given to `save`.

        Raises:
          FileNotFoundError: the folder holds no checkpoint, or not that step.
          CheckpointMismatch: the configs differ in what is computed, or leaves in name, shape or dtype.
          ValueError: a leaf of `abstract_state` has no sharding.
        """
        self.wait()
        step = self._pick(step)
        _, config_then, extra = self.stored(step)
        where = f"step {step} in {self.directory}"
        if not allow_config_change:
            require_same_run(config_then, config, where)
        wanted = named_leaves(abstract_state)
        if unplaced := [name for name, leaf in wanted.items() if getattr(leaf, "sharding", None) is None]:
            raise ValueError(f"abstract_state needs a sharding on every leaf; missing on {some(unplaced)}")
        saved = self._manager.item_metadata(step)["state"].tree
        if wrong := leaf_mismatches(saved, wanted):
            raise CheckpointMismatch(state_message(where, wrong, config_diff(config_then, config)))
        target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in wanted.items()}
        request = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        loaded = self._manager.restore(step, args=request)["state"]
        leaves = [loaded[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), extra

    def stored(self, step: int | None = None) -> tuple[int, dict, dict]:
        """(step, its config, its `extra`) of a step, the newest if None.

        Raises:
          FileNotFoundError: the folder holds no checkpoint, or not that step.
        """
        step = self._pick(step)
        items = self._manager.restore(step, args=ocp.args.Composite(config=_Json(), extra=_Json()))
        return step, items["config"], items["extra"]

    def read_leaves(self, step: int) -> tuple[dict, Callable[[str], np.ndarray]]:
        """({name: shape and dtype}, reader) of a step; the reader brings a leaf ("params.tokenizer.…") to the host.

        Only what is asked for is read, so that the largest state can be taken apart on one host.
        """
        folder = f"{self.directory}/{step}/state"
        reader = ocp.PyTreeCheckpointer()

        def read(name: str) -> np.ndarray:
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
            request = ocp.args.PyTreeRestore(item={name: 0}, restore_args=how, partial_restore=True)
            return reader.restore(folder, args=request)[name]

        return dict(self._manager.item_metadata(step)["state"].tree), read

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises the error of a background write."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the writer's threads. The object is of no use afterwards."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _pick(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        return steps[-1] if step is None else step


class _ReadableJson(ocp.JsonCheckpointHandler):
    """Orbax's JSON item, indented and under a telling file name."""

    def __init__(self, filename: str):
        super().__init__(filename)
        self._name = filename

    async def async_save(self, directory, item=None, args=None):
        async def write():
            if jax.process_index() == 0:
                (directory / self._name).write_text(json.dumps(args.item, indent=2) + "\n")

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name=f"write {self._name}")]


@ocp.args.register_with_handler(_ReadableJson, for_save=True, for_restore=True)
@dataclass
class _Json(ocp.args.CheckpointArgs):
    """What to write; None to read."""

    item: dict | None = None
