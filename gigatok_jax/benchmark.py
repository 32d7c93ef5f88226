"""Times a config's real train step, encode and decode, or sampling, on synthetic inputs; or its input on its real data.

    python -m gigatok_jax.benchmark --config=configs/quickstart.py --steps=10 --what=train,encode,decode
    python -m gigatok_jax.benchmark --config=configs/ar.py:b --what=sample --scale=1.75 --dtype=int8 \\
        --config.global_batch=4
    python -m gigatok_jax.benchmark --config=configs/quickstart.py --steps=100 --what=input --pace_ms=150

Input takes the config's batches as an accelerator of that pace would (0: as fast as they come) and says how long it
waited. Encode, decode and sample take one microbatch (global batch / accumulate). The last line printed is one JSON
object.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import flax
import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gigatok_jax import program, train_state
from gigatok_jax.benchmarks.inference import fresh_params, held, inference_call, sample_call, sampling_bytes
from gigatok_jax.benchmarks.inputs import input_speed
from gigatok_jax.benchmarks.timing import describe, measure, memory_gib_per_second
from gigatok_jax.benchmarks.training import train_call
from gigatok_jax.blueprint import Blueprint, build, model_group
from gigatok_jax.sampling.precision import DTYPES

WHAT = {"tokenizer": ("train", "encode", "decode"), "generator": ("train", "sample")}


def benchmark(
    cfg: ConfigDict,
    *,
    what: Sequence[str] | None = None,
    steps: int = 10,
    warmup: int = 2,
    step: int | None = None,
    scale: float = 1.0,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Facts of the machine and the config, and one record per name in `what`; prints each record when it is there.

    A record has `images` (per call), `compile_seconds` (with tracing; short where a compilation cache was warm),
    `median_ms`, `min_ms` and `max_ms` of a call waited for, `images_per_second` and `gflops_per_second` (10⁹ FLOP/s
    over all devices) at the median, `flops_per_image` and `flops_notes` (see `scaling.flops`: recomputation is
    counted), and `compiler_peak_mib`: MiB per device by the compiler's account, not measured; None where it gives
    none. That of "sample" has its `dtype`, `tokens_per_second`, and `bandwidth_fraction`: the time that reading weights
    and cache takes at the bandwidth of a copy, `memory_gib_per_second`, over the time it took.

    Args:
      what: names out of `WHAT` for what the config trains; all of them if None.
      steps, warmup: calls timed, and calls before them.
      step: step of the run, counted from 0, whose phase is trained; None is the last step.
      scale: guidance scale of sampling.
      dtype: of sampling's weights, one of `sampling.precision.DTYPES`; the config's if None.
    Raises:
      ValueError: for arguments out of range, or a config that cannot run here.
      ImportError: int8 without the package qwix.
    """
    known = WHAT[model_group(cfg)]
    what = known if what is None else what
    if unknown := set(what) - set(known):
        raise ValueError(f"what={', '.join(sorted(unknown))} is not among {', '.join(known)}")
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps={steps} must be at least 1 and warmup={warmup} at least 0")
    step = cfg.num_steps - 1 if step is None else step
    if not 0 <= step < cfg.num_steps:
        raise ValueError(f"step={step} is outside 0..{cfg.num_steps - 1}, the steps of this run")
    plan = build(cfg)
    phase = plan.objective.phase(step)
    facts = machine_and_config(plan)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    group = plan.model
    if "train" in what:
        facts |= {"step": step, "phase": phase._asdict()}
        print(f"train: step {step} (of {cfg.num_steps}, counted from 0), {phase}", flush=True)
        facts["train"], state = measure(train_call(plan, phase), train_state.init(*plan.state_args), steps, warmup)
        print(f"train: {describe(facts['train'])}", flush=True)
        params = state.params[group]
        del state  # the moments' memory
    elif what:
        params = fresh_params(plan, group)
    for name in [name for name in ("encode", "decode") if name in what]:
        facts[name], params = measure(inference_call(plan, name), params, steps, warmup)
        print(f"{name}: {describe(facts[name])}", flush=True)
    if "sample" in what:
        dtype = dtype or cfg.dtype
        params = held(plan, params, dtype)
        record, params = measure(sample_call(plan, params, scale, dtype), params, steps, warmup)
        facts["sample"] = record | _sampling_facts(plan, params, scale, dtype, record)
        print(f"sample: {describe(facts['sample'])}", flush=True)
    return facts


def _sampling_facts(plan: Blueprint, params: Any, scale: float, dtype: str, record: dict[str, Any]) -> dict[str, Any]:
    tokens = record["images"] * plan.objective.generator.num_latent_tokens
    bandwidth, seconds = memory_gib_per_second(), record["median_ms"] / 1e3
    bound = sampling_bytes(plan, params, scale, dtype) / (bandwidth * 2**30 * jax.device_count())
    facts = {"scale": scale, "dtype": dtype, "tokens_per_second": tokens / seconds}
    return {**facts, "memory_gib_per_second": bandwidth, "bandwidth_fraction": bound / seconds}


def machine_and_config(plan: Blueprint) -> dict[str, Any]:
    """What two results must share to be compared."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "global_batch": plan.cfg.global_batch,
        "dtype": plan.cfg.dtype,
        **plan.objective.facts(),
    }


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called only where this module is the program, so that importing it leaves other programs' flags alone."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/gigatok.py:b-l.", lock_config=True)
    flags.DEFINE_list("what", None, "Any of train, encode, decode; train, sample; or input, alone. All by default.")
    flags.DEFINE_float("pace_ms", 0.0, "Of input: milliseconds of a step, slept in its place.", lower_bound=0.0)
    flags.DEFINE_float(
        "scale", 1.0, "Of sample: guidance scale; 1 is none (of a masked generator 1 + sample's).", lower_bound=1.0
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Of sample: its weights; the config's by default.")
    flags.DEFINE_integer("steps", 10, "Timed calls.", lower_bound=1)
    flags.DEFINE_integer("warmup", 2, "Calls before them.", lower_bound=0)
    flags.DEFINE_integer("step", None, "Step, counted from 0, whose phase is trained; the last one by default.")
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    try:
        counts = {"steps": FLAGS.steps, "warmup": FLAGS.warmup}
        if FLAGS.what == ["input"]:
            facts = input_speed(FLAGS.config, **counts, pace_ms=FLAGS.pace_ms)
        else:
            facts = benchmark(
                FLAGS.config, what=FLAGS.what, step=FLAGS.step, scale=FLAGS.scale, dtype=FLAGS.dtype, **counts
            )
    except (ValueError, OSError, ImportError) as error:
        logging.debug("while benchmarking", exc_info=True)
        sys.exit(f"error: {error}")
    print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
