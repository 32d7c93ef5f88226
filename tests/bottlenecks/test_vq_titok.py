"""The quantiser with TiTok's options, against recorded values of the published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.bottlenecks import vq
from gigatok_jax.objectives.tokenizer import TokenizerObjective
from tests.compare import assert_close_tree

CODES, DIM = 32, 8


def tokens(x):
    """(B, C, 1, K) → (B, K, C)."""
    return jnp.asarray(x[:, :, 0].swapaxes(1, 2))


def quantizer(**options):
    return vq.VectorQuantizer(CODES, DIM, "straight_through", chunk_size=12, **options)


@pytest.mark.golden
@pytest.mark.parametrize("name, normalized", [("plain", False), ("l2", True)])
def test_values_and_gradients(golden, name, normalized):
    want = np.load(golden / "titok" / f"quantizer_{name}.npz")
    module, cotangent = quantizer(normalized=normalized), tokens(want["cotangent"])

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(z, codebook):
        codes = module.apply({"params": {"codebook": codebook}}, z, train=True)
        loss = codes.losses["codebook"] + 0.25 * codes.losses["commitment"]
        return loss + (codes.latents_BKZ * cotangent).sum(), (codes, loss)

    (_, (codes, loss)), (of_z, of_codebook) = run(tokens(want["z"]), jnp.asarray(want["codebook"]))
    np.testing.assert_array_equal(codes.ids_BK, want["indices"][:, 0])
    assert_close_tree(codes.latents_BKZ, tokens(want["z_quantized"]))
    np.testing.assert_allclose(loss, want["quantizer_loss"], rtol=1e-5)
    assert_close_tree(of_z, tokens(want["grad_z"]))
    assert_close_tree(of_codebook, want["grad_codebook"])
    soft = module.apply({"params": {"codebook": jnp.asarray(want["codebook"])}}, want["soft_in"], method="soft_lookup")
    assert_close_tree(soft, want["soft_entry"])


def test_mixtures_are_float32_wherever_they_are_multiplied():
    """A TPU multiplies float32 in bfloat16 unless it is told otherwise; the gradients' products are told too."""
    module, weights = quantizer(), jnp.ones((2, 3, CODES))

    def total(codebook, weights):
        return module.apply({"params": {"codebook": codebook}}, weights, method="soft_lookup").sum()

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(jnp.ones((CODES, DIM)), weights)
    products = [one for one in traced.eqns if one.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {one.params["precision"] for one in products} == {(jax.lax.Precision.HIGHEST,) * 2}


def edited(codebook, kept):
    """The codebook after the edits that a step has kept, as the train step makes them."""
    objective = TokenizerObjective(*[None] * 5)
    params = {"tokenizer": {"bottleneck": {"codebook": codebook}}}
    nested = {"tokenizer": {name: {"bottleneck": leaves} for name, leaves in kept.items()}}
    params, state = objective.edited(params, nested)
    kept = {name: leaves["bottleneck"] for name, leaves in state["tokenizer"].items()}
    return params["tokenizer"]["bottleneck"]["codebook"], kept


@pytest.mark.golden
@pytest.mark.parametrize("step", range(3))
def test_clustering(golden, step, monkeypatch):
    """A step from the recorded state and with the recorded ids.

    Entries that were pulled to one latent are equally near to it but for 2e-6, which is the spacing of float32 at the
    squares (18) that distances are the difference of: there rounding chooses, and any of these will do.
    """
    want = np.load(golden / "titok" / "quantizer_clustering.npz")
    module, z = quantizer(clustering=True, normalized=False), tokens(want["z"])
    codebook = jnp.asarray(want[f"codebook_after_{step - 1}"] if step else want["codebook0"])
    kept = {name: value for name, value in module.init(jax.random.key(0), z).items() if name != "params"}
    if step:
        kept["statistics"]["usage"] = jnp.asarray(want[f"embed_prob_{step - 1}"])
    variables = {"params": {"codebook": codebook}, **kept}
    ids, recorded = np.ravel(module.apply(variables, z).ids_BK), want[f"indices_{step}"].ravel()
    distance = np.square(np.float64(z.reshape(-1, 1, DIM)) - np.float64(codebook)).sum(-1)
    ties = distance <= distance.min(-1, keepdims=True) + 2e-6
    assert ties[np.arange(ids.size), ids].all() and ties[np.arange(ids.size), recorded].all()
    np.testing.assert_array_equal(ids[ties.sum(-1) == 1], recorded[ties.sum(-1) == 1])
    assert (ties.sum(-1) > 1).sum() <= (2 if step else 0)
    nearest = vq.nearest
    monkeypatch.setattr(vq, "nearest", lambda z_NZ, *rest: replayed(nearest(z_NZ, *rest), ids, recorded))
    codes, kept = module.apply(variables, z, train=True, mutable=["statistics", "edits"])
    np.testing.assert_array_equal(np.ravel(codes.ids_BK), recorded)
    loss = codes.losses["codebook"] + 0.25 * codes.losses["commitment"]
    np.testing.assert_allclose(loss, want[f"loss_{step}"], rtol=1e-5)
    codebook, kept = edited(codebook, kept)
    assert_close_tree(kept["statistics"]["usage"], want[f"embed_prob_{step}"])
    assert_close_tree(codebook, want[f"codebook_after_{step}"])


def replayed(found, ids, recorded):
    """The recorded ids where ours were found, else what was found."""
    same = found.shape == ids.shape and (found == ids).all()
    return jnp.asarray(recorded, found.dtype) if same else found


def test_edits_of_microbatches_follow_one_another():
    module = quantizer(clustering=True, normalized=False)
    first, second = jax.random.normal(jax.random.key(0), (2, 3, 10, DIM))
    variables = module.init(jax.random.key(1), first)
    codebook, kept = variables["params"]["codebook"], {name: variables[name] for name in ("statistics", "edits")}
    in_turn = codebook
    for z in (first, second):
        # Both see the codebook of before the update, as microbatches do.
        _, kept = module.apply(
            {"params": {"codebook": codebook}, **kept}, z, train=True, mutable=["statistics", "edits"]
        )
        share = jnp.exp(-10 * CODES * kept["statistics"]["usage"] / 0.01 - 1e-3)[:, None]
        flat = z.reshape(-1, DIM)
        distance = jnp.square(codebook[:, None] - flat[None]).sum(-1)
        in_turn = (1 - share) * in_turn + share * flat[distance.argmin(1)]
    assert_close_tree(edited(codebook, kept)[0], in_turn)


def test_without_training_nothing_is_edited():
    module = quantizer(clustering=True)
    z = jax.random.normal(jax.random.key(0), (3, 10, DIM))
    variables = module.init(jax.random.key(1), z)
    _, kept = module.apply(variables, z, mutable=["statistics", "edits"])
    assert_close_tree(kept, {name: variables[name] for name in kept})


def test_normalised_latents_pull_entries_by_direction_and_with_their_length():
    module = quantizer(clustering=True)
    z = 3 * jax.random.normal(jax.random.key(0), (3, 10, DIM))
    variables = module.init(jax.random.key(1), z)
    codebook, kept = variables["params"]["codebook"], {name: variables[name] for name in ("statistics", "edits")}
    kept["statistics"] = {"usage": jnp.linspace(0, 5e-4, CODES)}  # shares of all sizes
    _, kept = module.apply({**variables, **kept}, z, train=True, mutable=["statistics", "edits"])
    share = jnp.exp(-10 * CODES * kept["statistics"]["usage"] / 0.01 - 1e-3)[:, None]
    flat = z.reshape(-1, DIM)
    pulled_to = flat[(vq.unit(codebook) @ vq.unit(flat).T).argmax(-1)]
    assert_close_tree(edited(codebook, kept)[0], (1 - share) * codebook + share * pulled_to)
