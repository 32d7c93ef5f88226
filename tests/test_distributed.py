"""Meeting of the processes, its plain messages, and the local launcher."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import distributed
from gigatok_jax.checkpoint import Checkpointer

LAUNCH = Path(__file__).parents[1] / "launch" / "local.py"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for key in [k for k in os.environ if k.startswith(("GIGATOK_", "SLURM_"))]:
        monkeypatch.delenv(key)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(*told, timeout_s=5, port=None):
    """Runs the meeting of processes told (id, number), one thread each; returns what each of them raised."""
    address, raised = f"127.0.0.1:{port or free_port()}", {}

    def one(slot, index, count):
        deadline = time.monotonic() + timeout_s
        try:
            if index == 0:
                distributed._host_meeting(address, count, deadline, timeout_s)
            else:
                distributed._join_meeting(address, count, index, deadline, timeout_s)
        except RuntimeError as err:
            raised[slot] = str(err)

    threads = [threading.Thread(target=one, args=(slot, *pair)) for slot, pair in enumerate(told)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_nothing_asked_nothing_done():
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_main()
    assert distributed.from_main(True) and not distributed.from_main(False)


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        (("h:1", None, None), {}, "missing: num_processes, process_id"),
        ((None, None, None), {"NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "missing: coordinator"),
        (("h:1", 2, 2), {}, "from 0 to num_processes - 1; got 2 of 2"),
        (("h:1", 2, -1), {}, "got -1 of 2"),
        (("host", 2, 0), {}, "host:port, not 'host'"),
        (("h:1", None, 0), {"NUM_PROCESSES": "two"}, "GIGATOK_NUM_PROCESSES='two' is no integer"),
    ],
)
def test_half_said_is_refused(monkeypatch, arguments, env, message):
    for key, value in env.items():
        monkeypatch.setenv(f"GIGATOK_{key}", value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)


def test_arguments_come_before_the_environment(monkeypatch):
    for key, value in {"COORDINATOR": "env:1", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"GIGATOK_{key}", value)
    assert distributed._gather(None, None, None) == ("env:1", 4, 3)
    assert distributed._gather("[::1]:2", None, 0) == ("[::1]:2", 4, 0)


@pytest.mark.parametrize(
    "nodes, first", [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-007,9],cpu1", "gpu003"), ("a-b[7,9]", "a-b7")]
)
def test_slurm_says_who_and_where(monkeypatch, nodes, first):
    step = {"STEP_NODELIST": nodes, "STEP_NUM_TASKS": "4", "PROCID": "2", "JOB_ID": "5000"}
    for key, value in step.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert distributed._gather(None, None, None) is None  # only where asked
    assert distributed._gather("auto", None, None) == (f"{first}:{61440 + 904}", 4, 2)


def test_auto_without_a_cluster_is_plain():
    code = "from gigatok_jax import distributed; distributed.initialize('auto', timeout_s=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: jax.distributed did not start" in done.stderr


def test_all_meet():
    assert meet((0, 4), (3, 4), (1, 4), (2, 4)) == {}


def test_who_is_missing_is_named_to_all():
    raised = meet((0, 4), (2, 4), timeout_s=1)
    assert len(raised) == 2
    assert all("waited 1 s" in text and "did not hear from processes 1, 3" in text for text in raised.values())


@pytest.mark.parametrize(
    "told, message",
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes came with process id 1"),
        ([(0, 3), (1, 4)], "process 1 was told of 4 processes, process 0 of 3"),
    ],
)
def test_disagreement_is_told_at_once(told, message):
    start = time.monotonic()
    raised = meet(*told, timeout_s=20)
    assert sorted(raised) == list(range(len(told)))
    assert all(message in text for text in raised.values())
    assert time.monotonic() - start < 10


def test_strangers_and_those_who_left_do_not_count():
    port = free_port()

    def disturb():
        for line in (b"GET / HTTP/1.1\n", b"", b'{"hello": "gigatok-meet", "process_id": 1, "num_processes": 3}\n'):
            while True:
                try:
                    link = socket.create_connection(("127.0.0.1", port))
                    break
                except OSError:
                    time.sleep(0.01)
            link.sendall(line)
            link.close()

    thread = threading.Thread(target=disturb)
    thread.start()
    raised = []
    # The real ones come after all of that, the one whose id was used already among them.
    late = [threading.Timer(1.0, lambda i=i: raised.append(meet((i, 3), port=port))) for i in (1, 2)]
    for timer in late:
        timer.start()
    raised.append(meet((0, 3), port=port))
    for each in (thread, *late):
        each.join()
    assert raised == [{}, {}, {}]


def test_taken_port_is_a_message_not_a_crash():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        raised = meet((0, 2), port=taken.getsockname()[1])
    assert "cannot listen at coordinator 127.0.0.1:" in raised[0]
    assert "the port is free" in raised[0]


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-host.invalid:1"])
def test_wrong_coordinator_is_a_message_within_seconds(address):
    address = address.format(port=free_port())
    code = f"from gigatok_jax import distributed; distributed.initialize({address!r}, 2, 1, timeout_s=3)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 20
    assert done.returncode == 1, "ended by a signal from C++ instead of an exception"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: process 1 of 2 waited 3 s for process 0 at coordinator {address}: ")
    assert "distinct" in last and "reachable" in last


def launch(*command, **options):
    flags = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, str(LAUNCH), *flags, "--", *command]


SHARDED = """
import sys
from gigatok_jax import distributed
distributed.initialize()
distributed.initialize()  # a second call is no harm
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gigatok_jax.checkpoint import Checkpointer
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
def place(shape, *spec):
    return {"w": NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("a", "b")), P(*spec)),
            "step": NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("a", "b")), P())}
def init():
    return {"w": jax.random.normal(jax.random.key(5), (16, 12)), "step": jnp.int32(9)}
def checksum(tree):
    bits = jax.jit(lambda t: jax.lax.bitcast_convert_type(t["w"], jnp.uint32).sum() + t["step"].astype(jnp.uint32))
    return int(bits(tree).addressable_data(0))
saved = jax.jit(init, out_shardings=place((4, 1), "a"))()
with Checkpointer(sys.argv[1]) as checkpointer:
    try:
        checkpointer.save(1, {"mine": jnp.int32(3)}, config={})
    except ValueError as err:
        print("refused", "on one process only" in str(err) and "mine" in str(err))
    checkpointer.save(2, saved, config={"a": 1}, extra={"position": 7})
    shapes = jax.eval_shape(init)
    to = place((2, 2), None, "b")
    target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to[k]) for k, x in shapes.items()}
    restored, extra = checkpointer.restore(target, config={"a": 1})
assert distributed.from_main(jax.process_index() == 0)
sums = checksum(saved), checksum(restored)
print("main", distributed.is_main(), "sums", *sums, restored["w"].sharding == to["w"], extra)
"""


@pytest.mark.multiprocess
def test_two_processes_save_and_restore_and_one_process_reads_it(tmp_path):
    command = launch(sys.executable, "-c", SHARDED, str(tmp_path / "run"), num_processes=2, devices_per_process=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = jax.random.normal(jax.random.key(5), (16, 12))
    total = int(np.asarray(expected).view(np.uint32).sum(dtype=np.uint32) + np.uint32(9))
    for index in (0, 1):
        assert f"[p{index}] refused True" in done.stdout
        line = f"[p{index}] main {index == 0} sums {total} {total} True {{'position': 7}}"
        assert line in done.stdout, done.stdout
    with Checkpointer(tmp_path / "run", read_only=True) as checkpointer:
        restored, _ = checkpointer.restore({"w": expected, "step": jnp.int32(0)}, config={"a": 1})
    np.testing.assert_array_equal(restored["w"], expected)
    assert restored["step"] == 9


WORKER = """
import os, signal, sys, time
me = int(os.environ["GIGATOK_PROCESS_ID"])
def bye(number, frame):
    print("got", number)
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "never" else bye)
print("ready")
if me == 1 and sys.argv[1] != "stay":
    os.kill(os.getpid(), 9) if sys.argv[1] == "die" else sys.exit(int(sys.argv[1]))
time.sleep(60 if sys.argv[1] != "0" else 0)
"""


@pytest.mark.parametrize(
    "how, on_term, status, said",
    [
        ("0", "0", 0, None),
        ("7", "0", 7, "[p0] got 15"),
        ("die", "0", 128 + 9, "[p0] got 15"),
        ("7", "never", 7, None),  # killed after the grace
    ],
)
def test_launcher_returns_the_first_failure_and_stops_the_rest(how, on_term, status, said):
    # The failing one gives the other time to set its handler.
    worker = WORKER.replace('if me == 1 and', 'time.sleep(0.7)\nif me == 1 and')  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        launch(sys.executable, "-c", worker, how, on_term, num_processes=2, grace=1),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert time.monotonic() - start < 20
    assert "[p0] ready" in done.stdout and "[p1] ready" in done.stdout
    assert said is None or said in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launcher_forwards_signals(number):
    worker = WORKER.replace("signal.SIGTERM,", f"{int(number)},")
    command = launch(sys.executable, "-c", worker, "stay", "5", num_processes=2)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = ""
        while said.count("ready") < 2:
            said += process.stdout.readline()
        process.send_signal(number)
        said += process.stdout.read()
    assert process.returncode == 5
    assert sorted(re.findall(r"\[p(\d)\] got (\d+)", said)) == [("0", str(int(number))), ("1", str(int(number)))]


def test_launcher_wants_a_command():
    done = subprocess.run([sys.executable, str(LAUNCH), "--num_processes=2"], capture_output=True, text=True)
    assert done.returncode == 2 and "no command" in done.stderr
