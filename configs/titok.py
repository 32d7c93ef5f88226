"""TiTok tokenizers at every published size (arXiv 2406.07550; recipes of the released yamls, batch 256).

    python -m gigatok_jax.train --config=configs/titok.py:bl-64-vq --config.data.root=imagenet/train --workdir=runs/bl64

Single stage, pixels from the first step: bl-64-vq, bl-128-vq, sl-256-vq, and continuous latents ll-32-kl, bl-64-kl,
bl-128-kl. Two stages: l-32, b-64, s-128 are the released models with their pixel decoder (stage 2); l-32-stage1 and so
on learn the ids of a proxy tokenizer first, whose bundle --config.first_stage.bundle names, and joined with it are what
--config.start.bundle of stage 2 names. At 512 px, of which neither weights nor code are published: l-64-512, b-128-512,
after a proxy tokenizer of 512 px and 1,024 ids an image: `convert --from=maskgit-vqgan` makes one of the weights of
256 px with --fields='{"image_size": 512, "num_latent_tokens": 1024}'. On a laptop, on the quickstart's photographs:
cpu-tiny (single stage), cpu-tiny-kl, and in two stages, as at any size,

    python -m gigatok_jax.train --config=configs/maskgit_vqgan.py:cpu-tiny --workdir=runs/proxy
    python -m gigatok_jax.export --checkpoint=runs/proxy --bundle=runs/proxy/bundle
    python -m gigatok_jax.train --config=configs/titok.py:cpu-tiny-stage1 --workdir=runs/titok-stage1 \\
        --config.first_stage.bundle=runs/proxy/bundle
    python -m gigatok_jax.export --checkpoint=runs/titok-stage1 --proxy=runs/proxy/bundle \\
        --bundle=runs/titok-stage1/bundle
    python -m gigatok_jax.train --config=configs/titok.py:cpu-tiny-stage2 --workdir=runs/titok-stage2 \\
        --config.start.bundle=runs/titok-stage1/bundle

A masked generator of cpu-tiny's ids: `configs/pipelines/titok.py`.

Hardware: the published runs used 32 to 64 A100s; not yet measured here. The small ones take 2 CPU cores 3 to 5 minutes
each, the proxy tokenizer one. Expected result of these (seed 0), on held-out crops whose own mean colours give 17.4 dB:
cpu-tiny 20.7 dB, cpu-tiny-kl 24.2 dB, stage 1 17.7 dB as the proxy decodes it, stage 2 19.0 dB; codebook usage 96 to
99 %.
"""

from ml_collections import ConfigDict

from gigatok_jax import config

# encoder, decoder, latent tokens
TWO_STAGES = {
    "l-32": ("large", "large", 32),
    "b-64": ("base", "base", 64),
    "s-128": ("small", "small", 128),
    "l-64-512": ("large", "large", 64),
    "b-128-512": ("base", "base", 128),
}
SINGLE_STAGE = {
    "bl-64-vq": ("base", "large", 64),
    "bl-128-vq": ("base", "large", 128),
    "sl-256-vq": ("small", "large", 256),
    "ll-32-kl": ("large", "large", 32),
    "bl-64-kl": ("base", "large", 64),
    "bl-128-kl": ("base", "large", 128),
}
TINY = ("cpu-tiny", "cpu-tiny-kl", "cpu-tiny-stage1", "cpu-tiny-stage2")
# Matrices, but neither norms, biases, tokens, tables of positions or codes, nor the layers that embed.
DECAYED = r"(?!.*(embed|norm|codebook|_pos|token)).*kernel"


def get_config(size: str = "l-32") -> ConfigDict:
    """The locked config of a size.

    Raises:
      ValueError: for a size that is not listed.
    """
    if size in TINY:
        return cpu_tiny(size)
    name = size.removesuffix("-stage1")
    known = {**TWO_STAGES, **SINGLE_STAGE}
    if name not in known or (name != size and name not in TWO_STAGES):
        stages = [f"{name}{stage}" for name in TWO_STAGES for stage in ("", "-stage1")]
        raise ValueError(f"configs/titok.py:{size}: sizes are {', '.join([*stages, *SINGLE_STAGE, *TINY])}")
    cfg = config.base()
    cfg.update(global_batch=256, num_steps=1_000_000)
    cfg.tokenizer = config.titok_tokenizer()
    encoder, decoder, cfg.tokenizer.num_latent_tokens = known[name]
    config.set_vit(cfg.tokenizer, "encoder", encoder)
    config.set_vit(cfg.tokenizer, "decoder", decoder)
    if name.endswith("-512"):
        cfg.tokenizer.update(image_size=512, patch=32)
    # Published losses compare RGB in [0, 1]: a quarter of the same squares in [−1, 1].
    cfg.loss.update(pixel_weight=0.25, semantic_weight=0.0, entropy_weight=0.0, auxiliary_end=0)
    cfg.loss.update(feature_weight=0.0, direct=False)
    cfg.groups.tokenizer.update(warmup_steps=10_000, warmup_start=0.0, b2=0.999, clip=1.0, decayed=DECAYED)
    cfg.groups.tokenizer.update(ema=0.999, ema_warmup=True)
    cfg.groups.discriminator.update(b2=0.999, clip=1.0, decayed=DECAYED)
    cfg.discriminator.update(name="blur", base_channels=128)
    cfg.loss.update(discriminator_weight=1.0, lecam="of_means", lecam_weight=0.001)
    if name in SINGLE_STAGE:
        _single_stage(cfg, kl=name.endswith("-kl"))
    elif name == size:
        _second_stage(cfg)
    else:
        _first_stage(cfg)
    return cfg.lock()


def _single_stage(cfg: ConfigDict, kl: bool) -> None:
    """TA-TiTok's recipe, which the authors name for these."""
    cfg.tokenizer.update(legacy=False, head="pixels", normalized=False, codebook_size=8192, code_dim=64)
    if kl:
        cfg.tokenizer.update(bottleneck="kl", codebook_size=0, code_dim=16)
    cfg.loss.update(perceptual_weight=1.0, convnext_weight=0.1)
    cfg.loss.update(adversarial_weight=0.1, discriminator_start=200_000)


def _first_stage(cfg: ConfigDict) -> None:
    """The proxy's ids alone."""
    cfg.tokenizer.head = "proxy"
    cfg.discriminator.name = "none"
    cfg.loss.update(pixel_weight=0.0, perceptual_weight=0.0, lecam_weight=0.0)
    cfg.groups.tokenizer.b2 = 0.99


def _second_stage(cfg: ConfigDict) -> None:
    """Decoder fine-tuning: what makes ids stays as it is."""
    cfg.num_steps = 500_000
    cfg.loss.update(perceptual_weight=0.0, convnext_weight=0.1, codebook_weight=0.0, commitment_weight=0.0)
    cfg.loss.update(adversarial_weight=0.01, discriminator_start=20_000)
    cfg.groups.tokenizer.update(warmup_steps=5000, trainable="decoder/.*")


def cpu_tiny(size: str) -> ConfigDict:
    """A tokenizer of 32 px in 64 latent tokens, on the quickstart's photographs, without frozen networks."""
    cfg = config.base()
    cfg.update(num_steps=4000, global_batch=8, dtype="float32")
    cfg.tokenizer = config.small_titok_tokenizer()
    cfg.loss.update(perceptual_weight=0.0, semantic_weight=0.0, feature_weight=0.0, direct=False, auxiliary_end=0)
    cfg.loss.update(entropy_weight=0.02, discriminator_start=10**9)
    cfg.groups.tokenizer.update(
        learning_rate=1.5e-3, end_learning_rate=1e-5, warmup_steps=100, clip=1.0, decayed=DECAYED
    )
    cfg.data.update(source="photographs", eval_source="photographs", crop="scale", permute_channels=True)
    cfg.data.update(num_threads=1, prefetch=8)
    cfg.log.every = 10
    cfg.eval.update(every=1000, batch=64, num_images=128)
    cfg.checkpoint.every = 1000
    if "stage" in size:
        cfg.tokenizer.update(patch=4, legacy=True)  # cells as those of the proxy tokenizer
    if size.endswith("-kl"):
        cfg.tokenizer.update(bottleneck="kl", codebook_size=0)
        cfg.loss.entropy_weight = 0.0
    elif size.endswith("-stage1"):
        cfg.tokenizer.head = "proxy"
        cfg.loss.pixel_weight = 0.0
    elif size.endswith("-stage2"):
        cfg.tokenizer.head = "proxy_pixels"
        cfg.loss.update(codebook_weight=0.0, commitment_weight=0.0, entropy_weight=0.0)
        cfg.groups.tokenizer.trainable = "decoder/.*"
    return cfg.lock()
