import json

import pytest

from rpo.core.described import described
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import SFT
from rpo.training.objectives.safeguards import Anchored


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_pairs", 6, "accumulation must divide batch_pairs, got 4 and 6"),
        ("lr", 0.0, "lr must be above 0, got 0.0"),
        ("caption_dropout", 1.5, "caption_dropout must be between 0 and 1, got 1.5"),
        ("draws", 0, "draws must be at least 1, got 0; None draws anew"),
        ("draws", None, "reference='cached' needs a fixed number of draws.*set draws=8, or reference='live'"),
        ("timesteps", (5, 5), r"timesteps must be \(first, end\)"),
        ("reference", "offloaded", "reference='offloaded' moves a second network.*take 'live'"),
        ("lora_rank", 0, "rank must be at least 1, got 0"),
        ("lora_targets", (), "targets must be some of attention"),
    ],
)
def test_refusals_name_field_value_and_way_out(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model="x", **{field: value})


def test_fresh_draws_go_with_a_live_reference_or_with_none() -> None:
    TrainConfig(model="x", draws=None, reference="live")
    TrainConfig(model="x", draws=None, objective=SFT())


def test_warm_up() -> None:
    config = TrainConfig(model="x", lr=1.0, warmup_steps=4)
    assert [config.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert TrainConfig(model="x", lr=1.0, warmup_steps=0).lr_at(0) == 1


@pytest.mark.parametrize(("schedule", "rates"), [("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464])])
def test_the_learning_rate_falls_after_the_warm_up(schedule: str, rates: list[float]) -> None:
    config = TrainConfig(model="x", lr=1.0, steps=6, warmup_steps=2, lr_schedule=schedule)
    assert [config.lr_at(step) for step in range(6)] == pytest.approx(rates, abs=1e-4)


def test_what_a_weight_takes() -> None:
    assert TrainConfig(model="x").bytes_per_weight == 16
    assert TrainConfig(model="x", optimizer="adafactor", ema_decay=0.9).bytes_per_weight == 12
    assert TrainConfig(model="x", lora_rank=None, reference="live").bytes_per_weight == 20


def test_mirror_images_are_not_noised_with_what_their_source_came_from() -> None:
    with pytest.raises(ValueError, match="flip would mirror images"):
        TrainConfig(model="x", flip=True, generation_noise=True)


def test_json_tells_objectives_apart_and_survives_a_round_trip() -> None:
    config = described(TrainConfig(model="x", timesteps=(1, 2)))
    assert config["objective"] == {"type": "DiffusionDPO", "k": 2500.0}
    assert json.loads(json.dumps(config)) == config
    nested = described(TrainConfig(model="x", objective=Anchored(of=SFT(), weight=2.0)))["objective"]
    assert nested == {"type": "Anchored", "of": {"type": "SFT"}, "weight": 2.0}
