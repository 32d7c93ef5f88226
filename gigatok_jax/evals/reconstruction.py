"""Reconstruction quality of a tokenizer over an evaluation set.

The protocol of GigaTok's published tables: the reconstruction is rounded to 8 bits, PSNR compares it with the
input in [0,1] at data range 1, image by image.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.evals import codebook
from gigatok_jax.evals.psnr import psnr
from gigatok_jax.evals.ssim import ssim

MAX_PSNR = 100.0  # an image reproduced exactly; infinity would swallow the mean of the whole set

ReconstructFn = Callable[[np.ndarray], tuple[jax.Array, jax.Array | None]]


def to_uint8(image_m11: jax.Array) -> jax.Array:
    """Images (..., C) in [-1,1] → uint8 as published: truncate(clip(127.5·x + 128, 0, 255)).

    An 8-bit image u that enters as u/127.5 − 1 comes back exactly. Values outside [-1,1] are clipped.
    """
    scaled = 127.5 * image_m11.astype(jnp.float32) + 128.0
    return jnp.clip(scaled, 0.0, 255.0).astype(jnp.uint8)


def evaluate_reconstruction(
    reconstruct_fn: ReconstructFn,
    batches: Iterable[np.ndarray],
    codebook_size: int | None,
    *,
    batch_size: int | None = None,
    ssim_data_range: float = 1.0,
    on_batch: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, float | int]:
    """Runs a tokenizer over images and averages the scores.

    Args:
      reconstruct_fn: images (B,H,W,3) float32 in [-1,1] → (reconstruction (B,H,W,3) in about [-1,1], ids int
        (B,...) or None for a continuous bottleneck). Negative ids are padding. It sees one batch size only,
        so it compiles once.
      batches: uint8 images (B,H,W,3), the last batch possibly smaller. One process's share; every image
        counts once.
      codebook_size: V, or None to skip the codebook.
      batch_size: static batch size, by default the first batch's. Smaller batches are padded and masked.
      ssim_data_range: 1.0 for images in [0,1]; 2.0 reproduces GigaTok's published SSIM (see `ssim`).
      on_batch: called with (originals, reconstructions), uint8 (b,H,W,3), without the padding: for pictures
        or for rFID in the same pass.

    Returns:
      "psnr" and "ssim", means over images; "psnr_mean_colour", the PSNR of painting every image in its own
      mean colour, the floor a tokenizer must clear; "num_images"; and with a codebook "usage", "perplexity"
      over all ids. An image reproduced exactly counts as 100 dB. A reconstruction that is not finite makes
      psnr and ssim nan.

    Raises:
      ValueError: no images, wrong dtype or shape, a batch above `batch_size`, or ids at or above
      `codebook_size`.
    """
    sums, counts, num_images = np.zeros(3), 0, 0
    for images in batches:
        images = _check_images(images)
        batch_size = batch_size or len(images)
        rounded, scores, batch_counts = _run_batch(reconstruct_fn, images, batch_size, codebook_size, ssim_data_range)
        # Sums over a large set outgrow float32 and int32: they are kept on the host.
        sums += scores.astype(np.float64).sum(axis=1)
        counts = counts + batch_counts.astype(np.int64)
        num_images += len(images)
        if on_batch is not None:
            on_batch(images, rounded)
    if not num_images:
        raise ValueError("no images to evaluate")
    result = dict(zip(("psnr", "ssim", "psnr_mean_colour"), (sums / num_images).tolist()))
    result["num_images"] = num_images
    if np.sum(counts):
        result["usage"] = float(codebook.usage(counts))
        result["perplexity"] = float(codebook.perplexity(counts))
    return result


def _run_batch(reconstruct_fn, images, batch_size, codebook_size, ssim_data_range):
    """Host arrays without padding: uint8 reconstruction (b,H,W,3), scores (3,b), counts (V,) or (0,)."""
    padded = _pad(images, batch_size)
    reconstruction, ids = reconstruct_fn(padded.astype(np.float32) / 127.5 - 1.0)
    if reconstruction.shape != padded.shape:
        raise ValueError(f"images {padded.shape} were reconstructed as {reconstruction.shape}")
    valid = np.arange(batch_size) < len(images)
    ids = None if codebook_size is None else ids
    rounded, scores, counts, too_large = _score_batch(
        padded, reconstruction, ids, valid, codebook_size=codebook_size, ssim_data_range=ssim_data_range
    )
    if int(too_large):
        raise ValueError(f"{int(too_large)} ids are not below codebook_size={codebook_size}")
    return np.asarray(rounded)[valid], np.asarray(scores)[:, valid], np.asarray(counts)


@functools.partial(jax.jit, static_argnames=("codebook_size", "ssim_data_range"))
def _score_batch(images, reconstruction, ids, valid, *, codebook_size, ssim_data_range):
    """One padded batch: uint8 reconstruction (B,H,W,3), scores (3,B), counts (V,), number of bad ids."""
    original = images.astype(jnp.float32) / 255.0
    rounded = to_uint8(reconstruction)
    recovered = rounded.astype(jnp.float32) / 255.0
    # Conversion to 8 bits would turn nan into a colour and hide a broken model.
    finite = jnp.all(jnp.isfinite(reconstruction), axis=(1, 2, 3))
    mean_colour = jnp.broadcast_to(jnp.mean(original, axis=(1, 2), keepdims=True), original.shape)
    scores = jnp.stack(
        [
            jnp.where(finite, jnp.minimum(psnr(original, recovered, 1.0), MAX_PSNR), jnp.nan),
            jnp.where(finite, ssim(original, recovered, ssim_data_range), jnp.nan),
            jnp.minimum(psnr(original, mean_colour, 1.0), MAX_PSNR),
        ]
    )
    if ids is None:
        return rounded, scores, jnp.zeros((0,), jnp.int32), jnp.int32(0)
    ids = jnp.where(valid[:, None], ids.reshape(len(valid), -1), -1)
    return rounded, scores, codebook.count_ids(ids, codebook_size), jnp.sum(ids >= codebook_size)


def _check_images(images) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"batches must be uint8 (B,H,W,3), got {images.dtype} {images.shape}")
    return images


def _pad(images: np.ndarray, batch_size: int) -> np.ndarray:
    if len(images) > batch_size:
        raise ValueError(f"a batch of {len(images)} images is larger than the static batch size {batch_size}")
    # Copies of the last image: real pixels cannot make the model produce anything unusual.
    return np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])
