"""Planted transformations of photographs, and what a check should say of each: the material of `real_pictures.py`."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

Expected = Literal["no_op", "kept", "moved", "replaced", "open"]
"""open: between two bars, or a matter of taste; shown without a bar."""
Transform = Callable[[np.ndarray, np.random.Generator, np.ndarray], "np.ndarray | None"]
"""(image, random numbers, another image) to the transformed image; `None` where this image offers nothing to transform."""


def uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def codec(image: np.ndarray, kind: str, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, quality=quality)
    return np.asarray(Image.open(out).convert("RGB"))


def resample(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((width, height), Image.Resampling.LANCZOS))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def moved(image: np.ndarray, scale: float = 1.0, degrees: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """A similarity transform about the center; what comes in from outside is reflected."""
    angle, center = np.deg2rad(degrees), (np.array(image.shape[:2]) - 1) / 2
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = np.array([[cos, sin], [-sin, cos]])
    offset = center - matrix @ (center + np.array(shift))
    channels = np.moveaxis(image.astype(float), -1, 0)
    return uint8(np.stack([ndimage.affine_transform(c, matrix, offset, order=3, mode="reflect") for c in channels], -1))


def shifted(image: np.ndarray, rng: np.random.Generator, pixels: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return moved(image, shift=(pixels * np.sin(angle), pixels * np.cos(angle)))


def _box(image: np.ndarray, rng: np.random.Generator, share: float) -> tuple[slice, slice]:
    height, width = image.shape[:2]
    aspect = rng.uniform(0.7, 1.4)
    rows, columns = (
        min(height, round((share * height * width * aspect) ** 0.5)),
        min(width, round((share * height * width / aspect) ** 0.5)),
    )
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    return slice(top, top + rows), slice(left, left + columns)


def _visible(edit: Callable[[], tuple[np.ndarray, tuple[slice, slice]]], image: np.ndarray) -> np.ndarray | None:
    """The first of 30 tries whose box changes by 24 levels on average."""
    for _ in range(30):
        edited, box = edit()
        if np.abs(edited[box].astype(int) - image[box]).mean() > 24:
            return edited
    return None


def pasted(image: np.ndarray, rng: np.random.Generator, other: np.ndarray, share: float) -> np.ndarray | None:
    def once() -> tuple[np.ndarray, tuple[slice, slice]]:
        edited, box = image.copy(), _box(image, rng, share)
        rows, columns = (place.stop - place.start for place in box)
        top, left = rng.integers(0, other.shape[0] - rows + 1), rng.integers(0, other.shape[1] - columns + 1)
        edited[box] = other[top : top + rows, left : left + columns]
        return edited, box

    return _visible(once, image)


def recolored(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray | None:
    """A strong color at the luminance that was there."""

    def once() -> tuple[np.ndarray, tuple[slice, slice]]:
        edited, box = image.copy(), _box(image, rng, share)
        weights, color = np.array([0.299, 0.587, 0.114]), np.full(3, 0.45)
        color[rng.integers(3)] = 1.9
        edited[box] = uint8((image[box] @ weights)[..., None] * color / (color @ weights))
        return edited, box

    return _visible(once, image)


def inpainted(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray | None:
    """A box filled from its surroundings, as the removal of a thing leaves it."""

    def once() -> tuple[np.ndarray, tuple[slice, slice]]:
        box = _box(image, rng, share)
        hole = np.zeros(image.shape[:2], dtype=bool)
        hole[box] = True
        filled = image.astype(float)
        filled[hole] = filled[~hole].mean(0)
        for _ in range(30):
            filled[hole] = ndimage.uniform_filter(filled, (17, 17, 1))[hole]
        return np.where(hole[..., None], uint8(filled), image), box

    return _visible(once, image)


def cast(image: np.ndarray, rng: np.random.Generator, levels: float) -> np.ndarray:
    """One channel moved away from the end that it is nearer to."""
    channel = rng.integers(3)
    change = np.zeros(3)
    change[channel] = levels if image[..., channel].mean() < 128 else -levels
    return uint8(image + change)


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    return uint8(255 * (image / 255.0) ** exponent)


def gray(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def hue_turned(image: np.ndarray, by: int = 85) -> np.ndarray:
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) + by) % 256
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def sharpened(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.UnsharpMask(2, 150, 0)))


def noisy(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    return uint8(image + rng.normal(0, sigma, image.shape))


def transformations() -> dict[str, tuple[Expected, Transform]]:
    """By name, in the order of the table."""
    table: dict[str, tuple[Expected, Transform]] = {"identity": ("no_op", lambda x, r, o: x)}
    for quality in (95, 75, 50, 20):
        table[f"JPEG {quality}"] = ("no_op" if quality >= 75 else "open", lambda x, r, o, q=quality: codec(x, "JPEG", q))
    for quality in (95, 80, 40, 20):
        table[f"WebP {quality}"] = ("no_op" if quality >= 80 else "open", lambda x, r, o, q=quality: codec(x, "WEBP", q))
    for factor in (0.75, 0.5, 0.25):
        table[f"resample {factor}"] = ("open", lambda x, r, o, f=factor: resample(x, f))
    for sigma in (5, 10, 20):
        table[f"noise {sigma}"] = ("no_op" if sigma == 5 else "open", lambda x, r, o, s=sigma: noisy(x, r, s))
    for sigma in (0.7, 1.5, 3):
        table[f"blur {sigma}"] = ("open", lambda x, r, o, s=sigma: blur(x, s))
    table["sharpen"] = ("open", lambda x, r, o: sharpened(x))
    for pixels in (0.5, 1, 2, 3, 4, 8, 16, 40):
        table[f"shift {pixels} px"] = ("moved" if pixels >= 3 else "open", lambda x, r, o, p=pixels: shifted(x, r, p))

    def first(edit: Transform, then: Transform) -> Transform:
        return lambda x, r, o: None if (edited := edit(x, r, o)) is None else then(edited, r, o)

    shift4: Transform = lambda x, r, o: shifted(x, r, 4)  # noqa: E731
    table["shift 4 px, paste 15 %"] = ("moved", first(lambda x, r, o: pasted(x, r, o, 0.15), shift4))
    table["shift 4 px, cast 20"] = ("moved", first(lambda x, r, o: cast(x, r, 20), shift4))
    table["shift 4 px, JPEG 50"] = ("moved", lambda x, r, o: codec(shifted(x, r, 4), "JPEG", 50))
    for percent in (1, -1, 2, 3, -3, 5, -5, 8, 15, -15, 30):
        table[f"zoom {percent:+} %"] = ("moved" if abs(percent) >= 3 else "open", lambda x, r, o, z=percent: moved(x, 1 + z / 100))
    table["zoom +5 %, paste 15 %"] = ("moved", first(lambda x, r, o: pasted(x, r, o, 0.15), lambda x, r, o: moved(x, 1.05)))
    for degrees in (1, 2, 3, 6):
        table[f"rotation {degrees}°"] = ("moved" if degrees >= 2 else "open", lambda x, r, o, d=degrees: moved(x, 1, d * r.choice([-1, 1])))
    for levels in (10, 20, 30):
        table[f"cast {levels}"] = ("kept" if levels >= 20 else "open", lambda x, r, o, v=levels: cast(x, r, v))
    for exponent in (0.9, 0.7, 1.5):
        table[f"gamma {exponent}"] = ("open" if exponent == 0.9 else "kept", lambda x, r, o, g=exponent: gamma(x, g))
    table["gray"] = ("open", lambda x, r, o: gray(x))
    table["hues turned"] = ("open", lambda x, r, o: hue_turned(x))
    for share in (0.003, 0.01, 0.05, 0.15, 0.3):
        table[f"paste {100 * share:g} %"] = ("kept" if share >= 0.01 else "open", lambda x, r, o, s=share: pasted(x, r, o, s))
    for share in (0.003, 0.01, 0.05, 0.15):
        table[f"recolor {100 * share:g} %"] = ("kept" if share >= 0.01 else "open", lambda x, r, o, s=share: recolored(x, r, s))
    table["inpaint 10 %"] = ("kept", lambda x, r, o: inpainted(x, r, 0.1))
    table["mirror"] = ("replaced", lambda x, r, o: np.ascontiguousarray(x[:, ::-1]))
    table["another picture"] = ("replaced", lambda x, r, o: o)
    table["black"] = ("replaced", lambda x, r, o: np.zeros_like(x))
    return table


SHIPPED = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "ihc",
    "moon", "motorcycle_left", "retina", "rocket",
)  # fmt: skip
"""Photographs inside the wheel of scikit-image; its others are downloaded by pooch, or no photographs."""


def photographs(folder: Path | None, side: int) -> Iterator[np.ndarray]:
    """Every picture of a folder, its largest center square at `side`; without a folder scikit-image's, and their quarters behind them.

    Transparency is laid over white.
    """

    def square(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
        rgba = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        left, top, right, bottom = box or (0, 0, *flat.size)
        length = min(right - left, bottom - top)
        corner = (left + (right - left - length) / 2, top + (bottom - top - length) / 2)
        return np.asarray(flat.resize((side, side), Image.Resampling.LANCZOS, box=(*corner, corner[0] + length, corner[1] + length)))

    if folder is not None:
        paths: Sequence[Path] = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
        for path in paths:
            with Image.open(path) as image:
                yield square(image)
        return
    import skimage.data

    pictures: list[Image.Image] = []
    for name in SHIPPED:
        with Image.open(next(Path(skimage.data.__file__).parent.glob(f"{name}.*"))) as image:
            pictures.append(image.convert("RGB"))
    for image in pictures:
        yield square(image)
    for right in (0, 1):
        for bottom in (0, 1):
            for image in pictures:
                half = (image.width / 2, image.height / 2)
                yield square(image, (right * half[0], bottom * half[1], (right + 1) * half[0], (bottom + 1) * half[1]))
