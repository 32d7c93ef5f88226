"""gigatok_jax: latent-token image tokenizers and their generators, in JAX/Flax."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on use: `import gigatok_jax` costs nothing, and a room can import another without all of them.
    if name == "from_pretrained":
        from gigatok_jax.sampling.pipelines import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
