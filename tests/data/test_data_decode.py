"""Pixel values after conversion, and refusals."""

import tracemalloc
import warnings

import numpy as np
import pytest
from data_zoo import encoded, png_header, smooth
from PIL import Image

from gigatok_jax.data import BadRecord, decode, decode_image

RGB = smooth(24, 36, 7)
GREY = RGB[..., 0]


def alpha_half() -> np.ndarray:
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :18] = 0
    return alpha


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(form):
    data = encoded(Image.fromarray(RGB), form, **({"lossless": True} if form == "WEBP" else {}))
    image = decode_image(data, "x")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RGB)


def test_jpeg_is_near():
    image = decode_image(encoded(Image.fromarray(RGB), "JPEG", quality=98, subsampling=0), "x")
    assert np.abs(image.astype(int) - RGB).max() <= 6


def test_cmyk_jpeg():
    # PIL writes Adobe's inverted form. (1 - 51/255, 1 - 102/255, 1) * 255 = (204, 153, 255).
    image = decode_image(encoded(Image.new("CMYK", (40, 50), (51, 102, 0, 0)), "JPEG", quality=100), "x")
    assert image.shape == (50, 40, 3)
    np.testing.assert_allclose(image.reshape(-1, 3), np.tile([204, 153, 255], (2000, 1)), atol=2)


def test_16_bit_grey_is_scaled_and_not_clipped():
    deep = np.linspace(0, 65535, 24 * 36).round().astype(np.uint16).reshape(24, 36)
    for data in (encoded(Image.fromarray(deep), "PNG"), encoded(Image.fromarray(deep), "TIFF")):
        image = decode_image(data, "x")
        np.testing.assert_array_equal(image, np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode):
    source = Image.fromarray(GREY).convert(mode)
    expected = np.asarray(source.convert("L"))
    np.testing.assert_array_equal(decode_image(encoded(source, "PNG"), "x"), np.repeat(expected[..., None], 3, -1))


def test_palette():
    source = Image.fromarray(RGB).quantize(16)
    for form in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode_image(encoded(source, form), "x"), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    if mode == "P":
        source = Image.fromarray(np.where(alpha_half() == 0, 3, 1).astype(np.uint8), "P")
        source.putpalette([0, 0, 0, 10, 20, 30, 0, 0, 0, 90, 80, 70])
        data, opaque = encoded(source, "PNG", transparency=3), np.broadcast_to([10, 20, 30], RGB.shape)
    else:
        planes = RGB if mode == "RGBA" else GREY[..., None]
        stacked = np.concatenate([planes, alpha_half()[..., None]], -1)
        data, opaque = encoded(Image.fromarray(stacked), "PNG"), np.broadcast_to(planes, RGB.shape)
    image = decode_image(data, "x")
    assert (image[:, :18] == 255).all()
    np.testing.assert_array_equal(image[:, 18:], opaque[:, 18:])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.swapaxes(0, 1)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(RGB)),
    ],
)
def test_exif_orientation(form, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(RGB), form, exif=exif), "x"), expected)


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0no TIFF header")
    np.testing.assert_array_equal(decode_image(data, "x"), RGB)


def test_huge_header_is_refused_without_memory_or_warning():
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 100 million pixels: where PIL by itself would warn; 3.6 billion: where it would raise.
        for side in (10_000, 60_000):
            with pytest.raises(BadRecord, match=f"^x: {side}x{side} pixels, above the limit of 64000000"):
                decode_image(png_header(side, side), "x")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data, options, reason",
    [
        (b"", {}, "the file is empty"),
        (b"\xff\xd8\xff", {}, "cannot be decoded"),
        (b"hello", {}, "not a JPEG, PNG"),
        (b"RIFF\x10\0\0\0WAVEfmt ", {}, "cannot be decoded"),
        (encoded(Image.fromarray(RGB), "PNG")[:-400], {}, "cannot be decoded"),
        (encoded(Image.fromarray(RGB), "JPEG")[:-40], {}, "truncated"),
        (encoded(Image.fromarray(RGB), "PNG"), {"max_bytes": 100}, "above the limit of 100"),
        (encoded(Image.fromarray(RGB), "PNG"), {"max_pixels": 863}, "36x24 pixels, above the limit of 863"),
        (encoded(Image.fromarray(RGB), "PNG"), {"min_side": 25}, "the shorter side is below 25"),
        (encoded(Image.new("RGB", (8, 900)), "PNG"), {}, "over 50 times"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), {}, "no fixed white"),
        (encoded(Image.fromarray(GREY.astype(np.int32) - 1), "TIFF"), {}, "no fixed white"),
    ],
)
def test_refusals_name_the_record_and_the_reason(data, options, reason):
    with pytest.raises(BadRecord, match=reason) as caught:
        decode_image(data, "some/name.png", **options)
    assert caught.value.name == "some/name.png"
    assert str(caught.value).startswith("some/name.png: ")


def test_limits_are_inclusive():
    decode_image(encoded(Image.fromarray(RGB), "PNG"), "x", max_pixels=864, min_side=24)


JPEG_OPTIONS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive, "optimize": progressive}
    for quality in (10, 75, 95)
    for subsampling in (0, 1, 2)
    for progressive in (False, True)
] + [{"restart_marker_blocks": 3}, {"keep_rgb": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}]


def both_decoders(monkeypatch, data: bytes) -> list:
    """The image or the reason against it, with simplejpeg and without."""
    found = []
    for library in (decode.simplejpeg, None):
        with monkeypatch.context() as patch:
            patch.setattr(decode, "simplejpeg", library)
            try:
                found.append(decode_image(data, "x"))
            except BadRecord as error:
                found.append(error.reason)
    return found


def same(left, right) -> bool:
    return left == right if isinstance(left, str) and isinstance(right, str) else np.array_equal(left, right)


def jpegs() -> list[bytes]:
    noisy = np.random.default_rng(0).integers(-40, 41, (53, 67, 3)) + smooth(53, 67, 5)
    picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    files = [encoded(picture, "JPEG", **options) for options in JPEG_OPTIONS]
    files += [encoded(picture.convert("L"), "JPEG", progressive=p) for p in (False, True)]
    pixels = np.ascontiguousarray(np.asarray(picture))
    return files + [decode.simplejpeg.encode_jpeg(pixels, colorsubsampling=s) for s in ("440", "411")]


def test_simplejpeg_gives_pils_pixels(monkeypatch):
    fast = []
    real = decode._fast_jpeg
    monkeypatch.setattr(decode, "_fast_jpeg", lambda *args: fast.append(real(*args)) or fast[-1])
    for number, data in enumerate(jpegs()):
        left, right = both_decoders(monkeypatch, data)
        assert same(left, right), number
    assert sum(pixels is not None for pixels in fast) == len(jpegs()), "every one of these is for simplejpeg"
    both_decoders(monkeypatch, encoded(Image.new("CMYK", (40, 50)), "JPEG"))
    assert fast[-2] is None, "CMYK is for PIL"


def test_simplejpeg_gives_pils_verdict_on_damaged_files(monkeypatch):
    rng, files, verdicts = np.random.default_rng(0), jpegs(), []
    for _ in range(600):
        data = bytearray(files[rng.integers(len(files))])
        for place in rng.integers(2, len(data), 2):
            data[place] = rng.integers(256)
        if rng.random() < 0.2:
            del data[int(rng.integers(len(data) // 2, len(data))) :]
        left, right = both_decoders(monkeypatch, bytes(data))
        assert same(left, right)
        verdicts.append(isinstance(left, str))
    assert 50 < sum(verdicts) < 550


def test_jpeg_orientation_without_and_with_simplejpeg(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = (encoded(Image.fromarray(RGB), "JPEG", **options) for options in ({"exif": exif}, {}))
    for image in both_decoders(monkeypatch, turned):
        np.testing.assert_array_equal(image, np.rot90(decode_image(plain, "x"), -1))
