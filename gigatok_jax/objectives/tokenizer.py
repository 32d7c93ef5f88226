"""The objective of tokenizer training: every loss term of a step as one pure function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gigatok_jax.bottlenecks import edits
from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.losses import adversarial, lecam, pixel, semantic
from gigatok_jax.tokenizers.tokenizer import Tokenizer

Teacher = Callable[[Any, jax.Array], jax.Array]  # (frozen parameters, images in [−1, 1]) → features or distances
NEVER = -(2**30)


class Phase(NamedTuple):
    """What is in the program over an interval of steps."""

    auxiliary: bool
    adversarial: bool


class Weights(NamedTuple):
    """The `loss` section of a config, field by field."""

    pixel: str
    pixel_weight: float
    perceptual_weight: float
    perceptual_network: str
    convnext_weight: float
    semantic_weight: float
    semantic_teacher: str
    codebook_weight: float
    commitment_weight: float
    entropy_weight: float
    kl_weight: float
    proxy_weight: float
    feature_weight: float
    direct: bool
    auxiliary_end: int
    adversarial: str
    adversarial_weight: float
    discriminator: str
    discriminator_weight: float
    discriminator_start: int
    lecam: str
    lecam_weight: float
    usage_window: int


class TokenizerObjective(NamedTuple):
    """Built once from a config; every method is pure.

    Loss terms are reported weighted, as they enter the total. Steps are counted from 0 here and from 1 in the
    thresholds (`auxiliary_end`, `discriminator_start`), as published. `teachers` maps "perceptual", "logits" and
    "semantic" to functions whose parameters travel in `frozen` under the same names. With a `proxy`, whose parameters
    travel there as "first_stage", the tokenizer's decoder gives logits over the proxy's ids (stage 1 of TiTok): their
    cross-entropy stands in the place of the losses of images.
    """

    tokenizer: Tokenizer
    discriminator: nn.Module | None
    weights: Weights
    codebook_size: int
    teachers: Mapping[str, Teacher]
    accumulate: int = 1
    proxy: Tokenizer | None = None

    @property
    def shown(self) -> tuple[str, ...]:
        """What the progress line shows."""
        codes = "codebook/usage" if self.codebook_size else "loss/kl"
        return "loss/total", "loss/proxy" if self.proxy else f"loss/{self.weights.pixel}", codes

    def check(self, source: Any) -> None:
        """Raises ValueError for a source of ids; any source of images will do."""
        if hasattr(source, "tokenizer"):
            raise ValueError("config.data.source=tokens holds ids; a tokenizer is trained on images: name their source")

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params by group, state)."""
        size = self.tokenizer.image_size
        image = jnp.zeros((1, size, size, 3), jnp.float32)
        tokenizer_key, discriminator_key = jax.random.split(key)
        variables = self.tokenizer.init(tokenizer_key, image)
        params, state = {"tokenizer": variables["params"]}, {}
        if kept := {name: value for name, value in variables.items() if name != "params"}:
            state["tokenizer"] = kept
        if self.codebook_size:
            state["last_used"] = jnp.full((self.codebook_size,), NEVER, jnp.int32)
        if self.discriminator is not None:
            variables = self.discriminator.init(discriminator_key, image, train=False)
            params["discriminator"] = variables["params"]
            # Whatever else it keeps, by collection: running statistics, spectral-norm vectors.
            state["discriminator"] = {name: value for name, value in variables.items() if name != "params"}
            if self.weights.lecam_weight:
                state["lecam"] = lecam.lecam_init(self.weights.lecam)
        return params, state

    def phase(self, step: int) -> Phase:
        """The phase of the step counted from 0."""
        return Phase(
            auxiliary=step + 1 < self.weights.auxiliary_end
            and (self.weights.direct or self.weights.feature_weight > 0),
            adversarial=self.discriminator is not None and step + 1 >= self.weights.discriminator_start,
        )

    def phases(self, num_steps: int) -> list[Phase]:
        """The phases of a run, in order."""
        starts = {0, self.weights.auxiliary_end - 1, self.weights.discriminator_start - 1}
        return list(dict.fromkeys(self.phase(step) for step in sorted(starts) if 0 <= step < num_steps))

    def batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What a batch of `rows` images looks like."""
        size = self.tokenizer.image_size
        image = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)
        return {"image": image, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}

    def active(self, phase: Phase) -> tuple[str, ...]:
        """The groups that are trained in a phase."""
        return ("tokenizer", "discriminator") if phase.adversarial else ("tokenizer",)

    def facts(self) -> dict[str, Any]:
        """What a report says about the model."""
        sizes = {name: getattr(self.tokenizer, name) for name in ("image_size", "num_latent_tokens")}
        return {**sizes, "codebook_size": self.codebook_size}

    def usage_window(self, global_batch: int) -> int | None:
        """Steps over which codebook usage is counted; None where there is no codebook."""
        latent_tokens = global_batch * self.tokenizer.num_latent_tokens
        return -(-self.weights.usage_window // latent_tokens) if self.codebook_size else None

    def reconstruct(
        self, params: Mapping[str, Any], frozen: Mapping[str, Any], image_BHWC: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Images in [−1, 1] → (reconstructions, ids; None where latents are continuous)."""
        image, codes, _ = self.tokenizer.apply({"params": params["tokenizer"]}, image_BHWC)
        if self.proxy:
            variables, ids_BN = {"params": frozen["first_stage"]}, jnp.argmax(image, axis=-1)
            found = self.proxy.apply(variables, ids_BN, method="lookup")
            image, _ = self.proxy.apply(variables, found, method="decode")
        return image, codes.ids_BK

    def loss(self, phase: Phase) -> Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics)) of a phase."""

        def objective(params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
            image = to_unit_range(batch["image"])
            kept = state.get("tokenizer", {})
            variables = {"params": params["tokenizer"], **kept}
            # A stream of its own: what else is drawn of `key` does not depend on the bottleneck.
            options = {"key": jax.random.fold_in(key, 0), "train": True}
            (recon, codes, out), kept = self.tokenizer.apply(variables, image, mutable=list(kept), **options)
            state = {**state, "tokenizer": kept} if kept else state
            images = {"": recon}
            if phase.auxiliary and self.weights.direct:
                images["direct_"] = self.tokenizer.apply(variables, out["cnn"], method="decode_features")
            terms = self._proxy_term(recon, image, frozen) if self.proxy else self._image_terms(images, image, frozen)
            terms |= self._code_terms(codes.losses, out, image, frozen, phase)
            usage_state, metrics = self._usage(codes.ids_BK, state, step) if self.codebook_size else ({}, {})
            state = {**state, **usage_state}
            if phase.adversarial:
                adversarial_terms, state, scores = self._adversarial(
                    params["discriminator"], state, frozen, images, image, key, step
                )
                terms, metrics = {**terms, **adversarial_terms}, {**metrics, **scores}
            metrics |= {f"loss/{name}": value for name, value in terms.items()}
            return sum(terms.values()), (state, metrics)

        return objective

    def edited(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, state) after the edits that the tokenizer keeps in `state`; the optimiser moves what it trains."""
        if "edits" not in (kept := state.get("tokenizer", {})):
            return params, state
        params = {**params, "tokenizer": edits.applied(params["tokenizer"], kept["edits"])}
        return params, {**state, "tokenizer": {**kept, "edits": edits.cleared(kept["edits"])}}

    def _image_terms(self, images: dict[str, jax.Array], target: jax.Array, frozen: Any) -> dict[str, jax.Array]:
        w, terms = self.weights, {}
        distance = {"l1": pixel.l1, "l2": pixel.l2}[w.pixel]
        for prefix, image in images.items():
            terms[f"{prefix}{w.pixel}"] = w.pixel_weight * distance(image, target)
            if w.perceptual_weight:
                perceptual = self.teachers["perceptual"](frozen["perceptual"], image, target)
                terms[f"{prefix}perceptual"] = w.perceptual_weight * perceptual
            if w.convnext_weight:
                convnext = self.teachers["logits"](frozen["logits"], image, target)
                terms[f"{prefix}convnext"] = w.convnext_weight * convnext
        return terms

    def _proxy_term(self, logits_BNV: jax.Array, image: jax.Array, frozen: Any) -> dict[str, jax.Array]:
        """The cross-entropy of the proxy's ids of the image (TiTok, §3.3)."""
        ids_BN = image_ids(self.proxy, frozen["first_stage"], image)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_BNV, ids_BN).mean()
        return {"proxy": self.weights.proxy_weight * loss}

    def _code_terms(
        self, losses: Mapping[str, jax.Array], out: Any, image: jax.Array, frozen: Any, phase: Phase
    ) -> dict[str, jax.Array]:
        w = self.weights
        weights = {"codebook": w.codebook_weight, "commitment": w.commitment_weight, "entropy": w.entropy_weight}
        weights["kl"] = w.kl_weight
        terms = {name: weights[name] * value for name, value in losses.items() if weights[name]}
        if phase.auxiliary and w.feature_weight:
            terms["feature"] = w.feature_weight * semantic.feature_match(out["pre_decoder_cnn"], out["cnn"])
        if w.semantic_weight:
            features = jax.lax.stop_gradient(self.teachers["semantic"](frozen["semantic"], image))
            terms["semantic"] = w.semantic_weight * semantic.negative_cosine(out["semantic"], features)
        return terms

    def _usage(
        self, ids_BK: jax.Array, state: Any, step: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Usage over the last `usage_window` latent tokens (whole steps), perplexity and entropy of this batch."""
        window = -(-self.weights.usage_window // (ids_BK.size * self.accumulate))
        counts_V = jnp.zeros((self.codebook_size,), jnp.int32).at[ids_BK.reshape(-1)].add(1)
        last_used = jnp.where(counts_V > 0, step, state["last_used"])
        p_V = counts_V / ids_BK.size
        entropy = -jnp.sum(jnp.where(counts_V > 0, p_V * jnp.log(jnp.maximum(p_V, 1e-12)), 0.0))
        metrics = {
            "codebook/usage": jnp.mean(last_used > step - window, dtype=jnp.float32),
            "codebook/perplexity": jnp.exp(entropy),
            "codebook/entropy": entropy,
        }
        return {"last_used": last_used}, metrics

    def _adversarial(
        self,
        params: Any,
        state: Any,
        frozen: Any,
        images: dict[str, jax.Array],
        real: jax.Array,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, Any], dict[str, jax.Array]]:
        """Generator terms at stopped discriminator parameters, discriminator terms at stopped reconstructions.

        The discriminator sees, in this order, the reconstructions for the generator's term, the real images, and the
        reconstructions for its own; running statistics follow that order, as published for PatchGAN. (The published
        DINO step judges the reconstructions first: without running statistics only spectral-norm vectors tell, by
        rounding.) A discriminator over a frozen network finds it in the collection `frozen`, and draws its
        augmentations from the stream `augment`.
        """
        w, stop = self.weights, jax.lax.stop_gradient
        kept, terms, keys = state["discriminator"], {}, iter(jax.random.split(key, 2 * len(images) + 1))

        def judge(params: Any, image: jax.Array) -> jax.Array:
            nonlocal kept
            variables = {"params": params, "frozen": frozen.get("discriminator", {}), **kept}
            logits, kept = self.discriminator.apply(
                variables, image, train=True, mutable=list(kept), rngs={"augment": next(keys)}
            )
            return logits.astype(jnp.float32)

        generator_loss = adversarial.GENERATOR_LOSSES[w.adversarial]
        discriminator_loss = adversarial.DISCRIMINATOR_LOSSES[w.discriminator]
        for prefix, image in images.items():
            terms[f"{prefix}adversarial"] = w.adversarial_weight * generator_loss(judge(stop(params), image))
        logits_real = judge(params, real)
        fakes = {prefix: judge(params, stop(image)) for prefix, image in images.items()}
        for prefix, logits in fakes.items():
            terms[f"{prefix}discriminator"] = w.discriminator_weight * discriminator_loss(logits_real, logits)
        logits_fake = fakes[""]
        state = {**state, "discriminator": kept}
        if w.lecam_weight:
            penalty, state["lecam"] = lecam.lecam(
                w.lecam,
                state["lecam"],
                logits_real,
                logits_fake,
                step=step + 1,
                discriminator_start=w.discriminator_start,
            )
            terms["lecam"] = w.lecam_weight * penalty
        return terms, state, {"logits/real": logits_real.mean(), "logits/fake": logits_fake.mean()}


def image_ids(tokenizer: Tokenizer, params: Any, image_BHWC: jax.Array) -> jax.Array:
    """Images, uint8 or float in [−1, 1], → (B, K) int32 ids; reads no parameters of the decoder."""
    return image_codes(tokenizer, params, image_BHWC).ids_BK


def image_codes(tokenizer: Tokenizer, params: Any, image_BHWC: jax.Array) -> Codes:
    """Images, uint8 or float in [−1, 1], → codes; reads no parameters of the decoder."""
    # As published. Left to themselves, TPUs would multiply float32 in bfloat16, and ids would flip.
    with jax.default_matmul_precision("tensorfloat32"):
        return tokenizer.apply({"params": params}, to_unit_range(image_BHWC), method="encode")[0]


def to_unit_range(image: jax.Array) -> jax.Array:
    """uint8 → float32 in [−1, 1]; floats are taken to be there already."""
    return image.astype(jnp.float32) / 127.5 - 1.0 if image.dtype == jnp.uint8 else image.astype(jnp.float32)
