"""Published LlamaGen tokenizers (FoundationVision/LlamaGen `vq_model`) ↔ ours."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax import config
from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import conv, dense, norm, resnet
from gigatok_jax.hub.gigatok import BUFFERS
from gigatok_jax.hub.keymap import Entry

__all__ = ["BUFFERS", "entries", "section_of"]


def _attention(key: str, path: str, width: int) -> Iterator[Entry]:
    yield from norm(f"{key}.norm", f"{path}/norm", width)
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
        yield from conv(f"{key}.{theirs}", f"{path}/{ours}", width, width, 1)


def _middle(key: str, path: str, width: int) -> Iterator[Entry]:
    yield from resnet(f"{key}.mid.0", f"{path}/mid0", width, width)
    yield from _attention(f"{key}.mid.1", f"{path}/mid_attention", width)
    yield from resnet(f"{key}.mid.2", f"{path}/mid1", width, width)


def _level(key: str, path: str, inp: int, out: int, blocks: int, attended: bool) -> Iterator[Entry]:
    for block in range(blocks):
        yield from resnet(f"{key}.res.{block}", f"{path}_block{block}", out if block else inp, out)
        if attended:
            yield from _attention(f"{key}.attn.{block}", f"{path}_attention{block}", out)


def _encoder(cfg: Mapping[str, Any], widths: list[int]) -> Iterator[Entry]:
    inp, last, blocks = cfg["conv_base"], len(widths) - 1, cfg["encoder_conv_blocks"]
    yield from conv("encoder.conv_in", "encoder/cnn/conv_in", inp, 3, 3)
    for level, out in enumerate(widths):
        key, path = f"encoder.conv_blocks.{level}", f"encoder/cnn/level{level}"
        yield from _level(key, path, inp, out, blocks, level == last)
        if level < last:
            yield from conv(f"{key}.downsample.conv", f"{path}_down", out, out, 3)
        inp = out
    yield from _middle("encoder", "encoder/cnn", inp)
    yield from norm("encoder.norm_out", "encoder/cnn/norm_out", inp)
    yield from conv("encoder.conv_out", "encoder/cnn/conv_out", cfg["features"], inp, 3)


def _decoder(cfg: Mapping[str, Any], widths: list[int]) -> Iterator[Entry]:
    inp, last, blocks = widths[-1], len(widths) - 1, cfg["decoder_conv_blocks"]
    yield from conv("decoder.conv_in", "decoder/cnn/conv_in", inp, cfg["features"], 3)
    yield from _middle("decoder", "decoder/cnn", inp)
    for level, out in enumerate(reversed(widths)):
        key, path = f"decoder.conv_blocks.{level}", f"decoder/cnn/level{level}"
        yield from _level(key, path, inp, out, blocks, level == 0)
        if level < last:
            yield from conv(f"{key}.upsample.conv", f"{path}_up", out, out, 3)
        inp = out
    yield from norm("decoder.norm_out", "decoder/cnn/norm_out", inp)
    yield from conv("decoder.conv_out", "decoder/cnn/conv_out", 3, inp, 3)


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `tokenizer` section."""
    widths = [cfg["conv_base"] * multiplier for multiplier in cfg["conv_multipliers"]]
    return [
        *_encoder(cfg, widths),
        *_decoder(cfg, widths),
        Entry("quantize.embedding.weight", ("bottleneck/codebook",), "vector", (cfg["codebook_size"], cfg["code_dim"])),
        *dense("quant_conv", "encoder/to_latents", cfg["code_dim"], cfg["features"], kind="conv1x1"),
        *dense("post_quant_conv", "decoder/from_latents", cfg["features"], cfg["code_dim"], kind="conv1x1"),
    ]


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `tokenizer` section of a checkpoint, by the shapes of its tensors, which fit any image size: 256 px here.

    Raises:
      KeyError: where the tensors are no LlamaGen tokenizer's.
    """
    base, code_dim = shapes["encoder.conv_in.weight"][0], shapes["quant_conv.weight"][0]
    levels = keymap.count(shapes, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [shapes[f"encoder.conv_blocks.{level}.res.0.conv2.weight"][0] for level in range(levels)]
    section, factor = config.llamagen_tokenizer().to_dict(), 2 ** (levels - 1)
    return section | {
        "num_latent_tokens": (section["image_size"] // factor) ** 2,
        "features": shapes["encoder.conv_out.weight"][0],
        "conv_base": base,
        "conv_multipliers": [width // base for width in widths],
        "codebook_size": math.prod(shapes["quantize.embedding.weight"]) // code_dim,
        "code_dim": code_dim,
    }
