"""Plans for a topology: compiles a config's programs in processes of their own, and projects what they would take."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gigatok_jax import config
from gigatok_jax.blueprint import model_group
from gigatok_jax.scaling.chips import Topology
from gigatok_jax.scaling.projection import project
from gigatok_jax.sharding import PRESETS

PROGRAMS = {"tokenizer": ("train", "encode"), "generator": ("train", "sample")}
# The compiler asks nobody on the network what machine this is, and lets others beside it.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
ALONE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_MISSING = {  # what JAX says without them
    "TPU support not installed": 'a TPU needs the package libtpu: pip install "gigatok_jax[tpu]"',
    "topology not implemented for cuda": 'an NVIDIA GPU needs JAX\'s CUDA plugin: pip install "gigatok_jax[cuda]"',
}
JAX_TAKES = 0.75  # of a GPU's memory, unless the environment says otherwise


def plan(cfg: ConfigDict, topology: Topology, program: str, timeout: float = 3600.0) -> dict[str, Any]:
    """What one program of a config needs on a topology, as in the answer of `planning.compiling` and, where it fits:

    hbm_gib_per_device, hbm_gib_limit, projected_step_seconds, projected_mfu, the same two "in_turn" (see
    `scaling.projection`), bound, collective_bytes_per_step (of a device), flops_per_byte; of the train step also
    over_ideal (the memory against `scaling.memory`'s) and the chip_hours and images of num_steps such steps. What an
    earlier phase of the run would take, by `scaling.memory`, is in hbm_gib_of_a_phase: it must fit too. "settings" are
    the config's that bear on this, "notes" say what a real run may have otherwise. No projection counts copies from and
    to host memory, which holds host_gib_per_device.

    Raises:
      ValueError: the config cannot run there, naming why.
      RuntimeError: the compiler failed, with the end of what it wrote.
    """
    facts = compiled(cfg, topology, program, timeout)
    limit, peak = facts.get("limit", topology.chip.hbm_gib * 2**30), facts["memory"]["peak"]
    phases = facts.get("phases", {})
    most = peak + max(phases.values(), default=0) - next(reversed(phases.values()), 0)
    row = {
        "topology": topology.name,
        "chips": topology.chips,
        **facts,
        "model": model_group(cfg),
        "settings": settings(cfg),
        "fits": facts["fits"] and most <= limit,
        "hbm_gib_per_device": peak / 2**30,
        "hbm_gib_of_a_phase": most / 2**30,
        "hbm_gib_limit": limit / 2**30,
        "notes": [*facts.get("notes", ()), *_notes(cfg, topology, peak / limit), *_phase_notes(phases, peak, most)],
    }
    if not facts["fits"]:
        return row
    projection = project(facts, topology.chip, topology.chips)
    row |= {
        "host_gib_per_device": facts["memory"].get("host", 0) / 2**30,
        "projected_step_seconds": projection.step,
        "projected_seconds": {name: getattr(projection, name) for name in ("compute", "memory", "links")},
        "projected_mfu": projection.mfu,
        "projected_step_seconds_in_turn": projection.in_turn,
        "projected_mfu_in_turn": projection.mfu * projection.step / projection.in_turn,
        "bound": projection.bound,
        "collective_bytes_per_step": sum(kind["bytes"] for kind in facts["collectives"].values()),
        "flops_per_byte": facts["flops"]["hardware"] / topology.chips / facts["traffic"],
    }
    if program == "train":
        row["over_ideal"] = facts["memory"]["peak"] / sum(facts["ideal"].values())
        row["chip_hours"] = projection.step * cfg.num_steps * topology.chips / 3600
        row["chip_hours_in_turn"] = projection.in_turn * cfg.num_steps * topology.chips / 3600
        row["images_of_the_run"] = cfg.num_steps * cfg.global_batch
    return row


def estimated(cfg: ConfigDict, topology: Topology) -> int:
    """Bytes that a device would hold of the train step; see `scaling.memory`. Nothing is compiled.

    Raises:
      ValueError: the config cannot run there, naming why.
    """
    return sum(compiled(cfg, topology, "ideal", timeout=600.0)["ideal"].values())


def compiled(cfg: ConfigDict, topology: Topology, program: str, timeout: float) -> dict[str, Any]:
    """The answer of `planning.compiling`, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        content = {"config": config.to_json(cfg), "program": program, "topology": topology.name}
        request.write_text(json.dumps(content))
        command = [sys.executable, "-m", "gigatok_jax.planning.compiling", str(request), str(answer)]
        with log.open("wb") as sink:
            try:
                status = subprocess.run(
                    command, env={**os.environ, **ALONE}, stdout=sink, stderr=sink, timeout=timeout
                ).returncode
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"compiling {program} for {topology.name} took over {timeout:g} s") from None
        if not answer.exists():
            raise RuntimeError(_failure(program, topology, status, log.read_text(errors="replace")))
        facts = json.loads(answer.read_text())
    if "error" in facts:
        raise ValueError(facts["error"])
    return facts


def settings(cfg: ConfigDict) -> dict[str, Any]:
    """What of a config bears on a plan, beside its sizes."""
    model = cfg[model_group(cfg)]
    named = {"preset": cfg.sharding.preset, "offload": cfg.sharding.offload, "accumulate": cfg.accumulate}
    # Tokenizers of convolutions alone have no such choice.
    chosen = {name: model[name] for name in ("attention", "remat") if name in model}
    return {**named, "dtype": cfg.dtype, **chosen}


def _phase_notes(phases: Mapping[str, int], peak: float, most: float) -> list[str]:
    if most <= peak:
        return []
    name = max(phases, key=lambda name: phases[name])
    return [
        f"an earlier phase of the run, {name}, would take {most / 2**30:.2f} GiB a device by the formula: "
        "--config.num_steps=N of a step N in it compiles it"
    ]


def _notes(cfg: ConfigDict, topology: Topology, filled: float) -> list[str]:
    """What a mesh leaves whole, and what holds of GPUs; `filled` is the share of a device's memory that is taken."""
    notes, preset = [], cfg.sharding.preset
    if config.mesh_sizes(cfg, topology.chips)["tensor"] > 1 and "tensor" not in PRESETS[preset].values():
        notes.append(f"the preset {preset} splits no weights over tensor: --config.sharding.preset=fsdp+tensor does")
    if cfg.dtype != "bfloat16":
        notes.append(f"dtype is {cfg.dtype}: seconds and MFU are projected from the chip's bfloat16 peak all the same")
    if topology.chip.platform == "cuda" and JAX_TAKES < filled <= 1:
        notes.append(
            f"JAX takes {JAX_TAKES:.0%} of a GPU's memory, and this is {filled:.0%}: set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if topology.chip.platform == "cuda" and topology.chips > topology.shape[-1]:
        rate = topology.chip.network_bandwidth / 2e9
        notes.append(f"hosts are joined by {rate:g} GB/s a GPU and direction, as NVIDIA's DGX systems are")
    return notes


def _failure(program: str, topology: Topology, status: int, log: str) -> str:
    for sign, need in _MISSING.items():
        if sign in log:
            return f"compiling for {need}"
    lines = [line for line in log.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): ", line)]
    end = "\n  ".join(lines[raised[-1] :][:5] if raised else lines[-5:])
    return f"compiling {program} for {topology.name} ended with status {status}:\n  {end}"
