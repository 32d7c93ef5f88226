"""After TiTok's tiny tokenizer: ids of photographs, a masked generator of them, its images, and a page about it all.

    python -m gigatok_jax.train --config=configs/titok.py:cpu-tiny --workdir=runs/titok
    python -m gigatok_jax.pipeline --config=configs/pipelines/titok.py --run=runs/titok

Hardware and result: see `configs/masked.py`.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.pipeline()
    cfg.encode_train = dict(source="photographs", crop="scale", num_views=4096, flip=True, permute_channels=True)
    cfg.encode_eval = dict(source="photographs", split="eval", tiles=256)
    cfg.train_generator = dict(config="configs/masked.py:cpu-tiny-titok")
    cfg.sample = dict(scale=0.0, num_steps=16, temperature=3.0)  # one class: nothing to guide by
    return cfg.lock()
