"""What lets a library beside PyTorch be imported where only its Python part can run."""

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@functools.cache
def with_torchvision_declared() -> ModuleType:
    """torchvision, before anything that imports it.

    Its wheel's compiled part does not load beside a CPU build of PyTorch, and the import fails at operators that it
    would have defined. They are declared without an implementation; nothing here calls one.
    """
    torch, found = pytest.importorskip("torch"), importlib.util.find_spec("torchvision")
    if found is None:
        pytest.skip("needs torchvision (extra parity)")
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return importlib.import_module("torchvision")
