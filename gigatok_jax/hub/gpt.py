"""Published GPT checkpoints (SilentView/GigaTok `gpt_1d`, FoundationVision/LlamaGen `gpt`) ↔ our AR generator."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax import config
from gigatok_jax.generators.ar import hidden_width
from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import dense
from gigatok_jax.hub.keymap import Entry


def _weight(key: str, paths: tuple[str, ...], out: int, inp: int, layer: int | None = None) -> Entry:
    return Entry(f"{key}.weight", tuple(f"{path}/kernel" for path in paths), "dense", (out, inp), layer)


def _norm(key: str, path: str, width: int, layer: int | None = None) -> Entry:
    return Entry(f"{key}.weight", (f"{path}/scale",), "vector", (width,), layer)


def _layer(cfg: Mapping[str, Any], n: int) -> Iterator[Entry]:
    width, hidden = cfg["width"], hidden_width(cfg["width"], cfg["hidden_multiple"])
    key, ours = f"layers.{n}", "stack/layers"
    attention = f"{ours}/self_attention"
    packed = tuple(f"{attention}/{part}" for part in ("query", "key", "value"))
    yield _weight(f"{key}.attention.wqkv", packed, 3 * width, width, n)
    yield _weight(f"{key}.attention.wo", (f"{attention}/out",), width, width, n)
    for published, part in (("w1", "gate"), ("w3", "in")):
        yield _weight(f"{key}.feed_forward.{published}", (f"{ours}/mlp/{part}",), hidden, width, n)
    yield _weight(f"{key}.feed_forward.w2", (f"{ours}/mlp/out",), width, hidden, n)
    yield _norm(f"{key}.attention_norm", f"{ours}/norm_attention", width, n)
    yield _norm(f"{key}.ffn_norm", f"{ours}/norm_mlp", width, n)
    if cfg["qk_norm"]:
        for published, part in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield _norm(f"{key}.attention.{published}", f"{attention}/{part}", width // cfg["heads"], n)
            path = f"{attention}/{part}/bias"
            yield Entry(f"{key}.attention.{published}.bias", (path,), "vector", (width // cfg["heads"],), n)
    if cfg["modulation"] == "adaln":
        yield from dense(f"{key}.adaLN_modulation.1", f"{ours}/modulate", 6 * width, width, n)
    if cfg["modulation"] == "shared_adaln":
        yield Entry(f"{key}.ada_gss", (f"{ours}/modulation_table",), "shared_table", (1, 1, 6, width), n)


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `generator` section."""
    width, codes, classes = cfg["width"], cfg["codebook_size"], cfg["num_classes"] + 1
    listed = [
        Entry("cls_embedding.embedding_table.weight", ("class_embed/embedding",), "vector", (classes, width)),
        Entry("tok_embeddings.weight", ("id_embed/embedding",), "vector", (codes, width)),
        *(entry for n in range(cfg["depth"]) for entry in _layer(cfg, n)),
        _norm("norm", "norm_out", width),
        _weight("output", ("head",), codes, width),
    ]  # fmt: skip
    if cfg["positions"] == "learned":
        listed.append(Entry("positional_embedding", ("token_pos",), "vector", (1 + cfg["num_latent_tokens"], width)))
    if cfg["modulation"] == "shared_adaln":
        listed.extend(dense("adaLN.1", "modulate", 6 * width, width))
    if cfg["modulation"] != "none":
        listed.extend(dense("final_adaLN.1", "modulate_out", 2 * width, width))
    return listed


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `generator` section of a checkpoint, by the shapes of its tensors; what shapes do not tell is as published.

    Raises:
      KeyError: where the tensors are no GPT's.
    """
    width = shapes["layers.0.attention_norm.weight"][0]

    def rows(key: str) -> int:  # by another tensor's width, so that a transposed table is what does not fit
        return math.prod(shapes[key]) // width

    learned = "positional_embedding" in shapes
    section = config.ar_generator().to_dict()
    heads = {(width, depth): heads for width, depth, heads in config.GPT_SIZES.values()}
    depth = keymap.count(shapes, r"layers\.(\d+)\.")
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    multiples = (m for m in (section["hidden_multiple"], 128, 64, 32, 16) if hidden_width(width, m) == hidden)
    section |= {
        "width": width,
        "hidden_multiple": next(multiples, section["hidden_multiple"]),
        "depth": depth,
        "heads": heads.get((width, depth), max(width // 64, 1)),
        "codebook_size": rows("tok_embeddings.weight"),
        "num_classes": rows("cls_embedding.embedding_table.weight") - 1,
        "positions": "learned" if learned else "rope_2d",
        "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
        "modulation": "shared_adaln" if "adaLN.1.weight" in shapes else "none",
    }
    if "layers.0.adaLN_modulation.1.weight" in shapes:
        section["modulation"] = "adaln"
    if learned:
        section["num_latent_tokens"] = rows("positional_embedding") - 1
    return section
