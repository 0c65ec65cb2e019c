import pytest
import torch
import transformers

from rpo.training.config import TrainConfig
from rpo.training.runtime.optimizer import Descent


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


def test_transformers_adafactor_is_the_public_scripts() -> None:
    """A step of lr, as of transformers' optimizer itself with Salesforce's settings; torch's moves by a share of the weights' size."""
    torch.manual_seed(0)
    weights, data = 0.03 * torch.randn(40, 30), torch.randn(6, 16, 40)
    named = {
        name: Descent(TrainConfig(model="", optimizer=name, clip_norm=1e9), {"w": torch.nn.Parameter(weights.clone())})
        for name in ("adafactor_transformers", "adafactor")
    }
    theirs = torch.nn.Parameter(weights.clone())
    settings = {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False, "weight_decay": 0.01}
    optimizer = transformers.optimization.Adafactor([theirs], lr=1e-4, **settings)
    for batch in data:
        for descent in named.values():
            (batch @ descent.trained["w"]).square().sum().backward()
            descent.step(1e-4)
        (batch @ theirs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: (descent.weights()["w"] - weights).norm() for name, descent in named.items()}
    assert torch.equal(named["adafactor_transformers"].weights()["w"], theirs)
    assert moved["adafactor_transformers"] > 20 * moved["adafactor"]


def test_transformers_adafactor_goes_on_from_a_checkpoint() -> None:
    config = TrainConfig(model="", optimizer="adafactor_transformers")
    whole, first = (Descent(config, {"w": torch.nn.Parameter(torch.linspace(0, 1, 600).reshape(30, 20))}) for _ in range(2))
    for _ in range(4):
        advance(whole, 0.01)
    for _ in range(2):
        advance(first, 0.01)
    second = Descent(config, {"w": torch.nn.Parameter(torch.zeros(30, 20))})
    second.load(first.weights(), first.state(), 2)
    for _ in range(2):
        advance(second, 0.01)
    assert torch.equal(second.weights()["w"], whole.weights()["w"])
    assert second.state().keys() == whole.state().keys()
    with pytest.raises(ValueError, match="adafactor_transformers' knows no tensors that are split"):
        TrainConfig(model="", optimizer="adafactor_transformers", shard=True)
