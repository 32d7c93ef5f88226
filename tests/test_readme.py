"""README's two commands name things that are there."""

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)\n```", text, re.S)


def extras() -> set[str]:
    return set(importlib.metadata.metadata("gigatok_jax").get_all("Provides-Extra"))


def problems(command: str, known_flags: set[str]) -> list[str]:
    """What a command names that is not there: extras, files, modules, flags."""
    found = [f"extra {extra}" for extra in re.findall(r"\.\[(\w+)\]", command) if extra not in extras()]
    for path in re.findall(r"-c (\S+)|--config=([\w/.]+)", command):
        found += [f"file {name}" for name in path if name and not (ROOT / name).exists()]
    for module in re.findall(r"-m (gigatok_jax\.\w+)", command):
        if not (ROOT / (module.replace(".", "/") + ".py")).exists():
            found.append(f"module {module}")
        own = command.split(module, 1)[1]
        found += [f"flag --{flag}" for flag in re.findall(r"--(\w+)", own) if flag not in known_flags]
    return found


@pytest.fixture(scope="module")
def known_flags():
    from gigatok_jax import train

    source = Path(train.__file__).read_text()
    defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"|DEFINE_config_file\("(\w+)"', source)
    return {name for pair in defined for name in pair if name}


def test_the_first_two_blocks_are_the_two_commands(known_flags):
    install_and_train, install_and_test = commands((ROOT / "README.md").read_text())[:2]
    for command in (install_and_train, install_and_test):
        assert "\n" not in command
        assert not problems(command, known_flags)
    assert install_and_train.endswith(
        "python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart"
    )
    assert install_and_test.endswith("python -m pytest")


@pytest.mark.parametrize(
    "broken, named",
    [
        ('pip install -e ".[dmeo]"', "extra dmeo"),
        ("pip install -c constrains.txt -e .", "file constrains.txt"),
        ("python -m gigatok_jax.trian --config=configs/quickstart.py", "module gigatok_jax.trian"),
        ("python -m gigatok_jax.train --config=configs/quickstart.py --wrokdir=x", "flag --wrokdir"),
    ],
)
def test_a_wrong_name_is_found(broken, named, known_flags):
    assert named in problems(broken, known_flags)


def test_constraints_pin_every_direct_dependency():
    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    text = (ROOT / "setup.py").read_text()
    lists = re.findall(r"^(?:CORE|DEMO|INT8) = \[(.*?)\]", text, re.S | re.M)
    assert len(lists) == 3
    for name in re.findall(r'"([\w-]+)>=', "".join(lists)):
        assert name.lower().replace("-", "_") in pinned, name
