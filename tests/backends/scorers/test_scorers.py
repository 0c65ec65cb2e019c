"""Scorers against the authors' networks and formulas, written anew, on tiny random weights."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from published_rewards import SIDE, ImageReward, OpenClip, authors_head, pixels, save
from rpo.backends.scorers.aesthetic import AestheticConfig
from rpo.backends.scorers.clip import ClipScorer, ClipScorerConfig
from rpo.backends.scorers.convert import convert_aesthetic, convert_hps, convert_image_reward
from rpo.backends.scorers.image_reward import TOKENS, ImageRewardConfig
from rpo.errors import RpoError
from rpo.protocols import Embedder, Scorer
from rpo.shapes.networks import tokenizer
from tiny_rewards import clip_folder

PROMPTS = ["a large red star left of a small blue circle", "a green square on a gray background", "a star"]


def images(count: int = 3) -> list[np.ndarray]:
    """Of several shapes: fitted, wide, high, one pixel, large."""
    rng = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (50, 90), (77, 41), (1, 1), (4000, 3000)]
    return [rng.integers(0, 256, (*sizes[i], 3)).astype(np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes, tokenizer and preprocessing, as a published CLIP folder holds them; its weights are other ones."""
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def open_clip() -> OpenClip:
    torch.manual_seed(1)
    words = tokenizer()
    return OpenClip(len(words), words.model_max_length).eval()


@pytest.fixture(scope="module")
def hps_folder(open_clip: OpenClip, clip_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hps")
    return convert_hps(save(open_clip, folder / "HPS.pt", wrapped=True), str(clip_base), folder / "converted")


@pytest.fixture(scope="module")
def reward_network() -> ImageReward:
    torch.manual_seed(2)
    return ImageReward(len(tokenizer()))


@pytest.fixture(scope="module")
def reward_folder(reward_network: ImageReward, clip_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    return convert_image_reward(save(reward_network, folder / "ImageReward.pt"), str(clip_base), folder / "converted")


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("head")
    return convert_aesthetic(save(torch.nn.ModuleDict({"layers": authors_head(24)}), folder / "head.pth"), "", folder / "converted")


def tokens(prompt: str, length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    words = tokenizer()
    found = words([prompt], padding="max_length", truncation=True, return_tensors="pt", **({"max_length": length} if length else {}))
    return found.input_ids, found.attention_mask


def test_hps_is_the_authors_cosine(open_clip: OpenClip, hps_folder: Path) -> None:
    scores = ClipScorerConfig(model=str(hps_folder), scale="cosine").build().score(images(), PROMPTS)
    end = tokenizer().eos_token_id
    expected = [open_clip.cosine(image, tokens(prompt)[0], end) for image, prompt in zip(images(), PROMPTS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5) and len({round(s, 3) for s in scores}) == 3


def test_pick_score_is_the_scaled_cosine(open_clip: OpenClip, hps_folder: Path) -> None:
    scaled = ClipScorerConfig(model=str(hps_folder)).build().score(images(), PROMPTS)
    end = tokenizer().eos_token_id
    expected = [np.exp(2.5) * open_clip.cosine(i, tokens(p)[0], end) for i, p in zip(images(), PROMPTS, strict=True)]
    assert scaled == pytest.approx(expected, abs=1e-4)  # the scale, 12, multiplies float noise as well


def test_image_reward_is_the_authors_formula(reward_network: ImageReward, reward_folder: Path) -> None:
    scores = ImageRewardConfig(model=str(reward_folder)).build().score(images(), PROMPTS)
    expected = [reward_network.score(image, *tokens(prompt, TOKENS)) for image, prompt in zip(images(), PROMPTS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5) and len({round(s, 4) for s in scores}) == 3


def test_image_reward_reads_35_tokens(reward_folder: Path) -> None:
    scorer = ImageRewardConfig(model=str(reward_folder)).build()
    words = ["red"] * (TOKENS - 2)
    image = images(1)
    same, cut, other = (scorer.score(image, [" ".join(w)])[0] for w in (words, [*words, "star"], [*words[:-1], "star"]))
    assert same == cut != other


def test_the_aesthetic_grade_is_the_authors_formula(open_clip: OpenClip, hps_folder: Path, head_folder: Path) -> None:
    scores = AestheticConfig(head=str(head_folder), clip=str(hps_folder)).build().score(images(), PROMPTS)
    torch.manual_seed(3)
    head = authors_head(24).eval()
    with torch.no_grad():
        expected = [float(head(F.normalize(open_clip.visual(pixels(image)), dim=-1))) for image in images()]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_embeddings_are_those_of_the_picture_alone(open_clip: OpenClip, hps_folder: Path) -> None:
    scorer = ClipScorerConfig(model=str(hps_folder)).build()
    assert isinstance(scorer, Embedder)
    with torch.no_grad():
        expected = F.normalize(torch.cat([open_clip.visual(pixels(image)) for image in images()]), dim=-1).numpy()
    assert scorer.features(images()) == pytest.approx(expected, abs=1e-5)
    assert scorer.features([]).shape == (0, 24)


@pytest.fixture(scope="module")
def build(hps_folder: Path, reward_folder: Path, head_folder: Path) -> dict[str, Callable[[], Scorer]]:
    return {
        "clip": lambda: ClipScorerConfig(model=str(hps_folder)).build(),
        "image_reward": lambda: ImageRewardConfig(model=str(reward_folder)).build(),
        "aesthetic": lambda: AestheticConfig(head=str(head_folder), clip=str(hps_folder)).build(),
    }


@pytest.mark.parametrize("name", ["clip", "image_reward", "aesthetic"])
def test_batches_sizes_and_long_prompts(build: dict[str, Callable[[], Scorer]], name: str) -> None:
    scorer = build[name]()
    pictures, prompts = images(5), [*PROMPTS, "", " ".join(["a large red star"] * 500)]
    together = scorer.score(pictures, prompts)
    alone = [scorer.score([image], [prompt])[0] for image, prompt in zip(pictures, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5) and np.isfinite(np.array(together)).all()
    assert scorer.score([], []) == []
    again = build[name]().score(pictures, prompts)
    assert again == together, "nothing is drawn"


def test_one_copy_of_the_weights_for_all_who_use_them(hps_folder: Path) -> None:
    first, second = (ClipScorerConfig(model=str(hps_folder), scale=scale).build() for scale in ("logit", "cosine"))
    assert first.model is second.model


def test_a_batch_that_does_not_fit_is_halved(hps_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ClipScorerConfig(model=str(hps_folder)).build()
    expected, whole, sizes = scorer.score(images(), PROMPTS), ClipScorer.score, []

    class Cramped:
        logit_scale = scorer.model.logit_scale

        def __call__(self, pixel_values: torch.Tensor, **others: torch.Tensor) -> object:
            sizes.append(len(pixel_values))
            if len(pixel_values) > 1:
                raise torch.OutOfMemoryError
            return model(pixel_values=pixel_values, **others)

    model = scorer.model
    monkeypatch.setattr(scorer, "model", Cramped())
    assert whole(scorer, images(), PROMPTS) == pytest.approx(expected, abs=1e-5) and sizes == [3, 1, 1, 1]


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


def test_a_checkpoint_brings_numbers_and_no_code(tmp_path: Path, clip_base: Path) -> None:
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    torch.save({"layers.0.weight": _Bomb()}, tmp_path / "hidden.pt")
    for name in ("bomb.pt", "hidden.pt", "none.pt"):
        for convert in (convert_image_reward, convert_hps, convert_aesthetic):
            with pytest.raises(RpoError, match="cannot be read as weights"):
                convert(tmp_path / name, str(clip_base), tmp_path / "out")


def test_another_networks_checkpoint_is_refused(tmp_path: Path, clip_base: Path, open_clip: OpenClip, reward_network: ImageReward) -> None:
    hps, reward = save(open_clip, tmp_path / "hps.pt"), save(reward_network, tmp_path / "reward.pt")
    for convert, wrong in ((convert_image_reward, hps), (convert_hps, reward), (convert_aesthetic, hps)):
        with pytest.raises(RpoError, match="this is no checkpoint of"):
            convert(wrong, str(clip_base), tmp_path / "out")


def test_what_is_not_there_is_told_with_the_way_to_make_it(tmp_path: Path, clip_base: Path) -> None:
    with pytest.raises(RpoError, match="convert image_reward"):
        ImageRewardConfig(model=str(tmp_path)).build()
    with pytest.raises(RpoError, match="convert aesthetic"):
        AestheticConfig(head=str(tmp_path)).build()
    shutil.copytree(clip_base, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(RpoError, match="preprocessor_config"):
        ClipScorerConfig(model=str(tmp_path / "clip")).build()
