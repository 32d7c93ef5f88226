"""LlamaGen's VQ tokenizers (arXiv 2406.06525, Table 1): VQ-16 (72M) and VQ-8 (70M).

    python -m gigatok_jax.convert --from=llamagen --in=vq_ds16_c2i.pt --out=bundles/llamagen-vq-16
    python -m gigatok_jax.train --config=configs/llamagen.py:vq-16 --config.data.root=imagenet/train \\
        --workdir=runs/vq-16

Published training: 40 epochs of ImageNet at 256 px, batch 128, LPIPS and a PatchGAN from step 20,000, no teacher.

Hardware: not yet measured here. Expected result: not yet measured here.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(size: str = "vq-16") -> ConfigDict:
    """The locked config of a size, "vq-16" or "vq-8".

    Raises:
      ValueError: for another.
    """
    if size not in ("vq-16", "vq-8"):
        raise ValueError(f"configs/llamagen.py:{size}: sizes are vq-16, vq-8")
    cfg = config.base()
    cfg.update(num_steps=40 * 1_281_167 // 128, schedule="constant")
    cfg.tokenizer = config.llamagen_tokenizer()
    if size == "vq-8":
        cfg.tokenizer.update(conv_multipliers=(1, 2, 2, 4), num_latent_tokens=1024)
    cfg.loss.update(semantic_weight=0.0, feature_weight=0.0, direct=False, auxiliary_end=0)
    cfg.groups.tokenizer.update(weight_decay=0.05, clip=1.0)
    cfg.groups.discriminator.update(weight_decay=0.05, clip=1.0)
    return cfg.lock()
