"""Defaults of every config, in one place, and what can be said about a config before anything is built.

A file in `configs/` imports this module and no other of the package: it calls `base()`, fills the differences, and
returns the locked result. `validate` is what every entry point calls on the config it was given.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

VIT_SIZES = {  # width, layers, heads (GigaTok, arXiv 2504.08736, §3 and its code)
    "tiny": (256, 4, 4),
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "xxxl": (2560, 48, 40),
}


INF = float("inf")
# Least and greatest value of what has one; below or above, something far away would fail.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_steps", "global_batch", "accumulate", "max_skipped"), (1, INF)),
    **dict.fromkeys(("data.prefetch", "eval.batch", "eval.num_images", "eval.grid", "checkpoint.keep_last"), (1, INF)),
    **dict.fromkeys(("seed", "data.num_threads", "data.num_workers", "log.every", "eval.every"), (0, INF)),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep_period", "loss.auxiliary_end"), (0, INF)),
    **dict.fromkeys(("loss.usage_window", "loss.discriminator_start"), (1, INF)),
    **dict.fromkeys((f"tokenizer.{side}_{size}" for side in ("encoder", "decoder")
                     for size in ("width", "depth", "heads", "conv_blocks")), (1, INF)),
    **dict.fromkeys((f"tokenizer.{name}" for name in ("image_size", "num_latent_tokens", "features", "conv_base",
                     "conv_multipliers", "norm_groups", "codebook_size", "code_dim", "codebook_chunk", "unroll",
                     "distill_layer")), (1, INF)),
    **dict.fromkeys((f"tokenizer.{name}" for name in ("kernel_gain", "position_std", "teacher_dim")), (0, INF)),
    **dict.fromkeys((f"groups.*.{name}" for name in ("learning_rate", "end_learning_rate", "warmup_steps", "eps",
                     "weight_decay", "clip")), (0, INF)),
    **dict.fromkeys(("groups.*.b1", "groups.*.b2", "groups.*.ema", "decay_fraction"), (0, 1)),
}  # fmt: skip


def gigatok_tokenizer() -> ConfigDict:
    """The `tokenizer` section of GigaTok; sizes are those of S-S at 256 px."""
    return ConfigDict(
        dict(
            family="gigatok",
            layout="1d",  # "1d": latent queries; "2d": the feature map's own grid
            layer_2d="vit",  # "vit", or "qformer" (self + cross to its own input, the published VQ_SS256_2d)
            image_size=256,
            num_latent_tokens=256,
            features=256,  # channels between the convolutions and the ViTs
            conv_base=128,
            conv_multipliers=(1, 1, 2, 2, 4),
            encoder_conv_blocks=2,
            decoder_conv_blocks=3,
            conv_attention=False,
            norm_groups=32,
            kernel_gain=0.0,  # kernels start at N(0, gain²/fan-in); 0: at N(0, 0.02²) as published
            position_std=0.0,  # spread of the position tables at the start; 0: 1/sqrt(width) as published
            adaptive_scale_init=0.0,  # bias of the adaptive group norms' scale; 1 trains faster from scratch
            encoder_width=512,
            encoder_depth=6,
            encoder_heads=8,
            decoder_width=512,
            decoder_depth=6,
            decoder_heads=8,
            codebook_size=16384,
            code_dim=8,
            codebook_chunk=4096,  # entries whose distances are in memory at once
            estimator="rotation",  # or "straight_through"
            distill_layer=3,  # decoder layer whose output the semantic loss reads
            teacher_dim=768,  # width of the semantic teacher (DINOv2-B); 0: no distillation head
            attention="xla",  # or "cudnn"
            remat="full",  # of the ViTs' layers; or "dots", "none"
            remat_convs=True,  # residual blocks keep their input only
            unroll=1,  # layers per scan iteration
        )
    )


def small_gigatok_tokenizer(layout: str) -> ConfigDict:
    """A GigaTok section that a laptop trains: 32 px, 64 latent tokens, narrow convolutions, no distillation head."""
    section = gigatok_tokenizer()
    section.update(
        layout=layout,
        image_size=32,
        num_latent_tokens=64,
        features=64,
        conv_base=16,
        conv_multipliers=(1, 1, 2),
        encoder_conv_blocks=1,
        decoder_conv_blocks=1,
        norm_groups=4,
        codebook_size=512,
        teacher_dim=0,
        # A narrow network needs louder kernels and positions than the published ones, which suit widths of 512.
        kernel_gain=1.0,
        position_std=1.5,
        adaptive_scale_init=1.0,
        remat="none",
        remat_convs=False,
        unroll=2,
    )
    for side in ("encoder", "decoder"):
        section.update({f"{side}_width": 128, f"{side}_depth": 2, f"{side}_heads": 4})
    return section


def _group() -> ConfigDict:
    """One parameter group's optimiser: AdamW after clipping by the group's global norm."""
    return ConfigDict(
        dict(
            learning_rate=1e-4,
            end_learning_rate=1e-5,
            warmup_steps=0,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=1e-4,
            clip=10.0,
            ema=0.0,  # decay per update; 0 keeps no average
            trainable=".*",  # full-match pattern over parameter paths; the rest gets no gradient and no moments
        )
    )


def base() -> ConfigDict:
    """A complete config: GigaTok S-S at 256 px with the published training defaults; unlocked."""
    return ConfigDict(
        dict(
            seed=0,
            num_steps=1_000_000,  # optimiser updates
            global_batch=128,
            accumulate=1,  # microbatches per update
            dtype="bfloat16",  # of the networks' arithmetic; parameters, codes and losses are float32
            max_skipped=20,  # non-finite updates in a row before the run stops
            tokenizer=gigatok_tokenizer(),
            discriminator=dict(
                name="patchgan",  # or "dino" (heads over a frozen DINO v1), "none"
                base_channels=64,  # of patchgan
                num_layers=3,  # of patchgan
                remat="full",  # of dino's frozen layers; or "dots", "none"
            ),
            loss=dict(
                pixel="l2",  # or "l1"
                pixel_weight=1.0,
                perceptual_weight=1.0,  # LPIPS
                perceptual_network="vgg16",  # or "alexnet"
                semantic_weight=0.5,  # against `semantic_teacher`
                semantic_teacher="dinov2-b",  # or "dinov2-s", "dinov2-l", "vgg16"; teacher_dim is its width
                codebook_weight=1.0,
                commitment_weight=0.25,
                entropy_weight=0.0,
                feature_weight=1.0,  # auxiliary: decoder map against the encoder's, while the path is on
                direct=True,  # auxiliary: image losses on conv decoder(conv encoder), while the path is on
                auxiliary_end=15_000,  # the auxiliary path runs in steps 1 … auxiliary_end − 1
                adversarial="hinge",  # or "non_saturating"
                adversarial_weight=0.5,
                discriminator="hinge",  # or "vanilla", "non_saturating"
                discriminator_weight=0.5,
                discriminator_start=20_000,  # first step (counted from 1) with the discriminator
                lecam_weight=0.0,
                usage_window=65_536,  # latent tokens over which codebook usage is counted
            ),
            frozen=dict(
                folder="",  # of the weights of frozen networks; empty: $GIGATOK_WEIGHTS or ~/.cache/gigatok_jax
                dtype="bfloat16",  # of their parameters and arithmetic
                remat=False,  # of the perceptual network: keeps no feature maps for the backward pass
            ),
            groups=dict(tokenizer=_group(), discriminator=_group()),
            schedule="cosine",  # or "constant", "wsd"
            decay_fraction=0.2,  # of the steps, at the end of "wsd"
            data=dict(
                source="folder",  # or "array_record", "webdataset", "tfds", "imagenet2012", "emoji", "photographs"
                root="",  # where the source's images are; "emoji": data/emoji
                eval_source="",  # empty: no evaluation
                eval_root="",
                crop="adm",  # "adm", "scale" (random-scale crops of few large pictures), "center"
                flip=True,
                permute_channels=False,  # a random order of red, green, blue: more colours out of a few pictures
                num_threads=16,
                num_workers=0,
                prefetch=4,  # batches held ready
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),  # −1: all devices that are left
            sharding=dict(preset="fsdp"),
            log=dict(every=50),
            eval=dict(every=5000, batch=64, num_images=512, grid=16, lpips=""),  # lpips: "", "vgg16" or "alexnet"
            checkpoint=dict(every=5000, keep_last=2, keep_period=0),
        )
    )


def set_vit(cfg: ConfigDict, side: str, size: str) -> None:
    """Gives the `side` ("encoder" or "decoder") ViT of a tokenizer section a named size."""
    width, depth, heads = VIT_SIZES[size]
    cfg.update({f"{side}_width": width, f"{side}_depth": depth, f"{side}_heads": heads})


def to_json(cfg: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config as plain JSON data (tuples become lists)."""
    plain = cfg.to_dict() if isinstance(cfg, ConfigDict) else dict(cfg)
    return json.loads(json.dumps(plain))


def validate(cfg: ConfigDict, num_devices: int | None = None) -> None:
    """What can be known to be wrong before anything is built.

    Raises:
      ValueError: naming the field, its value and the mend.
    """
    for field, (low, high) in BOUNDS.items():
        for value in _values(cfg, field):
            if isinstance(value, str) or not low <= value <= high:
                raise ValueError(
                    f"config.{field}={value!r} must be at least {low}" + f" and at most {high}" * (high < INF)
                )
    if not cfg.tokenizer.conv_multipliers:
        raise ValueError("config.tokenizer.conv_multipliers is empty; one number per convolution level is wanted")
    if cfg.global_batch % cfg.accumulate:
        raise ValueError(f"config.global_batch={cfg.global_batch} does not divide into accumulate={cfg.accumulate}")
    if num_devices is not None:
        check_mesh(cfg, num_devices)
    choices = {
        "dtype": ("float32", "bfloat16"),
        "schedule": ("cosine", "constant", "wsd"),
        "loss.pixel": ("l1", "l2"),
        "loss.perceptual_network": ("vgg16", "alexnet"),
        "loss.semantic_teacher": ("dinov2-s", "dinov2-b", "dinov2-l", "vgg16"),
        "frozen.dtype": ("float32", "bfloat16"),
        "eval.lpips": ("", "vgg16", "alexnet"),
        "loss.adversarial": ("hinge", "non_saturating"),
        "loss.discriminator": ("hinge", "vanilla", "non_saturating"),
        "data.crop": ("adm", "scale", "center"),
        "sharding.preset": ("replicated", "fsdp", "fsdp+tensor"),
        "tokenizer.attention": ("xla", "cudnn"),
        "discriminator.name": ("none", "patchgan", "dino"),
        "discriminator.remat": ("none", "full", "dots"),
        "tokenizer.estimator": ("rotation", "straight_through"),
        "tokenizer.layout": ("1d", "2d"),
        "tokenizer.layer_2d": ("vit", "qformer"),
        "tokenizer.remat": ("none", "full", "dots"),
    }
    for field, allowed in choices.items():
        [value] = _values(cfg, field)
        if value not in allowed:
            raise ValueError(f"config.{field}={value!r} is not one of {', '.join(allowed)}")


def _values(cfg: ConfigDict, field: str) -> list[Any]:
    """What stands at a dotted field: one value, those of every group for "groups.*.x", those of a tuple."""
    nodes: list[Any] = [cfg]
    for part in field.split("."):
        nodes = [child for node in nodes for child in (node.values() if part == "*" else [node[part]])]
    return [value for node in nodes for value in (node if isinstance(node, (tuple, list)) else [node])]


def check_mesh(cfg: ConfigDict, num_devices: int) -> dict[str, int]:
    """The mesh's axis sizes with −1 filled in.

    Raises:
      ValueError: if they do not multiply to the device count, or the microbatch does not divide over them.
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
    shards, microbatch = sizes["data"] * sizes["fsdp"], cfg.global_batch // cfg.accumulate
    if microbatch % shards:
        raise ValueError(
            f"a microbatch of {microbatch} (global_batch={cfg.global_batch} / accumulate={cfg.accumulate}) does not "
            f"divide over data x fsdp = {shards} devices"
        )
    return sizes
