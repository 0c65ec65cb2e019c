import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rpo.errors import RpoError
from rpo.training.objectives.preference import PairErrors
from rpo.training.runtime.metrics import ADVICE, MetricsLog, Trend, Watch, accuracy, batch_metrics, last_line


def trend_of(values: np.ndarray) -> Trend:
    trend = Trend()
    for value in values:
        trend = trend.add(float(value))
    return trend


def alarms_of(chosen: np.ndarray, rejected: np.ndarray, accuracy: float = 0.7) -> tuple[str, ...]:
    watch = Watch()
    for one, other in zip(chosen, rejected, strict=True):
        watch = watch.add(
            {"chosen_over_reference": float(one), "rejected_over_reference": float(other), "accuracy": accuracy, "fresh": True}
        )
    return watch.alarms


@pytest.mark.parametrize("measured", ["held_out", "fresh"])
def test_pairs_are_told_apart_where_nothing_was_trained(measured: str) -> None:
    """Draws that come back are learned by heart: the accuracy of the steps rings no alarm."""
    step = {"chosen_over_reference": -0.1, "rejected_over_reference": 0.1, "accuracy": 1.0, "fresh": False}
    for share, pairs, rings in ((0.96, 64, ()), (1.0, 64, ("all pairs told apart",)), (1.0, 4, ())):
        watch = Watch()
        for _ in range(3):
            for _ in range(50):
                watch = watch.add(step)
            watch = watch.add({**step, f"{measured}_draw_accuracy": share, "measured_draws": 4 * pairs})
        assert watch.alarms == rings, (share, pairs)


def test_noise_is_no_trend() -> None:
    rng = np.random.default_rng(0)
    signs = [trend_of(rng.normal(0, 1e-3, 200)).sign for _ in range(100)]
    assert sum(map(abs, signs)) <= 3
    assert trend_of(rng.normal(-1e-3, 1e-3, 200)).sign == -1
    assert trend_of(np.zeros(200)).sign == 0
    assert trend_of(rng.normal(0, 1e-3, 200) + np.linspace(0, 3e-3, 200)).sign == 1
    assert trend_of(np.full(5, 1.0)).sign == 0  # five steps are no trend


def test_alarms() -> None:
    rng = np.random.default_rng(0)
    noise, rising = rng.normal(0, 1e-3, (2, 200)), np.linspace(0, 5e-3, 200)
    assert alarms_of(*noise) == ()
    assert alarms_of(noise[0] - rising, noise[1] + rising) == ()  # as it should be: one side better, the other worse
    assert alarms_of(noise[0] + rising, noise[1] + 2 * rising) == ("chosen side worse than the reference",)
    assert alarms_of(noise[0], noise[1] + rising) == ("margin from the rejected side alone",)
    assert alarms_of(noise[0] - rising, noise[1] + rising, accuracy=1.0) == ("all pairs told apart",)
    assert set(ADVICE) == {"chosen side worse than the reference", "margin from the rejected side alone", "all pairs told apart"}


def test_the_average_starts_at_the_first_value_and_forgets() -> None:
    assert trend_of(np.array([2.0])).mean == 2.0
    assert trend_of(np.concatenate([np.full(50, 9.0), np.full(200, 1.0)])).mean == pytest.approx(1.0, abs=1e-3)


def write(path: Path, first: int, last: int, **tensors: float) -> Watch:
    log, watch = MetricsLog(path, step=first - 1), Watch()
    for step in range(first, last + 1):
        values = {
            "loss": 0.5,
            "gradient_norm": 1.0,
            "chosen_over_reference": 0.1,
            "rejected_over_reference": 0.1,
            "accuracy": 0.5,
            **tensors,
        }
        log.add({"step": step}, {name: torch.tensor(value) for name, value in values.items()})
        watch, _ = log.flush(watch)
    return watch


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7)
    with path.open("a") as file:
        file.write('{"step": 8, "los')
    write(path, 5, 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 10))
    assert last_line(path)["step"] == 9
    assert last_line(tmp_path / "none") == {}


def test_lines_wait_until_they_are_flushed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    for step in (1, 2, 3):
        log.add({"step": step}, {"loss": torch.tensor(float(step)), "gradient_norm": torch.tensor(1.0)})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    _, lines = log.flush(Watch())
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert log.flush(Watch()) == (Watch(), [])


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_no_number_stops_the_run(tmp_path: Path, broken: str) -> None:
    with pytest.raises(RpoError, match="no number at step 1; lower lr"):
        write(tmp_path / "metrics.jsonl", 1, 1, **{broken: float("nan")})


def test_batch_metrics() -> None:
    errors = PairErrors(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 4, 4]), torch.tensor([2.0, 2, 2]), torch.tensor([4.0, 4, 4]))
    metrics = {name: value.item() for name, value in batch_metrics(errors).items()}
    assert metrics["chosen_error"] == 2 and metrics["rejected_error"] == 4
    assert metrics["chosen_over_reference"] == 0 and metrics["rejected_over_reference"] == 0
    assert metrics["margin_p50"] == 0 and metrics["margin_p10"] == pytest.approx(-0.8) and metrics["accuracy"] == 0.5
    assert set(batch_metrics(PairErrors(torch.ones(2)))) == {"chosen_error"}


def test_ties_count_half() -> None:
    assert accuracy(torch.tensor([0.0, 0.0])).item() == 0.5
    assert accuracy(torch.tensor([1.0, 0.5, -1.0, 0.0])).item() == 0.625
