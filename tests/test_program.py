"""How an entry point ends where nobody wants it to go on."""

import subprocess
import sys

PROGRAM = """
import threading, time
from gigatok_jax import program

def main(argv):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise KeyboardInterrupt

program.run(main)
"""


def test_an_interrupt_is_one_line_and_waits_for_no_thread():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr.strip()) == (130, "stopped: the same command does the rest")
