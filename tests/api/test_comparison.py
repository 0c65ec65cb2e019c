"""What is compared with what: models by content, headlines, and judges that fail."""

import json
from pathlib import Path

import numpy as np
import pytest

from rpo.api.evaluation import _judge_prefers_edit, _preflight, results_tables
from rpo.api.folder import check_base, drawn_by, same_model
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair
from rpo.errors import RowError, RpoError


def sampler(model: object) -> GeneratorConfig:
    return GeneratorConfig(model=str(model))


def folder(path: Path, weights: str) -> Path:
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_text(weights)
    return path


def tuned(path: Path, base: str, identity: str | None = None) -> Path:
    (path / "train" / "weights").mkdir(parents=True)
    (path / "train" / "config.json").write_text(json.dumps({"model": base}))
    training = {} if identity is None else {"model_identity": identity}
    (path / "summary.json").write_text(json.dumps({"version": 1, "seconds": {}, "training": training}))
    return path


def test_a_model_is_known_by_its_content_and_not_by_its_folder(tmp_path: Path) -> None:
    mine, other = folder(tmp_path / "a" / "base", "1"), folder(tmp_path / "b" / "base", "2")
    copy = folder(tmp_path / "c" / "renamed", "1")
    assert not same_model(str(mine), str(other)) and same_model(str(mine), str(copy))
    assert not drawn_by(sampler(other), str(mine)) and drawn_by(sampler(copy), str(mine))
    assert same_model("owner/name", "owner/name@v1") and not same_model("owner/name@v1", "owner/name@v2")
    assert not same_model("owner/name", "another/name") and not same_model("owner/base", str(mine))


def test_a_run_of_another_base_is_refused(tmp_path: Path) -> None:
    mine, other = folder(tmp_path / "a" / "base", "1"), folder(tmp_path / "b" / "base", "2")
    run = tuned(tmp_path / "run", str(other))
    check_base(sampler(other), run)
    with pytest.raises(ValueError, match=r"--models x=run: .*run was tuned on .*b/base, and pictures would be drawn with .*a/base"):
        check_base(sampler(mine), run, "--models x=run")


def test_a_base_that_was_moved_is_known_by_the_hash_that_the_run_kept(tmp_path: Path) -> None:
    from rpo.core.hashing import model_identity

    here, imposter = folder(tmp_path / "new" / "sd", "1"), folder(tmp_path / "imposter" / "base", "2")
    run = tuned(tmp_path / "run", "/gone/base", model_identity(here))
    check_base(sampler(here), run)
    with pytest.raises(ValueError, match="other weights"):
        check_base(sampler(imposter), run)
    check_base(sampler(imposter), tuned(tmp_path / "old", "/gone/base"))  # an older run kept none: the name has to do


def pair(name: str, edit_is: str, chosen: int, rejected: int) -> Pair:
    sides = {"chosen": "original", "rejected": "original"} | {edit_is: "edited"}
    images = [EncodedImage.of(encode_png(np.full((8, 8, 3), level, dtype=np.uint8))) for level in (chosen, rejected)]
    return Pair(
        id=name, prompt="a", chosen=images[0], rejected=images[1], gap=1.0, split="train", critique="null", instruction="", scores="{}",
        provenance=json.dumps(sides),
    )  # fmt: skip


class Featureless:
    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), 0))


class Fails(Featureless):
    """Has no metric for dark images; another judge's metric comes first."""

    def measure(self, images: list[np.ndarray], prompts: list[str]) -> list[dict[str, float]]:
        return [{"vlm_follows": float(image.mean())} if image.mean() > 5 else {} for image in images]


class Other(Featureless):
    def measure(self, images: list[np.ndarray], prompts: list[str]) -> list[dict[str, float]]:
        return [{"other": 1.0} for _ in images]


class Compares:
    def compare(self, first: list[np.ndarray], second: list[np.ndarray], prompts: list[str]) -> list[float | RowError]:
        return [RowError("refused") if a.mean() < 5 else float(a.mean() > b.mean()) for a, b in zip(first, second, strict=True)]


PAIRS = [pair("a", "chosen", 200, 100), pair("b", "rejected", 100, 200), pair("c", "chosen", 0, 100), pair("d", "chosen", 100, 200)]


@pytest.mark.parametrize(("judge", "lower", "share"), [(Fails, False, 2 / 3), (Fails, True, 1 / 3), (Compares, False, 2 / 3)])
def test_a_failed_answer_or_another_judge_does_not_end_the_evaluation(judge: type, lower: bool, share: float) -> None:
    judges = {"other": Other, "vlm": judge}
    assert _judge_prefers_edit(PAIRS, judges, "vlm_follows", lower=lower) == pytest.approx(share)
    assert _judge_prefers_edit(PAIRS, {"other": Other}, "vlm_follows", lower=lower) is None
    assert _judge_prefers_edit([], judges, "vlm_follows", lower=lower) is None


def test_a_server_without_log_probabilities_is_found_in_advance() -> None:
    from rpo.backends.scorers.vision_chat import Rubric

    class Mute:
        def complete(self, requests: list[object]) -> list[RowError]:
            return [RowError("the server tells no log probabilities") for _ in requests]

    with pytest.raises(RpoError, match="no log probabilities"):
        _preflight({"rubric": lambda: Rubric(Mute())}, "a cat")
    _preflight({"other": Other}, "a cat")


def test_tables_of_old_summaries_can_be_read_and_losses_stand_below() -> None:
    own = {"base": 0.5, "tuned": 0.4, "difference": -0.1, "ci95": [-0.2, -0.05], "win_rate": 0.2, "win_ci95": [0.1, 0.3], "n": 90}
    summary = {"recipe": "r", "seed": 0, "headline": "good", "comparisons": {"mine": {"bad": own, "good": own | {"ci95": [-0.1, 0.1]}}}}
    table, sentence = results_tables(summary)
    assert [column._cells[0] for column in table.columns][:4] == ["good", "0.500", "0.400", "-0.100"]
    assert str(sentence).startswith("But it got worse elsewhere: bad fell by 0.100")
    named = {"theirs": 0.5, "mine": 0.4} | {name: value for name, value in own.items() if name not in ("base", "tuned")}
    [table, _] = results_tables(summary | {"baseline": "theirs", "comparisons": {"mine": {"good": named | {"ci95": None}, "bad": named}}})
    assert [column.header for column in table.columns][:3] == ["metric", "theirs", "mine"] and table.columns[4]._cells[0] == "–"
