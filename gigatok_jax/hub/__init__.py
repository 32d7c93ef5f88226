"""Bundles, published weights, and the way from one to the other."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Imported on use: other modules of this room are imported by rooms that `models` imports.
    if name == "convert":
        from gigatok_jax.hub.models import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
