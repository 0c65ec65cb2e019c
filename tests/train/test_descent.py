import pytest
import torch

from rpo.train.config import TrainConfig
from rpo.train.descent import Descent


def descent_of(values: list[float], **settings: object) -> Descent:
    return Descent(TrainConfig(model="", **settings), {"w": torch.nn.Parameter(torch.tensor(values))})


def advance(descent: Descent, lr: float) -> torch.Tensor:
    descent.trained["w"].square().sum().backward()
    return descent.step(lr)


def test_the_norm_is_told_before_it_is_cut() -> None:
    assert advance(descent_of([3.0, 4.0]), 0.1).item() == pytest.approx(10.0)


def test_the_average_is_what_its_formula_says() -> None:
    descent, expected = descent_of([1.0, -2.0], ema_decay=0.5), torch.tensor([1.0, -2.0])
    for done in range(1, 8):
        advance(descent, 0.1)
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * descent.trained["w"].detach()
    last = descent.trained["w"].detach().clone()
    with descent.averaged():
        assert torch.allclose(descent.trained["w"], expected)
        assert not torch.allclose(expected, last)
    assert torch.equal(descent.trained["w"], last)


def test_without_an_average_the_last_weights_are_it() -> None:
    descent = descent_of([1.0, -2.0])
    advance(descent, 0.1)
    with descent.averaged():
        assert descent.trained["w"].abs().max() < 2.0
    assert set(descent.tensors()) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}


def test_adafactor_keeps_rows_and_columns() -> None:
    descent = Descent(TrainConfig(model="", optimizer="adafactor"), {"w": torch.nn.Parameter(torch.ones(30, 20))})
    advance(descent, 0.1)
    assert sum(tensor.numel() for tensor in descent.tensors().values()) == 51  # a step, 30 rows and 20 columns
    assert (descent.trained["w"] < 1).all()


def test_wrong_decays_are_named() -> None:
    with pytest.raises(ValueError, match=r"ema_decay must be above 0 and below 1, got 1.0"):
        TrainConfig(model="", ema_decay=1.0)
