"""Checkpoints: bits, meshes, donation, killed saves, and the config stored beside them."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigatok_jax.checkpoint import Checkpointer, CheckpointMismatch, config_diff

CONFIG = {"tokenizer": {"width": 512, "levels": [8, 8]}, "mesh": {"data": 8}, "data": {"root": "a"}, "seed": 0}


class State(NamedTuple):
    step: Any
    params: Any
    nothing: Any = None


def place(x, num_devices=8, spec=()):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("x",))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def small_state(value=0.0, **change):
    params = {"enc": [place(jnp.arange(32.0).reshape(8, 4) + value, spec=("x",))], "b": place(jnp.ones(3))}
    return State(place(jnp.int32(7)), params | change)


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree, num_devices=8, spec_of=lambda x: ()):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("x",))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec_of(x)))),
        tree,
    )


def rows(x):
    return ("x",) if x.ndim and x.shape[0] % 8 == 0 else ()


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / "run") as made:
        yield made


def test_every_dtype_keeps_its_bits(checkpointer):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2**32, 64, dtype=np.uint32)  # as floats these include NaNs with payloads
    state = {
        "bfloat16": place(jax.lax.bitcast_convert_type(raw.astype(np.uint16), jnp.bfloat16), spec=("x",)),
        "float16": place(raw.astype(np.uint16).view(np.float16), spec=("x",)),
        "float32": place(raw.view(np.float32), spec=("x",)),
        "key": place(jax.random.key_data(jax.random.key(3))),
        "count": place(jnp.int32(-5)),
        "seen": place(jnp.asarray(raw % 2 == 0), spec=("x",)),
        "flag": place(jnp.asarray(True)),
    }
    checkpointer.save(1, state, config=CONFIG)
    restored, _ = checkpointer.restore(abstract(state, spec_of=rows), config=CONFIG)
    assert bits(restored) == bits(state)


def test_any_mesh_reads_what_another_wrote(checkpointer):
    state = small_state()
    checkpointer.save(0, state, config=CONFIG)
    for step, (num_devices, spec) in enumerate([(1, ()), (4, ("x",)), (8, ("x",)), (2, (None, "x"))], start=1):
        target = abstract(state, num_devices, lambda x, spec=spec: spec if x.ndim == 2 else ())
        restored, _ = checkpointer.restore(target, config=CONFIG)
        assert isinstance(restored, State)
        assert bits(restored) == bits(state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
        checkpointer.save(step, restored, config=CONFIG)  # the next mesh reads what this one wrote


@pytest.mark.parametrize("rows_per_device", [1, 1 << 19])
def test_donating_the_state_right_after_an_asynchronous_save(checkpointer, rows_per_device):
    """The saved bits are those at the time of `save`, whatever the next steps write over the same buffers."""

    def init():
        sharded = jax.random.normal(jax.random.key(0), (8 * rows_per_device,))
        return {"sharded": sharded, "half": sharded.astype(jnp.bfloat16), "step": jnp.int32(0)}

    shardings = jax.tree.map(lambda x: x.sharding, abstract(jax.eval_shape(init), spec_of=rows))
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0, out_shardings=shardings)
    state = jax.jit(init, out_shardings=shardings)()
    for save in range(2):
        for _ in range(3):
            state = update(state)  # buffers that have been donated before
        expected = bits(jax.tree.map(lambda x: np.array(x, copy=True), state))
        checkpointer.save(save, state, config=CONFIG)
        for _ in range(30):
            state = update(state)
        assert bits(state) != expected
        checkpointer.wait()
        restored, _ = checkpointer.restore(abstract(state, spec_of=rows), config=CONFIG)
        assert bits(restored) == expected
        # And what was restored may be donated in turn.
        after = update(restored)
        again, _ = checkpointer.restore(abstract(after, spec_of=rows), config=CONFIG)
        assert bits(again) == expected


def test_keeps_the_last_and_every_period(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_period=3) as checkpointer:
        for step in range(8):
            assert checkpointer.save(step, small_state(), config=CONFIG)
    with Checkpointer(tmp_path, keep_last=2, keep_period=3) as checkpointer:
        assert checkpointer.all_steps() == [0, 3, 6, 7]
        assert checkpointer.latest_step() == 7


def test_config_lies_beside_the_state_readable_and_extra_comes_back(checkpointer):
    extra = {"seed": 3, "sample position": 2**40}
    checkpointer.save(4, small_state(), config=CONFIG, extra=extra, wait=True)
    text = (Path(checkpointer.directory) / "4" / "config" / "config.json").read_text()
    assert json.loads(text) == CONFIG
    assert '    "width": 512,\n' in text
    assert checkpointer.restore(small_state(), config=CONFIG)[1] == extra


def test_picks_the_step_asked_for(checkpointer):
    for step in (1, 2):
        checkpointer.save(step, small_state(step), config=CONFIG)
    for step in (None, 1, 2):
        restored, _ = checkpointer.restore(small_state(), config=CONFIG, step=step)
        assert bits(restored) == bits(small_state(step or 2))


def test_nothing_saved_yet(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.all_steps() == []
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            checkpointer.restore(small_state(), config=CONFIG)
        checkpointer.save(3, small_state(), config=CONFIG)
        with pytest.raises(FileNotFoundError, match=r"step 2 .*there are \[3\]"):
            checkpointer.restore(small_state(), config=CONFIG, step=2)


def test_config_diff_lines():
    saved = {"tokenizer": {"width": 512, "old": 1}, "levels": (8, 8), "lr": 1, "flag": 1, "same": None, "empty": {}}
    now = {"tokenizer": {"width": 768, "new": "x"}, "levels": [8, 8], "lr": 1.0, "flag": True, "same": None}
    assert config_diff(saved, now) == [
        "empty: saved {}, now absent",
        "flag: saved 1, now true",
        'tokenizer.new: saved absent, now "x"',
        "tokenizer.old: saved 1, now absent",
        "tokenizer.width: saved 512, now 768",
    ]
    assert config_diff(saved, saved) == []


def test_another_config_is_refused_with_what_differs_and_the_mend(checkpointer):
    checkpointer.save(1, small_state(), config=CONFIG)
    changed = CONFIG | {"tokenizer": {"width": 768, "levels": [8, 8]}, "mesh": {"data": 1}}
    with pytest.raises(CheckpointMismatch) as caught:
        checkpointer.restore(small_state(), config=changed)
    message = str(caught.value)
    assert "tokenizer.width: saved 512, now 768" in message
    assert "mesh" not in message
    assert "--allow_config_change" in message and "--workdir" in message
    restored, _ = checkpointer.restore(small_state(), config=changed, allow_config_change=True)
    assert bits(restored) == bits(small_state())


def test_a_field_that_is_younger_than_the_checkpoint_has_the_value_that_it_ran_with(checkpointer):
    before = CONFIG | {"loss": {"pixel": "l2"}, "discriminator": {"name": "patchgan"}}
    checkpointer.save(1, small_state(), config=before)
    now = before | {"loss": {"pixel": "l2", "lecam": "per_logit"}}
    checkpointer.restore(small_state(), config=now)
    now["loss"]["lecam"] = "of_means"
    with pytest.raises(CheckpointMismatch, match=r'loss\.lecam: saved "per_logit", now "of_means"'):
        checkpointer.restore(small_state(), config=now)


@pytest.mark.parametrize(
    "change, same_run",
    [
        ({"mesh": {"data": 2, "fsdp": 4}}, True),
        ({"mesh": [2, 4]}, True),
        ({"sharding": "fsdp"}, True),
        ({"log": {"every": 5}, "eval": {"rfid": {"every": 1}}, "checkpoint": {"every": 2}}, True),
        ({"data": {"root": "b", "num_threads": 4, "num_workers": 2, "prefetch": 1}}, True),
        ({"frozen": {"folder": "elsewhere"}, "eval": {"every": 3}}, True),
        ({"num_steps": 100}, False),
        ({"seed": 1}, False),
        ({"data": {"root": "a", "crop": "center"}}, False),
        ({"logarithm": 1}, False),
    ],
)
def test_only_what_does_not_change_the_computation_is_free(checkpointer, change, same_run):
    checkpointer.save(1, small_state(), config=CONFIG)
    if same_run:
        checkpointer.restore(small_state(), config=CONFIG | change)
    else:
        with pytest.raises(CheckpointMismatch):
            checkpointer.restore(small_state(), config=CONFIG | change)


def test_another_state_is_one_message_with_leaves_and_config(checkpointer):
    checkpointer.save(1, small_state(), config=CONFIG)
    target = State(place(jnp.float32(0)), {"enc": [place(jnp.ones((8, 5)))], "more": place(jnp.ones(2))})
    with pytest.raises(CheckpointMismatch) as caught:
        checkpointer.restore(target, config=CONFIG | {"seed": 9}, allow_config_change=True)
    for line in (
        "params.b: saved float32[3], now absent",
        "params.enc.0: saved float32[8, 4], now float32[8, 5]",
        "params.more: saved absent, now float32[2]",
        "step: saved int32[], now float32[]",
        "seed: saved 0, now 9",
    ):
        assert line in str(caught.value)
    assert caught.value.__cause__ is None
    many = {f"w{i}": place(jnp.ones(1)) for i in range(9)}
    with pytest.raises(CheckpointMismatch, match="and 4 more"):
        checkpointer.restore(small_state(**many), config=CONFIG)


def test_what_cannot_be_saved_is_named(checkpointer):
    with pytest.raises(TypeError, match=r"params\.b"):
        checkpointer.save(1, small_state(b=np.ones(3)), config=CONFIG)
    with pytest.raises(ValueError, match=r"without elements.*params\.b"):
        checkpointer.save(1, small_state(b=jnp.ones((0, 3))), config=CONFIG)
    with pytest.raises(ValueError, match=r"share the name params\.b\.c"):
        checkpointer.save(1, small_state(**{"b": {"c": place(1.0)}, "b.c": place(1.0)}), config=CONFIG)
    with pytest.raises(TypeError, match=r"'tokenizer\.dtype'"):
        checkpointer.save(1, small_state(), config={"tokenizer": {"dtype": jnp.bfloat16}})
    with pytest.raises(ValueError, match=r"sharding.*step"):
        checkpointer.save(1, small_state(), config=CONFIG)
        checkpointer.restore(jax.eval_shape(lambda: State(jnp.int32(0), {})), config=CONFIG)


def test_steps_only_go_forward(checkpointer):
    assert checkpointer.save(5, small_state(1), config=CONFIG)
    assert not checkpointer.save(5, small_state(2), config=CONFIG)
    assert bits(checkpointer.restore(small_state(), config=CONFIG)[0]) == bits(small_state(1))
    with pytest.raises(ValueError, match="already holds step 5"):
        checkpointer.save(4, small_state(), config=CONFIG)


def test_reader_beside_a_running_job(tmp_path):
    with Checkpointer(tmp_path) as writer:
        writer.save(1, small_state(), config=CONFIG, wait=True)
        under_way = tmp_path / "2.orbax-checkpoint-tmp"
        under_way.mkdir()
        with Checkpointer(tmp_path, read_only=True) as reader:
            assert reader.latest_step() == 1
            assert under_way.exists()
            writer.save(3, small_state(3), config=CONFIG, wait=True)
            assert bits(reader.restore(small_state(), config=CONFIG)[0]) == bits(small_state(3))
            with pytest.raises(RuntimeError, match="read-only"):
                reader.save(4, small_state(), config=CONFIG)
    with Checkpointer(tmp_path / "absent", read_only=True) as reader:
        assert reader.latest_step() is None


# The save of step 2 cannot be over before its kill: a small part of it, its config, is not let through.
KILLED = """
import json, os, signal, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from gigatok_jax.checkpoint import Checkpointer
folder, when = Path(sys.argv[1]), sys.argv[2]
state = lambda seed: {"w": jax.random.bits(jax.random.key(seed), (1 << 22,)), "step": jnp.int32(seed)}
checkpointer = Checkpointer(folder, keep_last=1)
checkpointer.save(1, state(1), config={"a": 1}, extra={"position": 1}, wait=True)
second = jax.block_until_ready(state(2))
write, never = json.dumps, threading.Event()
json.dumps = lambda item, **kw: never.wait() if kw and item == {"a": 1} else write(item, **kw)
checkpointer.save(2, second, config={"a": 1}, extra={"position": 2})
until = time.monotonic() + 120
while when == "writing" and not any(p.is_file() for p in folder.glob("2.*/state*/**/d/*")):
    time.sleep(0.001)
    if time.monotonic() > until:
        print("nothing of step 2 was written in two minutes", file=sys.stderr, flush=True)
        os._exit(1)  # the held writer would keep a plain exit waiting
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["at once", "writing"])
def test_killed_while_saving_the_step_before_is_restored(tmp_path, when):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "2").exists(), "the save was over before the kill"
    if when == "writing":
        left = [p.name for p in tmp_path.iterdir() if p.name.startswith("2")]
        assert left, "the save had not begun"
    state = {"w": jax.random.bits(jax.random.key(1), (1 << 22,)), "step": jnp.int32(1)}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored, extra = checkpointer.restore(state, config={"a": 1})
        assert bits(restored) == bits(state)
        assert extra == {"position": 1}
        assert checkpointer.save(3, state, config={"a": 1}, wait=True)
        assert checkpointer.all_steps() == [3]
    assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name]
