"""The commands of README and of the configs' docstrings name things that are there."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

from tests.entry_points import defined

ROOT = Path(__file__).parents[1]


def blocks(text: str) -> list[str]:
    """What stands in fenced blocks: the commands to paste."""
    return re.findall(r"```bash\n(.*?)\n```", text, re.S)


def others(text: str) -> list[str]:
    """Indented commands, each on one line."""
    lines = re.findall(r"^    python -m gigatok_jax.*$", text.replace("\\\n", ""), re.M)
    return [part for line in lines for part in line.split("&&")]


def extras() -> set[str]:
    return set(importlib.metadata.metadata("gigatok_jax").get_all("Provides-Extra"))


def problems(command: str) -> list[str]:
    """What a command names that is not there: extras, files, modules, flags."""
    found = [f"extra {extra}" for extra in re.findall(r"\.\[(\w+)\]", command) if extra not in extras()]
    for path in re.findall(r"-c (\S+)|--config=([\w/.]+)", command):
        found += [f"file {name}" for name in path if "." in name and not (ROOT / name).exists()]
    for part in command.split("&&"):
        for name in re.findall(r"-m (gigatok_jax\.\w+)", part):
            if not (ROOT / (name.replace(".", "/") + ".py")).exists():
                found.append(f"module {name}")
                continue
            with defined(name) as (_, known):
                given = re.findall(r"--(\w+)", part.split(name, 1)[1])
                found += [f"flag --{flag}" for flag in given if flag not in known]
    return found


def test_the_first_two_blocks_are_the_two_commands():
    install_and_run, install_and_test = blocks((ROOT / "README.md").read_text())[:2]
    for command in (install_and_run, install_and_test):
        assert "\n" not in command
        assert not problems(command)
    assert install_and_run.endswith(
        "python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart && .venv/bin/"
        "python -m gigatok_jax.pipeline --config=configs/pipelines/quickstart.py --run=runs/quickstart"
    )
    assert install_and_test.endswith("python -m pytest")


def test_every_other_command():
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "configs").rglob("*.py")]
    for text in ((ROOT / "README.md").read_text(), *docstrings):
        assert others(text)
        assert [(command, wrong) for command in others(text) if (wrong := problems(command))] == []


@pytest.mark.parametrize(
    "broken, named",
    [
        ('pip install -e ".[dmeo]"', "extra dmeo"),
        ("pip install -c constrains.txt -e .", "file constrains.txt"),
        ("python -m gigatok_jax.trian --config=configs/quickstart.py", "module gigatok_jax.trian"),
        ("python -m gigatok_jax.train --config=configs/quickstart.py --wrokdir=x", "flag --wrokdir"),
        ("python -m gigatok_jax.train --workdir=x && python -m gigatok_jax.pipeline --workdir=x", "flag --workdir"),
    ],
)
def test_a_wrong_name_is_found(broken, named):
    assert problems(broken) == [named]


def test_constraints_pin_every_direct_dependency():
    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    text = (ROOT / "setup.py").read_text()
    lists = re.findall(r"^(?:CORE|DEMO|INT8) = \[(.*?)\]", text, re.S | re.M)
    assert len(lists) == 3
    for name in re.findall(r'"([\w-]+)>=', "".join(lists)):
        assert name.lower().replace("-", "_") in pinned, name
