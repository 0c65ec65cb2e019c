"""Rewards as judges."""

import numpy as np
import pytest

from rpo.evaluation.judges import (
    ScorerJudge,
    check_headline,
    declared_metrics,
    direction,
    headline_of,
    losses,
    metric_of,
    value_of,
)
from rpo.protocols import Metric


class Bright:
    def score(self, images: list[np.ndarray], prompts: list[str]) -> list[float]:
        return [float(image.mean()) for image in images]


class Embedding(Bright):
    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean((0, 1)) for image in images])


def test_a_reward_that_embeds_images_has_features_and_another_none() -> None:
    images = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (10, 20)]
    assert ScorerJudge("bright", Bright()).measure(images, ["a", "b"]) == [{"bright": 10.0}, {"bright": 20.0}]
    assert ScorerJudge("bright", Bright()).features(images).shape == (2, 0)
    assert ScorerJudge("bright", Embedding()).features(images).tolist() == [[10.0] * 3, [20.0] * 3]


class NamesItsMetrics:
    def metrics(self) -> dict[str, Metric]:
        return {"right": Metric(kind="fraction"), "far": Metric(kind="distance", better="lower")}


class Silent:
    pass


class Probability:
    def metric(self) -> Metric:
        return Metric(kind="probability")


def test_metrics_are_declared_by_configurations_and_a_scorer_is_a_score() -> None:
    metrics, silent = declared_metrics([("judge", NamesItsMetrics()), ("other", Silent())], [("clip", Silent()), ("vqa", Probability())])
    assert {name: metric.kind for name, metric in metrics.items()} == {
        "right": "fraction", "far": "distance", "clip": "score", "vqa": "probability",
    }  # fmt: skip
    assert silent == ["other"]


def test_an_unknown_headline_is_refused_with_the_metrics_there_are() -> None:
    with pytest.raises(ValueError, match="headline is 'rigth', which no judge or scorer measures; its metrics are right, far, clip"):
        check_headline("rigth", [("judge", NamesItsMetrics())], [("clip", Silent())])
    check_headline("right", [("judge", NamesItsMetrics())], [])
    check_headline("unheard", [("judge", Silent())], [])  # found out once that judge has measured


def numbers(*marks: str, **more: object) -> dict[str, object]:
    return {"ci95": [0.1, 0.2], "difference": 0.15} | dict.fromkeys(marks, True) | more


def test_a_reward_that_labelled_is_no_headline_while_there_is_another() -> None:
    labelled = {"clip": numbers("used_in_labelling"), "vlm_prefers": numbers("of_pairs"), "diversity": numbers(), "pick": numbers()}
    assert headline_of("clip", labelled) == "pick" and headline_of("pick", labelled) == "pick"
    assert headline_of("vlm_prefers", labelled) == "vlm_prefers", "where it is wanted"
    assert headline_of("clip", {"clip": numbers("used_in_labelling")}) == "clip" and headline_of("x", {}) == ""
    assert headline_of("drift", {"drift": {"difference": 1.0}, "pick": numbers()}) == "pick"


def test_directions_follow_the_metric_and_old_files_are_scores() -> None:
    assert direction(numbers()) == "better" and direction(numbers(better="lower")) == "worse"
    assert direction(numbers(better="neither")) == "open" and direction(numbers(ci95=None)) == "open"
    assert losses({"a": numbers(), "b": numbers(better="lower"), "drift": {"difference": 3.0}}, "a") == ["b"]
    assert metric_of({"base": 0.3, "tuned": 0.4}).kind == "score"
    assert value_of({"base": 0.3, "tuned": 0.4}, "mine", "tuned") == 0.4 and value_of({"theirs": 1.0, "mine": 2.0}, "mine", "tuned") == 2.0
