"""After the emoji tokenizer: ids of emoji, a small generator of them, its images, and a page about it all.

    python -m gigatok_jax.train --config=configs/emoji.py --workdir=runs/emoji
    python -m gigatok_jax.pipeline --config=configs/pipelines/emoji.py --run=runs/emoji

The stages' own commands are in `configs/emoji_ar.py`, with what to expect of them.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.pipeline()
    cfg.encode_train = dict(source="emoji", crop="adm", num_views=8, flip=True)
    cfg.encode_eval = dict(source="emoji", split="eval")
    cfg.train_generator = dict(config="configs/emoji_ar.py")
    cfg.sample = dict(scale=2.0)
    return cfg.lock()
