import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rpo.curation.leakage import Leakage, check_health, leakage
from rpo.data.images import fit_square
from rpo.errors import RpoError

NUM_PAIRS = 60


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


def measured(chosen: list[np.ndarray], rejected: list[np.ndarray], **settings: int) -> Leakage:
    found = leakage(zip(chosen, rejected, strict=True), **settings)
    assert isinstance(found, Leakage)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_half_where_only_the_content_differs(seed: int) -> None:
    found = measured(drawings(seed), drawings(seed + 100), seed=seed)
    assert found.auc_low < 0.5 < found.auc_high and abs(found.paired - 0.5) < 0.15


@pytest.mark.parametrize("mark", [lambda image: blurred(image, 0.6), lambda image: jpeg(image, 75)])
def test_near_one_where_one_side_is_processed(mark) -> None:
    rejected = drawings(0)
    chosen = [mark(image) for image in rejected]
    for found in (measured(chosen, rejected), measured(rejected, chosen)):
        assert found.paired > 0.95 and found.auc > 0.8 and found.differs == "sharpness and noise"
        with pytest.raises(RpoError, match="sharpness and noise"):
            check_health(found)


def test_a_little_brighter_shows_in_pairs_only() -> None:
    """Single images of any brightness exist; the objective sees the difference."""
    rejected = drawings(0)
    found = measured([np.clip(image * 1.05, 0, 255).astype(np.uint8) for image in rejected], rejected)
    assert found.auc < 0.8 and found.paired > 0.9 and found.differs == "color"


def test_half_where_both_sides_are_processed() -> None:
    both = [[blurred(image, 0.6) for image in drawings(seed)] for seed in (0, 1)]
    assert abs(measured(*both).auc - 0.5) < 0.12


def test_a_shared_image_does_not_make_an_artifact() -> None:
    """Twenty sources on the rejected side of three pairs each: knowing them by heart must not help."""
    sources = drawings(0, 20)
    assert abs(measured(drawings(1), [sources[i % 20] for i in range(NUM_PAIRS)]).auc - 0.5) < 0.2
    assert "share their images" in str(leakage([(image, sources[0]) for image in drawings(1, 30)]))


def test_more_pairs_do_not_raise_the_numbers() -> None:
    rejected = drawings(0, 150)
    chosen = [jpeg(image, 92) for image in rejected]
    few, many = measured(chosen[:50], rejected[:50]), measured(chosen, rejected)
    assert abs(few.auc - many.auc) < 0.08 and many.auc_high - many.auc_low < few.auc_high - few.auc_low


def test_depends_on_the_seed_alone() -> None:
    assert measured(drawings(0), drawings(1), seed=5) == measured(drawings(0), drawings(1), seed=5)


def test_too_few_pairs_say_nothing() -> None:
    assert "10 pairs" in check_health(leakage(zip(drawings(0, 10), drawings(1, 10), strict=True)))


@pytest.mark.parametrize("side", [None, 32])
@pytest.mark.parametrize("size", [(1, 1), (2, 64), (8, 8), (3, 200)])
def test_one_tiny_image_does_not_switch_the_refusal_off(size: tuple[int, int], side: int | None) -> None:
    tiny = np.zeros((*size, 3), dtype=np.uint8)
    rejected = [*drawings(0, 40), tiny]
    chosen = [*(blurred(image, 1.5) for image in drawings(0, 40)), tiny + 1]
    found = leakage(zip(chosen, rejected, strict=True), side=side)
    assert isinstance(found, Leakage) and found.pairs == 41
    with pytest.raises(RpoError, match="pair health"):
        check_health(found)


def test_images_are_compared_at_the_size_that_is_trained_on() -> None:
    """One side at twice the size of the other: training resizes both."""
    chosen = [image.repeat(2, 0).repeat(2, 1) for image in drawings(0)]
    rejected = [fit_square(image, 64) for image in chosen]
    assert measured(chosen, rejected, side=64).paired == 0.5 and measured(chosen, rejected).paired > 0.9


def test_verdicts() -> None:
    def line(auc: float, width: float = 0.02, pairs: int = 200) -> Leakage:
        ends = {"auc_low": auc - width, "auc_high": auc + width, "paired": 0.5, "paired_low": 0.4, "paired_high": 0.6}
        return Leakage(pairs=pairs, auc=auc, differs="color", **ends)

    assert not check_health(line(0.55)).startswith("warning") and "so far" in check_health(line(0.55, pairs=40))
    assert check_health(line(0.88)).startswith("warning")
    assert check_health(line(0.93, width=0.1)).startswith("warning"), "a wide interval does not refuse"
    with pytest.raises(RpoError, match=r"AUC 0\.97.*neutral edit.*brought.*--allow-fingerprint"):
        check_health(line(0.97))
    assert check_health(line(0.97), allow_fingerprint=True).startswith("warning")
