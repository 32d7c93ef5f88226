"""After the quickstart's tokenizer: ids of photographs, a tiny generator of them, its images, and a page about it all.

    python -m gigatok_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m gigatok_jax.pipeline --config=configs/pipelines/quickstart.py --run=runs/quickstart

Hardware and result: see `configs/quickstart_ar.py`.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.pipeline()
    cfg.encode_train = dict(source="photographs", crop="scale", num_views=2048, flip=True, permute_channels=True)
    cfg.encode_eval = dict(source="photographs", split="eval", tiles=256)
    cfg.train_generator = dict(config="configs/quickstart_ar.py")
    return cfg.lock()
