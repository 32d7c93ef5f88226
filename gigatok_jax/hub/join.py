"""A TiTok of stage 1 and its proxy tokenizer, joined: the tokenizer that stage 2 starts from, and that makes images."""

from typing import Any

from gigatok_jax.hub.bundle import Bundle
from gigatok_jax.tokenizers.titok import proxy_section

QUANTIZER, CNN = "quantizer", "cnn"  # of the head, as `decoders.vit.ProxyPixelHead` names them


def with_pixel_decoder(tokenizer: Bundle, proxy: Bundle) -> Bundle:
    """The bundle whose decoder turns the logits of the proxy's ids into pixels by the proxy's codebook and decoder.

    Raises:
      ValueError: these are not a TiTok that gives logits and the MaskGIT-VQGAN whose ids it learnt.
    """
    section, theirs = dict(tokenizer.section), proxy.section
    if section["family"] != "titok" or section["head"] != "proxy":
        raise ValueError("only a TiTok with head=proxy (its first stage) is joined with a proxy tokenizer")
    if theirs["family"] != "maskgit_vqgan" or theirs["codebook_size"] != section["proxy_codebook_size"]:
        raise ValueError(
            f"the proxy tokenizer is a {theirs['family']} of {theirs['codebook_size']} ids; wanted is a maskgit_vqgan "
            f"of {section['proxy_codebook_size']}"
        )
    learnt = tokenizer.provenance.get("frozen", {}).get("first_stage", proxy.hash)
    if learnt != proxy.hash:
        raise ValueError(
            f"the first stage learnt the ids of the proxy tokenizer {learnt[:12]}…, this one is {proxy.hash[:12]}…: "
            "name the bundle that config.first_stage.bundle named"
        )
    section |= {"head": "proxy_pixels"}
    section |= {f"proxy_{name}": theirs[name] for name in proxy_section(section) if f"proxy_{name}" in section}
    decoder = tokenizer.params["decoder"]
    head = {
        "proxy": decoder["head"],
        QUANTIZER: {"codebook": proxy.params["bottleneck"]["codebook"]},
        CNN: proxy.params["decoder"]["cnn"],
    }
    params = {**tokenizer.params, "decoder": {**decoder, "head": head}}
    provenance: dict[str, Any] = {**tokenizer.provenance, "joined": {"tokenizer": tokenizer.hash, "proxy": proxy.hash}}
    return tokenizer._replace(section=section, params=params, provenance=provenance, folder=None)
