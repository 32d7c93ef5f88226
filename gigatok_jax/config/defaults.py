"""Defaults of every config, in one place; sizes are arguments."""

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

GPT_SIZES = {  # width, layers, heads (GigaTok's code; arXiv 2406.06525, Table 1)
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "1b": (2048, 22, 32),
    "3b": (3200, 24, 32),
    "xxxl": (2560, 48, 40),
    "7b": (4096, 32, 32),
}

# What follows a tokenizer's run, in order.
STAGES = ("export_tokenizer", "encode_train", "encode_eval", "train_generator", "export_generator", "sample")


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
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the ViTs' layers; or "dots", "none"
            remat_convs=True,  # residual blocks keep their input only
            unroll=1,  # layers per scan iteration
        )
    )


def llamagen_tokenizer() -> ConfigDict:
    """The `tokenizer` section of LlamaGen; sizes are those of VQ-16 at 256 px."""
    return ConfigDict(
        dict(
            family="llamagen",
            image_size=256,
            num_latent_tokens=256,  # the grid's cells, in raster order
            features=256,  # channels of the feature map
            conv_base=128,
            conv_multipliers=(1, 1, 2, 2, 4),
            encoder_conv_blocks=2,
            decoder_conv_blocks=3,
            norm_groups=32,
            kernel_gain=0.0,  # kernels start at N(0, gain²/fan-in); 0: at N(0, 0.02²)
            codebook_size=16384,
            code_dim=8,
            codebook_chunk=4096,  # entries whose distances are in memory at once
            estimator="straight_through",  # or "rotation"
            teacher_dim=0,  # it has no distillation head
            attention="xla",  # of the middle blocks: plain products
            remat_convs=True,  # residual blocks keep their input only
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


def ar_generator(size: str = "b") -> ConfigDict:
    """The `generator` section of an autoregressive generator of a named size over 256 ids of 16,384.

    Raises:
      ValueError: for a size that is not in `GPT_SIZES`.
    """
    if size not in GPT_SIZES:
        raise ValueError(f"an AR generator of size {size!r} is not one of {', '.join(GPT_SIZES)}")
    width, depth, heads = GPT_SIZES[size]
    return ConfigDict(
        dict(
            family="ar",
            width=width,
            depth=depth,
            heads=heads,
            hidden_multiple=256,  # the SwiGLU's width, 8/3 of the layer's, is rounded up to a multiple of this
            codebook_size=16384,
            num_latent_tokens=256,
            num_classes=1000,
            class_dropout=0.1,  # share of training rows that see the null class
            dropout=0.1,  # of embedded ids, and of both branches of every layer
            positions="learned",  # or "rope_2d" (LlamaGen)
            modulation="none",  # or "adaln", "shared_adaln"
            qk_norm=False,
            attention="xla",  # or "cudnn" (NVIDIA), "splash" (TPUs; elsewhere as "xla")
            remat="full",  # of the layers; or "dots", "none"
            unroll=1,  # layers per scan iteration
        )
    )


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
            decayed=".*",  # full-match pattern of those that weight decay pulls
        )
    )


def base() -> ConfigDict:
    """A complete config: GigaTok S-S at 256 px with the published training defaults; unlocked."""
    return ConfigDict(
        dict(
            objective="tokenizer",  # what is trained: see `gigatok_jax.objectives`
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
                semantic_teacher="dinov2-b",  # or "dinov2-l-reg", "siglip-so400m", …; teacher_dim is its width
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
            sharding=dict(
                preset="fsdp",  # or "replicated", "fsdp+tensor"
                offload="none",  # "moments": Adam's lie in the host's memory but for the update
            ),
            log=dict(every=50),
            eval=dict(
                every=5000,
                batch=64,
                num_images=512,
                grid=16,
                lpips="",  # or "vgg16", "alexnet"
                fid=False,  # rFID; it needs 2,049 images at least, published tables have 50,000
            ),
            checkpoint=dict(every=5000, keep_last=2, keep_period=0),
        )
    )


def set_vit(cfg: ConfigDict, side: str, size: str) -> None:
    """Gives the `side` ("encoder" or "decoder") ViT of a tokenizer section a named size."""
    width, depth, heads = VIT_SIZES[size]
    cfg.update({f"{side}_width": width, f"{side}_depth": depth, f"{side}_heads": heads})


def ar(size: str = "b") -> ConfigDict:
    """A complete config: an AR generator of a named size with GigaTok's published training; unlocked.

    Its ids are stored (source "tokens"), or made of any source's pictures inside the step (`first_stage.bundle`).

    Raises:
      ValueError: for a size that is not in `GPT_SIZES`.
    """
    cfg = base()
    for section in ("tokenizer", "discriminator", "loss", "frozen"):
        del cfg[section]
    cfg.update(objective="ar", num_steps=1_500_000, global_batch=256, schedule="wsd")
    cfg.generator = ar_generator(size)
    cfg.first_stage = dict(bundle="")  # of the tokenizer that makes ids of pictures, in float32
    cfg.groups = dict(generator=_group())
    # Matrices and tables, not norms and biases; a layer axis makes every parameter of a stack look like a matrix.
    decayed = r".*(kernel|embedding|_pos|_table)"
    cfg.groups.generator.update(end_learning_rate=0.0, warmup_steps=5000, weight_decay=0.05, clip=1.0, decayed=decayed)
    cfg.data.update(source="tokens", num_threads=4)  # "tokens", or pictures
    cfg.eval = dict(every=5000, batch=64, num_images=512, unigram_images=16_384)  # the last: crops trained on, at most
    return cfg


def pipeline() -> ConfigDict:
    """A pipeline from a tokenizer's run to samples: flags of each stage's entry point, none yet; unlocked."""
    return ConfigDict({stage: {} for stage in STAGES})
