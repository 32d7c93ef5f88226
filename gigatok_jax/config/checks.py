"""What can be said about a config before anything is built."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gigatok_jax.config.tokenizers import TOKENIZERS

INF = float("inf")
# Least and greatest value of what has one; below or above, something far away would fail.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_steps", "global_batch", "accumulate", "max_skipped"), (1, INF)),
    **dict.fromkeys(("data.prefetch", "eval.batch", "eval.num_images", "eval.grid", "eval.unigram_images",
                     "checkpoint.keep_last"), (1, INF)),
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("data.num_threads", "data.num_workers", "log.every", "eval.every"), (0, INF)),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep_period", "loss.auxiliary_end"), (0, INF)),
    **dict.fromkeys((f"loss.{name}_weight" for name in ("pixel", "perceptual", "convnext", "semantic", "codebook",
                     "commitment", "entropy", "kl", "proxy", "feature", "adversarial", "discriminator", "lecam")),
                     (0, INF)),
    **dict.fromkeys(("loss.usage_window", "loss.discriminator_start"), (1, INF)),
    **dict.fromkeys((f"tokenizer.{side}_{size}" for side in ("encoder", "decoder")
                     for size in ("width", "depth", "heads")), (1, INF)),
    # What is built one by one ends somewhere.
    **dict.fromkeys(("tokenizer.encoder_conv_blocks", "tokenizer.decoder_conv_blocks", "discriminator.num_layers",
                     "discriminator.num_heads"), (1, 100)),
    **dict.fromkeys((f"tokenizer.{name}" for name in ("features", "conv_base", "conv_multipliers", "norm_groups",
                     "code_dim", "codebook_chunk", "unroll", "distill_layer", "patch")), (1, INF)),
    "tokenizer.codebook_size": (0, INF),  # 0: a bottleneck without ids
    **dict.fromkeys((f"tokenizer.proxy_{name}" for name in ("codebook_size", "code_dim", "conv_base",
                     "conv_multipliers", "decoder_conv_blocks", "norm_groups")), (1, INF)),
    # Tables are made of these.
    "tokenizer.image_size": (1, 4096),
    **dict.fromkeys(("tokenizer.num_latent_tokens", "generator.num_latent_tokens"), (1, 65_536)),
    **dict.fromkeys(("discriminator.base_channels", "discriminator.width"), (1, INF)),
    **dict.fromkeys((f"tokenizer.{name}" for name in ("kernel_gain", "position_std", "teacher_dim")), (0, INF)),
    **dict.fromkeys((f"groups.*.{name}" for name in ("learning_rate", "end_learning_rate", "warmup_steps", "eps",
                     "weight_decay", "clip")), (0, INF)),
    **dict.fromkeys((f"generator.{name}" for name in ("width", "depth", "heads", "hidden_multiple", "codebook_size",
                     "num_classes", "unroll")), (1, INF)),
    **dict.fromkeys(("generator.class_dropout", "generator.dropout", "loss.label_smoothing"), (0, 1)),
    **dict.fromkeys(("generator.hidden", "loss.unmasked_weight"), (0, INF)),
    **dict.fromkeys((f"groups.*.{name}" for name in ("b1", "b2", "ema", "warmup_start")), (0, 1)),
    "decay_fraction": (0, 1),
}  # fmt: skip
SEMANTIC_TEACHERS = (
    *(f"dinov2-{size}{kind}" for kind in ("", "-reg") for size in "sblg"),
    *("siglip-so400m", "dfn-clip-l", "vgg16"),
)
WITH_CODEBOOK, WITHOUT = ("vq",), ("kl",)  # bottlenecks
# What is one of a few names.
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("tokenizer", "ar", "masked"),
    "dtype": ("float32", "bfloat16"),
    "schedule": ("cosine", "constant", "wsd"),
    "loss.pixel": ("l1", "l2"),
    "loss.perceptual_network": ("vgg16", "alexnet"),
    "loss.semantic_teacher": SEMANTIC_TEACHERS,
    "frozen.dtype": ("float32", "bfloat16"),
    "eval.lpips": ("", "vgg16", "alexnet"),
    "loss.adversarial": ("hinge", "non_saturating"),
    "loss.discriminator": ("hinge", "vanilla", "non_saturating"),
    "loss.lecam": ("per_logit", "of_means"),
    "data.crop": ("adm", "scale", "center"),
    "sharding.preset": ("replicated", "fsdp", "fsdp+tensor"),
    "sharding.offload": ("none", "moments"),
    "tokenizer.attention": ("xla", "cudnn", "splash"),
    "discriminator.name": ("none", "patchgan", "blur", "dino"),
    "discriminator.pooling": ("blur", "average"),
    "discriminator.remat": ("none", "full", "dots"),
    "tokenizer.estimator": ("rotation", "straight_through"),
    "tokenizer.layout": ("1d", "2d"),
    "tokenizer.bottleneck": (*WITH_CODEBOOK, *WITHOUT),
    "tokenizer.head": ("pixels", "proxy", "proxy_pixels"),
    "tokenizer.layer_2d": ("vit", "qformer"),
    "tokenizer.remat": ("none", "full", "dots"),
    "generator.architecture": ("bert", "uvit"),
    "loss.mask_schedule": ("arccos", "cosine", "linear", "root"),
    "generator.attention": ("xla", "cudnn", "splash"),
    "generator.remat": ("none", "full", "dots"),
}


def to_json(cfg: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config as plain JSON data (tuples become lists)."""
    plain = cfg.to_dict() if isinstance(cfg, ConfigDict) else dict(cfg)
    return json.loads(json.dumps(plain))


def validate(cfg: ConfigDict, num_devices: int | None = None) -> None:
    """What can be known to be wrong before anything is built.

    Raises:
      ValueError: naming the field, its value and the mend.
    """
    check_fields(cfg, "config.")
    if cfg.global_batch % cfg.accumulate:
        raise ValueError(f"config.global_batch={cfg.global_batch} does not divide into accumulate={cfg.accumulate}")
    if cfg.eval.get("fid") and not cfg.data.eval_source:
        raise ValueError(
            "config.eval.fid=True, but nothing is evaluated: name held-out images with --config.data.eval_source"
        )
    if num_devices is not None:
        check_mesh(cfg, num_devices)
    if "generator" in cfg:
        _check_ids(cfg)
    elif "tokenizer" in cfg and "loss" in cfg:
        _check_losses(cfg)


def check_fields(cfg: ConfigDict | Mapping[str, Any], where: str) -> None:
    """Compares every field of the sections that are there with its bounds or its choices.

    Args:
      where: what stands before a field's name in an error.
    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    for field, (low, high) in BOUNDS.items():
        for value in _values(cfg, field):
            if isinstance(value, str) or not low <= value <= high:
                raise ValueError(
                    f"{where}{field}={value!r} must be at least {low}" + f" and at most {high}" * (high < INF)
                )
    for field, value in cfg["tokenizer"].items() if "tokenizer" in cfg else ():
        if field.endswith("conv_multipliers") and not value:
            raise ValueError(f"{where}tokenizer.{field} is empty; one number per convolution level is wanted")
    for field, allowed in CHOICES.items():
        for value in _values(cfg, field):
            if value not in allowed:
                raise ValueError(f"{where}{field}={value!r} is not one of {', '.join(allowed)}")


def _check_losses(cfg: ConfigDict) -> None:
    """Refuses losses of what a tokenizer has not."""
    tokenizer, loss, family = cfg.tokenizer, cfg.loss, cfg.tokenizer.family
    if family not in TOKENIZERS:
        raise ValueError(f"config.tokenizer.family={family!r} is not one of {', '.join(TOKENIZERS)}")
    continuous, no_images = tokenizer.bottleneck in WITHOUT, TOKENIZERS[family].no_images(tokenizer)
    no_codebook = f"a {tokenizer.bottleneck.upper()} bottleneck has no codebook"
    auxiliary = loss.auxiliary_end > 1 and (loss.direct or loss.feature_weight > 0)
    adversarial = cfg.discriminator.name != "none" and loss.discriminator_start <= cfg.num_steps
    wrong = {  # what may be asked for in vain, why, and the mend
        "loss.entropy_weight": (continuous and loss.entropy_weight, no_codebook, 0.0),
        "tokenizer.clustering": (continuous and tokenizer.get("clustering"), no_codebook, False),
        "loss.semantic_weight": (
            loss.semantic_weight and "distill_layer" not in tokenizer,
            f"the family {family} has no distillation head",
            0.0,
        ),
        "loss.auxiliary_end": (auxiliary and "conv_base" not in tokenizer, f"{family} has no convolutional map", 0),
        **{
            f"loss.{name}": (no_images and loss[name], no_images, 0.0)
            for name in ("perceptual_weight", "convnext_weight")
        },
        "discriminator.name": (no_images and adversarial, no_images, "none"),
    }
    for field, (asked, why, mend) in wrong.items():
        if asked:
            section, name = field.split(".")
            raise ValueError(f"config.{field}={cfg[section][name]!r}, but {why}: set --config.{field}={mend}")


def _check_ids(cfg: ConfigDict) -> None:
    """Refuses pictures that nothing makes ids of."""
    if cfg.first_stage.bundle and cfg.data.source != "tokens":
        return
    for field in ("source", "eval_source"):
        if cfg.data[field] not in ("tokens", ""):
            raise ValueError(
                f"config.data.{field}={cfg.data[field]!r} gives pictures, a generator reads ids: encode them with "
                f"`python -m gigatok_jax.encode` and set --config.data.{field}=tokens, or train on pictures with "
                "--config.first_stage.bundle=FOLDER of the tokenizer that makes ids of them"
            )


def _values(cfg: ConfigDict | Mapping[str, Any], field: str) -> list[Any]:
    """What stands at a dotted field: one value, those of every group for "groups.*.x", those of a tuple.

    None where this kind of config has no such section, or has less in it.
    """
    section, *rest = field.split(".")
    if section not in cfg or (rest and rest[0] != "*" and rest[0] not in cfg[section]):
        return []
    nodes: list[Any] = [cfg]
    for part in field.split("."):
        nodes = [child for node in nodes for child in (node.values() if part == "*" else [node[part]])]
    return [value for node in nodes for value in (node if isinstance(node, (tuple, list)) else [node])]


def mesh_sizes(cfg: ConfigDict, num_devices: int) -> dict[str, int]:
    """The mesh's axis sizes with −1 filled in.

    Raises:
      ValueError: if they do not multiply to the device count.
    """
    sizes = dict(cfg.mesh.to_dict())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"config.mesh={sizes}: an axis has at least 1 device, or -1 for all that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for size in sizes.values():
        fixed *= 1 if size == -1 else size
    if len(free) > 1 or num_devices % fixed:
        raise ValueError(f"config.mesh={sizes} does not fit {num_devices} devices; at most one axis may be -1")
    if free:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(f"config.mesh={sizes} has {fixed} devices, {num_devices} are there; set one axis to -1")
    return sizes


def check_mesh(cfg: ConfigDict, num_devices: int) -> dict[str, int]:
    """`mesh_sizes` of a config whose batch divides over them.

    Raises:
      ValueError: as `mesh_sizes`, or the microbatch does not divide over the data-parallel devices.
    """
    sizes = mesh_sizes(cfg, num_devices)
    shards, microbatch = sizes["data"] * sizes["fsdp"], cfg.global_batch // cfg.accumulate
    if microbatch % shards:
        raise ValueError(
            f"a microbatch of {microbatch} (global_batch={cfg.global_batch} / accumulate={cfg.accumulate}) does not "
            f"divide over data x fsdp = {shards} devices"
        )
    return sizes
