"""Starting JAX over several processes, with a plain message where it cannot start.

JAX's coordination client ends the process from C++ when a wait runs out (SIGABRT and a stack trace, no Python
exception), and a taken port is a segmentation fault. So the processes first meet in Python, at the coordinator's
address: process 0 waits there for the others, checks that everyone agrees on the number and that the ids are
distinct, and only then does JAX take the port over.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"
_HELLO = "gigatok-meet"
_CHECK = (
    "Check that every process got the same coordinator address (that of process 0), that the process ids are "
    "distinct and run from 0 to num_processes - 1, and that the port is free on that machine and reachable "
    "from the others."
)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 120,
) -> None:
    """Joins this process to the others; before any JAX computation.

    Does nothing where nothing asks for it, or where it has been done.

    Args:
      coordinator: host:port of process 0, else GIGATOK_COORDINATOR. "auto" takes what the cluster says: SLURM's
        variables (the first node, a port made from the job id), otherwise what JAX finds by itself (TPU, GKE, MPI).
      num_processes: else GIGATOK_NUM_PROCESSES.
      process_id: else GIGATOK_PROCESS_ID.
      timeout_s: how long to wait for the others.

    Raises:
      ValueError: some but not all of the three are given, or they make no sense.
      RuntimeError: the others did not come, the port is taken, the address does not resolve, two processes claim
        one id, or they disagree on their number. Says who waited, where, how long and what to check.
    """
    given = _gather(coordinator, num_processes, process_id)
    if given is None or jax.distributed.is_initialized():
        return
    address, count, index = given
    if address == AUTO:
        _start_jax("a process of a cluster that JAX detects", initialization_timeout=timeout_s)
        return
    deadline = time.monotonic() + timeout_s
    if count > 1:
        if index == 0:
            _host_meeting(address, count, deadline, timeout_s)
        else:
            _join_meeting(address, count, index, deadline, timeout_s)
    _start_jax(
        f"process {index} of {count} at coordinator {address}",
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        # All are here; still leave some seconds where they came at the last moment.
        initialization_timeout=max(10, int(deadline - time.monotonic())),
        # Under SLURM JAX would show each process one GPU; with an address given by hand it shows all of them.
        cluster_detection_method=None if _wants_auto(coordinator) else "deactivate",
    )


def is_main() -> bool:
    """True in the one process that prints and writes summaries."""
    return jax.process_index() == 0


def from_main(value: bool) -> bool:
    """Process 0's value, in all of them: for what depends on a file that only it writes."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def same_everywhere(text: str) -> bool:
    """Whether all processes hold the same text."""
    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


def _gather(coordinator, num_processes, process_id) -> tuple[str, int | None, int | None] | None:
    """Arguments before environment; None where neither says anything."""
    env = os.environ
    if _wants_auto(coordinator):
        return _slurm() or (AUTO, None, None)
    coordinator = coordinator or env.get("GIGATOK_COORDINATOR") or None
    values = {"num_processes": num_processes, "process_id": process_id}
    for key in values:
        text = env.get(f"GIGATOK_{key.upper()}")
        if values[key] is None and text:
            if not re.fullmatch(r"-?\d+", text):
                raise ValueError(f"GIGATOK_{key.upper()}={text!r} is no integer")
            values[key] = int(text)
    values = {"coordinator": coordinator, **values}
    absent = [key for key, value in values.items() if value is None]
    if len(absent) == 3:
        return None
    if absent:
        raise ValueError(
            f"several processes need coordinator, num_processes and process_id; missing: {', '.join(absent)} "
            "(give the arguments or GIGATOK_COORDINATOR, GIGATOK_NUM_PROCESSES, GIGATOK_PROCESS_ID)"
        )
    count, index = values["num_processes"], values["process_id"]
    if not 0 <= index < count:
        raise ValueError(f"process_id must be from 0 to num_processes - 1; got {index} of {count}")
    _split(coordinator)
    return coordinator, count, index


def _wants_auto(coordinator: str | None) -> bool:
    return (coordinator or os.environ.get("GIGATOK_COORDINATOR")) == AUTO


def _slurm() -> tuple[str, int, int] | None:
    """(coordinator, number, id) of an srun step of several tasks, or None outside of one."""
    env = os.environ
    keys = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID")
    if any(key not in env for key in keys):
        return None
    nodes, tasks, index, job = (env[key] for key in keys)
    # "gpu[003-007,9],cpu1" -> gpu003, "n1,n2" -> n1
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    port = 61440 + int(job) % 4096  # above the ports Linux hands out, the same for all, another per job
    return f"{first[1]}{first[2] or ''}:{port}", int(tasks), int(index)


def _start_jax(who: str, **arguments) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except Exception as err:
        raise RuntimeError(f"jax.distributed did not start for {who}: {err}\n{_CHECK}") from err


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the coordinator must read host:port, not {address!r}")
    return host.strip("[]"), int(port)


def _host_meeting(address: str, count: int, deadline: float, timeout_s: int) -> None:
    """Process 0: waits until each of the other ids has called, then lets all go on together."""
    try:
        door = _listen(_split(address)[1])
    except OSError as err:
        raise RuntimeError(
            f"process 0 of {count} cannot listen at coordinator {address}: {err.strerror or err}. Another program, "
            f"or another process 0, holds the port. {_CHECK}"
        ) from err
    callers: dict[int, socket.socket] = {}
    problem = None
    with door:
        while problem is None and len(callers) < count - 1:
            door.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = door.accept()
            except TimeoutError:
                missing = [i for i in range(1, count) if i not in callers]
                problem = f"waited {timeout_s} s at coordinator {address} and did not hear from {_ids(missing)}"
                break
            # A caller that went away meanwhile may come again under the same id.
            callers = {i: caller for i, caller in callers.items() if _connected(caller)}
            problem = _admit(link, callers, count)
    for link in callers.values():
        # Who dies at this very moment is for JAX's own timeout to report.
        with contextlib.suppress(OSError), link:
            _send(link, problem=problem)
    if problem:
        raise RuntimeError(f"process 0 of {count}: {problem}. {_CHECK}")


def _admit(link: socket.socket, callers: dict, count: int) -> str | None:
    """Hears who calls and puts the link among `callers`; returns what is wrong, after telling the caller."""
    hello = _receive(link)
    if not hello:  # a port scan, a health check
        link.close()
        return None
    index, told = hello["process_id"], hello["num_processes"]
    if told != count:
        problem = f"process {index} was told of {told} processes, process 0 of {count}"
    elif index in callers:
        problem = f"two processes came with process id {index}"
    else:
        callers[index] = link
        return None
    with contextlib.suppress(OSError), link:
        _send(link, problem=problem)
    return problem


def _join_meeting(address: str, count: int, index: int, deadline: float, timeout_s: int) -> None:
    """Any other process: calls process 0 until it answers, then waits for its word."""
    who, last = f"process {index} of {count}", "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(_split(address), timeout=left) as link:
                _send(link, process_id=index, num_processes=count)
                # A little longer than process 0, which knows better what is wrong and should speak first.
                reply = _receive(link, max(1.0, deadline - time.monotonic()) + 3.0)
        except OSError as err:
            last = err.strerror or str(err)
        else:
            if reply and reply["problem"] is None:
                return
            if reply:
                raise RuntimeError(f"{who}: process 0 reports: {reply['problem']}. {_CHECK}")
            last = "somebody listens there but gives no word"
        time.sleep(0.2)
    raise RuntimeError(f"{who} waited {timeout_s} s for process 0 at coordinator {address}: {last}. {_CHECK}")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _send(link: socket.socket, **message) -> None:
    link.settimeout(2.0)
    link.sendall((json.dumps({"hello": _HELLO, **message}) + "\n").encode())


def _receive(link: socket.socket, timeout_s: float = 2.0) -> dict | None:
    """One line of ours, or None for anything else, silence included."""
    link.settimeout(timeout_s)
    try:
        message = json.loads(link.makefile("rb").readline(4096))
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) and message.get("hello") == _HELLO else None


def _connected(link: socket.socket) -> bool:
    """False once the other end has closed: then there is an end of file to read."""
    link.setblocking(False)
    try:
        return link.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _ids(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
