"""Autoregressive generators of ids, as GigaTok trains them (arXiv 2504.08736, §4; sizes of its code and of LlamaGen).

    python -m gigatok_jax.train --config=configs/ar.py:b --config.first_stage.bundle=TOKENIZER \\
        --config.data.source=imagenet2012 --config.data.eval_source=imagenet2012 --workdir=runs/ar-b

makes the ids inside the step, from random crops and flips, as the published runs do. Their other way is ids of stored
crops, one of a picture's ten or, of two sets, twenty:

    python -m gigatok_jax.encode --bundle=TOKENIZER --source=imagenet2012 --crop=ten_crop --out=tokens/train
    python -m gigatok_jax.encode --bundle=TOKENIZER --source=imagenet2012 --crop=ten_crop --crop_range=1.05 \\
        --out=tokens/train105
    python -m gigatok_jax.encode --bundle=TOKENIZER --source=imagenet2012 --split=eval --out=tokens/eval
    python -m gigatok_jax.train --config=configs/ar.py:b --config.data.root=tokens/train,tokens/train105 \\
        --config.data.eval_source=tokens --config.data.eval_root=tokens/eval --workdir=runs/ar-b

Sizes: b (default), l, xl, xxl, 1b, 3b, xxxl, 7b. `--config.generator.positions=rope_2d` is LlamaGen's form. The
published runs take 1.5M steps of 256 images, xxl 750,000 of 512. AR probing: the size b, 250,000 steps,
`--config.schedule=constant --config.groups.generator.warmup_steps=0`.

Hardware: an accelerator. Expected result: not yet measured.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(size: str = "b") -> ConfigDict:
    """The locked config of a size.

    Raises:
      ValueError: for a size that is not known.
    """
    cfg = config.ar(size)
    if size == "xxl":
        cfg.update(num_steps=750_000, global_batch=512)
    return cfg.lock()
