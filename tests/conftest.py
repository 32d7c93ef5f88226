"""Eight CPU devices in one process, and the folder of recorded outputs of the published code."""

import os
from pathlib import Path

# Tests check numbers, not speed: such code runs slowly and compiles in half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Compilations are shared between the tests of one run and between runs.
jax.config.update("jax_compilation_cache_dir", os.environ.get("GIGATOK_TEST_CACHE", "/tmp/gigatok_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with `gigatok/*.npz|*.safetensors`; the test is skipped where it is not given."""
    folder = os.environ.get("GIGATOK_GOLDEN")
    if not folder:
        pytest.skip("set GIGATOK_GOLDEN=<folder of recorded outputs> to compare with the published code")
    return Path(folder)


SLOW_FILES = (
    "test_train.py",
    "test_sharding.py",
    "test_recipes.py",
    "test_train_step.py",
    "test_gigatok_golden.py",
    "test_nn.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: whole files are dealt out to the workers, and none should start one at the end."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)
