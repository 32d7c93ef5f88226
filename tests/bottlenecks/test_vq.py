"""The vector quantiser: recorded values, properties by gradient, and memory of the chunked form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.bottlenecks import vq
from tests.compare import assert_close_tree


def plain_entropy(z_NZ, codebook_VZ, temperature=0.01):
    """The formula of the paper, all distances at once."""
    d = (z_NZ**2).sum(-1)[:, None] + (codebook_VZ**2).sum(-1)[None] - 2 * z_NZ @ codebook_VZ.T
    p = jax.nn.softmax(-d / temperature)
    log_p = jax.nn.log_softmax(-d / temperature)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * jnp.log(mean + 1e-5)).sum()


@pytest.fixture
def rows():
    z = vq.unit(jax.random.normal(jax.random.key(0), (48, 8)))
    codebook = vq.codebook_init(jax.random.key(1), (100, 8))
    return z, codebook


@pytest.mark.golden
def test_recorded_entropy_and_rotation(golden):
    want = np.load(golden / "gigatok" / "quant_pieces.npz")
    chunks = jnp.asarray(want["d"]).reshape(96, 4, 128).swapaxes(0, 1)
    per_row, of_mean = vq.entropies(lambda d: -d / 0.01, chunks, 96)
    np.testing.assert_allclose(per_row - of_mean, want["entropy_loss"], rtol=1e-4)
    # Recorded is R(u → q)·u, which the estimator scales by |q| / |u|.
    u, q = want["rot_u"], want["rot_q"]
    scale = np.linalg.norm(q, axis=-1, keepdims=True) / (np.linalg.norm(u, axis=-1, keepdims=True) + 1e-6)
    assert_close_tree(vq.rotate(u, q) / scale, want["rot_out"])


@pytest.mark.parametrize("chunk_size", [7, 32, 100])
def test_chunks_do_not_change_the_result(rows, chunk_size):
    z, codebook = rows

    def chunked(z, codebook):
        return vq.entropy_loss(z, codebook, temperature=0.01, chunk_size=chunk_size)

    got = jax.value_and_grad(chunked, argnums=(0, 1))(z, codebook)
    want = jax.value_and_grad(plain_entropy, argnums=(0, 1))(z, codebook)
    assert_close_tree(got, want, rtol=1e-4)
    ids = vq.nearest(z, codebook, chunk_size)
    np.testing.assert_array_equal(ids, jnp.argmin(((z[:, None] - codebook[None]) ** 2).sum(-1), -1))


def test_nearest_takes_the_first_on_ties():
    codebook = jnp.tile(jnp.eye(4)[:1], (9, 1))
    np.testing.assert_array_equal(vq.nearest(jnp.eye(4)[:1], codebook, 2), [0])


def test_estimators_by_gradient(rows):
    z, codebook = rows

    def through(estimator):
        module = vq.VectorQuantizer(codebook_size=100, code_dim=8, estimator=estimator)
        variables = {"params": {"codebook": codebook}}

        def probe(pre):
            return module.apply(variables, pre, train=True).latents_BKZ

        pre = z[None] * 3.0
        value, pull = jax.vjp(probe, pre)
        return value, pull(jnp.ones_like(value))[0]

    straight, straight_gradient = through("straight_through")
    rotated, rotated_gradient = through("rotation")
    exact = codebook[vq.nearest(z, codebook, 100)][None]
    np.testing.assert_allclose(straight, exact, atol=1e-6)
    np.testing.assert_allclose(rotated, exact, atol=2e-5)
    # Straight-through is the identity on the unit vector; rotation is orthogonal: other direction, same length.
    g = jnp.ones_like(z)
    want = (g - (g * z).sum(-1, keepdims=True) * z) / 3.0
    np.testing.assert_allclose(straight_gradient[0], want, atol=1e-5)
    assert not np.allclose(rotated_gradient, straight_gradient, atol=1e-3)


def test_loss_terms_reach_the_right_side(rows):
    z, codebook = rows
    module = vq.VectorQuantizer(codebook_size=100, code_dim=8)

    def term(name):
        def loss(pre, codebook):
            return module.apply({"params": {"codebook": codebook}}, pre, train=True).losses[name]

        return [float(jnp.abs(g).max()) for g in jax.grad(loss, argnums=(0, 1))(z[None], codebook)]

    pre, book = term("codebook")
    assert pre == 0 and book > 0
    pre, book = term("commitment")
    assert pre > 0 and book == 0
    pre, book = term("entropy")
    assert pre > 0 and book > 0


def test_float32_whatever_comes_in(rows):
    z, codebook = rows
    module = vq.VectorQuantizer(codebook_size=100, code_dim=8)
    codes = module.apply({"params": {"codebook": codebook}}, z[None].astype(jnp.bfloat16), train=True)
    assert codes.latents_BKZ.dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in codes.losses.values())
    assert module.apply({"params": {"codebook": codebook}}, codes.ids_BK, method="lookup").ids_BK is codes.ids_BK


def peak_mib(rows, entries, chunk_size):
    def loss(z, codebook):
        return vq.entropy_loss(z, codebook, temperature=0.01, chunk_size=chunk_size)

    shapes = [jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (rows, entries)]
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 2**20


def test_memory_is_bounded_by_the_chunk(capsys):
    """A codebook of 262,144 against 65,536 latent tokens would take 64 GiB per copy of the distances."""
    chunked = peak_mib(65_536, 262_144, 1024)
    small, small_plain = peak_mib(4096, 16_384, 1024), peak_mib(4096, 16_384, 16_384)
    with capsys.disabled():
        print(f"\n65,536 x 262,144, chunks of 1,024: {chunked:.0f} MiB; 4,096 x 16,384: {small:.0f} MiB in chunks of "
              f"1,024, {small_plain:.0f} MiB in one")  # fmt: skip
    assert chunked < 4096
    assert small_plain > 4 * small
