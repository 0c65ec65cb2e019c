"""Several attempts of which one goes on, rounds that follow each other, and what is told of both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from rpo.curation.columns import cells, images
from rpo.curation.stages.candidates import AttemptStage, choose, ranks
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.edit import EditStage, attempt_seed
from rpo.curation.stages.pairwise import PairwiseStage
from rpo.curation.stages.refine import RoundStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.verify import SafetyStage, VerifyStage
from rpo.data.schema import Critique, Instruction, Instructions
from rpo.errors import RowError


@dataclass(frozen=True)
class Of:
    """A configuration of a fake that is there already."""

    fake: object

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> object:
        return self.fake


def grey(level: float, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), level, dtype=np.uint8)


class Brighter:
    """Adds ten levels an instruction, twice as many at guidance 9; a neutral edit adds one. A round trip changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], float | None]] = []

    def edit(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int], *, guidance: float | None = None
    ) -> list[np.ndarray]:
        self.calls.append((list(seeds), guidance))
        step = [1 if text.startswith("keep") else 20 if guidance == 9.0 else 10 for text in instructions]
        return [(image + s).astype(np.uint8) for image, s in zip(images, step, strict=True)]

    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(images)


class Light:
    """Scores by brightness; a prompt of its own cannot be scored."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        return [RowError("no score") if p == "bad" else self.sign * float(i.mean()) for i, p in zip(images, prompts, strict=True)]


def test_every_attempt_has_its_own_seed_and_guidance() -> None:
    editor = Brighter()
    stage = EditStage(editor=Of(editor), attempts=3, guidances=(5.0, 9.0))
    out = stage.build()({"source": cells([grey(50)]), "instruction": ["make it bright"], "seed": [7]})
    assert [images(out[f"attempt_{i}"])[0][0, 0, 0] for i in range(3)] == [60, 70, 60] and set(out) == set(stage.spec.outputs)
    seeds = [seeds[0] for seeds, _ in editor.calls]
    assert seeds[0] == 7 == seeds[3], "the neutral edit has the first attempt's"
    assert len(set(seeds)) == 3 and seeds[1] == attempt_seed(7, 1)
    assert json.loads(out["edited_by"][0])["attempts"] == [
        {"seed": seeds[0], "guidance": 5.0}, {"seed": seeds[1], "guidance": 9.0}, {"seed": seeds[2], "guidance": 5.0},
    ]  # fmt: skip


def test_one_attempt_is_the_edit_itself() -> None:
    stage = EditStage(editor=Of(Brighter()), other=True)
    out = stage.build()({"source": cells([grey(50)]), "other": cells([grey(9)]), "instruction": ["a"], "seed": [7]})
    assert out.keys() == {"original", "second", "neutral", "edited", "edited_by", "other_original"}
    assert images(out["other_original"])[0][0, 0, 0] == 9


def test_ranks_do_not_look_at_scales() -> None:
    scores = np.array([[1.0, 1000.0], [2.0, 3000.0], [3.0, 2000.0]])
    assert ranks(scores).tolist() == ranks(scores * [1e6, 1]).tolist()
    assert choose(scores, [True] * 3) == 1, "second and first make the same as first and second: the first of equals"
    assert choose(scores, [True, False, True]) == 2, "a failed attempt goes on only if all failed"
    assert choose(scores, [False] * 3) == 1


def attempts(levels: Sequence[float], prompts: Sequence[str], **settings: object) -> dict:
    stage = AttemptStage(**({"count": len(levels), "rewards": (("light", Of(Light())),)} | settings))  # pyright: ignore[reportArgumentType]
    told = json.dumps({"attempts": [{"seed": i, "guidance": None} for i in range(len(levels))]})
    tried = {f"attempt_{i}": cells([grey(level)] * len(prompts)) for i, level in enumerate(levels)}
    batch = {"prompt": prompts, "original": cells([grey(50)] * len(prompts)), "edited_by": [told] * len(prompts), **tried}
    out = stage.build()(batch)
    assert set(out) - {"status"} == set(stage.spec.outputs)
    return dict(out)


def test_the_best_attempt_goes_on_and_all_are_told() -> None:
    out = attempts([100, 200, 150], ["a"], check=CheckStage())
    assert out["attempt"] == [1] and images(out["edited"])[0][0, 0, 0] == 200 and out["status"] == [None]
    told = json.loads(out["attempts"][0])
    assert [one["scores"]["light"] for one in told] == [100, 200, 150] and [one["seed"] for one in told] == [0, 1, 2]
    assert all(one["change"] > 1 for one in told)


def test_an_attempt_that_fails_the_check_gives_way() -> None:
    out = attempts([51, 40, 40], ["a"], check=CheckStage(change_min=0.0))
    assert out["attempt"] == [0]
    strict = attempts([51, 10], ["a"], check=CheckStage())
    assert strict["attempt"] == [1] and json.loads(strict["attempts"][0])[0]["status"] == "drop:no_op"


def test_a_row_without_scores_is_an_error() -> None:
    out = attempts([100, 200], ["a", "bad"], check=CheckStage())
    assert out["status"] == [None, "error:attempts:no score"] and out["attempt"] == [1, 0]


class Fussy:
    """Finds fault with what is darker than 75; cannot look at black."""

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        return [RowError("black") if not i.any() else self._one(i.mean() < 75) for i in images]

    def _one(self, dark: bool) -> Critique:
        return Critique(reasoning="seen", aspects=(), issues=(), keep=(), overall=3, no_issue=not dark)


class Teller:
    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        one = Instruction(op="fix", target="it", instruction="make it brighter", addresses=(), expected_visible_change="it is bright")
        return [Instructions(instructions=(one,)) for _ in prompts]


def test_rounds_go_on_until_nothing_is_wrong() -> None:
    editor = Brighter()
    stage = RoundStage(critic=Of(Fussy()), instructor=Of(Teller()), editor=Of(editor), rounds=2)
    firsts = [grey(50), grey(60), grey(70), grey(80), grey(0)]
    batch = {"prompt": ["p"] * 5, "seed": [1, 2, 3, 4, 5], "first_edited": cells(firsts), "first_neutral": cells(firsts)}
    out = stage.build()(batch)
    assert set(out) == set(stage.spec.outputs)
    assert [image[0, 0, 0] for image in images(out["edited"])] == [70, 80, 80, 80, 0]
    assert [image[0, 0, 0] for image in images(out["neutral"])] == [52, 62, 71, 80, 0], "as often through the editor"
    assert [cell is not None for cell in out["round_1"]] == [True, True, True, False, False]
    assert [cell is not None for cell in out["round_2"]] == [True, True, False, False, False]
    told = [json.loads(text) for text in out["rounds"]]
    assert [one["instruction"] for one in told[0]] == ["make it brighter"] * 2 and told[0][0]["seed"] != told[0][1]["seed"]
    assert told[2][1]["stopped"] == "no issue" and told[3][0]["stopped"] == "no issue" and told[4] == [{"stopped": "black"}]
    assert len(editor.calls) == 4 and [len(seeds) for seeds, _ in editor.calls] == [3, 3, 2, 2]


class Sure:
    """Says of each what its brightness is, of 100; answers nothing of black."""

    def verify(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], changes: Sequence[str]) -> list[float | RowError]:
        return [RowError("dark") if not i.any() else float(i.mean()) / 100 for i in after]

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        return self.verify(second, first, prompts)

    def unsafe(self, images: Sequence[np.ndarray]) -> list[float]:
        return [float(i.mean()) / 100 for i in images]


def told(count: int) -> str:
    one = Instruction(op="fix", target="it", instruction="x", addresses=(), expected_visible_change="it is so")
    return Instructions(instructions=(one,) * count).model_dump_json()


def test_every_announced_change_must_be_seen() -> None:
    batch = {"original": cells([grey(1)] * 4), "edited": cells([grey(90), grey(40), grey(0), grey(20)])}
    out = VerifyStage(verifier=Of(Sure())).build()({**batch, "instructions": [told(2), told(1), told(1), told(0)]})
    assert out["status"] == [None, "drop:not_followed", "error:verify:dark", None]
    assert out["followed"] == [0.9, 0.4, None, 1.0], "nothing announced, nothing to see"


def test_pictures_that_should_not_be_kept_fall() -> None:
    batch = {"source": cells([grey(10), grey(80)]), "edited": cells([grey(20), grey(10)])}
    assert SafetyStage(checker=Of(Sure())).build()(batch) == {"unsafe": [0.2, 0.8], "status": [None, "drop:unsafe"]}


def test_a_comparison_without_an_answer_is_an_error() -> None:
    batch = {"prompt": ["a", "b"], "edited": cells([grey(90), grey(0)]), "neutral": cells([grey(1), grey(2)])}
    assert PairwiseStage(comparer=Of(Sure())).build()(batch) == {"prefers_edit": [0.9, None], "status": [None, "error:pairwise:dark"]}


def test_a_score_that_is_none_is_an_error_of_its_row() -> None:
    stage = ScoreStage(rewards=(("light", Of(Light())), ("endless", Of(Light(float("inf"))))), sides=("edited",))
    out = stage.build()({"prompt": ["bad", "a"], "edited": cells([grey(1), grey(2)])})
    assert out["status"] == ["error:score:no score", "error:score:endless_edited is inf"] and out["light_edited"] == [None, 2.0]
    assert json.loads(out["scored_by"][0])["light"]["model"] == "Of"


def test_settings_that_cannot_be() -> None:
    for make, word in (
        (lambda: AttemptStage(count=1, rewards=(("a", Of(Light())),)), "count"),
        (lambda: AttemptStage(count=2, rewards=()), "rewards"),
        (lambda: RoundStage(critic=Of(0), instructor=Of(0), editor=Of(0), rounds=0), "rounds"),
        (lambda: EditStage(editor=Of(0), attempts=0), "attempts"),
        (lambda: CheckStage(distance_min=0.1), "embedder"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
