"""Defaults of every config, in one place; sizes are arguments."""

from ml_collections import ConfigDict

from gigatok_jax.config.generators import ar_generator, masked_generator
from gigatok_jax.config.tokenizers import gigatok_tokenizer

# What follows a tokenizer's run, in order.
STAGES = ("export_tokenizer", "encode_train", "encode_eval", "train_generator", "export_generator", "sample")


def _group() -> ConfigDict:
    """One parameter group's optimiser: AdamW after clipping by the group's global norm."""
    return ConfigDict(
        dict(
            learning_rate=1e-4,
            end_learning_rate=1e-5,
            warmup_steps=0,
            warmup_start=0.01,  # share of the learning rate that the warm-up begins with
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=1e-4,
            clip=10.0,
            ema=0.0,  # decay per update; 0 keeps no average
            ema_warmup=False,  # the decay rises from 0 to this, as (1 + step) / (10 + step)
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
                name="patchgan",  # or "blur" (TiTok's), "dino" (heads over a frozen DINO v1), "none"
                base_channels=64,  # of patchgan; TiTok's blur has 128
                num_layers=3,  # of patchgan and blur
                pooling="blur",  # of blur's halvings; or "average"
                remat="full",  # of dino's frozen layers; or "dots", "none"
            ),
            loss=dict(
                pixel="l2",  # or "l1"
                pixel_weight=1.0,
                perceptual_weight=1.0,  # LPIPS
                perceptual_network="vgg16",  # or "alexnet"
                convnext_weight=0.0,  # squared differences of ConvNeXt-S's logits (TiTok: 0.1 beside LPIPS's 1)
                semantic_weight=0.5,  # against `semantic_teacher`
                semantic_teacher="dinov2-b",  # or "dinov2-l-reg", "siglip-so400m", …; teacher_dim is its width
                codebook_weight=1.0,
                commitment_weight=0.25,
                entropy_weight=0.0,
                kl_weight=1e-6,  # of a KL bottleneck
                proxy_weight=1.0,  # cross-entropy of a proxy tokenizer's ids, where the decoder gives their logits
                feature_weight=1.0,  # auxiliary: decoder map against the encoder's, while the path is on
                direct=True,  # auxiliary: image losses on conv decoder(conv encoder), while the path is on
                auxiliary_end=15_000,  # the auxiliary path runs in steps 1 … auxiliary_end − 1
                adversarial="hinge",  # or "non_saturating"
                adversarial_weight=0.5,
                discriminator="hinge",  # or "vanilla", "non_saturating"
                discriminator_weight=0.5,
                discriminator_start=20_000,  # first step (counted from 1) with the discriminator
                lecam="per_logit",  # or "of_means" (TiTok's)
                lecam_weight=0.0,
                usage_window=65_536,  # latent tokens over which codebook usage is counted
            ),
            start=dict(bundle=""),  # of the weights that a run starts from; empty: drawn ones
            # Of the tokenizer that makes ids of pictures, in float32: for a generator, or TiTok's first stage.
            first_stage=dict(bundle=""),
            frozen=dict(
                folder="",  # of the weights of frozen networks; empty: $GIGATOK_WEIGHTS or ~/.cache/gigatok_jax
                dtype="bfloat16",  # of their parameters and arithmetic
                remat=False,  # of the perceptual networks: keeps no feature maps for the backward pass
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


def ar(size: str = "b") -> ConfigDict:
    """A complete config: an AR generator of a named size with GigaTok's published training; unlocked.

    Its ids are stored (source "tokens"), or made of any source's pictures inside the step (`first_stage.bundle`).

    Raises:
      ValueError: for a size that is not in `GPT_SIZES`.
    """
    cfg = _generator(ar_generator(size))
    cfg.update(num_steps=1_500_000, global_batch=256, schedule="wsd")
    # Matrices and tables, not norms and biases; a layer axis makes every parameter of a stack look like a matrix.
    decayed = r".*(kernel|embedding|_pos|_table)"
    cfg.groups.generator.update(end_learning_rate=0.0, warmup_steps=5000, weight_decay=0.05, clip=1.0, decayed=decayed)
    return cfg


def masked(size: str = "l-32") -> ConfigDict:
    """A complete config: a masked generator of a named size with TiTok's published training; unlocked.

    Ids as of `ar`.

    Raises:
      ValueError: for a size that is not in `MASKED_SIZES`.
    """
    cfg = _generator(masked_generator(size))
    cfg.update(num_steps=500_000, global_batch=2048)
    cfg.loss = dict(
        mask_schedule="arccos",  # or "cosine", "linear", "root": the share of ids masked by a uniform time
        label_smoothing=0.1,
        unmasked_weight=0.1,  # of an id that the network sees, beside 1 of a masked one
    )
    cfg.groups.generator.update(
        learning_rate=2e-4, warmup_steps=10_000, warmup_start=0.0, b2=0.96, weight_decay=0.03, clip=1.0, ema=0.999
    )
    cfg.groups.generator.ema_warmup = True
    cfg.groups.generator.decayed = r".*kernel"  # no norm, bias or table
    return cfg


def _generator(section: ConfigDict) -> ConfigDict:
    """What the configs of all generators have; the training is yet to be said."""
    cfg = base()
    for name in ("tokenizer", "discriminator", "loss", "frozen"):
        del cfg[name]
    cfg.objective, cfg.generator = section.family, section
    cfg.groups = dict(generator=_group())
    cfg.data.update(source="tokens", num_threads=4)  # "tokens", or pictures
    cfg.eval = dict(every=5000, batch=64, num_images=512, unigram_images=16_384)  # the last: crops trained on, at most
    return cfg


def pipeline() -> ConfigDict:
    """A pipeline from a tokenizer's run to samples: flags of each stage's entry point, none yet; unlocked."""
    return ConfigDict({stage: {} for stage in STAGES})
