"""MaskGIT's VQGAN (arXiv 2202.04200), f16 with 1,024 codes (54.5M): the proxy tokenizer of TiTok's first stage.

    python -m gigatok_jax.convert --from=maskgit-vqgan --in=maskgit-vqgan-imagenet-f16-256.bin \\
        --out=bundles/maskgit-vqgan
    python -m gigatok_jax.train --config=configs/maskgit_vqgan.py --config.data.root=imagenet/train \\
        --workdir=runs/maskgit-vqgan

    python -m gigatok_jax.train --config=configs/maskgit_vqgan.py:cpu-tiny --workdir=runs/proxy

The last is a small one on the quickstart's photographs, for a laptop. The weights are those of `fun-research/TiTok`
on Hugging Face (Apache-2.0). The published quantiser's loss has its 0.25 on the codebook's term, not on the
commitment; the rest of the training is the house's, since none is published with them.

Hardware: f16 not yet measured here; cpu-tiny takes 2 CPU cores 40 s. Expected result (seed 0): 20.7 dB on held-out
crops whose own mean colours give 17.4 dB; codebook usage 99 %.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(size: str = "f16") -> ConfigDict:
    """The locked config of a size, "f16" or "cpu-tiny".

    Raises:
      ValueError: for another.
    """
    if size not in ("f16", "cpu-tiny"):
        raise ValueError(f"configs/maskgit_vqgan.py:{size}: sizes are f16, cpu-tiny")
    cfg = config.base()
    cfg.schedule = "constant"
    cfg.tokenizer = config.maskgit_vqgan_tokenizer()
    cfg.loss.update(codebook_weight=0.25, commitment_weight=1.0)
    cfg.loss.update(semantic_weight=0.0, feature_weight=0.0, direct=False, auxiliary_end=0)
    if size == "cpu-tiny":
        _cpu_tiny(cfg)
    return cfg.lock()


def _cpu_tiny(cfg: ConfigDict) -> None:
    """A proxy tokenizer of 32 px that a laptop trains on the quickstart's photographs, without frozen networks."""
    cfg.update(num_steps=2000, global_batch=8, dtype="float32", schedule="cosine")
    cfg.tokenizer.update(image_size=32, num_latent_tokens=64, conv_base=16, conv_multipliers=(1, 1, 2), norm_groups=1)
    cfg.tokenizer.update(encoder_conv_blocks=1, decoder_conv_blocks=1, codebook_size=256, kernel_gain=1.0)
    # Plain entries keep to a line of greys in so short a run: of unit vectors, all colours are used.
    cfg.tokenizer.update(normalized=True, code_dim=8, remat_convs=False)
    cfg.loss.update(codebook_weight=1.0, commitment_weight=0.25, entropy_weight=0.02)
    cfg.loss.update(perceptual_weight=0.0, discriminator_start=10**9)
    cfg.groups.tokenizer.update(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=50, clip=1.0)
    cfg.data.update(source="photographs", eval_source="photographs", crop="scale", permute_channels=True)
    cfg.data.update(num_threads=1, prefetch=8)
    cfg.log.every = 10
    cfg.eval.update(every=1000, batch=64, num_images=128)
    cfg.checkpoint.every = 500
