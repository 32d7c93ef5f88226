"""Entry points inside the tests' own process."""

import contextlib
import importlib
import sys

from absl import flags


@contextlib.contextmanager
def entry_point(arguments, monkeypatch):
    """The module that `python -m` would run, with its flags defined and read.

    Args:
      arguments: the module's name and the flags.
    """
    name, *rest = arguments
    before = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [name, *rest])  # where configs look for what overrides them
    module = importlib.import_module(name)
    try:
        module.define_flags()
        flags.FLAGS(sys.argv)
        yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
