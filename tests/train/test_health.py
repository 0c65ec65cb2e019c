import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rpo.errors import RpoError
from rpo.train.health import check_health, fingerprint_auc

NUM_PAIRS = 150


def drawings(seed: int, num_images: int = NUM_PAIRS) -> list[np.ndarray]:
    """Coloured discs and boxes on grey with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    images = []
    for _ in range(num_images):
        image = np.full((64, 64, 3), rng.integers(40, 200), dtype=float)
        for _ in range(2):
            cx, cy, radius = rng.uniform(14, 50), rng.uniform(14, 50), rng.uniform(6, 14)
            inside = np.hypot(x - cx, y - cy) < radius if rng.random() < 0.5 else np.maximum(abs(x - cx), abs(y - cy)) < radius
            image[inside] = rng.integers(0, 256, 3)
        images.append((image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8))
    return images


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return np.array(Image.open(out))


@pytest.mark.parametrize("seed", range(3))
def test_half_where_only_the_content_differs(seed: int) -> None:
    assert abs(fingerprint_auc(zip(drawings(seed), drawings(seed + 100), strict=True), seed) - 0.5) < 0.1


@pytest.mark.parametrize("mark", [lambda image: blurred(image, 0.6), lambda image: jpeg(image, 90)])
@pytest.mark.parametrize("other_content", [False, True])
def test_near_one_where_one_side_is_processed(mark, other_content: bool) -> None:
    rejected = drawings(0)
    chosen = [mark(image) for image in (drawings(1) if other_content else rejected)]
    assert fingerprint_auc(zip(chosen, rejected, strict=True)) > 0.95
    assert fingerprint_auc(zip(rejected, chosen, strict=True)) > 0.95


def test_half_where_both_sides_are_processed() -> None:
    both = [[blurred(image, 0.6) for image in drawings(seed)] for seed in (0, 1)]
    assert abs(fingerprint_auc(zip(*both, strict=True)) - 0.5) < 0.1


def test_a_shared_image_does_not_make_a_fingerprint() -> None:
    """Thirty sources on the rejected side of five pairs each: knowing them by heart must not help."""
    sources = drawings(0, 30)
    pairs = [(image, sources[i % 30]) for i, image in enumerate(drawings(1))]
    assert len(pairs) == NUM_PAIRS and abs(fingerprint_auc(pairs) - 0.5) < 0.15


def test_depends_on_the_seed_alone() -> None:
    first, second = (fingerprint_auc(zip(drawings(0), drawings(1), strict=True), 5) for _ in range(2))
    assert first == second


def test_too_few_pairs_say_nothing() -> None:
    assert math.isnan(fingerprint_auc(zip(drawings(0, 10), drawings(1, 10), strict=True)))
    assert check_health(math.nan).startswith("warning")


def test_images_of_any_size() -> None:
    images = [[image[:height, :40] for image, height in zip(drawings(seed, 30), range(16, 46), strict=True)] for seed in (0, 1)]
    assert 0 <= fingerprint_auc(zip(*images, strict=True)) <= 1


def test_verdicts() -> None:
    assert not check_health(0.55).startswith("warning")
    assert check_health(0.85).startswith("warning")
    with pytest.raises(RpoError, match=r"AUC 0\.97.*neutral edit.*--allow-fingerprint"):
        check_health(0.97)
    assert check_health(0.97, allow_fingerprint=True).startswith("warning")
