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
    assert torch.allclose(descent.result()["w"], expected) and not torch.allclose(expected, last)
    assert torch.equal(descent.weights()["w"], last)


def test_without_an_average_the_last_weights_are_it() -> None:
    descent = descent_of([1.0, -2.0])
    advance(descent, 0.1)
    assert torch.equal(descent.result()["w"], descent.trained["w"])
    assert set(descent.state()) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}


def test_adafactor_keeps_rows_and_columns() -> None:
    descent = Descent(TrainConfig(model="", optimizer="adafactor"), {"w": torch.nn.Parameter(torch.ones(30, 20))})
    advance(descent, 0.1)
    assert sum(tensor.numel() for tensor in descent.state().values()) == 51  # a step, 30 rows and 20 columns
    assert (descent.trained["w"] < 1).all()


def test_a_byte_is_enough_for_each_average_of_adamw() -> None:
    weights = torch.linspace(-1, 1, 8192).reshape(64, 128)
    small, full = (
        Descent(TrainConfig(model="", optimizer=name), {"w": torch.nn.Parameter(weights.clone())}) for name in ("adamw8bit", "adamw")
    )
    for _ in range(5):
        advance(small, 0.01)
        advance(full, 0.01)
    assert torch.allclose(small.weights()["w"], full.weights()["w"], atol=5e-3)
    assert not torch.allclose(full.weights()["w"], weights, atol=2e-2)
    sizes = {name: sum(value.nbytes for value in descent.state().values()) for name, descent in (("small", small), ("full", full))}
    assert sizes["small"] < 0.35 * sizes["full"]


def test_a_step_too_large_for_half_precision_is_skipped_and_the_next_are_scaled_less() -> None:
    descent = descent_of([1.0, -2.0], precision="fp16")
    before, scale = descent.weights()["w"].clone(), descent.state()["loss_scale"][0]
    descent.backward(descent.trained["w"].sum() * float("inf"))
    assert descent.step(0.1) == 0
    assert torch.equal(descent.weights()["w"], before) and descent.state()["loss_scale"][0] == scale / 2
    descent.backward(descent.trained["w"].square().sum())
    assert descent.step(0.1).item() == pytest.approx(20**0.5)
    assert not torch.equal(descent.weights()["w"], before)


def test_wrong_decays_are_named() -> None:
    with pytest.raises(ValueError, match=r"ema_decay must be above 0 and below 1, got 1.0"):
        TrainConfig(model="", ema_decay=1.0)
