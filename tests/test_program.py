"""How an entry point ends where nobody wants it to go on."""

import sys

import pytest

from gigatok_jax import program


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: the same command does the rest"
