"""A 1-D GigaTok tokenizer on real photographs, on a laptop.

    python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Trains on the nine colour pictures in scikit-image's wheel and evaluates on tiles of the two in scikit-learn's, so
whole photographs are held out. `configs/quickstart.py:2d` is the 2-D tokenizer.

Hardware: 2 CPU cores. Expected result: not yet measured.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(layout: str = "1d") -> ConfigDict:
    """The locked config of a layout, "1d" or "2d"."""
    cfg = config.base()
    cfg.num_steps, cfg.global_batch, cfg.dtype = 1000, 16, "float32"
    cfg.tokenizer.update(
        layout=layout,
        image_size=32,
        num_latent_tokens=64,
        features=64,
        conv_base=16,
        conv_multipliers=(1, 2, 4),
        encoder_conv_blocks=1,
        decoder_conv_blocks=1,
        norm_groups=8,
        codebook_size=512,
        teacher_dim=0,
        adaptive_scale_init=1.0,
        kernel_gain=1.0,
        remat="none",
    )
    for side in ("encoder", "decoder"):
        cfg.tokenizer.update({f"{side}_width": 128, f"{side}_depth": 2, f"{side}_heads": 4})
    cfg.loss.update(perceptual_weight=0.0, semantic_weight=0.0, auxiliary_end=0, direct=False, entropy_weight=0.05)
    cfg.loss.update(discriminator_start=10**9)
    cfg.groups.tokenizer.update(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=50, clip=1.0)
    cfg.data.update(source="photographs", eval_source="photographs", crop="scale", num_threads=1, prefetch=8)
    cfg.log.every = 10
    cfg.eval.update(every=500, batch=64, num_images=128)
    cfg.checkpoint.update(every=500)
    return cfg.lock()
