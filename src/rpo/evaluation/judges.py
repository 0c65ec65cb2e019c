"""Reward models as judges, and what judges measure: names, kinds and directions of metrics, and which one is the headline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rpo.errors import RowError, RpoError
from rpo.protocols import DeclaresMetric, DeclaresMetrics, Embedder, Metric, Scorer

FRECHET = "frechet"
DIVERSITY = "diversity"
DRIFT = "drift"
OF_FEATURES: Mapping[str, Metric] = {
    FRECHET: Metric(kind="distance", better="lower"),
    DIVERSITY: Metric(kind="distance"),
    DRIFT: Metric(kind="distance", better="neither"),
}
"""Metrics computed from a judge's features."""
SIGNIFICANT = 0.05
"""p-value, after Holm's correction, below which a secondary metric counts as changed."""


@dataclass(frozen=True)
class ScorerJudge:
    """A `Judge` with one metric, named as the scorer; features if the scorer embeds images, else none."""

    name: str
    scorer: Scorer

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        scores = self.scorer.score(images, prompts)
        for score in scores:
            if isinstance(score, RowError):
                raise RpoError(f"{self.name} has no score for one of the images: {score}")
        return [{self.name: score} for score in scores if not isinstance(score, RowError)]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.scorer.features(images) if isinstance(self.scorer, Embedder) else np.zeros((len(images), 0))


def declared_metrics(judges: Iterable[tuple[str, object]], scorers: Iterable[tuple[str, object]]) -> tuple[dict[str, Metric], list[str]]:
    """The metrics that configurations declare, by name, and the judges that declare none."""
    metrics: dict[str, Metric] = {}
    silent: list[str] = []
    for name, config in judges:
        if isinstance(config, DeclaresMetrics):
            metrics |= config.metrics()
        else:
            silent.append(name)
    for name, config in scorers:
        metrics[name] = config.metric() if isinstance(config, DeclaresMetric) else Metric()
    return metrics, silent


def unknown_headline(headline: str, known: Iterable[str]) -> str:
    """What to say of a headline that nobody measures."""
    return f"headline is {headline!r}, which no judge or scorer measures; its metrics are {', '.join(known)}"


def check_headline(headline: str, judges: Sequence[tuple[str, object]], scorers: Sequence[tuple[str, object]]) -> None:
    """Raises `ValueError` if no judge or scorer measures the headline, as far as their configurations tell."""
    metrics, silent = declared_metrics(judges, scorers)
    if headline not in metrics and not silent:
        raise ValueError(unknown_headline(headline, metrics))


def headline_of(wanted: str, numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """The metric that decides: the one that is wanted, unless it belongs to a reward that labelled the pairs and another does not.

    Metrics that only exist for pairs of images ("of_pairs") do not take its place. Empty where nothing was compared.
    """
    compared = [name for name in numbers if is_compared(numbers[name])]
    evidence = [name for name in compared if "used_in_labelling" not in numbers[name] and name not in OF_FEATURES]
    single = [name for name in evidence if "of_pairs" not in numbers[name]]
    if wanted in evidence or (wanted in compared and not evidence):
        return wanted
    return next(iter([*single, *evidence, *compared]), "")


def is_compared(numbers: Mapping[str, Any]) -> bool:
    """Whether a metric was compared prompt by prompt; a distance between whole sets of images is not."""
    return "ci95" in numbers


def metric_of(numbers: Mapping[str, Any]) -> Metric:
    """How a metric of a summary reads; one of an older version, which does not say, is a score."""
    return Metric(kind=numbers.get("kind", "score"), better=numbers.get("better", "higher"), says=numbers.get("says", ""))


def described_metric(metric: Metric) -> dict[str, Any]:
    """The form in which a summary holds it."""
    return {name: value for name, value in asdict(metric).items() if value}


def value_of(numbers: Mapping[str, Any], model: str, role: str) -> float:
    """A model's mean: under its own name, or in files of older versions under its role, base or tuned."""
    return numbers[model] if model in numbers else numbers[role]


def direction(numbers: Mapping[str, Any]) -> Literal["better", "worse", "open"]:
    """Where the interval of the difference lies, by the metric's own direction; open if it holds zero or there is none."""
    better = metric_of(numbers).better
    if numbers.get("ci95") is None or better == "neither":
        return "open"
    low, high = numbers["ci95"]
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (better == "higher") else "worse"


def verdict(numbers: Mapping[str, Any]) -> Literal["better", "worse", "open"]:
    """As `direction`, but open as well where the p-value after Holm's correction is not below `SIGNIFICANT`."""
    return direction(numbers) if numbers.get("p_holm", 0.0) < SIGNIFICANT else "open"


def losses(numbers: Mapping[str, Mapping[str, Any]], headline: str) -> list[str]:
    """Metrics beside the headline whose whole interval lies on the bad side; rewards that labelled the pairs count as well."""
    return [name for name, own in numbers.items() if name != headline and is_compared(own) and direction(own) == "worse"]
