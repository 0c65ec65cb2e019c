"""Images come out as they went in, and strangers' bytes cannot do harm."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.data.images import MAX_ENCODED_BYTES, decode_cell, decode_image, encode_png, fit_square, image_cell


def noise(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one short line of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_png_is_lossless_and_equal_for_equal_arrays() -> None:
    array = noise()
    assert np.array_equal(decode_image(encode_png(array)), array)
    assert encode_png(array) == encode_png(np.asfortranarray(array))
    assert decode_cell(image_cell(encode_png(array))).dtype == np.uint8


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_only_rgb_bytes_are_encoded(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 of shape"):
        encode_png(wrong)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_the_three_formats_are_read(kind: str) -> None:
    flat = Image.new("RGB", (20, 10), (200, 30, 30))
    decoded = decode_image(saved(flat, kind))
    assert decoded.shape == (10, 20, 3) and abs(decoded.astype(int) - [200, 30, 30]).max() < 12


def test_transparency_is_laid_over_white_and_exif_turns_the_image() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(saved(clear, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    assert (decode_image(saved(palette, "PNG", transparency=0)) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).shape == (20, 10, 3)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(2)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


HOSTILE = {
    "empty": b"",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "gif": saved(Image.new("RGB", (4, 4)), "GIF"),
    "bmp": saved(Image.new("RGB", (4, 4)), "BMP"),
    "tiff": saved(Image.new("RGB", (4, 4)), "TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
    "bomb of 100 megapixels": png_header(10_000, 10_000),
    "bomb of 26 megapixels": png_header(5_100, 5_100),
    "bomb of 4 gigapixels": png_header(65_535, 65_535),
    "one line of 20,000": png_header(20_000, 1),
    "header that lies": png_header(4_000, 4_000),
    "real 100 megapixels": saved(Image.new("L", (10_000, 10_000)), "PNG"),
    "too many bytes": encode_png(noise()) + bytes(MAX_ENCODED_BYTES),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "16 bits": saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"),
    "png cut in half": encode_png(noise())[: len(encode_png(noise())) // 2],
    "jpeg cut in half": saved(Image.fromarray(noise()), "JPEG")[:900],
    "webp cut in half": saved(Image.fromarray(noise()), "WEBP")[:600],
    "png signature alone": b"\x89PNG\r\n\x1a\n",
    "jpeg signature alone": b"\xff\xd8\xff\xe0",
    "riff alone": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_quickly(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="image refused: "):
        decode_image(HOSTILE[name])
    assert time.monotonic() - began < 2


def test_flipped_bytes_raise_nothing_but_value_error() -> None:
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = np.frombuffer(saved(Image.fromarray(noise(16, 16)), kind), np.uint8)
        for _ in range(300):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=2)] ^= rng.integers(1, 256, size=2, dtype=np.uint8)
            try:
                decode_image(damaged.tobytes())
            except ValueError:
                pass


def test_a_path_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_png(noise()))
    for cell in ({"bytes": None, "path": str(secret)}, {"path": str(secret)}, {"bytes": str(secret), "path": None}, None):
        with pytest.raises(ValueError, match="holds no bytes"):
            decode_cell(cell)


def test_fit_square_crops_the_centre_and_keeps_what_fits() -> None:
    array = noise(64, 64)
    assert fit_square(array, 64) is array
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fit_square(wide, 10) == 200).all() and (fit_square(np.swapaxes(wide, 0, 1), 10) == 200).all()
    assert fit_square(noise(100, 64), 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="side must be at least 1"):
        fit_square(array, 0)
