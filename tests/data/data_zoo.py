"""A folder of good, convertible and broken image files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth colour image (JPEG keeps it nearly exact)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header of any size, with four bytes of pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 4)) + chunk(b"IEND", b"")
    )


# name -> a part of the reason it must be refused for
BAD = {
    "birds/empty.png": "the file is empty",
    "birds/huge_header.png": "60000x60000 pixels, above the limit",
    "birds/text.jpg": "not a JPEG",
    "cats/one_pixel.png": "1x1 pixels, the shorter side is below 8",
    "cats/truncated.jpeg": "truncated",
}
GOOD = {
    "birds/a.JPG": 0,
    "birds/deep/cmyk.jpg": 0,
    "cats/b.webp": 1,
    "cats/palette.png": 1,
    "dogs/c.bmp": 2,
    "dogs/grey16.png": 2,
}


def write_zoo(root: Path) -> None:
    """Writes the folder; `BAD` and `GOOD` are its image files."""
    grey16 = (np.arange(48 * 40).reshape(48, 40) * 34).astype(np.uint16)
    files = {
        "birds/a.JPG": encoded(Image.fromarray(smooth(60, 45, 0)), "JPEG", quality=95),
        "birds/deep/cmyk.jpg": encoded(Image.new("CMYK", (40, 50), (51, 102, 0, 0)), "JPEG", quality=100),
        "birds/empty.png": b"",
        "birds/huge_header.png": png_header(60_000, 60_000),
        "birds/notes.txt": b"no image, and not named as one",
        "birds/text.jpg": b"this is a text",
        "cats/b.webp": encoded(Image.fromarray(smooth(64, 32, 1)), "WEBP", lossless=True),
        "cats/one_pixel.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "cats/palette.png": encoded(Image.fromarray(smooth(33, 47, 2)).quantize(16), "PNG"),
        "cats/truncated.jpeg": encoded(Image.fromarray(smooth(90, 90, 3)), "JPEG")[:700],
        "dogs/c.bmp": encoded(Image.fromarray(smooth(32, 32, 4)), "BMP"),
        "dogs/grey16.png": encoded(Image.fromarray(grey16), "PNG"),
        "empty_folder/readme.md": b"no class",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
