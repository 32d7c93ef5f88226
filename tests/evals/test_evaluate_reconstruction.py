import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gigatok_jax.evals.reconstruction import MAX_PSNR, evaluate_reconstruction, to_uint8

V = 16


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, size=(7, 16, 12, 3)).astype(np.uint8)


@jax.jit
def blurred(images_m11):
    """A stand-in tokenizer: shrinks contrast past the range on one side; ids from the corner pixels."""
    ids = jnp.round((images_m11[:, :2, :2, 0] + 1.0) / 2.0 * (V // 2 - 1)).astype(jnp.int32)
    return 0.8 * images_m11 + 0.3, ids


def in_batches(images, size):
    return [images[i : i + size] for i in range(0, len(images), size)]


def test_uint8_truncates_as_published():
    x = np.array([-3.0, -1.0, -0.999, 0.0, 0.5, 0.99, 0.9960, 1.0, 3.0], np.float32)
    # 128 − 127.5 = 0.5 → 0;   −0.999 → 0.6 → 0;   0.5 → 191.75 → 191;   0.99 → 254.2;   0.996 → 254.99
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 0, 128, 191, 254, 254, 255, 255])
    assert to_uint8(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.uint8


def test_every_8_bit_value_survives_the_round_trip():
    u = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(u.astype(np.float32) / 127.5 - 1.0), u)


@pytest.mark.parametrize("ssim_data_range", [1.0, 2.0])
def test_scores_equal_skimage_image_by_image(images, ssim_data_range):
    result = evaluate_reconstruction(blurred, in_batches(images, 3), V, ssim_data_range=ssim_data_range)
    original = images.astype(np.float64) / 255.0
    output = 0.8 * (images.astype(np.float64) / 127.5 - 1.0) + 0.3
    recovered = np.floor(np.clip(127.5 * output + 128.0, 0.0, 255.0)) / 255.0
    colour = np.broadcast_to(original.mean((1, 2), keepdims=True), original.shape)

    def mean_psnr(other):
        return np.mean([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(original, other)])

    ssims = [
        structural_similarity(x, y, channel_axis=-1, data_range=ssim_data_range) for x, y in zip(original, recovered)
    ]
    assert result["psnr"] == pytest.approx(mean_psnr(recovered), rel=1e-5)
    assert result["psnr_mean_colour"] == pytest.approx(mean_psnr(colour), rel=1e-5)
    assert result["ssim"] == pytest.approx(np.mean(ssims), abs=1e-5)
    assert result["num_images"] == 7


def test_codebook_scores_are_over_the_whole_set(images):
    result = evaluate_reconstruction(blurred, in_batches(images, 2), V)
    ids = np.rint(images[:, :2, :2, 0].astype(np.float64) / 255.0 * (V // 2 - 1)).astype(int)
    share = np.bincount(ids.ravel(), minlength=V) / ids.size
    assert result["usage"] == pytest.approx(np.mean(share > 0))
    assert result["perplexity"] == pytest.approx(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))


def test_batch_size_changes_nothing_and_the_model_sees_one_shape(images):
    shapes = set()

    def recording(images_m11):
        assert isinstance(images_m11, np.ndarray) and images_m11.dtype == np.float32
        shapes.add(images_m11.shape)
        return blurred(images_m11)

    whole = evaluate_reconstruction(blurred, [images], V)
    padded = evaluate_reconstruction(recording, in_batches(images, 3), V, batch_size=4)
    assert shapes == {(4, 16, 12, 3)}
    assert padded == pytest.approx(whole, rel=1e-6)


def test_on_batch_sees_every_image_once(images):
    seen = []
    evaluate_reconstruction(blurred, in_batches(images, 3), V, on_batch=lambda a, b: seen.append((a, b)))
    np.testing.assert_array_equal(np.concatenate([a for a, _ in seen]), images)
    recovered = np.concatenate([b for _, b in seen])
    np.testing.assert_array_equal(recovered, to_uint8(blurred(images.astype(np.float32) / 127.5 - 1.0)[0]))


def test_exact_and_flat_images_stay_finite(images):
    flat = images.copy()
    flat[0], flat[1] = 0, 255
    result = evaluate_reconstruction(lambda x: (jnp.asarray(x), None), [flat], None)
    assert result["psnr"] == pytest.approx(MAX_PSNR) and np.isfinite(result["psnr_mean_colour"])
    assert set(result) == {"psnr", "ssim", "psnr_mean_colour", "num_images"}


def test_a_broken_reconstruction_shows(images):
    def broken(images_m11):
        reconstruction, ids = blurred(images_m11)
        return reconstruction.at[0, 0, 0, 0].set(jnp.nan), ids

    result = evaluate_reconstruction(broken, [images], V)
    assert np.isnan(result["psnr"]) and np.isnan(result["ssim"]) and np.isfinite(result["psnr_mean_colour"])


def test_padding_ids_are_not_counted(images):
    def ragged(images_m11):
        reconstruction, _ = blurred(images_m11)
        return reconstruction, jnp.tile(jnp.array([3, 5, -1, -1]), (len(images_m11), 1))

    result = evaluate_reconstruction(ragged, in_batches(images, 3), V)
    assert result["usage"] == 2 / V and result["perplexity"] == pytest.approx(2.0)


def test_sharded_output(images):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    sharded = jax.jit(blurred, in_shardings=sharding, out_shardings=sharding)
    result = evaluate_reconstruction(sharded, [images], V, batch_size=8)
    assert result == pytest.approx(evaluate_reconstruction(blurred, [images], V), rel=1e-6)


def test_wrong_inputs_are_refused(images):
    with pytest.raises(ValueError, match="no images"):
        evaluate_reconstruction(blurred, [], V)
    with pytest.raises(ValueError, match="uint8"):
        evaluate_reconstruction(blurred, [images / 255.0], V)
    with pytest.raises(ValueError, match="larger than the static batch size 2"):
        evaluate_reconstruction(blurred, [images], V, batch_size=2)
    with pytest.raises(ValueError, match="not below codebook_size=4"):
        evaluate_reconstruction(blurred, [images], 4)
    with pytest.raises(ValueError, match="reconstructed as"):
        evaluate_reconstruction(lambda x: (x[:, :8], None), [images], V)
