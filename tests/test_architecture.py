"""The house's rules that a machine can check: which way imports run, and where flags are read."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gigatok_jax"
LEVELS = {
    "shapes": 0,
    "nn": 1,
    "encoders": 2,
    "bottlenecks": 2,
    "decoders": 2,
    "discriminators": 2,
    "losses": 2,
    "teachers": 2,
    "tokenizers": 3,
    "generators": 3,
    "objectives": 3,
    "train_step": 4,
    "train_state": 4,
    "checkpoint": 4,
    "evals": 4,
    "sampling": 4,
    "hub": 4,
}
# Beside the levels: what each may import of the package.
BESIDE = {
    "config": set(),
    "data": set(),
    "metrics": set(),
    "sharding": set(),
    "optim": {"sharding"},
    "scaling": set(),
    "distributed": set(),
    "preemption": set(),
}
SIBLINGS_MAY_MEET = {"codes"}  # bottlenecks/codes.py is what crosses between the level-2 rooms


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gigatok_jax"):
            base = node.module
            found |= {f"{base}.{alias.name}" if base.count(".") == 0 else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("gigatok_jax.")}
    return found


def problems(path: Path, name: str) -> list[str]:
    here = name.split("/")[0].removesuffix(".py")
    found = []
    for module in imports(path):
        there = room(module)
        if here in BESIDE:
            if there not in BESIDE[here] | {here}:
                found.append(f"{name} imports {module}: {here} stands beside the levels")
            continue
        mine, theirs = LEVELS.get(here, 5), LEVELS.get(there, 0 if there in BESIDE else 5)
        if theirs > mine:
            found.append(f"{name} (level {mine}) imports {module} (level {theirs}): an upward arrow")
        if mine == theirs == 2 and here != there and module.split(".")[-1] not in SIBLINGS_MAY_MEET:
            found.append(f"{name} imports its sibling {module}")
        if mine <= 3 and there in ("data", "metrics", "distributed", "preemption", "config"):
            found.append(f"{name} (level {mine}) imports {module}: models know no data, metrics or configs")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    assert not problems(PACKAGE / name, name)


@pytest.mark.parametrize("name", FILES)
def test_only_entry_points_read_flags_and_only_the_top_asks_for_devices(name):
    here = name.split("/")[0].removesuffix(".py")
    level = LEVELS.get(here, 5)
    tree = ast.parse((PACKAGE / name).read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if level <= 3:
        assert not calls & {"open", "jax.devices", "jax.device_count", "time.time", "time.monotonic"}
    if level < 5 or here in BESIDE:
        assert not [c for c in calls if c.startswith(("flags.DEFINE", "config_flags.DEFINE"))]


def test_an_upward_arrow_is_found(tmp_path):
    bad = tmp_path / "attention.py"
    bad.write_text("from gigatok_jax.tokenizers import gigatok\nfrom gigatok_jax import data\n")
    assert len(problems(bad, "nn/attention.py")) == 2
    assert problems(bad, "losses/pixel.py")


def test_configs_import_only_the_config_module():
    for path in (PACKAGE.parent / "configs").rglob("*.py"):
        assert imports(path) <= {"gigatok_jax.config"}, path


def test_files_are_of_a_size_to_feel_at_home_in():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
