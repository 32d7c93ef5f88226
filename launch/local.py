"""Starts several JAX processes on this machine and watches them.

    python launch/local.py --num_processes=2 --devices_per_process=4 -- python -m gigatok_jax.train --config=...

Each process finds GIGATOK_COORDINATOR, GIGATOK_NUM_PROCESSES and GIGATOK_PROCESS_ID in its environment. Their output
is printed with [p0], [p1], ... in front. SIGTERM and SIGINT go to all of them. When one ends with an error the others
are asked to stop, and killed after the grace; the status is that of the first one to fail.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def main(argv: list[str] | None = None) -> int:
    """Runs the processes to their end; returns 0, or the status of the first that failed (128 + signal number)."""
    args = parse(argv)
    coordinator = f"127.0.0.1:{args.port or free_port()}"
    processes, printers, stop_asked = [], [], []

    def forward(number, frame):
        stop_asked.append(number)
        for process in processes:
            send(process, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for index in range(args.num_processes):
        process = start(args, coordinator, index)
        processes.append(process)
        # A signal may have come while the list was being filled.
        for number in stop_asked[:1]:
            send(process, number)
        printers.append(threading.Thread(target=print_lines, args=(process.stdout, f"[p{index}] "), daemon=True))
        printers[-1].start()
    status = watch(processes, args.grace)
    for printer in printers:
        printer.join(timeout=2)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags before `--`, the command after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=1, help="CPU devices each process pretends to have")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator; a free one by default")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds to stop in after another one has failed")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- command with its arguments")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command given after --")
    if args.num_processes < 1 or args.devices_per_process < 1:
        parser.error("--num_processes and --devices_per_process must be at least 1")
    return args


def start(args: argparse.Namespace, coordinator: str, index: int) -> subprocess.Popen:
    """One process of the run, in a process group of its own."""
    env = os.environ | {
        "GIGATOK_COORDINATOR": coordinator,
        "GIGATOK_NUM_PROCESSES": str(args.num_processes),
        "GIGATOK_PROCESS_ID": str(index),
        "JAX_NUM_CPU_DEVICES": str(args.devices_per_process),
        "PYTHONUNBUFFERED": "1",
    }
    # Processes of one machine cannot share an accelerator: CPU, unless the caller says otherwise.
    env.setdefault("JAX_PLATFORMS", "cpu")
    # Left to itself, XLA's CPU scheduler may start independent collectives in another order in each process, and Gloo
    # takes one for the other ("op.preamble.length <= op.nbytes").
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    # Own group: Ctrl-C in a terminal would otherwise arrive twice, from the terminal and from here.
    return subprocess.Popen(
        args.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def watch(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits for all; after a failure the rest get SIGTERM, and SIGKILL when the grace is over."""
    failed, deadline = None, None
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and (bad := [i for i, code in enumerate(codes) if code]):
            failed = codes[bad[0]]
            deadline = time.monotonic() + grace
            print(f"[local] p{bad[0]} ended with status {failed}; stopping the others", flush=True)
            for process in processes:
                send(process, signal.SIGTERM)
        if None not in codes:
            return 0 if failed is None else (failed if failed > 0 else 128 - failed)
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                send(process, signal.SIGKILL)
        time.sleep(0.05)


def send(process: subprocess.Popen, number: int) -> None:
    """Signals the process's whole group, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def print_lines(stream, prefix: str) -> None:
    """Copies a stream line by line, so that lines of two processes never mix."""
    for line in stream:
        sys.stdout.write(prefix + line.decode(errors="replace"))
        sys.stdout.flush()


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
