"""Two samples of one prompt: drawn from different noise, labelled only where every reward agrees."""

from dataclasses import dataclass

import numpy as np
import pytest

from rpo.curation.columns import score_column
from rpo.curation.sample_pairs import DuelLabelStage, TwoSamplesStage
from rpo.data.images import decode_cell


@dataclass(frozen=True)
class Grey:
    """Draws a grey whose level is its seed's."""

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "Grey":
        return self

    def generate(self, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
        return [np.full((8, 8, 3), seed % 251, dtype=np.uint8) for seed in seeds]


def test_the_second_sample_starts_elsewhere_and_depends_on_its_row_alone() -> None:
    run = TwoSamplesStage(generator=Grey()).build()
    both = run({"prompt": ["a", "b"], "seed": [5, 6]})
    alone = run({"prompt": ["b"], "seed": [6]})
    levels = {side: [int(decode_cell(cell)[0, 0, 0]) for cell in both[side]] for side in ("first", "second")}
    assert levels["first"] == [5, 6] and levels["second"] != levels["first"]
    assert alone["second"][0] == both["second"][1]


def batch(first: list[list[float]], second: list[list[float]]) -> dict[str, list]:
    columns: dict[str, list] = {"id": [f"{i:016x}" for i in range(len(first))]}
    for number, reward in enumerate(("a", "b")):
        columns[score_column(reward, "first")] = [row[number] for row in first]
        columns[score_column(reward, "second")] = [row[number] for row in second]
    return columns


def test_only_what_all_rewards_prefer_is_chosen() -> None:
    rows = batch([[2, 2], [0, 0], [2, 0], [1, 1], [2, 1]], [[1, 1], [1, 1], [0, 2], [1, 1], [0, 1]])
    label = DuelLabelStage(rewards=("a", "b")).build()(rows)
    assert label["chosen_side"] == ["first", "second", None, None, None]
    assert label["rejected_side"] == ["second", "first", None, None, None]
    assert [status is None for status in label["status"]] == [True, True, False, False, False]


def test_the_coin_is_fair_and_the_same_every_time() -> None:
    rows = batch([[0.0, 0.0]] * 400, [[1.0, 1.0]] * 400)
    label = DuelLabelStage(rewards=("a", "b"), rule="random").build()
    chosen = label(rows)["chosen_side"]
    assert chosen == label(rows)["chosen_side"] and chosen.count("first") == pytest.approx(200, abs=50)
