"""The `tokenizer` section of every family; sizes are fields. `TOKENIZERS` lists the families."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

VIT_SIZES = {  # width, layers, heads (GigaTok, arXiv 2504.08736, §3 and its code)
    "tiny": (256, 4, 4),
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "xxxl": (2560, 48, 40),
}

TITOK_SIZES = {  # width, layers, heads (TiTok's code; arXiv 2406.07550, §4.1)
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def gigatok_tokenizer() -> ConfigDict:
    """The `tokenizer` section of GigaTok; sizes are those of S-S at 256 px."""
    return ConfigDict(
        dict(
            family="gigatok",
            layout="1d",  # "1d": latent queries; "2d": the feature map's own grid
            layer_2d="vit",  # "vit", or "qformer" (self + cross to its own input, the published VQ_SS256_2d)
            image_size=256,
            num_latent_tokens=256,
            features=256,  # channels between the convolutions and the ViTs
            conv_base=128,
            conv_multipliers=(1, 1, 2, 2, 4),
            encoder_conv_blocks=2,
            decoder_conv_blocks=3,
            conv_attention=False,
            norm_groups=32,
            kernel_gain=0.0,  # kernels start at N(0, gain²/fan-in); 0: at N(0, 0.02²) as published
            position_std=0.0,  # spread of the position tables at the start; 0: 1/sqrt(width) as published
            adaptive_scale_init=0.0,  # bias of the adaptive group norms' scale; 1 trains faster from scratch
            encoder_width=512,
            encoder_depth=6,
            encoder_heads=8,
            decoder_width=512,
            decoder_depth=6,
            decoder_heads=8,
            bottleneck="vq",  # or "kl", with a codebook_size of 0
            codebook_size=16384,
            code_dim=8,
            codebook_chunk=4096,  # entries whose distances are in memory at once
            estimator="rotation",  # or "straight_through"
            distill_layer=3,  # decoder layer whose output the semantic loss reads
            teacher_dim=768,  # width of the semantic teacher (DINOv2-B); 0: no distillation head
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the ViTs' layers; or "dots", "none"
            remat_convs=True,  # residual blocks keep their input only
            unroll=1,  # layers per scan iteration
        )
    )


def llamagen_tokenizer() -> ConfigDict:
    """The `tokenizer` section of LlamaGen; sizes are those of VQ-16 at 256 px."""
    return ConfigDict(
        dict(
            family="llamagen",
            image_size=256,
            num_latent_tokens=256,  # the grid's cells, in raster order
            features=256,  # channels of the feature map
            conv_base=128,
            conv_multipliers=(1, 1, 2, 2, 4),
            encoder_conv_blocks=2,
            decoder_conv_blocks=3,
            norm_groups=32,
            kernel_gain=0.0,  # kernels start at N(0, gain²/fan-in); 0: at N(0, 0.02²)
            bottleneck="vq",  # or "kl", with a codebook_size of 0
            codebook_size=16384,
            code_dim=8,
            codebook_chunk=4096,  # entries whose distances are in memory at once
            estimator="straight_through",  # or "rotation"
            teacher_dim=0,  # it has no distillation head
            attention="xla",  # of the middle blocks: plain products
            remat_convs=True,  # residual blocks keep their input only
        )
    )


def maskgit_vqgan_tokenizer() -> ConfigDict:
    """The `tokenizer` section of MaskGIT-VQGAN; sizes are those of the published f16 at 256 px."""
    return ConfigDict(
        dict(
            family="maskgit_vqgan",
            image_size=256,
            num_latent_tokens=256,  # the grid's cells, in raster order
            conv_base=128,
            conv_multipliers=(1, 1, 2, 2, 4),
            encoder_conv_blocks=2,
            decoder_conv_blocks=2,
            norm_groups=32,
            kernel_gain=0.0,  # kernels start at N(0, gain²/fan-in); 0: at N(0, 0.02²)
            bottleneck="vq",  # or "kl", with a codebook_size of 0
            codebook_size=1024,
            code_dim=256,  # channels of the decoder's map too
            normalized=False,  # latents and codes are unit vectors
            codebook_chunk=1024,  # entries whose distances are in memory at once
            estimator="straight_through",  # or "rotation"
            teacher_dim=0,  # it has no distillation head
            remat_convs=True,  # residual blocks keep their input only
        )
    )


def small_gigatok_tokenizer(layout: str) -> ConfigDict:
    """A GigaTok section that a laptop trains: 32 px, 64 latent tokens, narrow convolutions, no distillation head."""
    section = gigatok_tokenizer()
    section.update(
        layout=layout,
        image_size=32,
        num_latent_tokens=64,
        features=64,
        conv_base=16,
        conv_multipliers=(1, 1, 2),
        encoder_conv_blocks=1,
        decoder_conv_blocks=1,
        norm_groups=4,
        codebook_size=512,
        teacher_dim=0,
        # A narrow network needs louder kernels and positions than the published ones, which suit widths of 512.
        kernel_gain=1.0,
        position_std=1.5,
        adaptive_scale_init=1.0,
        remat="none",
        remat_convs=False,
        unroll=2,
    )
    for side in ("encoder", "decoder"):
        section.update({f"{side}_width": 128, f"{side}_depth": 2, f"{side}_heads": 4})
    return section


def titok_tokenizer() -> ConfigDict:
    """The `tokenizer` section of TiTok; sizes are those of L-32 as released, with its pixel decoder."""
    return ConfigDict(
        dict(
            family="titok",
            image_size=256,
            patch=16,
            num_latent_tokens=32,
            encoder_width=1024,
            encoder_depth=24,
            encoder_heads=16,
            decoder_width=1024,
            decoder_depth=24,
            decoder_heads=16,
            # Kernels start at N(0, gain²/fan-in), the last convolution as a rotation, grey patches at 0; or, for a gain
            # of 0, as published: at N(0, 0.02²) and Xavier's.
            kernel_gain=0.0,
            position_std=0.0,  # spread of learned tokens and positions at the start; 0: 1/sqrt(width) as published
            legacy=True,  # the latent tokens' numbers are read as D × K before their projection (two-stage models)
            bottleneck="vq",  # or "kl", with a codebook_size of 0
            codebook_size=4096,
            code_dim=12,
            normalized=True,  # latents and codes are unit vectors
            clustering=False,  # pull entries that are seldom used to the batch's latents (TA-TiTok)
            codebook_chunk=4096,  # entries whose distances are in memory at once
            estimator="straight_through",  # or "rotation"
            distill_layer=3,  # decoder layer whose output the semantic loss reads
            teacher_dim=0,  # width of the semantic teacher; 0: no distillation head
            head="proxy_pixels",  # or "proxy" (ids of the proxy tokenizer), "pixels"
            proxy_codebook_size=1024,  # of MaskGIT-VQGAN, and so on
            proxy_code_dim=256,
            proxy_normalized=False,
            proxy_conv_base=128,
            proxy_conv_multipliers=(1, 1, 2, 2, 4),
            proxy_decoder_conv_blocks=2,
            proxy_norm_groups=32,
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the ViTs' layers; or "dots", "none"
            remat_convs=True,
            unroll=1,  # layers per scan iteration
        )
    )


def small_titok_tokenizer() -> ConfigDict:
    """A single-stage TiTok section that a laptop trains: 32 px in patches of 8, 64 latent tokens of 512 codes.

    Its proxy fields are those of `configs/maskgit_vqgan.py:cpu-tiny`.
    """
    section = titok_tokenizer()
    section.update(image_size=32, patch=8, num_latent_tokens=64, legacy=False, head="pixels", remat="none", unroll=2)
    section.update(codebook_size=512, code_dim=8, estimator="rotation", remat_convs=False)
    section.update(kernel_gain=1.0, position_std=0.3)  # as for GigaTok's, but here positions enter the sum
    section.update(proxy_codebook_size=256, proxy_code_dim=8, proxy_conv_base=16, proxy_conv_multipliers=(1, 1, 2))
    section.update(proxy_decoder_conv_blocks=1, proxy_norm_groups=1, proxy_normalized=True)
    for side in ("encoder", "decoder"):
        section.update({f"{side}_width": 128, f"{side}_depth": 2, f"{side}_heads": 4})
    return section


def set_vit(cfg: ConfigDict, side: str, size: str) -> None:
    """Gives the `side` ("encoder" or "decoder") ViT of a tokenizer section a named size of its family."""
    width, depth, heads = TOKENIZERS[cfg.family].sizes[size]
    cfg.update({f"{side}_width": width, f"{side}_depth": depth, f"{side}_heads": heads})


class Tokenizers(NamedTuple):
    """What is known of a family of tokenizers by its sections; `tokenizers.families` builds them.

    section: its fields with their defaults.   sizes: of its ViTs, by name.
    added: fields that it has got since bundles were written, and the value that these were made with.
    no_images: a section → why its decoder makes no images; empty where it does.
    """

    section: Callable[[], ConfigDict]
    sizes: Mapping[str, tuple[int, int, int]] = {}
    added: Mapping[str, Any] = {}
    no_images: Callable[[Mapping[str, Any]], str] = lambda section: ""


def _logits(section: Mapping[str, Any]) -> str:
    return "tokenizer.head=proxy gives logits of ids, not images" if section["head"] == "proxy" else ""


TOKENIZERS = {
    "gigatok": Tokenizers(gigatok_tokenizer, VIT_SIZES, added={"bottleneck": "vq"}),
    "llamagen": Tokenizers(llamagen_tokenizer, added={"bottleneck": "vq"}),
    "titok": Tokenizers(titok_tokenizer, TITOK_SIZES, no_images=_logits),
    "maskgit_vqgan": Tokenizers(maskgit_vqgan_tokenizer, added={"bottleneck": "vq"}),
}
