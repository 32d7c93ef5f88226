"""A tiny AR generator of photographs' ids, over those of `configs/quickstart.py`'s tokenizer."""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.ar()
    cfg.update(num_steps=1000, global_batch=32, dtype="float32")
    cfg.generator.update(width=128, depth=3, heads=4, codebook_size=512, num_latent_tokens=64, num_classes=1)
    cfg.generator.update(remat="none", unroll=3, class_dropout=0.0)
    cfg.groups.generator.update(learning_rate=1e-3, warmup_steps=50)
    cfg.data.update(root="runs/quickstart/tokens", eval_source="tokens", eval_root="runs/quickstart/tokens")
    cfg.data.num_threads = 1
    cfg.log.every = 10
    cfg.eval.update(every=250, num_images=256)
    cfg.checkpoint.every = 500
    return cfg.lock()
