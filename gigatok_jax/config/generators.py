"""The `generator` section of every family."""

from ml_collections import ConfigDict

GPT_SIZES = {  # width, layers, heads (GigaTok's code; arXiv 2406.06525, Table 1)
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "1b": (2048, 22, 32),
    "3b": (3200, 24, 32),
    "xxxl": (2560, 48, 40),
    "7b": (4096, 32, 32),
}

MASKED_SIZES = {  # architecture, width, layers, heads, ids (TiTok's code); U-ViT has one layer more in the middle
    "l-32": ("bert", 768, 24, 16, 32),
    "b-64": ("bert", 768, 24, 16, 64),
    "s-128": ("uvit", 1024, 20, 16, 128),
}


def ar_generator(size: str = "b") -> ConfigDict:
    """The `generator` section of an autoregressive generator of a named size over 256 ids of 16,384.

    Raises:
      ValueError: for a size that is not in `GPT_SIZES`.
    """
    if size not in GPT_SIZES:
        raise ValueError(f"an AR generator of size {size!r} is not one of {', '.join(GPT_SIZES)}")
    width, depth, heads = GPT_SIZES[size]
    return ConfigDict(
        dict(
            family="ar",
            width=width,
            depth=depth,
            heads=heads,
            hidden_multiple=256,  # the SwiGLU's width, 8/3 of the layer's, is rounded up to a multiple of this
            codebook_size=16384,
            num_latent_tokens=256,
            num_classes=1000,
            class_dropout=0.1,  # share of training rows that see the null class
            dropout=0.1,  # of embedded ids, and of both branches of every layer
            positions="learned",  # or "rope_2d" (LlamaGen)
            modulation="none",  # or "adaln", "shared_adaln"
            qk_norm=False,
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the layers; or "dots", "none"
            unroll=1,  # layers per scan iteration
        )
    )


def masked_generator(size: str = "l-32") -> ConfigDict:
    """The `generator` section of a masked generator of a named size over ids of 4,096.

    Raises:
      ValueError: for a size that is not in `MASKED_SIZES`.
    """
    if size not in MASKED_SIZES:
        raise ValueError(f"a masked generator of size {size!r} is not one of {', '.join(MASKED_SIZES)}")
    architecture, width, depth, heads, num_latent_tokens = MASKED_SIZES[size]
    return ConfigDict(
        dict(
            family="masked",
            architecture=architecture,  # "bert" (post-norm) or "uvit" (pre-norm, long skips)
            width=width,
            depth=depth,  # of "uvit": half on each side of a middle layer
            heads=heads,
            hidden=0,  # width of the MLPs; 0: four times that of the layer
            codebook_size=4096,
            num_latent_tokens=num_latent_tokens,
            num_classes=1000,
            class_dropout=0.1,  # share of training rows that see the null class
            dropout=0.1 if architecture == "bert" else 0.0,  # of embeddings, attention's weights and both branches
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the layers; or "dots", "none"
            unroll=1,  # layers per scan iteration
        )
    )
