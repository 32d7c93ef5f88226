"""MaskGIT's VQGAN (arXiv 2202.04200), f16 with 1,024 codes (54.5M): the proxy tokenizer of TiTok's first stage.

    python -m gigatok_jax.convert --from=maskgit-vqgan --in=maskgit-vqgan-imagenet-f16-256.bin \\
        --out=bundles/maskgit-vqgan
    python -m gigatok_jax.train --config=configs/maskgit_vqgan.py --config.data.root=imagenet/train \\
        --workdir=runs/maskgit-vqgan

The weights are `fun-research/TiTok`'s on Hugging Face (Apache-2.0). The published quantiser's loss has its 0.25 on the
codebook's term, not on the commitment; the rest of the training is the house's, since none is published with them.

Hardware: not yet measured here. Expected result: not yet measured here.
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config() -> ConfigDict:
    """The locked config."""
    cfg = config.base()
    cfg.schedule = "constant"
    cfg.tokenizer = config.maskgit_vqgan_tokenizer()
    cfg.loss.update(codebook_weight=0.25, commitment_weight=1.0)
    cfg.loss.update(semantic_weight=0.0, feature_weight=0.0, direct=False, auxiliary_end=0)
    return cfg.lock()
