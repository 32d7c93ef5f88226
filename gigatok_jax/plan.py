"""What a config will be, before any accelerator is taken: its parameters, and what its run would need on a pod.

    python -m gigatok_jax.plan --config=configs/gigatok.py:xl-xxl --params
    python -m gigatok_jax.plan --config=configs/ar.py:xxl --topology=v5e:4x4 --mesh=fsdp=16 --out=plans/xxl

The second compiles the real train step, and the encoding of a tokenizer or the sampling of a generator, for TPUs
(extra `tpu`) or NVIDIA GPUs (extra `cuda`; h100:8, or h100:4x8 for four hosts) that are not there. Bytes and counts are
the compiler's; seconds and MFU are projections by the formula in `scaling/projection.py`. The last line printed is one
JSON object. Nothing is allocated.
"""

import functools
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from gigatok_jax import config, program
from gigatok_jax.blueprint import model_group
from gigatok_jax.planning import golden as records
from gigatok_jax.planning import growth, parameters, picture, report, search, topology
from gigatok_jax.scaling import chips
from gigatok_jax.sharding import MESH_AXES

FLAGS = flags.FLAGS
OF_A_TOPOLOGY = ("mesh", "what", "per_device_batch", "out", "search", "largest_batch", "golden", "update_golden")


def define_flags() -> None:
    """Called only where this module is the program, so that importing it leaves other programs' flags alone."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/gigatok.py:xl-xxl.", lock_config=True)
    flags.DEFINE_bool("params", False, "Print the parameters of the tokenizer or generator.")
    flags.DEFINE_integer("depth", 2, "Names of a module path that make a row of the table.", lower_bound=1)
    flags.DEFINE_list("topology", [], "Compile for these, e.g. v5p:2x2x4,v5e:4x4,h100:8.")
    flags.DEFINE_list("mesh", [], "Axis sizes in place of the config's, e.g. fsdp=16,tensor=4; data takes the rest.")
    flags.DEFINE_list("what", [], "Programs to compile: train, encode, sample; by default all that the config has.")
    flags.DEFINE_integer(
        "per_device_batch", 0, "In place of the config's batch: images of a data-parallel device.", lower_bound=0
    )
    flags.DEFINE_string("out", "", "A folder for plan.json and plan.png.")
    flags.DEFINE_bool("search", False, "Compile the train step on several meshes and put the cheapest first.")
    flags.DEFINE_integer("tries", 4, "Meshes that --search compiles.", lower_bound=1)
    flags.DEFINE_bool("largest_batch", False, "Compile the train step with ever larger batches, up to what fits.")
    flags.DEFINE_string("golden", "", "A folder of recorded shardings and collectives that the plan must equal.")
    flags.DEFINE_bool("update_golden", False, "Record them there instead.")
    flags.mark_flag_as_required("config")


def with_mesh(cfg: ConfigDict, sizes: Sequence[str]) -> ConfigDict:
    """The config with axis sizes such as ["fsdp=16"]; `data` takes what is left unless it is named.

    Raises:
      ValueError: for another form or axis, or one that is named twice.
    """
    if not sizes:
        return cfg
    cfg = cfg.copy_and_resolve_references()
    mesh = {"data": 1 if any(size.endswith("=-1") for size in sizes) else -1, "fsdp": 1, "tensor": 1}
    if len({size.partition("=")[0] for size in sizes}) < len(sizes):
        raise ValueError(f"--mesh={','.join(sizes)} names an axis twice")
    for size in sizes:
        axis, _, number = size.partition("=")
        if axis not in mesh or not re.fullmatch(r"-1|[1-9]\d*", number):
            raise ValueError(f"--mesh={','.join(sizes)}: {size!r} is no AXIS=SIZE; axes are {', '.join(mesh)}")
        mesh[axis] = int(number)
    cfg.mesh.update(mesh)
    return cfg


def with_rows(cfg: ConfigDict, rows: int, chips: int) -> ConfigDict:
    """The config with a batch of `rows` images a microbatch and data-parallel device; 0 leaves it as it is."""
    if not rows:
        return cfg
    cfg = cfg.copy_and_resolve_references()
    sizes = config.mesh_sizes(cfg, chips)
    cfg.global_batch = rows * sizes["data"] * sizes["fsdp"] * cfg.accumulate
    return cfg


def plan_topologies(
    cfg: ConfigDict,
    names: Sequence[str],
    what: Sequence[str] = (),
    out: str = "",
    *,
    per_device: int = 0,
    tries: int = 0,
    grow: bool = False,
    golden: str = "",
    update: bool = False,
) -> dict[str, Any]:
    """{"plans": a row per program and topology, see `planning.topology.plan`}; prints a table, draws under `out`.

    Args:
      per_device: images of a data-parallel device and microbatch; 0: the config's batch. Where it is given, the train
        steps on several topologies are also compared as these grow (see `planning.growth`).
      tries: meshes of the train step to compile, the cheapest of which is "cheapest_mesh"; 0: the config's.
      grow: whether to look for "largest_batch", the largest of the train step that fits.
      golden, update: a folder of records that rows must equal, or are to be written to (see `planning.golden`).
    Raises:
      ValueError, RuntimeError: as `planning.topology.plan`; a row is not as recorded. Rows that were made are shown.
    """
    topologies = [chips.topology(name) for name in names]
    known = topology.PROGRAMS[model_group(cfg)]
    programs = what or known
    if unknown := sorted(set(programs) - set(known)):
        raise ValueError(f"--what={','.join(what)}: this config has no {', '.join(unknown)}, but {', '.join(known)}")
    if (tries or grow) and (len(names) > 1 or per_device or what not in ((), [], ["train"])):
        raise ValueError("--search and --largest_batch take one --topology, no --per_device_batch, and --what=train")
    if update and not golden:
        raise ValueError("--update_golden writes to the folder of --golden: name it")
    if not tries:
        for where in topologies:
            config.check_mesh(with_rows(cfg, per_device, where.chips), where.chips)
    found: dict[str, Any] = {"plans": []}
    try:
        for where in topologies:
            planned = functools.partial(_planned, where, {}, found["plans"])
            if tries or grow:
                _search(cfg, where, planned, tries, grow, found)
            else:
                for name in programs:
                    planned(with_rows(cfg, per_device, where.chips), name)
    finally:
        if found["plans"]:
            _show(found, bool(per_device), out)
    if golden:
        for row in found["plans"]:
            records.check(cfg, row, Path(golden), update)
    return found


def _planned(
    where: chips.Topology,
    made: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    cfg: ConfigDict,
    name: str = "train",
) -> dict[str, Any]:
    """A row, made once for equal requests and added to `rows`."""
    key = json.dumps([name, config.to_json(cfg)])
    if key not in made:
        sizes = "×".join(str(cfg.mesh[axis]) for axis in MESH_AXES)
        said = f"compiling {name} for {where.name}, mesh {sizes}, batch {cfg.global_batch} …"
        print(said, file=sys.stderr, flush=True)
        made[key] = topology.plan(cfg, where, name)
        rows.append(made[key])
        if not made[key]["fits"]:
            print(report.misfit(made[key]))
    return made[key]


def _search(
    cfg: ConfigDict, where: chips.Topology, planned: search.Planned, tries: int, grow: bool, found: dict[str, Any]
) -> None:
    """Adds "cheapest_mesh" and "largest_batch", as asked for, to what was found, and puts the cheapest row first."""
    if tries:
        by_price = search.cheapest_mesh(cfg, where, planned, lambda cfg: topology.estimated(cfg, where), tries)
        found["plans"][:] = by_price
        found["cheapest_mesh"] = by_price[0]["mesh"]
        cfg = search.on(cfg, found["cheapest_mesh"])
    if grow:
        grown = search.largest_batch(cfg, planned)
        found["largest_batch"] = max((row["images"] for row in grown if row["fits"]), default=0)


def _show(found: dict[str, Any], grown: bool, out: str) -> None:
    """Prints what the rows are made of, their table and notes, and writes plan.json and pictures under `out`."""
    rows = found["plans"]
    for row in rows:
        print(report.details(row))
    print(report.table(rows))
    pictures = {"plan.png": picture.picture(rows)}
    trains = [row for row in rows if row["program"] == "train" and row["fits"]]
    if grown and len(trains) > 1:
        found["growth"] = growth.growth(trains)
        print(growth.table(found["growth"]))
        pictures["growth.png"] = growth.picture(found["growth"])
    for note in dict.fromkeys(note for row in rows for note in row.get("notes", ())):
        print(f"note: {note}")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "plan.json").write_text(json.dumps(found, indent=2) + "\n")
        for name, image in pictures.items():
            image.save(Path(out) / name)
            print(f"{out}/{name}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    if FLAGS.params == bool(FLAGS.topology):
        sys.exit("error: one of --params (a table of the parameters, with --depth=N) and --topology=KIND:SHAPE")
    if FLAGS.search and FLAGS.mesh:
        sys.exit("error: --search tries meshes of its own; it takes no --mesh")
    if FLAGS["tries"].present and not FLAGS.search:
        sys.exit("error: --tries counts the meshes of --search: give both, or neither")
    if FLAGS["depth"].present and not FLAGS.params:
        sys.exit("error: --depth is of the table of --params")
    idle = [name for name in OF_A_TOPOLOGY if FLAGS[name].present] if FLAGS.params else []
    if idle:
        sys.exit(f"error: --params compiles nothing; it takes no --{idle[0]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so ends the compiler's process
    jax.config.update("jax_platforms", "cpu")  # a plan must not take hold of an accelerator that a run is using
    try:
        config.validate(FLAGS.config)
        if FLAGS.params:
            table, facts = parameters.plan_params(FLAGS.config, FLAGS.depth)
            print(table)
        else:
            facts = plan_topologies(
                with_mesh(FLAGS.config, FLAGS.mesh),
                FLAGS.topology,
                FLAGS.what,
                FLAGS.out,
                per_device=FLAGS.per_device_batch,
                tries=FLAGS.tries if FLAGS.search else 0,
                grow=FLAGS.largest_batch,
                golden=FLAGS.golden,
                update=FLAGS.update_golden,
            )
            one = len(facts) == len(facts["plans"]) == 1
            facts = facts["plans"][0] if one else {"fits": all(row["fits"] for row in facts["plans"]), **facts}
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts))


if __name__ == "__main__":
    define_flags()
    program.run(main)
