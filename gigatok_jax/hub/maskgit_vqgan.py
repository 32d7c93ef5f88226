"""Published MaskGIT-VQGAN weights (`encoder.*`, `decoder.*`, `quantize.*`, as TiTok reads them) ↔ ours."""

from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax import config
from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import conv, norm
from gigatok_jax.hub.keymap import Entry


def _block(key: str, path: str, inp: int, out: int) -> Iterator[Entry]:
    yield from norm(f"{key}.norm1", f"{path}/norm1", inp)
    yield from conv(f"{key}.conv1", f"{path}/conv1", out, inp, 3, bias=False)
    yield from norm(f"{key}.norm2", f"{path}/norm2", out)
    yield from conv(f"{key}.conv2", f"{path}/conv2", out, out, 3, bias=False)
    if inp != out:  # reads the block's output, not its input
        yield from conv(f"{key}.nin_shortcut", f"{path}/shortcut", out, out, 1, bias=False)


def _level(key: str, path: str, inp: int, out: int, blocks: int) -> Iterator[Entry]:
    for block in range(blocks):
        yield from _block(f"{key}.block.{block}", f"{path}_block{block}", out if block else inp, out)


def _middle(key: str, path: str, width: int) -> Iterator[Entry]:
    for block in range(2):
        yield from _block(f"{key}.mid.{block}", f"{path}/mid{block}", width, width)


def _widths(cfg: Mapping[str, Any]) -> list[int]:
    return [cfg["conv_base"] * multiplier for multiplier in cfg["conv_multipliers"]]


def encoder_entries(key_prefix: str, path_prefix: str, cfg: Mapping[str, Any]) -> Iterator[Entry]:
    """The tensors `{key_prefix}.*` of a `MaskGITEncoder` whose parameters are at `{path_prefix}/*`."""
    inp = cfg["conv_base"]
    yield from conv(f"{key_prefix}.conv_in", f"{path_prefix}/conv_in", inp, 3, 3, bias=False)
    for level, out in enumerate(_widths(cfg)):
        key, path = f"{key_prefix}.down.{level}", f"{path_prefix}/level{level}"
        yield from _level(key, path, inp, out, cfg["encoder_conv_blocks"])
        inp = out
    yield from _middle(key_prefix, path_prefix, inp)
    yield from norm(f"{key_prefix}.norm_out", f"{path_prefix}/norm_out", inp)
    yield from conv(f"{key_prefix}.conv_out", f"{path_prefix}/conv_out", cfg["code_dim"], inp, 1)


def decoder_entries(key_prefix: str, path_prefix: str, cfg: Mapping[str, Any]) -> Iterator[Entry]:
    """The tensors `{key_prefix}.*` of a `MaskGITDecoder` whose parameters are at `{path_prefix}/*`.

    Reads `conv_base`, `conv_multipliers`, `decoder_conv_blocks` and `code_dim` (the channels of its map) of `cfg`.
    Published levels are counted from the finest, ours from the coarsest.
    """
    widths = _widths(cfg)
    inp, last = widths[-1], len(widths) - 1
    yield from conv(f"{key_prefix}.conv_in", f"{path_prefix}/conv_in", inp, cfg["code_dim"], 3)
    yield from _middle(key_prefix, path_prefix, inp)
    for level, out in enumerate(reversed(widths)):
        key, path = f"{key_prefix}.up.{last - level}", f"{path_prefix}/level{level}"
        yield from _level(key, path, inp, out, cfg["decoder_conv_blocks"])
        if level < last:
            yield from conv(f"{key}.upsample_conv", f"{path}_up", out, out, 3)
        inp = out
    yield from norm(f"{key_prefix}.norm_out", f"{path_prefix}/norm_out", inp)
    yield from conv(f"{key_prefix}.conv_out", f"{path_prefix}/conv_out", 3, inp, 3)


def codebook_entry(key_prefix: str, path: str, cfg: Mapping[str, Any]) -> Entry:
    """The codebook `{key_prefix}.embedding.weight`, whose leaf is `path`; reads `codebook_size` and `code_dim`."""
    return Entry(f"{key_prefix}.embedding.weight", (path,), "vector", (cfg["codebook_size"], cfg["code_dim"]))


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `tokenizer` section."""
    return [
        *encoder_entries("encoder", "encoder/cnn", cfg),
        *decoder_entries("decoder", "decoder/cnn", cfg),
        codebook_entry("quantize", "bottleneck/codebook", cfg),
    ]


def decoder_sizes(key_prefix: str, codebook_prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The section's fields that a decoder's and a codebook's tensors tell: what `decoder_entries` reads, and its size.

    Raises:
      KeyError: where the tensors are no MaskGIT-VQGAN's.
    """
    levels = keymap.count(shapes, rf"{key_prefix}\.up\.(\d+)\.block\.\d+\.")
    widths = [shapes[f"{key_prefix}.up.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    base = shapes[f"{key_prefix}.norm_out.weight"][0]
    codebook_size, code_dim = shapes[f"{codebook_prefix}.embedding.weight"]
    return {
        "conv_base": base,
        "conv_multipliers": [width // base for width in widths],
        "decoder_conv_blocks": keymap.count(shapes, rf"{key_prefix}\.up\.\d+\.block\.(\d+)\."),
        "codebook_size": codebook_size,
        "code_dim": code_dim,
    }


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `tokenizer` section of a checkpoint, by the shapes of its tensors, which fit any image size: 256 px here.

    Raises:
      KeyError: where the tensors are no MaskGIT-VQGAN's.
      ValueError: where its codebook is no matrix.
    """
    section, sizes = config.maskgit_vqgan_tokenizer().to_dict(), decoder_sizes("decoder", "quantize", shapes)
    blocks = keymap.count(shapes, r"encoder\.down\.\d+\.block\.(\d+)\.")
    factor = 2 ** (len(sizes["conv_multipliers"]) - 1)
    cells = (section["image_size"] // factor) ** 2
    return section | sizes | {"num_latent_tokens": cells, "encoder_conv_blocks": blocks}
