"""Images small enough to be part of a page."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from rpo.data.images import decode_image

SIDE_MAX = 256
PIXEL_ART_MAX = 128
"""Images up to this side are kept losslessly and shown enlarged with hard pixels."""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A picture as the page needs it."""

    uri: str
    """`data:image/webp;base64,...`"""
    width: int
    height: int
    pixelated: bool


def thumbnail(encoded: bytes) -> Thumbnail:
    """WebP of at most 256 pixels a side; lossless if it is small. Raises `ValueError` for bytes that are no image."""
    image = Image.fromarray(decode_image(encoded))
    small = max(image.size) <= PIXEL_ART_MAX
    image.thumbnail((SIDE_MAX, SIDE_MAX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, format="WEBP", lossless=small, quality=80, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
    return Thumbnail(uri=uri, width=image.width, height=image.height, pixelated=small)
