"""The evaluation a tokenizer's training run repeats: held-out images in, scores and a picture out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from gigatok_jax import data, sharding
from gigatok_jax.evals import fid, lpips
from gigatok_jax.evals.grid import comparison_grid
from gigatok_jax.evals.reconstruction import evaluate_reconstruction
from gigatok_jax.nn.constrain import gathered, placing

Reconstruct = Callable[[Mapping[str, Any], Mapping[str, Any], jax.Array], tuple[jax.Array, jax.Array | None]]


class Evaluator:
    """Reconstructs the same held-out images at every call.

    Photographs are cut into tiles spread over each picture and its octaves; other sources are centre-cropped (ADM).
    Every process runs it on the same images, so that every process knows the scores.

    Raises:
      ValueError: for a source with fewer images than `config.eval.num_images`, pictures smaller than the crops, or too
        few images for rFID.
      FileNotFoundError: for a frozen network of the scores whose weights are missing.
    """

    primary = "psnr"

    def __init__(self, cfg: Mapping[str, Any], reconstruct: Reconstruct, mesh: Mesh, frozen: Mapping[str, Any]):
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self._mesh, self._settings = mesh, cfg["eval"]
        if cfg["eval"]["fid"]:
            fid.check_count(cfg["eval"]["num_images"], fid.num_features())
        self._batch = -(-min(cfg["eval"]["batch"], cfg["eval"]["num_images"]) // shards) * shards
        self._codebook_size, self._size = cfg["tokenizer"]["codebook_size"], cfg["tokenizer"]["image_size"]
        self._source = data.make_source(cfg["data"]["eval_source"], root=cfg["data"]["eval_root"] or None, split="eval")
        self._crops = None
        if cfg["data"]["eval_source"] == "photographs":
            self._crops, _ = data.eval_crops(self._source, self._size, cfg["eval"]["num_images"])
        elif len(self._source) < cfg["eval"]["num_images"]:
            raise ValueError(
                f"config.eval.num_images={cfg['eval']['num_images']}, but {cfg['data']['eval_root']} has "
                f"{len(self._source)}; set --config.eval.num_images={len(self._source)}"
            )
        self.bad_records: dict[str, str] = {}
        network = cfg["eval"]["lpips"]
        self._lpips = lpips.build(network, cfg["frozen"]["folder"], mesh, self._batch) if network else None
        self._features = fid.build(cfg["frozen"]["folder"], mesh, self._batch) if cfg["eval"]["fid"] else None

        self._frozen = {name: params for name, params in frozen.items() if name == "first_stage"}

        def constrained(params: Any, frozen: Any, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            with placing(sharding.placement(mesh)):
                return reconstruct(gathered(params), gathered(frozen), image)

        self._reconstruct = jax.jit(constrained, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Mapping[str, Any]) -> tuple[dict[str, float], Image.Image]:
        """Parameters by group → (scores by name, originals over reconstructions).

        Raises:
          data.NoUsableImages: no held-out image can be read, or too few for rFID.
        """
        count = self._settings["num_images"]
        shown = {round(i) for i in np.linspace(0, count - 1, min(self._settings["grid"], count))}
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        distances: list[np.ndarray] = []
        statistics: list[fid.Statistics] = []  # of originals, of reconstructions
        seen = 0

        def reconstruct(images_m11: Any) -> tuple[np.ndarray, np.ndarray]:
            images = sharding.place_rows(np.asarray(images_m11), self._mesh)
            return jax.device_get(self._reconstruct(params, self._frozen, images))

        def keep(originals: np.ndarray, reconstructions: np.ndarray) -> None:
            nonlocal seen, statistics
            pairs.extend(pair for i, pair in enumerate(zip(originals, reconstructions), seen) if i in shown)
            seen += len(originals)
            if self._lpips:
                distances.append(self._lpips(originals, reconstructions))
            if self._features:
                new = [fid.Statistics.of(self._features(images)) for images in (originals, reconstructions)]
                statistics = [old + more for old, more in zip(statistics, new)] or new

        scores = evaluate_reconstruction(
            reconstruct,
            self._usable_batches(),
            self._codebook_size or None,
            batch_size=self._batch,
            on_batch=keep,
        )
        if distances:
            scores[f"lpips_{self._settings['lpips']}"] = float(np.concatenate(distances).mean(dtype=np.float64))
        if statistics:
            scores["rfid"] = self._rfid(*statistics) if np.isfinite(scores["psnr"]) else float("nan")
        originals, reconstructions = (np.stack(side) for side in zip(*pairs))
        caption = f"PSNR {scores['psnr']:.2f} dB · SSIM {scores['ssim']:.3f} · usage {scores.get('usage', 0):.1%}"
        return scores, comparison_grid(originals, reconstructions, caption=caption)

    def _rfid(self, originals: fid.Statistics, reconstructions: fid.Statistics) -> float:
        try:
            return fid.frechet_distance(originals, reconstructions)
        except fid.TooFewImages as error:  # which were enough before some of them could not be read
            raise data.NoUsableImages(f"{len(self.bad_records)} held-out images cannot be read: {error}") from None

    def _usable_batches(self) -> Iterator[np.ndarray]:
        """The batches; raises NoUsableImages where there is none."""
        found = False
        for images in self._batches():
            found = True
            yield images
        if not found:
            first = dict(list(self.bad_records.items())[:3])
            raise data.NoUsableImages(f"none of the held-out images can be read; the first: {first}")

    def _batches(self) -> Iterator[np.ndarray]:
        if self._crops is not None:
            for start in range(0, len(self._crops), self._batch):
                yield self._crops[start : start + self._batch]
            return
        batches = data.eval_batches(
            self._source,
            image_size=self._size,
            batch=self._batch,
            count=self._settings["num_images"],
            bad_records=self.bad_records,
        )
        for batch in batches:
            if batch["valid"].any():
                yield batch["image"][batch["valid"]]
