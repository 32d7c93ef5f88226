"""A tiny AR generator of photographs, over the ids of `configs/quickstart.py`'s tokenizer, on a laptop.

    python -m gigatok_jax.pipeline --config=configs/pipelines/quickstart.py --run=runs/quickstart

or, one by one:

    python -m gigatok_jax.export --checkpoint=runs/quickstart --bundle=runs/quickstart/bundles/tokenizer
    python -m gigatok_jax.encode --bundle=runs/quickstart/bundles/tokenizer --source=photographs --crop=scale \\
        --num_views=2048 --flip --permute_channels --out=runs/quickstart/tokens/train
    python -m gigatok_jax.encode --bundle=runs/quickstart/bundles/tokenizer --source=photographs --split=eval \\
        --tiles=256 --out=runs/quickstart/tokens/eval
    python -m gigatok_jax.train --config=configs/quickstart_ar.py --workdir=runs/quickstart/generator
    python -m gigatok_jax.export --checkpoint=runs/quickstart/generator --bundle=runs/quickstart/bundles/generator
    python -m gigatok_jax.sample --generator=runs/quickstart/bundles/generator \\
        --tokenizer=runs/quickstart/bundles/tokenizer --out=runs/quickstart/samples

Trains on 2,048 crops of each of nine pictures and is scored on 256 fixed tiles of two others; photographs count as one
class. What is chosen below was chosen on pictures left out of the nine, never on the two: see README.

Hardware: 2 CPU cores, some minutes. Expected result (seed 0): 3.36 nats per id, where each position's own distribution
of training ids gives 5.40.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.ar()
    cfg.update(num_steps=1500, global_batch=16, dtype="float32")
    cfg.generator.update(width=128, depth=3, heads=4, codebook_size=512, num_latent_tokens=64, num_classes=1)
    # So short a training sees every crop about once: dropout would only slow it. One class needs no null class.
    cfg.generator.update(hidden_multiple=64, dropout=0.0, class_dropout=0.0, remat="none", unroll=3)
    cfg.groups.generator.update(learning_rate=2e-3, warmup_steps=50)
    cfg.data.update(root="runs/quickstart/tokens", eval_source="tokens", eval_root="runs/quickstart/tokens")
    cfg.data.num_threads = 1
    cfg.log.every = 10
    cfg.eval.update(every=500, num_images=256)
    cfg.checkpoint.every = 500
    return cfg.lock()
