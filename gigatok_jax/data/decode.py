"""Bytes of an image file to an RGB array, with every refusal told as a `BadRecord`."""

import io
from typing import Any

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: PIL gives the same pixels, more slowly
    simplejpeg: Any = None

MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
MIN_SIDE = 8
# Scaling the shorter side of a 8 x 5,000,000 strip to 256 would ask for 120 GB.
MAX_ASPECT = 50

# The readers are called by file signature instead of through `Image.open`, which applies PIL's process-wide
# pixel limit as warnings and errors of its own. Ours is an argument, and holds in every thread.
_READERS = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"BM", BmpImageFile),
)

_Turn = Image.Transpose
_EXIF_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


class BadRecord(ValueError):
    """One record that cannot be used: `name` says which, `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(
    data: bytes,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """Decodes a JPEG, PNG, WEBP, BMP, GIF (first frame) or TIFF (first page) file.

    Sizes are read from the header and checked before any pixel is decoded. EXIF orientation is applied; alpha
    is composited over white; CMYK, palette, grey and 1-bit images become RGB. A 16-bit grey value v becomes
    round(v / 257); 16-bit colour keeps its high byte (PIL reads no more). JPEG pixels are those of PIL, whether or
    not simplejpeg is there to decode them faster.

    Args:
        data: the whole file.
        name: the record's name, for the error only.
        max_pixels: largest width * height; PIL's own limits take over above 89 million.
        max_bytes: largest file.
        min_side: smallest allowed shorter side, in pixels.

    Returns:
        (H, W, 3) uint8 in [0, 255].

    Raises:
        BadRecord: the file is empty, too large, too small, truncated, or no image of these formats.
    """
    if not data:
        raise BadRecord(name, "the file is empty")
    if len(data) > max_bytes:
        raise BadRecord(name, f"{len(data)} bytes, above the limit of {max_bytes}")
    try:
        picture = _open(data)
        _check_size(picture.size, name, max_pixels, min_side)
        pixels = _fast_jpeg(picture, data)
        if pixels is None:
            picture.load()
        # After load(): a PNG may hold EXIF behind its pixels, and TIFF applies its orientation in load().
        turn = _EXIF_TURNS.get(_orientation(picture))
        if pixels is not None and turn is None:
            return pixels
        rgb = _to_rgb(picture) if pixels is None else Image.fromarray(pixels)
    except BadRecord:
        raise
    except Exception as error:
        # PIL raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files.
        raise BadRecord(name, f"cannot be decoded ({type(error).__name__}: {error})") from error
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _open(data: bytes) -> Image.Image:
    for signature, reader in _READERS:
        if data.startswith(signature):
            return reader(io.BytesIO(data))
    raise ValueError("not a JPEG, PNG, WEBP, BMP, GIF or TIFF file")


def _fast_jpeg(picture: Image.Image, data: bytes) -> np.ndarray | None:
    """The pixels of a plain, undamaged JPEG; None where PIL is to read it, or to say what is wrong with it.

    Both libraries are libjpeg-turbo with its slow, exact inverse transform and smooth upsampling; a test compares
    them. The result must not depend on which is installed, or a run could not go on on another machine.
    """
    if simplejpeg is None or not isinstance(picture, JpegImageFile) or picture.mode not in ("L", "RGB"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        # Also for what libjpeg merely warns of, and PIL reads in silence.
        return None
    return pixels if pixels.shape[1::-1] == picture.size else None


def _check_size(size: tuple[int, int], name: str, max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadRecord(name, f"{width}x{height} pixels, above the limit of {max_pixels}")
    if min(size) < min_side:
        raise BadRecord(name, f"{width}x{height} pixels, the shorter side is below {min_side}")
    if max(size) > MAX_ASPECT * min(size):
        raise BadRecord(name, f"{width}x{height} pixels, one side is over {MAX_ASPECT} times the other")


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        # Good pixels with a damaged EXIF block are common, and worth keeping.
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # convert("RGB") would clip at 255 instead of scaling.
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit integers have no fixed white")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed white")
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        white = Image.new("RGBA", above.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, above).convert("RGB")
    return picture.convert("RGB")
