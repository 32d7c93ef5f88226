"""The families of tokenizers by name; `config.TOKENIZERS` has their sections."""

from collections.abc import Mapping
from typing import Any

from gigatok_jax.tokenizers import gigatok, llamagen, maskgit_vqgan, titok
from gigatok_jax.tokenizers.tokenizer import Tokenizer

FAMILIES = {
    "gigatok": gigatok.build,
    "llamagen": llamagen.build,
    "maskgit_vqgan": maskgit_vqgan.build,
    "titok": titok.build,
}


def build(section: Mapping[str, Any], dtype: Any) -> Tokenizer:
    """The tokenizer of a config's section.

    Raises:
      ValueError: for an unknown family, or sizes that the family refuses.
    """
    if section["family"] not in FAMILIES:
        raise ValueError(f"config.tokenizer.family={section['family']!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[section["family"]](section, dtype=dtype)
