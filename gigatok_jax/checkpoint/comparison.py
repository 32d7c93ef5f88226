"""What a stored state and config are compared by, and what is said where they differ."""

import json
from fnmatch import fnmatchcase

import jax

# May differ between the run that saved and the run that resumes: how it is watched, placed and fed, never what
# is computed (but for rounding). fnmatch patterns over dotted keys. `num_steps` is not free: schedules end there.
RUN_ONLY_KEYS = (
    "mesh.*", "sharding.*", "log.*", "eval.*", "checkpoint.*", "max_skipped", "data.num_threads", "data.num_workers",
    "data.prefetch", "data.root", "data.eval_*", "tokenizer.attention", "tokenizer.codebook_chunk", "tokenizer.remat",
    "tokenizer.remat_convs", "tokenizer.unroll", "discriminator.remat", "frozen.folder", "frozen.remat",
    "generator.attention", "generator.remat", "generator.unroll", "first_stage.*",
)  # fmt: skip

# Fields that configs have got since checkpoints were written, and the value that these ran with.
ADDED = {
    **{"discriminator.pooling": "blur", "loss.lecam": "per_logit", "loss.convnext_weight": 0.0},
    **{"loss.kl_weight": 1e-6, "loss.proxy_weight": 1.0, "start.bundle": "", "tokenizer.bottleneck": "vq"},
    **{
        f"groups.{group}.{name}": value
        for group in ("tokenizer", "discriminator", "generator")
        for name, value in (("warmup_start", 0.01), ("ema_warmup", False))
    },
}

SHOWN = 5  # mismatching leaves named in an error; the rest are counted


class CheckpointMismatch(ValueError):
    """The checkpoint belongs to another config or model; the message lists what differs and the mend."""


def config_diff(saved: dict, current: dict) -> list[str]:
    """Every difference as a line, 'tokenizer.width: saved 512, now 768', sorted by key.

    Both sides are compared as JSON would store them (a tuple is a list).

    Raises:
      TypeError: a value is no JSON.
    """
    return [f"{key}: {text}" for key, text in _differences(saved, current).items()]


def _differences(saved: dict, current: dict) -> dict[str, str]:
    old, new = _flatten(json_only(saved, "saved config")), _flatten(json_only(current, "config"))

    def equal(a, b):
        # 1 and 1.0 are one number in a config, 1 and True are not.
        return a == b and isinstance(a, bool) == isinstance(b, bool)

    def show(side, key):
        return json.dumps(side[key]) if key in side else "absent"

    same = {k for k in old.keys() & new.keys() if equal(old[k], new[k])}
    return {k: f"saved {show(old, k)}, now {show(new, k)}" for k in sorted((old.keys() | new.keys()) - same)}


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def json_only(tree: dict, what: str) -> dict:
    """`tree` as it reads back from JSON; a TypeError names the key that cannot be written."""
    for key, value in _flatten(tree).items():
        try:
            json.dumps(value)
        except TypeError as err:
            raise TypeError(f"{what} key {key!r} holds a {type(value).__name__}: no JSON") from err
    return json.loads(json.dumps(tree))


def _run_only(key: str) -> bool:
    return any(fnmatchcase(key, p) or key == p.removesuffix(".*") for p in RUN_ONLY_KEYS)


def require_same_run(saved: dict, current: dict, where: str) -> None:
    then, now = _flatten(saved), _flatten(current)
    then = {key: value for key, value in ADDED.items() if key in now} | then
    lines = [f"  {key}: {text}" for key, text in _differences(then, now).items() if not _run_only(key)]
    if lines:
        raise CheckpointMismatch(
            f"{where} was written with another config:\n" + "\n".join(lines) + "\n"
            "Use the config of that run, another --workdir, or --allow_config_change to go on all the same."
        )


def named_leaves(tree) -> dict:
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"two leaves of the state share the name {name}")
        named[name] = leaf
    return named


def checked_leaves(state) -> dict:
    """Refuses what Orbax would refuse on one process while the others wait for it."""
    named = named_leaves(state)
    if wrong := [n for n, x in named.items() if not isinstance(x, jax.Array)]:
        raise TypeError(f"the state must hold jax.Arrays only; not so: {some(wrong)}")
    if empty := [n for n, x in named.items() if x.size == 0]:
        raise ValueError(f"the state has leaves without elements, which cannot be stored: {some(empty)}")
    if jax.process_count() > 1 and (local := [n for n, x in named.items() if x.is_fully_addressable]):
        raise ValueError(f"leaves on one process only (make them by jit with out_shardings): {some(local)}")
    return named


def leaf_mismatches(saved: dict, wanted: dict) -> list[str]:
    def show(side, name):
        return f"{side[name].dtype}{list(side[name].shape)}" if name in side else "absent"

    pairs = [(name, show(saved, name), show(wanted, name)) for name in sorted(saved.keys() | wanted.keys())]
    return [f"{name}: saved {old}, now {new}" for name, old, new in pairs if old != new]


def state_message(where: str, wrong: list[str], config_lines: list[str]) -> str:
    more = [f"  ... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    body = [f"{where} does not fit this model:", *(f"  {line}" for line in wrong[:SHOWN]), *more]
    body += ["The configs differ in:" if config_lines else "The configs are equal: the code has changed."]
    body += [f"  {line}" for line in config_lines]
    return "\n".join([*body, "Use the config of that run, or another --workdir to start anew."])


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
