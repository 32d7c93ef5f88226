"""Times a config's real train step, encode and decode on synthetic images, or its input alone on its real data.

    python -m gigatok_jax.benchmark --config=configs/quickstart.py --steps=10 --what=train,encode,decode
    python -m gigatok_jax.benchmark --config=configs/quickstart.py --steps=100 --what=input --pace_ms=150

Input takes the config's batches as an accelerator of that pace would (0: as fast as they come) and says how long it
waited. Encode and decode take one microbatch (global batch / accumulate). The last line printed is one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from gigatok_jax import config, data, objectives, optim, sharding, train_state
from gigatok_jax.data.speed import measure_input
from gigatok_jax.hub import frozen
from gigatok_jax.nn.constrain import constraints
from gigatok_jax.objectives.tokenizer import Phase, TokenizerObjective, to_unit_range
from gigatok_jax.scaling.flops import Flops, count_flops
from gigatok_jax.train_state import TrainState
from gigatok_jax.train_step import compile_step, make_train_step

WHAT = ("train", "encode", "decode")


class Setup(NamedTuple):
    """What train.py builds before its loop. `counted` is the objective whose FLOPs are counted: the same arithmetic
    with attention as plain matrix products, because a fused kernel cannot be looked into."""

    cfg: ConfigDict
    objective: TokenizerObjective
    counted: TokenizerObjective
    groups: Mapping[str, optim.Group]
    mesh: Mesh
    abstract: TrainState

    @property
    def state_args(self) -> tuple[Any, ...]:
        """The arguments of `train_state.init` and `train_state.abstract`."""
        return self.objective, self.groups, self.cfg.seed, self.mesh, self.cfg.sharding.preset


def build(cfg: ConfigDict) -> Setup:
    """Checks a config and builds what its run would.

    Raises:
      ValueError: for a config that cannot run here.
    """
    config.validate(cfg, jax.device_count())
    plain = cfg.copy_and_resolve_references().unlock()
    plain.tokenizer.attention = "xla"
    mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
    objective = objectives.build(cfg)
    groups = optim.make_groups(cfg)
    abstract = train_state.abstract(objective, groups, cfg.seed, mesh, cfg.sharding.preset)
    return Setup(cfg, objective, objectives.build(plain), groups, mesh, abstract)


def benchmark(
    cfg: ConfigDict, *, what: Sequence[str] = WHAT, steps: int = 10, warmup: int = 2, step: int | None = None
) -> dict[str, Any]:
    """Facts of the machine and the config, and one record per name in `what`; prints each record when it is there.

    A record has `images` (per call), `compile_seconds` (with tracing; short where a compilation cache was warm),
    `median_ms`, `min_ms` and `max_ms` of a call waited for, `images_per_second` and `gflops_per_second` (10⁹ FLOP/s
    over all devices) at the median, `flops_per_image` and `flops_notes` (see `scaling.flops`: recomputation is
    counted), and `compiler_peak_mib`: MiB per device by the compiler's account, not measured; None where it gives
    none.

    Args:
      what: names out of `WHAT`.
      steps, warmup: calls timed, and calls before them.
      step: step of the run, counted from 0, whose phase is trained; None is the last step.
    Raises:
      ValueError: for arguments out of range, or a config that cannot run here.
    """
    if unknown := set(what) - set(WHAT):
        raise ValueError(f"what={', '.join(sorted(unknown))} is not among {', '.join(WHAT)}")
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps={steps} must be at least 1 and warmup={warmup} at least 0")
    step = cfg.num_steps - 1 if step is None else step
    if not 0 <= step < cfg.num_steps:
        raise ValueError(f"step={step} is outside 0..{cfg.num_steps - 1}, the steps of this run")
    setup = build(cfg)
    phase = setup.objective.phase(step)
    facts = machine_and_config(cfg)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if "train" in what:
        facts |= {"step": step, "phase": phase._asdict()}
        print(f"train: step {step} (of {cfg.num_steps}, counted from 0), {phase}", flush=True)
        facts["train"], state = measure(train_call(setup, phase), train_state.init(*setup.state_args), steps, warmup)
        print(f"train: {describe(facts['train'])}", flush=True)
        params = state.params["tokenizer"]
        del state  # the moments' memory
    elif what:
        params = tokenizer_params(setup)
    for name in [name for name in ("encode", "decode") if name in what]:
        facts[name], params = measure(inference_call(setup, name), params, steps, warmup)
        print(f"{name}: {describe(facts[name])}", flush=True)
    return facts


def machine_and_config(cfg: ConfigDict) -> dict[str, Any]:
    """What two results must share to be compared."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "global_batch": cfg.global_batch,
        "image_size": cfg.tokenizer.image_size,
        "num_latent_tokens": cfg.tokenizer.num_latent_tokens,
    }


class Call(NamedTuple):
    """A compiled program. `run` takes what lives on from call to call and returns (it, the outputs)."""

    run: Callable[[Any], tuple[Any, Any]]
    compiled: jax.stages.Compiled
    compile_seconds: float
    images: int
    flops: Flops


def synthetic_batch(cfg: ConfigDict, mesh: Mesh, images: int) -> dict[str, jax.Array]:
    """Noise in the form of the loader's batches: uint8 images, int32 labels."""
    rng, size = np.random.default_rng(cfg.seed), cfg.tokenizer.image_size
    first, last = sharding.process_rows(mesh, images)
    batch = {
        "image": rng.integers(0, 256, (last - first, size, size, 3), np.uint8),
        "label": np.zeros((last - first,), np.int32),
    }
    return sharding.place_batch(batch, mesh, images)


def train_call(setup: Setup, phase: Phase) -> Call:
    """The run's train step on one batch, which it sees again at every call."""
    cfg, mesh, abstract = setup.cfg, setup.mesh, setup.abstract
    batch = synthetic_batch(cfg, mesh, cfg.global_batch)
    options = dict(seed=cfg.seed, accumulate=cfg.accumulate)
    networks = frozen.of_config(cfg, mesh)
    started = time.monotonic()
    compiled = compile_step(
        setup.objective, setup.groups, phase, **options, mesh=mesh, abstract=abstract, frozen=networks, batch=batch
    )
    seconds = time.monotonic() - started
    flops = count_flops(make_train_step(setup.counted, setup.groups, phase, **options), abstract, networks, batch)
    return Call(lambda state: compiled(state, networks, batch), compiled, seconds, cfg.global_batch, flops)


def tokenizer_params(setup: Setup) -> Any:
    """The tokenizer's fresh parameters alone, lying as in training."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.params["tokenizer"])
    key = jax.random.key(setup.cfg.seed)
    return jax.jit(lambda key: setup.objective.init(key)[0]["tokenizer"], out_shardings=placed)(key)


def inference_call(setup: Setup, name: str) -> Call:
    """Encode (uint8 images → ids) or decode (ids → images) of one microbatch, parameters lying as in training."""
    cfg, mesh = setup.cfg, setup.mesh
    images = cfg.global_batch // cfg.accumulate
    shapes = setup.abstract.params["tokenizer"]
    if name == "encode":
        x = synthetic_batch(cfg, mesh, images)["image"]
    else:
        first, last = sharding.process_rows(mesh, images)
        shape = last - first, cfg.tokenizer.num_latent_tokens
        ids = np.random.default_rng(cfg.seed).integers(0, cfg.tokenizer.codebook_size, shape, np.int32)
        x = sharding.place_rows(ids, mesh, images, first)
    jitted = jax.jit(_inference(setup.objective, name, mesh), out_shardings=sharding.batch_sharding(mesh))
    started = time.monotonic()
    compiled = jitted.lower(shapes, x).compile()
    seconds = time.monotonic() - started
    flops = count_flops(_inference(setup.counted, name, mesh), shapes, x)
    return Call(lambda params: (params, compiled(params, x)), compiled, seconds, images, flops)


def _inference(objective: TokenizerObjective, name: str, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(params: Any, method: str, x: Any) -> Any:
        return objective.tokenizer.apply({"params": params}, x, method=method)

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        with constraints(sharding.activation_constraint(mesh)):
            return apply(params, "encode", to_unit_range(image_BHWC))[0].ids_BK

    def decode(params: Any, ids_BK: jax.Array) -> jax.Array:
        with constraints(sharding.activation_constraint(mesh)):
            return apply(params, "decode", apply(params, "lookup", ids_BK))[0].astype(jnp.float32)

    return {"encode": encode, "decode": decode}[name]


def measure(call: Call, carry: Any, steps: int, warmup: int) -> tuple[dict[str, Any], Any]:
    """(record (see `benchmark`), what lives on) after calls that are each waited for."""
    times = []
    for _ in range(warmup + steps):
        started = time.monotonic()
        carry, _ = jax.block_until_ready(call.run(carry))
        times.append(time.monotonic() - started)
    times = times[warmup:]
    median = statistics.median(times)
    record = {
        "images": call.images,
        "compile_seconds": call.compile_seconds,
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "images_per_second": call.images / median,
        "flops_per_image": call.flops.total / call.images,
        "flops_notes": list(call.flops.notes),
        "gflops_per_second": call.flops.total / median / 1e9,
        "compiler_peak_mib": compiler_peak_mib(call.compiled),
    }
    return record, carry


def compiler_peak_mib(compiled: jax.stages.Compiled) -> float | None:
    """Arguments + outputs − aliases + temporaries of one device, in MiB; None where the backend does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (held + sizes.temp_size_in_bytes) / 2**20


def describe(record: Mapping[str, Any]) -> str:
    """A record in one line."""
    peak = record["compiler_peak_mib"]
    memory = "no memory figure" if peak is None else f"{peak:.1f} MiB a device by the compiler's figure"
    return (
        f"{record['median_ms']:.2f} ms ({record['min_ms']:.2f} to {record['max_ms']:.2f}) for {record['images']} "
        f"images, {record['images_per_second']:.1f} images/s, {record['flops_per_image'] / 1e9:.4g} GFLOP an image, "
        f"{record['gflops_per_second']:.1f} GFLOP/s, {memory}, compiled in {record['compile_seconds']:.1f} s"
        + "".join(f"; {note}" for note in record["flops_notes"])
    )


def input_speed(cfg: ConfigDict, *, steps: int, warmup: int, pace_ms: float) -> dict[str, Any]:
    """The wait for this process' batches of a config (see `data.speed.measure_input`); nothing else is built."""
    config.validate(cfg, jax.device_count())
    mesh = sharding.make_mesh(config.check_mesh(cfg, jax.device_count()))
    rows = sharding.process_rows(mesh, cfg.global_batch)
    source = data.make_source(cfg.data.source, root=cfg.data.root or None, split="train")
    reading = {name: cfg.data[name] for name in ("num_threads", "num_workers", "prefetch")}
    reading |= {"rows": rows, "element": data.element(cfg)}
    total = 1 + warmup + steps
    loader = data.TrainLoader(source, global_batch=cfg.global_batch, seed=cfg.seed, num_steps=total, **reading)
    facts = measure_input(loader, steps=steps, warmup=warmup, pace_ms=pace_ms)
    print(
        f"input: waited {facts['wait_ms']:.2f} ms for a batch, {facts['wait_fraction']:.1%} of the time, at "
        f"{facts['images_per_second']:.1f} images/s; {facts['first_batch_ms']:.0f} ms for the first",
        flush=True,
    )
    return {"global_batch": cfg.global_batch, "input": facts}


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Called only where this module is the program, so that importing it leaves other programs' flags alone."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/gigatok.py:b-l.", lock_config=True)
    flags.DEFINE_list("what", list(WHAT), f"Any of {', '.join(WHAT)}; or input, alone.")
    flags.DEFINE_float("pace_ms", 0.0, "Of input: milliseconds of a step, slept in its place.", lower_bound=0.0)
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
            facts = benchmark(FLAGS.config, what=FLAGS.what, step=FLAGS.step, **counts)
    except (ValueError, OSError, ImportError) as error:
        logging.debug("while benchmarking", exc_info=True)
        sys.exit(f"error: {error}")
    print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    app.run(main)
