"""How every entry point starts: whatever is wrong with its flags or config file becomes one error."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags


def run(main: Callable[[list[str]], Any]) -> None:
    """Reads the flags, which runs a config file, and calls `main`; exits with one line where that cannot be read.

    Ctrl-C ends it with status 130 and one line.
    """
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:
        print("\nstopped: the same command does the rest", file=sys.stderr)
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)  # files are whole or not there: threads that read ahead need not finish


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {told(error)}; --help names the flags")


def told(error: BaseException) -> str:
    """What an error says, without the program text that a failed config file's error quotes."""
    text = str(error)
    if "Traceback" in text:
        raised = re.findall(r"^\s*\w*(?:Error|Exception): (.*)$", text, re.M)
        text = raised[-1] if raised else text
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
