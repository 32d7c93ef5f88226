"""gigatok_jax: latent-token image tokenizers and their generators, in JAX/Flax."""

__version__ = "0.1.0"
