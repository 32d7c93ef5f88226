"""The forms in which projects publish tokenizers, generators and discriminators."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gigatok_jax import config
from gigatok_jax.hub import blur, dino_heads, gigatok, gpt, keymap, llamagen, masked, maskgit_vqgan, patchgan, titok


class Keys(NamedTuple):
    """The tensors of a kind of model.

    section_of: shapes by published name → the config section.   entries: the section → its key list.
    buffers: the section → the closed set of tensors that are dropped, with what they are made anew as.
    old: tensors that older files hold beside these, which are dropped and not made anew.
    """

    section_of: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    entries: Callable[[Mapping[str, Any]], list[keymap.Entry]]
    buffers: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] = lambda section: {}
    old: tuple[str, ...] = ()


class ModelLayout(NamedTuple):
    """The form in which a project publishes a model.

    requires: fields of the section, which other sections of the family may have otherwise.
    parts: where a training checkpoint keeps it; the first that is there is taken, as the published loaders do.
    sizes, known: the fields that tell one published model from another, and their values at every published size.
    """

    kind: str
    what: str
    source: str
    licence: str
    tested: str
    keys: Keys
    requires: Mapping[str, Any]
    parts: tuple[str, ...]
    sizes: tuple[str, ...]
    known: tuple[tuple[Any, ...], ...]


_GIGATOK, _LLAMAGEN = "https://github.com/SilentView/GigaTok", "https://github.com/FoundationVision/LlamaGen"
_TITOK = "https://github.com/bytedance/1d-tokenizer"
_RECORDED = "recorded outputs of the published code at narrow sizes; its key lists at every published size"
_SIDES = ("encoder_width", "encoder_depth", "decoder_width", "decoder_depth")
_VIT = {name: sizes[:2] for name, sizes in config.VIT_SIZES.items()}
_PAIRS = (
    ("small", "small"),
    ("small", "base"),
    ("base", "small"),
    ("small", "large"),
    ("base", "large"),
    ("xl", "xxl"),
)
_GPT, _GPT_PARTS = ("width", "depth", "heads"), ("model", "module", "state_dict")
_MASKED = ("width", "depth", "num_latent_tokens")
_masked = lambda form: tuple((*s[1:3], s[4]) for s in config.MASKED_SIZES.values() if s[0] == form)  # noqa: E731
_used = lambda section: gigatok.BUFFERS  # noqa: E731


def _titok_sizes() -> Iterator[tuple[Any, ...]]:
    """What `ModelLayout.sizes` are of every published TiTok."""
    two_stages = [("large", "large", 32), ("base", "base", 64), ("small", "small", 128)]
    single = [("base", "large", 64), ("base", "large", 128), ("small", "large", 256)]
    kl = [("large", "large", 32), ("base", "large", 64), ("base", "large", 128)]
    for models, bottleneck in ((two_stages, ("vq", 4096, 12)), (single, ("vq", 8192, 64)), (kl, ("kl", 0, 16))):
        for encoder, decoder, tokens in models:
            yield config.TITOK_SIZES[encoder][0], config.TITOK_SIZES[decoder][0], tokens, *bottleneck


LAYOUTS: dict[str, ModelLayout] = {
    "gigatok": ModelLayout(
        kind="tokenizer",
        what="GigaTok tokenizers, 1-D and 2-D",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(gigatok.section_of, gigatok.entries, _used),
        requires={"family": "gigatok", "bottleneck": "vq"},
        parts=("ema", "model", "state_dict"),
        sizes=_SIDES,
        known=tuple(_VIT[encoder] + _VIT[decoder] for encoder, decoder in _PAIRS),
    ),
    "gigatok-gpt": ModelLayout(
        kind="generator",
        what="GigaTok's GPT-1D, B to XXL, with any modulation",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(gpt.section_of, gpt.entries),
        requires={"family": "ar", "positions": "learned"},
        parts=_GPT_PARTS,
        sizes=_GPT,
        known=tuple(config.GPT_SIZES.values()),
    ),
    "gigatok-patchgan": ModelLayout(
        kind="discriminator",
        what="GigaTok's and LlamaGen's PatchGAN",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(patchgan.section_of, patchgan.section_entries, patchgan.buffers),
        requires={"family": "patchgan"},
        parts=("discriminator",),
        sizes=("base_channels", "num_layers"),
        known=((64, 3),),
    ),
    "gigatok-dino-disc": ModelLayout(
        kind="discriminator",
        what="the trained heads of GigaTok's DINO discriminator",
        source=_GIGATOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(dino_heads.section_of, dino_heads.section_entries),
        requires={"family": "dino"},
        parts=("discriminator",),
        sizes=("width", "num_heads"),
        known=((384, 5),),
    ),
    "titok-disc": ModelLayout(
        kind="discriminator",
        what="TiTok's and TA-TiTok's discriminator",
        source=_TITOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(blur.section_of, blur.section_entries, blur.buffers),
        requires={"family": "blur"},
        parts=("discriminator",),
        sizes=("base_channels", "num_layers", "pooling"),
        known=((128, 3, "blur"),),
    ),
    "llamagen": ModelLayout(
        kind="tokenizer",
        what="LlamaGen's VQ-16 and VQ-8 tokenizers, for any image size",
        source=_LLAMAGEN,
        licence="MIT",
        tested="PyTorch on the same weights; key lists of the published code at every published size",
        keys=Keys(llamagen.section_of, llamagen.entries, _used),
        requires={"family": "llamagen", "bottleneck": "vq"},
        parts=("model",),
        sizes=("conv_base", "conv_multipliers", "codebook_size", "code_dim"),
        known=((128, [1, 1, 2, 2, 4], 16384, 8), (128, [1, 2, 2, 4], 16384, 8)),
    ),
    "llamagen-gpt": ModelLayout(
        kind="generator",
        what="LlamaGen's class-conditional GPT, B to 3B",
        source=_LLAMAGEN,
        licence="MIT",
        tested=_RECORDED,
        keys=Keys(gpt.section_of, gpt.entries),
        requires={"family": "ar", "positions": "rope_2d", "modulation": "none", "qk_norm": False},
        parts=_GPT_PARTS,
        sizes=_GPT,
        known=tuple(config.GPT_SIZES.values()),
    ),
    "maskgit-vqgan": ModelLayout(
        kind="tokenizer",
        what="MaskGIT-VQGAN as TiTok reads it, for any image size",
        source="https://huggingface.co/fun-research/TiTok (maskgit-vqgan-imagenet-f16-256.bin)",
        licence="Apache-2.0",
        tested="recorded outputs of the published code at narrow sizes; its key list at the published size",
        keys=Keys(maskgit_vqgan.section_of, maskgit_vqgan.entries),
        requires={"family": "maskgit_vqgan", "bottleneck": "vq"},
        parts=("model", "state_dict"),
        sizes=("conv_base", "conv_multipliers", "codebook_size", "code_dim"),
        known=((128, [1, 1, 2, 2, 4], 1024, 256),),
    ),
    "titok": ModelLayout(
        kind="tokenizer",
        what="TiTok tokenizers, two-stage and single-stage, VQ and KL",
        source="https://huggingface.co/yucornetto (tokenizer_titok_*_imagenet)",
        licence="Apache-2.0",
        tested="recorded outputs of the published code at narrow sizes; its key lists at every published size",
        keys=Keys(titok.section_of, titok.entries),
        requires={"family": "titok"},
        parts=("model", "state_dict"),
        sizes=("encoder_width", "decoder_width", "num_latent_tokens", "bottleneck", "codebook_size", "code_dim"),
        known=tuple(_titok_sizes()),
    ),
    "titok-imagebert": ModelLayout(
        kind="generator",
        what="TiTok's masked generators ImageBert, of L-32 and B-64",
        source=_TITOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(masked.section_of, masked.entries, old=masked.OLD),
        requires={"family": "masked", "architecture": "bert"},
        parts=("model", "state_dict"),
        sizes=_MASKED,
        known=_masked("bert"),
    ),
    "titok-uvit": ModelLayout(
        kind="generator",
        what="TiTok's masked generator UViTBert, of S-128",
        source=_TITOK,
        licence="Apache-2.0",
        tested=_RECORDED,
        keys=Keys(masked.section_of, masked.entries),
        requires={"family": "masked", "architecture": "uvit"},
        parts=("model", "state_dict"),
        sizes=_MASKED,
        known=_masked("uvit"),
    ),
}
