"""Published masked generators (bytedance/1d-tokenizer `ImageBert`, `UViTBert`) ↔ ours."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax import config
from gigatok_jax.hub import keymap
from gigatok_jax.hub.conv_keys import dense, norm
from gigatok_jax.hub.keymap import Entry

_QKV = ("query", "key", "value")
OLD = ("model.embeddings.position_ids",)  # numbers of positions
# The tensors that tell the sizes: of the table, positions, head, MLP and width; and what the layers' names begin with.
_EMBEDDINGS = "model.embeddings"
_TOLD_BY = {
    "bert": (
        f"{_EMBEDDINGS}.word_embeddings.weight",
        f"{_EMBEDDINGS}.position_embeddings.weight",
        "model.lm_head.bias",
        "model.encoder.layer.0.intermediate.dense.bias",
        f"{_EMBEDDINGS}.LayerNorm.bias",
        r"model\.encoder\.layer\.(\d+)\.",
    ),
    "uvit": (
        "embeddings.weight",
        "pos_embed",
        "lm_head.bias",
        "mid_block.mlp.fc1.bias",
        "norm.bias",
        r"in_blocks\.(\d+)\.",
    ),
}


def entries(cfg: Mapping[str, Any]) -> list[Entry]:
    """The key list of a config's `generator` section."""
    return list((_bert if cfg["architecture"] == "bert" else _uvit)(cfg))


def _rows(cfg: Mapping[str, Any]) -> int:
    """Ids, MASK, classes, null class."""
    return cfg["codebook_size"] + cfg["num_classes"] + 2


def _bert(cfg: Mapping[str, Any]) -> Iterator[Entry]:
    width, hidden = cfg["width"], cfg["hidden"] or 4 * cfg["width"]
    tables = {
        "word": ("id_embed/embedding", _rows(cfg)),
        "position": ("token_pos", 1 + cfg["num_latent_tokens"]),
        "token_type": ("type_table", 2),
    }
    for name, (path, rows) in tables.items():
        yield Entry(f"{_EMBEDDINGS}.{name}_embeddings.weight", (path,), "vector", (rows, width))
    yield from norm(f"{_EMBEDDINGS}.LayerNorm", "norm_in", width)
    for n in range(cfg["depth"]):
        key, ours = f"model.encoder.layer.{n}", "stack/layers"
        for part in _QKV:
            yield from dense(f"{key}.attention.self.{part}", f"{ours}/self_attention/{part}", width, width, n)
        yield from dense(f"{key}.attention.output.dense", f"{ours}/self_attention/out", width, width, n)
        yield from norm(f"{key}.attention.output.LayerNorm", f"{ours}/norm_self", width, n)
        yield from dense(f"{key}.intermediate.dense", f"{ours}/mlp/in", hidden, width, n)
        yield from dense(f"{key}.output.dense", f"{ours}/mlp/out", width, hidden, n)
        yield from norm(f"{key}.output.LayerNorm", f"{ours}/norm_mlp", width, n)
    yield from dense("model.lm_head", "head", cfg["codebook_size"], width)


def _uvit(cfg: Mapping[str, Any]) -> Iterator[Entry]:
    width, hidden, half = cfg["width"], cfg["hidden"] or 4 * cfg["width"], cfg["depth"] // 2
    yield Entry("embeddings.weight", ("id_embed/embedding",), "vector", (_rows(cfg), width))
    yield Entry("pos_embed", ("token_pos",), "positions", (1, 1 + cfg["num_latent_tokens"], width))
    for n in range(half):
        yield from _block(f"in_blocks.{n}", "stack/down/layers", width, hidden, n)
    yield from _block("mid_block", "stack/middle/layers", width, hidden, 0)
    for n in range(half):
        yield from dense(f"out_blocks.{n}.skip_linear", "stack/up/layers/skip", width, 2 * width, n)
        yield from _block(f"out_blocks.{n}", "stack/up/layers/block", width, hidden, n)
    yield from norm("norm", "norm_out", width)
    yield from dense("lm_head", "head", cfg["codebook_size"], width)


def _block(key: str, ours: str, width: int, hidden: int, n: int) -> Iterator[Entry]:
    packed = tuple(f"{ours}/self_attention/{part}/kernel" for part in _QKV)
    yield from norm(f"{key}.norm1", f"{ours}/norm_self", width, n)
    yield Entry(f"{key}.attn.qkv.weight", packed, "dense", (3 * width, width), n)
    yield from dense(f"{key}.attn.proj", f"{ours}/self_attention/out", width, width, n)
    yield from norm(f"{key}.norm2", f"{ours}/norm_mlp", width, n)
    yield from dense(f"{key}.mlp.fc1", f"{ours}/mlp/in", hidden, width, n)
    yield from dense(f"{key}.mlp.fc2", f"{ours}/mlp/out", width, hidden, n)


def section_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `generator` section of a checkpoint, by the shapes of its tensors; what shapes do not tell is as published.

    Raises:
      KeyError: where the tensors are of neither model.
    """
    bert = "pos_embed" not in shapes
    table, positions, head, mlp, out, layer = _TOLD_BY["bert" if bert else "uvit"]
    width, hidden = shapes[out][0], shapes[mlp][0]
    codebook_size, rows = shapes[head][0], math.prod(shapes[table]) // width
    section = config.masked_generator("l-32" if bert else "s-128").to_dict()
    heads = {sizes[:3]: sizes[3] for sizes in config.MASKED_SIZES.values()}
    depth = keymap.count(shapes, layer) * (1 if bert else 2)
    return section | {
        "width": width,
        "depth": depth,
        "heads": heads.get((section["architecture"], width, depth), max(width // 64, 1)),
        "hidden": 0 if hidden == 4 * width else hidden,
        "codebook_size": codebook_size,
        "num_latent_tokens": math.prod(shapes[positions]) // width - 1,
        "num_classes": rows - codebook_size - 2,
    }
