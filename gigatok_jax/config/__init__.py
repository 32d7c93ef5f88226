"""Configs: their defaults, and what can be known to be wrong with one before anything is built.

A file in `configs/` imports this package and nothing else of the house: it calls `base()`, `ar()`, `masked()` or
`pipeline()`, fills the differences, and returns the locked result. `validate` is what every entry point calls on the
config it was given.
"""

from gigatok_jax.config.checks import check_fields, check_mesh, mesh_sizes, to_json, validate
from gigatok_jax.config.defaults import STAGES, ar, base, masked, pipeline
from gigatok_jax.config.generators import GPT_SIZES, MASKED_SIZES, ar_generator, masked_generator
from gigatok_jax.config.tokenizers import (
    TITOK_SIZES,
    TOKENIZERS,
    VIT_SIZES,
    gigatok_tokenizer,
    llamagen_tokenizer,
    maskgit_vqgan_tokenizer,
    set_vit,
    small_gigatok_tokenizer,
    small_titok_tokenizer,
    titok_tokenizer,
)

__all__ = [
    "GPT_SIZES",
    "MASKED_SIZES",
    "STAGES",
    "TITOK_SIZES",
    "TOKENIZERS",
    "VIT_SIZES",
    "ar",
    "ar_generator",
    "base",
    "check_fields",
    "check_mesh",
    "gigatok_tokenizer",
    "llamagen_tokenizer",
    "masked",
    "masked_generator",
    "maskgit_vqgan_tokenizer",
    "mesh_sizes",
    "pipeline",
    "set_vit",
    "small_gigatok_tokenizer",
    "small_titok_tokenizer",
    "titok_tokenizer",
    "to_json",
    "validate",
]
