"""GigaTok tokenizers at every published size (arXiv 2504.08736; recipes of the released yamls).

    python -m gigatok_jax.train --config=configs/gigatok.py:b-l --config.data.root=imagenet/train --workdir=runs/b-l

Sizes: s-s, s-b, b-s, s-l, b-l, b-l-dino-disc, b-l-new (the authors' recommended recipe), xl-xxl, 2d-s-s (the yaml as
released: self + cross layers), 2d-s-s-paper (plain ViT layers, as the paper's table), 2d-s-b, 2d-b-l, and tiny ones for
a CPU: cpu-tiny, 2d-cpu-tiny. Default: s-s.

Hardware: not yet measured here; the published runs used global batches of 128 and 256 on GPU clusters.
Expected result: not yet measured here.
"""

from ml_collections import ConfigDict

from gigatok_jax import config

EPOCH = 5000 * 256  # images the published scripts count as one epoch

# encoder, decoder, batch, epochs; B-S and S-L have no released yaml: they follow S-B's and B-L's recipes.
SIZES = {
    "s-s": ("small", "small", 128, 100),
    "s-b": ("small", "base", 128, 200),
    "b-s": ("base", "small", 128, 200),
    "s-l": ("small", "large", 256, 200),
    "b-l": ("base", "large", 256, 200),
    "b-l-dino-disc": ("base", "large", 256, 200),
    "b-l-new": ("base", "large", 256, 200),
    "xl-xxl": ("xl", "xxl", 256, 300),
    "2d-s-s": ("small", "small", 128, 100),
    "2d-s-s-paper": ("small", "small", 128, 100),
    "2d-s-b": ("small", "base", 128, 200),
    "2d-b-l": ("base", "large", 256, 200),
}


def get_config(size: str = "s-s") -> ConfigDict:
    """The locked config of a size.

    Raises:
      ValueError: for a size that is not listed.
    """
    if size in ("cpu-tiny", "2d-cpu-tiny"):
        return cpu_tiny("2d" if size.startswith("2d") else "1d")
    if size not in SIZES:
        raise ValueError(f"configs/gigatok.py:{size}: sizes are {', '.join([*SIZES, 'cpu-tiny', '2d-cpu-tiny'])}")
    cfg = config.base()
    encoder, decoder, cfg.global_batch, epochs = SIZES[size]
    cfg.num_steps = epochs * EPOCH // cfg.global_batch
    config.set_vit(cfg.tokenizer, "encoder", encoder)
    config.set_vit(cfg.tokenizer, "decoder", decoder)
    if size.startswith("2d"):
        cfg.tokenizer.layout = "2d"
        cfg.tokenizer.layer_2d = "qformer" if size == "2d-s-s" else "vit"
    if size in ("b-l-new", "xl-xxl", "2d-b-l"):
        cfg.loss.entropy_weight = 0.005
    if size in ("b-l-new", "xl-xxl"):
        cfg.loss.direct = False
        for group in cfg.groups.values():
            group.warmup_steps = 5000
    if size == "b-l-new":
        cfg.tokenizer.estimator = "straight_through"
    if size == "xl-xxl":
        cfg.loss.auxiliary_end = 0
    if size == "b-l-dino-disc":
        cfg.discriminator.name = "dino"
        cfg.loss.discriminator_start = 80_000
    return cfg.lock()


def cpu_tiny(layout: str) -> ConfigDict:
    """A tokenizer that a laptop trains, without frozen networks."""
    cfg = config.base()
    cfg.update(num_steps=2000, global_batch=8, dtype="float32")
    cfg.tokenizer = config.small_gigatok_tokenizer(layout)
    cfg.loss.update(perceptual_weight=0.0, semantic_weight=0.0, entropy_weight=0.02, auxiliary_end=1000)
    cfg.loss.discriminator_start = 10**9
    cfg.groups.tokenizer.update(learning_rate=1e-3, warmup_steps=50, clip=1.0)
    cfg.data.update(num_threads=2, prefetch=8)
    return cfg.lock()
