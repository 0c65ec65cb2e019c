"""Images come out as they went in, and strangers' bytes cannot do harm."""

import contextlib
import io
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from rpo.data.images import (
    MAX_ENCODED_BYTES,
    EncodedImage,
    ImageRefused,
    decode_cell,
    decode_image,
    encode_as,
    encode_png,
    fit_square,
    image_cell,
    image_suffix,
)  # fmt: skip


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


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "AVIF", "BMP"])
def test_every_format_is_read_and_named(kind: str) -> None:
    flat = Image.new("RGB", (20, 10), (200, 30, 30))
    encoded = saved(flat, kind)
    decoded = decode_image(encoded)
    assert decoded.shape == (10, 20, 3) and abs(decoded.astype(int) - [200, 30, 30]).max() < 12
    assert EncodedImage.of(encoded).read() == encoded and image_suffix(encoded) == {"JPEG": "jpg"}.get(kind, kind.lower())


def test_the_first_frame_of_a_phone_photo_is_read() -> None:
    frames = [Image.new("RGB", (32, 24), color) for color in ((200, 30, 30), (0, 0, 255))]
    photo = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert abs(decode_image(photo).astype(int) - [200, 30, 30]).max() < 12


def test_16_bit_gray_is_read_as_8_bits() -> None:
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16).repeat(4, axis=0)
    assert decode_image(saved(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


def swapped_profile() -> bytes:
    """A profile like sRGB whose red and blue primaries are each other's."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"o\0t\0h\0r"))
    tags = {bytes(name): at for name, at in ((profile[at : at + 4], at) for at in range(132, 132 + 12 * profile[131], 12))}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_an_embedded_profile_is_followed() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert (decode_image(saved(red, "PNG", icc_profile=swapped_profile()))[0, 0] - [0, 0, 255] == 0).all()
    assert abs(decode_image(saved(red, "JPEG", icc_profile=swapped_profile()))[0, 0].astype(int) - [0, 0, 255]).max() < 8
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert abs(decode_image(saved(clear, "PNG", icc_profile=swapped_profile()))[0, 0].astype(int) - [127, 127, 255]).max() < 2
    for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert decode_image(saved(red, "PNG", icc_profile=profile))[0, 0].tolist() == [255, 0, 0], "damaged, or sRGB itself"


def many_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    encoded = saved(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    last = encoded.rindex(b"\xff\xda")
    return encoded[:last] + encoded[last:-2] * number + encoded[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded() -> None:
    assert decode_image(many_scans(1)).shape == (64, 64, 3)
    with pytest.raises(ImageRefused, match="over 100 scans"):
        decode_image(many_scans(101))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_cannot_ask_for_memory(kind: str) -> None:
    """Each of the directory's entries asks for the whole block."""
    count = 5000 if kind == "JPEG" else 60_000
    block = b"MM\0*" + struct.pack(">IH", 8, count)
    block += b"".join(struct.pack(">HHII", 0x9000 + at % 4096, 1, 12 * count, 0) for at in range(count))
    exif = b"Exif\0\0" + block
    picture = Image.fromarray(noise(16, 16))
    if kind == "JPEG":
        plain = saved(picture, kind)
        encoded = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    else:
        encoded = saved(picture, kind, exif=exif)
    tracemalloc.start()
    assert decode_image(encoded).shape == (16, 16, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(encoded) + 20_000_000


def test_reasons_name_the_kind_and_no_addresses() -> None:
    kinds = {}
    for name, encoded in HOSTILE.items():
        with pytest.raises(ImageRefused) as refused:
            decode_image(encoded)
        kinds[name] = refused.value.kind
        assert "object at" not in str(refused.value)
    assert kinds["gif"] == "GIF is not read" and kinds["tiff"] == "TIFF is not read" and kinds["heic"] == "HEIC is not read"
    assert kinds["bomb of 26 megapixels"] == "over 25 megapixels" and kinds["animated webp"] == "more than one frame"
    assert kinds["jpeg cut in half"] == "damaged or cut off" and kinds["text"] == "not an image"


HEADS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x18ftypavif"]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x18ftypavif"]),
    st.binary(max_size=400),
)
def test_any_bytes_are_an_image_or_refused(head: bytes, tail: bytes) -> None:
    with contextlib.suppress(ImageRefused):
        assert decode_image(head + tail).dtype == np.uint8


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
    "bmp with run lengths": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 4, 4, 1, 8, 1) + bytes(60),
    "heic": b"\x00\x00\x00\x18ftypheic" + bytes(40),
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
    for kind in ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "MPO"):
        data = np.frombuffer(saved(Image.fromarray(noise(16, 16)), kind), np.uint8)
        for _ in range(200):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=2)] ^= rng.integers(1, 256, size=2, dtype=np.uint8)
            with contextlib.suppress(ValueError):
                decode_image(damaged.tobytes())


def test_a_path_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_png(noise()))
    for cell in ({"bytes": None, "path": str(secret)}, {"path": str(secret)}, {"bytes": str(secret), "path": None}, None):
        with pytest.raises(ValueError, match="holds no bytes"):
            decode_cell(cell)


@pytest.mark.parametrize(("name", "head"), [(".png", b"\x89PNG"), (".JPG", b"\xff\xd8"), (".jpeg", b"\xff\xd8"), (".webp", b"RIFF")])
def test_an_image_is_written_in_the_format_of_its_name(name: str, head: bytes) -> None:
    assert encode_as(noise(), name).startswith(head)
    for wrong in ("", ".txt", ".md"):
        with pytest.raises(ValueError, match=r"ends in .png, .jpg, .jpeg, .webp"):
            encode_as(noise(), wrong)


def test_a_palette_with_transparency_is_laid_over_white() -> None:
    palette = Image.fromarray(noise(16, 16)).quantize(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(saved(palette, "PNG", transparency=bytes([0, 128, 255, 255])))
    assert decoded.shape == (16, 16, 3) and (decoded == 255).all(axis=2).any()


def test_fit_square_crops_the_centre_and_keeps_what_fits() -> None:
    array = noise(64, 64)
    assert fit_square(array, 64) is array
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fit_square(wide, 10) == 200).all() and (fit_square(np.swapaxes(wide, 0, 1), 10) == 200).all()
    assert fit_square(noise(100, 64), 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="side must be at least 1"):
        fit_square(array, 0)
