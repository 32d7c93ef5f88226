"""Published GPT checkpoints (SilentView/GigaTok `gpt_1d`, FoundationVision/LlamaGen `gpt`) ↔ our AR generator."""

from collections.abc import Iterator, Mapping
from typing import Any

from gigatok_jax.generators.ar import hidden_width
from gigatok_jax.hub.keymap import Entry

DROPPABLE = ("freqs_cis",)


def _weight(key: str, paths: tuple[str, ...], out: int, inp: int, layer: int | None = None) -> Entry:
    return Entry(f"{key}.weight", tuple(f"{path}/kernel" for path in paths), "dense", (out, inp), layer)


def _norm(key: str, path: str, width: int, layer: int | None = None) -> Entry:
    return Entry(f"{key}.weight", (f"{path}/scale",), "vector", (width,), layer)


def _biased(key: str, path: str, out: int, inp: int, layer: int | None = None) -> Iterator[Entry]:
    yield _weight(key, (path,), out, inp, layer)
    yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (out,), layer)


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
        yield from _biased(f"{key}.adaLN_modulation.1", f"{ours}/modulate", 6 * width, width, n)
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
        listed.extend(_biased("adaLN.1", "modulate", 6 * width, width))
    if cfg["modulation"] != "none":
        listed.extend(_biased("final_adaLN.1", "modulate_out", 2 * width, width))
    return listed
