"""Entry points inside the tests' own process."""

import contextlib
import importlib
import sys

from absl import flags


@contextlib.contextmanager
def defined(name):
    """The module that `python -m name` would run, with its flags defined for a while; yields (module, their names)."""
    module = importlib.import_module(name)
    before = set(flags.FLAGS)
    module.define_flags()
    mine = set(flags.FLAGS) - before
    try:
        yield module, mine
    finally:
        # Not what a library imported meanwhile has defined; a config's overrides become flags when they are read.
        for flag in [flag for flag in flags.FLAGS if flag.partition(".")[0] in mine]:
            delattr(flags.FLAGS, flag)


@contextlib.contextmanager
def entry_point(arguments, monkeypatch):
    """The module of a command, with its flags read; `arguments` are what follows `python -m`."""
    name, *rest = arguments
    monkeypatch.setattr(sys, "argv", [name, *rest])  # where configs look for what overrides them
    with defined(name) as (module, _):
        flags.FLAGS(sys.argv)
        yield module
