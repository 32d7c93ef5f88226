"""A bundle's programs as `jax.export` artefacts, which run without this package.

    import jax, safetensors.numpy
    program = jax.export.deserialize(open("bundle/tokenize.stablehlo", "rb").read())
    ids = program.call(safetensors.numpy.load_file("bundle/model.safetensors"), images)

`tokenize`: (weights, (b, S, S, 3) uint8) → (b, K) int32.   `detokenize`: (weights, (b, K) int32) → (b, S, S, 3) uint8.
Of a tokenizer with continuous latents `encode` and `decode`, with (b, K, Z) float32 in the place of ids.
`sample`: (weights, labels (b,) int32, image numbers (b,) int32, seed () uint32, guidance scales (K,) float32) → (b, K)
int32, at temperature 1; of a masked generator, in place of the scales, the four arrays of `sampling.masked.make_steps`
for its default number of steps. The batch b is any; weights are the bundle's tensors by name, never part of the
program.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.evals.reconstruction import to_uint8
from gigatok_jax.hub import keymap
from gigatok_jax.hub.bundle import build_model, parameter_shapes
from gigatok_jax.objectives.tokenizer import image_codes, image_ids
from gigatok_jax.sampling import ar
from gigatok_jax.sampling.samplers import SAMPLERS

Program = tuple[Callable[..., jax.Array], *tuple[Any, ...]]
PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder: Path, kind: str, section: Mapping[str, Any], platforms: tuple[str, ...] = PLATFORMS) -> list[Path]:
    """Writes `<program>.stablehlo` for every program of a bundle into its folder; returns their paths."""
    weights = parameter_shapes(kind, section)
    written = []
    for name, (program, *inputs) in programs(kind, section).items():
        exported = export.export(jax.jit(program), platforms=platforms)(weights, *inputs)
        path = folder / f"{name}.stablehlo"
        path.write_bytes(exported.serialize())
        written.append(path)
    return written


def programs(kind: str, section: Mapping[str, Any]) -> dict[str, Program]:
    """{name: (function of flat weights and inputs, shapes of the inputs…)}, the batch a symbol."""
    model = build_model(kind, {**section, "attention": "xla"})  # the fused kernel is of one platform
    (b,) = export.symbolic_shape("b")
    return _sampling(model, section, b) if kind == "generator" else _coding(model, section, b)


def _shape(*sizes: Any, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _sampling(model: Any, section: Mapping[str, Any], b: Any) -> dict[str, Program]:
    """What a generator does."""
    family = SAMPLERS[section["family"]]
    example = family.constant(section["num_latent_tokens"], 2.0)  # guided all along
    arrays, form = jax.tree.flatten(example)

    def sample(
        weights: Mapping[str, jax.Array], class_B: jax.Array, number_B: jax.Array, seed: jax.Array, *steps: jax.Array
    ) -> jax.Array:
        params, keys_B = keymap.unflatten(weights), ar.image_keys(seed, number_B)
        steps = jax.tree.unflatten(form, steps)
        return family.generate(model, params, class_B, keys_B, steps, guided=family.guided(example))

    steps = [_shape(*x.shape, dtype=x.dtype) for x in arrays]
    return {"sample": (sample, _shape(b), _shape(b), _shape(dtype=jnp.uint32), *steps)}


def _coding(model: Any, section: Mapping[str, Any], b: Any) -> dict[str, Program]:
    """What a tokenizer does."""

    def variables(weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        return {"params": keymap.unflatten(weights)}

    def tokenize(weights: Mapping[str, jax.Array], image_BHWC: jax.Array) -> jax.Array:
        return image_ids(model, keymap.unflatten(weights), image_BHWC)

    def detokenize(weights: Mapping[str, jax.Array], ids_BK: jax.Array) -> jax.Array:
        return pixels(weights, model.apply(variables(weights), ids_BK, method="lookup"))

    def encode(weights: Mapping[str, jax.Array], image_BHWC: jax.Array) -> jax.Array:
        return image_codes(model, keymap.unflatten(weights), image_BHWC).latents_BKZ

    def decode(weights: Mapping[str, jax.Array], latents_BKZ: jax.Array) -> jax.Array:
        return pixels(weights, Codes.of_latents(latents_BKZ))

    def pixels(weights: Mapping[str, jax.Array], codes: Codes) -> jax.Array:
        return to_uint8(model.apply(variables(weights), codes, method="decode")[0])

    size, K = section["image_size"], section["num_latent_tokens"]
    images = _shape(b, size, size, 3, dtype=jnp.uint8)
    if section["codebook_size"]:
        found = {"tokenize": (tokenize, images), "detokenize": (detokenize, _shape(b, K))}
    else:
        latents = _shape(b, K, section["code_dim"], dtype=jnp.float32)
        found = {"encode": (encode, images), "decode": (decode, latents)}
    made_of = {name: made for name, made in found.items() if name in ("tokenize", "encode")}
    return made_of if model.proxy_codebook_size else found  # whose decoder makes no images
