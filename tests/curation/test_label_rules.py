"""Label rules as functions of scores, and labels that do not depend on how the rows were cut or ordered."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rpo.core.parquet import IMAGE
from rpo.core.run_folder import open_run
from rpo.curation.label_rules import Measured, decide, lower_bound, measure
from rpo.curation.select import mixed, select_pairs, widest
from rpo.curation.stages.label import Combination, LabelStage, with_noise_floors
from rpo.data.images import EncodedImage, encode_png, image_cell
from rpo.data.pairs import Pair
from rpo.engine.layers import read_run
from rpo.engine.local import run_stages
from rpo.engine.stage import Batch, StageCall, StageSpec, plan

MARGINS = np.array([[3.0, 3.0], [3.0, 0.2], [3.0, -3.0], [-3.0, -3.0], [0.2, 0.2]])
MEASURED = Measured(floors=(1.0, 1.0), spreads=(1.0, 2.0), mean_floor=0.4)
IDS = [f"{i:016x}" for i in range(5)]


def by(rule: str, **changes: object) -> list[float]:
    settings: dict = {"votes_min": 2, "by": 0, "kappa": 1.0, "preferences": None} | changes
    return decide(rule, IDS, MARGINS, MEASURED, **settings).tolist()  # pyright: ignore[reportArgumentType]


def test_each_rule_says_who_wins() -> None:
    assert by("vote") == [1, 0, 0, -1, 0]
    assert by("vote", votes_min=1) == [1, 1, 0, -1, 0], "one vote is enough unless another contradicts"
    assert by("single") == [1, 1, 1, -1, 0] and by("single", by=1) == [1, 0, -1, -1, 0]
    # In units: (3, 1.5), (3, .1), (3, -1.5), (-3, -1.5), (.2, .1)
    assert by("mean") == [1, 1, 1, -1, 0]
    # mean - spread: 2.25 - .75, 1.55 - 1.45, .75 - 2.25, ...
    assert by("conservative") == [1, 0, 0, -1, 0] and by("conservative", kappa=0.0) == by("mean")
    assert by("pairwise", preferences=np.array([0.9, 0.2, 0.5, 0.51, 0.0])) == [1, -1, 0, 1, -1]
    assert by("trust_edit") == [1] * 5 and set(by("random")) <= {1, -1}


def test_the_lower_bound_is_mean_less_spread() -> None:
    units = np.array([[3.0, 1.5], [-3.0, -1.5], [3.0, -1.5]])
    assert lower_bound(units, 2.0) == pytest.approx([2.25 - 2 * 0.75, 2.25 - 2 * 0.75, 0.75 - 2 * 2.25])


def test_measures_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    source, original, opponent = rng.normal(size=(3, 1000, 2)) * 10.0 ** rng.integers(-6, 6, (3, 1000, 2))
    turned = rng.permutation(1000)
    assert measure(source, original, opponent, opponent) == measure(source[turned], original[turned], opponent[turned], opponent[turned]), (
        "to the last bit"
    )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Stands for all stages before the label: images and scores that depend on the row alone."""

    batch_size: int = 3
    workers: int = 1

    @property
    def spec(self) -> StageSpec:
        scores = [f"{reward}_{side}" for reward in ("a", "b") for side in (*SIDES, "other_original")]
        images = dict.fromkeys(("edited", "neutral", "other_original"), IMAGE)
        texts = {name: pa.string() for name in ("critique", "instruction", "edited_by", "scored_by")}
        outputs = images | texts | {name: pa.float64() for name in scores} | {"prefers_edit": pa.float64()}
        return StageSpec(
            name="scored", version="1", inputs=("id", "seed"), outputs=outputs, batch_size=self.batch_size, workers=self.workers
        )

    def build(self) -> StageCall:
        def run(batch: Batch) -> Batch:
            rows = [np.random.default_rng(int(str(row), 16)) for row in batch["id"]]
            columns: dict[str, list] = {name: [] for name in self.spec.outputs}
            for rng in rows:
                noise = rng.normal(size=20)
                for k, reward in enumerate("ab"):
                    source = noise[k]
                    for j, (side, value) in enumerate(
                        {
                            "source": source, "original": source + 0.1 * noise[4 + k], "second": source + 0.1 * noise[13 + k],
                            "neutral": source + 0.1 * noise[6 + k],
                            "edited": source + noise[8] + 0.5 * noise[9 + k], "other_original": source + noise[11 + k],
                        }.items()
                    ):  # fmt: skip
                        columns[f"{reward}_{side}"].append(float(value) * (10 if k else 1) + j * 0)
                picture = [image_cell(encode_png(np.full((8, 8, 3), rng.integers(256), dtype=np.uint8))) for _ in range(3)]
                for name, cell in zip(("edited", "neutral", "other_original"), picture, strict=True):
                    columns[name].append(cell)
                for name in ("critique", "edited_by", "scored_by"):
                    columns[name].append("{}")
                columns["instruction"].append("make it red")
                columns["prefers_edit"].append(float(rng.random()))
            return columns

        return run


SIDES = ("source", "original", "second", "neutral", "edited")


def pairs_of(folder: Path, label: LabelStage, prompts: list[str], shard_rows: int = 8, **scored: int) -> dict[str, tuple]:
    rows = plan(({"prompt": prompt} for prompt in prompts), seed=3)
    stages = (Scored(**scored), label)
    with open_run(folder) as run:
        ready = with_noise_floors(stages, run.path, rows, shard_rows=shard_rows)
        if ready is None:
            run_stages(run, rows, stages[:-1], shard_rows=shard_rows)
            ready = with_noise_floors(stages, run.path, rows, shard_rows=shard_rows)
        assert ready is not None
        run_stages(run, rows, ready, shard_rows=shard_rows)
    return {p.id: (p.chosen.read(), p.rejected.read(), p.gap, p.weight, p.split, p.scores) for p in select_pairs(folder, label)}


PROMPTS = [f"prompt {i}" for i in range(40)]


@pytest.mark.parametrize("rule", ["vote", "single", "mean", "conservative", "pairwise", "trust_edit", "random"])
def test_labels_are_the_same_however_rows_are_cut_and_ordered(tmp_path: Path, rule: str) -> None:
    combinations = ("source",) if rule == "pairwise" else ("source", "other")
    label = LabelStage(rewards=("a", "b"), rule=rule, weighted=True, combinations=combinations)  # pyright: ignore[reportArgumentType]
    once = pairs_of(tmp_path / "once", label, PROMPTS)
    assert len(once) > 10
    assert pairs_of(tmp_path / "other", label, PROMPTS[::-1], shard_rows=13, batch_size=5, workers=2) == once


def test_the_source_after_its_round_trip_can_be_the_other_side(tmp_path: Path) -> None:
    label = LabelStage(rewards=("a", "b"), rule="mean", rejected_side="original")
    stages = (Scored(), label)
    rows = plan(({"prompt": prompt} for prompt in PROMPTS), seed=3)
    with open_run(tmp_path / "run") as run:
        run_stages(run, rows, stages[:-1])
        ready = with_noise_floors(stages, run.path, rows)
        assert ready is not None
        run_stages(run, rows, ready)
    sides = set(read_run(tmp_path / "run", ["chosen_side"]).column("chosen_side").to_pylist())
    assert sides == {"edited", "original", None}


def test_the_run_says_how_labels_were_measured(tmp_path: Path) -> None:
    label = LabelStage(rewards=("a", "b"), by="b", rule="single")
    pairs_of(tmp_path / "run", label, PROMPTS)
    (file,) = tmp_path.glob("run/2_label-*/stage.json")
    measured = json.loads(file.read_text())["recipe"]["config"]["fields"]["measured"]["fields"]
    table = read_run(tmp_path / "run", ["b_original", "b_second", "b_neutral"]).to_pydict()
    spreads = [(np.array(table[name]) - np.array(table["b_original"])).std(ddof=1) for name in ("b_second", "b_neutral")]
    assert measured["floors"][1] == pytest.approx(1.96 * max(spreads))


@pytest.mark.parametrize("combination", ["source", "other"])
def test_what_an_edit_is_held_against(tmp_path: Path, combination: Combination) -> None:
    label = LabelStage(rewards=("a", "b"), rule="trust_edit", combinations=(combination,))
    pairs_of(tmp_path / "run", label, PROMPTS[:4])
    columns = ["edited", "neutral", "other_original"]
    images = {row["id"]: {name: row[name]["bytes"] for name in columns} for row in read_run(tmp_path / "run", columns).to_pylist()}
    opponent = "neutral" if combination == "source" else "other_original"
    for pair in select_pairs(tmp_path / "run", label):
        row = images[pair.id.removesuffix("-other")]
        assert (pair.chosen.read(), pair.rejected.read()) == (row["edited"], row[opponent])


def test_floors_of_the_run_are_measured_first() -> None:
    with pytest.raises(ValueError, match="measured over the run"):
        LabelStage(rewards=("a",), rule="mean").build()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"rewards": ()}, "rewards"), ({"by": "c"}, "by must be"), ({"kappa": -1.0}, "kappa"), ({"combinations": ()}, "combinations"),
        ({"votes_min": 3}, "votes_min"), ({"projected": True, "combinations": ("other",)}, "projected"),
        ({"rule": "pairwise", "combinations": ("other",)}, "pairwise"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(wrong: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LabelStage(**({"rewards": ("a", "b"), "rule": "vote"} | wrong))


def pair(name: str, prompt: str, gap: float) -> Pair:
    picture = EncodedImage.of(encode_png(np.zeros((2, 2, 3), dtype=np.uint8)))
    told = {"critique": "{}", "instruction": "", "scores": "{}", "provenance": "{}"}
    return Pair(id=name, prompt=prompt, chosen=picture, rejected=picture, gap=gap, split="train", **told)


def test_a_prompt_keeps_its_widest_pairs() -> None:
    pairs = [pair("a", "x", 1.0), pair("b", "x", 3.0), pair("c", "y", 0.5), pair("d", "x", 2.0)]
    assert widest(pairs, 2) == {"b", "c", "d"} and widest(pairs, 1) == {"b", "c"}
    assert widest(pairs[::-1], 2) == {"d", "c", "b"}


def test_human_pairs_are_mixed_in_by_ratio() -> None:
    ours, human = [pair(f"o{i}", "x", 1.0) for i in range(30)], [pair(f"h{i}", "y", 1.0) for i in range(100)]
    for share, expected in ((0.25, 10), (0.5, 30), (0.9, 100)):
        both = list(mixed(ours, human, share))
        assert both[:30] == ours and len(both) - 30 == expected
    drawn = [[pair.id for pair in mixed(ours, order, 0.25)][len(ours) :] for order in (human, human[::-1])]
    assert drawn[0] == drawn[1][::-1], "the same whatever their order, and in the order of their file"
    assert len(list(mixed(ours, ours, 0.5))) == 30, "none comes twice"
    with pytest.raises(ValueError, match="share"):
        list(mixed(ours, human, 1.0))
