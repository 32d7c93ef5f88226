"""A 1-D GigaTok tokenizer on real photographs, on a laptop.

    python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Trains on the nine colour pictures in scikit-image's wheel and evaluates on tiles of the two in scikit-learn's, so
whole photographs are held out. `configs/quickstart.py:2d` is the 2-D tokenizer.

Hardware: 2 CPU cores, 3 to 5 minutes. Expected result (seed 0) on held-out crops whose own mean colours give 17.4 dB:
1-D 21.2 dB, 2-D 21.9 dB; codebook usage 98 %.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(layout: str = "1d") -> ConfigDict:
    """The locked config of a layout, "1d" or "2d"."""
    cfg = config.base()
    cfg.update(num_steps=2000, global_batch=8, dtype="float32")
    cfg.tokenizer = config.small_gigatok_tokenizer(layout)
    cfg.loss.update(perceptual_weight=0.0, semantic_weight=0.0, entropy_weight=0.02)
    # The published shortcut trick, for half of the run: it starts the convolutions.
    cfg.loss.update(auxiliary_end=1000)
    # A last phase with a small PatchGAN: at full width its step would take five times as long. LPIPS, which usually
    # stands beside it, would need 64 MB of weights fetched first: see configs/emoji.py.
    cfg.loss.update(discriminator_start=1601, adversarial_weight=0.02)
    cfg.discriminator.update(base_channels=16, num_layers=2)
    cfg.groups.tokenizer.update(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=50, clip=1.0)
    cfg.data.update(
        source="photographs", eval_source="photographs", crop="scale", permute_channels=True, num_threads=1, prefetch=8
    )
    cfg.log.every = 10
    cfg.eval.update(every=500, batch=64, num_images=128)
    cfg.checkpoint.every = 500
    return cfg.lock()
