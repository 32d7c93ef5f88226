"""Masked generators of ids, as TiTok trains them (arXiv 2406.07550): MaskGIT's way, over any tokenizer's ids.

    python -m gigatok_jax.train --config=configs/masked.py:l-32 --config.first_stage.bundle=TOKENIZER \\
        --config.data.source=imagenet2012 --config.data.eval_source=imagenet2012 --workdir=runs/masked-l-32
    python -m gigatok_jax.export --checkpoint=runs/masked-l-32 --bundle=bundles/masked-l-32
    python -m gigatok_jax.sample --generator=bundles/masked-l-32 --tokenizer=TOKENIZER --labels=random --out=samples

or from stored ids, as in `configs/ar.py`. Sizes are named by the tokenizers whose ids they write: l-32 (BERT of 177M
parameters, the default), b-64 (the same), s-128 (U-ViT of 295M). For a laptop there are cpu-tiny, over the ids of
`configs/gigatok.py:cpu-tiny`, and cpu-tiny-titok, over those of `configs/titok.py:cpu-tiny`. Another tokenizer's ids
need its --config.generator.codebook_size and --config.generator.num_latent_tokens. Published evaluation samples l-32 as
`sample` does by default; and

    python -m gigatok_jax.sample --num_steps=8 --scale=3 --temperature=11 --schedule=linear \\
        --generator=bundles/masked-b-64 --tokenizer=TOKENIZER --out=samples
    python -m gigatok_jax.sample --num_steps=64 --scale=6.9 --temperature=2.8 --schedule=power-cosine \\
        --generator=bundles/masked-s-128 --tokenizer=TOKENIZER --out=samples

cpu-tiny-titok is trained on the quickstart's photographs and sampled, by a pipeline after the tokenizer's run:

    python -m gigatok_jax.train --config=configs/titok.py:cpu-tiny --workdir=runs/titok
    python -m gigatok_jax.pipeline --config=configs/pipelines/titok.py --run=runs/titok

Hardware: an accelerator, where gFID 2.77, 2.48 and 1.97 over 256 px ImageNet are published; here not yet measured. The
tiny ones: 2 CPU cores; cpu-tiny-titok's pipeline takes 5 min 10 s beside other work. Expected result of it (seed 0):
2.17 nats per masked id of 256 tiles of each held-out picture, each position's own distribution of training ids 3.22.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(size: str = "l-32") -> ConfigDict:
    """The locked config of a size.

    Raises:
      ValueError: for a size that is not known.
    """
    if size == "cpu-tiny-titok":
        return _cpu_tiny_titok()
    if size != "cpu-tiny":
        return config.masked(size).lock()
    cfg = config.masked("l-32")
    cfg.update(num_steps=200, global_batch=16, dtype="float32")
    tokenizer = config.small_gigatok_tokenizer("1d")
    cfg.generator.update(width=64, depth=2, heads=4, remat="none", num_classes=1)
    cfg.generator.update({name: tokenizer[name] for name in ("codebook_size", "num_latent_tokens")})
    cfg.groups.generator.update(learning_rate=1e-3, warmup_steps=20)
    cfg.log.every = 10
    cfg.eval.update(every=100, num_images=64)
    cfg.checkpoint.every = 100
    return cfg.lock()


def _cpu_tiny_titok() -> ConfigDict:
    """A generator of photographs that a laptop trains, over the ids of `configs/titok.py:cpu-tiny`."""
    cfg = config.masked("l-32")
    cfg.update(num_steps=3000, global_batch=16, dtype="float32")
    tokenizer = config.small_titok_tokenizer()
    cfg.generator.update({name: tokenizer[name] for name in ("codebook_size", "num_latent_tokens")})
    # So short a training sees every crop about once: dropout would only slow it. One class needs no null class.
    cfg.generator.update(width=128, depth=3, heads=4, num_classes=1, dropout=0.0, class_dropout=0.0)
    cfg.generator.update(remat="none", unroll=3)
    cfg.groups.generator.update(learning_rate=1e-3, warmup_steps=100, ema=0.99)
    cfg.data.update(root="runs/titok/tokens", eval_source="tokens", eval_root="runs/titok/tokens", num_threads=1)
    cfg.log.every = 10
    cfg.eval.update(every=1000, num_images=256)
    cfg.checkpoint.every = 500
    return cfg.lock()
