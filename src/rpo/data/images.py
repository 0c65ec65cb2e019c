"""Images between bytes and arrays: one lossless way out, one guarded way in, one resize policy.

An image is a `uint8` array of shape (height, width, 3), RGB. Encoded images come from strangers' data sets,
so decoding is limited in format, size and frames, and never opens a path or address.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
MAX_ENCODED_BYTES = 32_000_000
MAX_SIDE = 16_384

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
"""Of PNG, JPEG and WebP."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow's three decoders raise on bytes that are not what they claim to be."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as PNG, JPEG or WebP, in memory or still in the file it came from. Equal where the bytes are."""

    sha256: str
    """Of the bytes, in hexadecimal."""
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """The bytes. Raises `RpoError` when their file is no longer what it was."""

    @classmethod
    def of(cls, encoded: bytes) -> "EncodedImage":
        """The image in memory. Raises `ValueError` for bytes that do not begin as an image does; no pixel is unpacked."""
        if not encoded.startswith(_SIGNATURES):
            raise ValueError("an image must be PNG, JPEG or WebP; encode it with rpo.data.images.encode_png")
        return cls(sha256=hashlib.sha256(encoded).hexdigest(), read=lambda: encoded)

    def decode(self) -> np.ndarray:
        """The pixels; see `decode_image`."""
        return decode_image(self.read())


def encode_png(array: np.ndarray) -> bytes:
    """Lossless PNG bytes of an RGB image; equal arrays give equal bytes. Raises `ValueError` on any other shape or type."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"an image must be uint8 of shape (height, width, 3), got {array.dtype} {array.shape}")
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, format="PNG")
    return out.getvalue()


def image_cell(encoded: bytes) -> dict[str, bytes | None]:
    """The value of an image column for encoded bytes."""
    return {"bytes": encoded, "path": None}


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, at most {MAX_PIXELS:,} and {MAX_SIDE} a side are read")
    if getattr(image, "n_frames", 1) != 1:
        raise ValueError("more than one frame")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel")


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def decode_image(encoded: bytes) -> np.ndarray:
    """The image in `encoded` (PNG, JPEG or WebP), upright, transparency over white.

    Raises `ValueError` for anything else, and beyond 25 megapixels, 16,384 pixels a side, 32 MB encoded or one frame;
    sizes are refused by their header, before any pixel is unpacked.
    """
    if len(encoded) > MAX_ENCODED_BYTES:
        raise ValueError(f"image refused: {len(encoded):,} bytes, at most {MAX_ENCODED_BYTES:,} are read")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_header(image)
            return np.array(_to_rgb(image), dtype=np.uint8)
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"image refused: {reason}") from error


def image_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) as the header has it; nothing is unpacked. Raises `ValueError` as `decode_image` does."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return image.size
    except _DECODING_ERRORS as error:
        raise ValueError(f"image refused: {' '.join(str(error).split()) or type(error).__name__}") from error


def decode_cell(cell: Mapping[str, object] | None) -> np.ndarray:
    """The image of an image column's value. Only its bytes are used: a cell that is just a path raises `ValueError`."""
    encoded = None if cell is None else cell.get("bytes")
    if not isinstance(encoded, bytes):
        raise ValueError("image refused: the cell holds no bytes (paths are not opened)")
    return decode_image(encoded)


def fit_square(array: np.ndarray, side: int) -> np.ndarray:
    """The one resize policy: the largest centred square, then Lanczos to (side, side); returned as it is when it fits."""
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    height, width = array.shape[:2]
    if (height, width) == (side, side):
        return array
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    box = (left, top, left + square, top + square)
    return np.array(Image.fromarray(array).resize((side, side), Image.Resampling.LANCZOS, box=box), dtype=np.uint8)
