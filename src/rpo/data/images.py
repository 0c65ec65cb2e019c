"""Images between bytes and arrays: one lossless way out, one guarded way in, one resize policy.

An image is a `uint8` array of shape (height, width, 3), RGB. Encoded images come from strangers' data sets,
so decoding is limited in format, size, frames, scans and metadata, and never opens a path or address.
"""

import hashlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP")
"""Formats that are decoded. A phone's MPO is a JPEG with further frames: the first is read."""
MAX_PIXELS = 25_000_000
MAX_ENCODED_BYTES = 32_000_000
MAX_SIDE = 16_384
MAX_SCANS = 100
"""Of a progressive JPEG: each scan may touch every pixel again."""
MAX_PROFILE_BYTES = 4_000_000
"""Of an ICC profile; a larger one is not followed."""

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM")
"""Of PNG, JPEG, WebP and BMP; AVIF has its own after four bytes."""
_NOT_READ = ((b"GIF8", "GIF"), (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"), (b"%PDF", "PDF"))
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.S)
"""The first marker after the data of a JPEG scan."""
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
    UserWarning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow's decoders raise on bytes that are not what they claim to be, warnings where a program has made them errors."""
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # EXIF of strangers that is cut off


class ImageRefused(ValueError):
    """Bytes that are no image that is read. `kind` is the reason without numbers of this one image, so that rows can be counted by it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"image refused: {kind}{f' ({detail})' if detail else ''}")
        self.kind = kind


@dataclass(frozen=True)
class EncodedImage:
    """An image in one of `FORMATS`, in memory or still in the file it came from. Equal where the bytes are."""

    sha256: str
    """Of the bytes, in hexadecimal."""
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """The bytes. Raises `RpoError` when their file is no longer what it was."""

    @classmethod
    def of(cls, encoded: bytes) -> "EncodedImage":
        """The image in memory. Raises `ValueError` for bytes that do not begin as an image does; no pixel is unpacked."""
        if not (encoded.startswith(_SIGNATURES) or encoded[4:8] == b"ftyp"):
            raise ValueError("an image must be PNG, JPEG, WebP, AVIF or BMP; encode it with rpo.data.images.encode_png")
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


ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Of files that an image can be written to."""


def encode_as(array: np.ndarray, suffix: str) -> bytes:
    """An RGB image in the format of a file name's ending. Raises `ValueError` for an ending that is none of `ENDINGS`."""
    if suffix.lower() not in ENDINGS:
        raise ValueError(f"an image is written to a name that ends in {', '.join(ENDINGS)}, got {suffix or 'no ending'!r}")
    if suffix.lower() == ".png":
        return encode_png(array)
    out = io.BytesIO()
    options = {"lossless": True} if suffix.lower() == ".webp" else {"quality": 95, "subsampling": 0}
    Image.fromarray(np.ascontiguousarray(array)).save(out, format="WEBP" if suffix.lower() == ".webp" else "JPEG", **options)
    return out.getvalue()


def image_suffix(encoded: bytes) -> str:
    """How the name of a file with these bytes ends."""
    if encoded[4:8] == b"ftyp":
        return "avif"
    return {b"\x89P": "png", b"\xff\xd8": "jpg", b"BM": "bmp"}.get(encoded[:2], "webp")


def recompressed(array: np.ndarray, quality: int = 90) -> np.ndarray:
    """The image after a JPEG of full color resolution: as it was, up to noise that nobody sees."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(out))


def image_cell(encoded: bytes) -> dict[str, bytes | None]:
    """The value of an image column for encoded bytes."""
    return {"bytes": encoded, "path": None}


def _check_scans(encoded: bytes) -> None:
    """Counts the scans of a JPEG up to the end of its first frame."""
    place, scans = 2, 0
    while (place := encoded.find(b"\xff", place)) >= 0 and place + 1 < len(encoded):
        marker = encoded[place + 1]
        place += 1 if marker == 0xFF else 2
        if marker == 0xD9:
            return
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # these have no length
            continue
        place += max(int.from_bytes(encoded[place : place + 2]), 2)
        if marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise ImageRefused(f"over {MAX_SCANS} scans in a JPEG")
            found = _AFTER_SCAN.search(encoded, place)
            place = found.start() if found else len(encoded)


def _check_bytes(encoded: bytes) -> bytes:
    """The bytes, if they may be handed to Pillow. Raises `ImageRefused` for a size, a format or a JPEG that is not read."""
    if len(encoded) > MAX_ENCODED_BYTES:
        raise ImageRefused(f"over {MAX_ENCODED_BYTES // 1_000_000} MB", f"{len(encoded):,} bytes")
    for signature, name in _NOT_READ:
        if encoded.startswith(signature):
            raise ImageRefused(f"{name} is not read", "convert it to PNG, JPEG or WebP")
    if encoded[4:8] == b"ftyp" and (name := _BRANDS.get(encoded[8:12]) if b"avif" not in encoded[8:64] else None):
        raise ImageRefused(f"{name} is not read", "convert it to PNG, JPEG or WebP")
    if encoded.startswith(b"BM") and encoded[30:34] not in (b"\0\0\0\0", b"\3\0\0\0") and encoded[14:18] != b"\x0c\0\0\0":
        raise ImageRefused("compressed BMP is not read", "convert it to PNG")
    if encoded.startswith(b"\xff\xd8\xff"):
        _check_scans(encoded)
    return encoded


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageRefused(f"over {MAX_PIXELS // 1_000_000} megapixels", f"{width}x{height} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageRefused(f"a side over {MAX_SIDE:,} pixels", f"{width}x{height} pixels")
    if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:
        raise ImageRefused("more than one frame")
    if image.mode not in _MODES:
        raise ImageRefused(f"mode {image.mode} is not read")


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """RGB colors by the embedded profile; as they are where it is sRGB, is damaged, or does not fit the mode."""
    if not isinstance(profile, bytes) or not profile or len(profile) > MAX_PROFILE_BYTES:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        found = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
    return found if found is not None else image.convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, upright, sRGB, transparency over white."""
    image.load()
    profile = image.info.get("icc_profile")
    upright = _upright(image)
    if upright.mode in ("I;16", "I"):
        values = np.asarray(upright).astype(np.int64).clip(0, 65_535)
        upright = Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
    alpha = None
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        alpha = layer.getchannel("A")
        upright = layer.convert("RGB") if upright.mode != "LA" else upright
    if upright.mode not in ("L", "RGB", "CMYK"):
        upright = upright.convert("L" if upright.mode in ("1", "LA") else "RGB")
    colors = _to_srgb(upright, profile)
    return colors if alpha is None else Image.composite(colors, Image.new("RGB", colors.size, "white"), alpha)


def _refused(error: BaseException) -> ImageRefused:
    if isinstance(error, ImageRefused):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageRefused(f"over {MAX_PIXELS // 1_000_000} megapixels")
    reason = re.sub(r"<[^>]*>", "the bytes", " ".join(str(error).split())) or type(error).__name__
    return ImageRefused("not an image" if isinstance(error, Image.UnidentifiedImageError) else "damaged or cut off", reason[:200])


def decode_image(encoded: bytes) -> np.ndarray:
    """The image in `encoded` (PNG, JPEG, WebP, AVIF or BMP), upright, in sRGB, 16-bit gray as 8 bits, transparency over white.

    Raises `ImageRefused`, a `ValueError`, for anything else, and beyond 25 megapixels, 16,384 pixels a side, 32 MB encoded, 100 scans or
    one frame (of a phone's MPO the first is read); sizes are refused by their header, before any pixel is unpacked.
    """
    try:
        with Image.open(io.BytesIO(_check_bytes(encoded)), formats=FORMATS) as image:
            _check_header(image)
            return np.array(_to_rgb(image), dtype=np.uint8)
    except _DECODING_ERRORS as error:
        raise _refused(error) from error


def image_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) as the header has it; nothing is unpacked. Raises `ValueError` as `decode_image` does."""
    try:
        with Image.open(io.BytesIO(_check_bytes(encoded)), formats=FORMATS) as image:
            return image.size
    except _DECODING_ERRORS as error:
        raise _refused(error) from error


def decode_cell(cell: Mapping[str, object] | None) -> np.ndarray:
    """The image of an image column's value. Only its bytes are used: a cell that is just a path raises `ValueError`."""
    encoded = None if cell is None else cell.get("bytes")
    if not isinstance(encoded, bytes):
        raise ImageRefused("the cell holds no bytes", "paths are not opened")
    return decode_image(encoded)


def fit_square(array: np.ndarray, side: int) -> np.ndarray:
    """The one resize policy: the largest centred square, then Lanczos to (side, side); returned as it is when it fits."""
    return Frame(side=side).fitted(array)


FrameFit = Literal["square", "letterbox", "nearest"]
_ASPECT_MAX = 2.0
"""Of a `nearest` frame, either way: editors are trained on little beyond it."""
MULTIPLE = 32
"""Sides of a `nearest` frame are multiples of this, which every editor of diffusers accepts."""


def resized(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole image at another size, its aspect with it; returned as it is when it fits."""
    if array.shape[:2] == (height, width):
        return array
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)


@lru_cache(maxsize=16)
def nearest_sizes(side: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of every frame with about side² pixels: the sizes that Qwen's rule for editors leaves alone.

    Width is the rounded root of area times aspect, height that of area by aspect.
    """

    def rounded(aspect: float) -> int:
        return round(side * aspect**0.5 / MULTIPLE) * MULTIPLE

    lengths = range(MULTIPLE, 2 * side, MULTIPLE)
    sizes = ((height, width) for height in lengths for width in lengths if max(height, width) <= _ASPECT_MAX * min(height, width))
    return tuple((h, w) for h, w in sizes if (rounded(h / w), rounded(w / h)) == (h, w))


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The one geometry of a run: what the editor sees is what is criticized, scored and compared."""

    side: int
    """Width and height in pixels; of `nearest` the root of the area."""
    fit: FrameFit = "square"
    """square: the largest center square; letterbox: the whole image, the rest of the square white; nearest: the largest center box
    in the shape of the editor's own sizes that is nearest to the image's, up to 2:1."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side must be at least 1, got {self.side}")
        if self.fit == "nearest" and self.side % MULTIPLE:
            raise ValueError(f"side must be a multiple of {MULTIPLE} with fit nearest, got {self.side}")

    def size(self, array: np.ndarray) -> tuple[int, int]:
        """(height, width) of the frame that an image is fitted to."""
        if self.fit != "nearest":
            return self.side, self.side
        aspect = array.shape[0] / array.shape[1]
        return min(nearest_sizes(self.side), key=lambda size: abs(math.log(size[0] / size[1] / aspect)))

    def fitted(self, array: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """The image in the frame, in that of `size` if given; returned as it is when it fits."""
        height, width = size or self.size(array)
        if array.shape[:2] == (height, width):
            return array
        if self.fit != "letterbox":
            box = _center_box(array, height / width)
            shown = Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS, box=box)
            return np.array(shown, dtype=np.uint8)
        scale = self.side / max(array.shape[:2])
        inner = resized(array, *(max(round(length * scale), 1) for length in array.shape[:2]))
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
        out[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return out

    def cut(self, array: np.ndarray) -> float:
        """Share of the image's area that the frame cuts off."""
        if self.fit == "letterbox":
            return 0.0
        height, width = self.size(array)
        left, top, right, bottom = _center_box(array, height / width)
        return 1 - (right - left) * (bottom - top) / (array.shape[0] * array.shape[1])


def _center_box(array: np.ndarray, aspect: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest center box whose height is `aspect` times its width; begins at a whole pixel."""
    height, width = array.shape[:2]
    rows, columns = min(height, width * aspect), min(width, height / aspect)
    top, left = int(height - rows) // 2, int(width - columns) // 2
    return left, top, left + columns, top + rows


def framed_cells(cells: Sequence[Mapping[str, object]], frame: Frame | None) -> tuple[list[Mapping[str, object]], float]:
    """(values of an image column in the frame of the first, the share of the first that was cut off).

    Bytes that fit, or have no frame, stay as they came.
    """
    if frame is None:
        return list(cells), 0.0
    arrays = [decode_cell(cell) for cell in cells]
    fitted = [frame.fitted(array, frame.size(arrays[0])) for array in arrays]
    kept = [cell if one is array else image_cell(encode_png(one)) for cell, array, one in zip(cells, arrays, fitted, strict=True)]
    return kept, frame.cut(arrays[0])
