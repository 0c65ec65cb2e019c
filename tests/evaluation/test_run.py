"""Evaluation on fakes: a model is a function of (prompt, seed), a judge reads the picture's first pixel."""

import hashlib
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from rpo.core.parquet import read_shard
from rpo.data.images import decode_image
from rpo.errors import RowError, RpoError
from rpo.evaluation.judges import ScorerJudge
from rpo.evaluation.rows import read_images, read_index, read_rows, shard_seconds
from rpo.evaluation.run import evaluate
from rpo.evaluation.tasks import Task
from rpo.protocols import Metric

TASK = Task.of("held out", [f"a red star, number {i}" for i in range(50)], seeds_per_prompt=2)
DECLARED = {"good": Metric(kind="fraction"), "light": Metric(kind="score")}
PRINTS = {"base": "b1", "tuned": "t1", "eye": "e1", "nose": "n1"}


class Painter:
    """Its picture is noise of the seed; a skilled painter's first pixel is brighter. `calls` counts images."""

    def __init__(self, skill: int, stop_after: int = 10_000) -> None:
        self.skill, self.stop_after, self.calls, self.seen = skill, stop_after, 0, {}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.calls += 1
            if self.calls > self.stop_after:
                raise KeyboardInterrupt
            image = np.random.default_rng(seed).integers(0, 156, (8, 8, 3), dtype=np.uint8)
            image[0, 0] = (image[0, 0].astype(int) + self.skill).clip(0, 255)
            self.seen[prompt, seed] = hashlib.sha256(image.tobytes()).hexdigest()
            images.append(image)
        return images


class Eye:
    """`good` is 1 when the first pixel is bright; `red` applies only to every other picture."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        self.calls += len(images)
        out = []
        for image in images:
            value: dict[str, float] = {"good": float(image[0, 0, 0] > 128), "light": image[0, 0, 0] / 255}
            if image[1, 1, 0] % 2:
                value["red"] = 1.0
            out.append(value)
        return out

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([image[0, 0].astype(np.float64) for image in images])


class Nose(Eye):
    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        self.calls += len(images)
        return [{"smell": float(len(prompt))} for prompt in prompts]


def run(folder: Path, base: Painter, tuned: Painter, judges=None, prints=PRINTS, task=TASK, **more):
    models = {"base": lambda: base, "tuned": lambda: tuned}
    told = {"fingerprints": prints, "curation_prompts": ["a blue star"], "declared": DECLARED} | more
    return evaluate(task, models, built(judges or {"eye": Eye()}), folder, **told)["tuned"]


def built(judges):
    """Builders of judges that are there already."""
    return {name: lambda judge=judge: judge for name, judge in judges.items()}


def test_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    base, tuned = Painter(0), Painter(60)
    good_images = np.random.default_rng(0).normal(150, 10, (90, 8, 8, 3)).astype(np.uint8)
    result = run(tmp_path, base, tuned, references=lambda: good_images)
    rows = read_rows(tmp_path)
    assert [row.key for row in rows["base"]] == [row.key for row in rows["tuned"]] and len(rows["base"]) == 100
    for model in ("base", "tuned"):
        assert result["good"][model] == pytest.approx(np.mean([row.metrics["good"] for row in rows[model]]))
    good = result["good"]
    assert good["n"] == 50 and good["ci95"][0] < good["difference"] < good["ci95"][1]
    assert result["light"]["difference"] == pytest.approx(60 / 255) and result["light"]["win_rate"] == 1.0
    assert 0 < result["red"]["n"] <= 50 and result["red"]["difference"] == 0
    assert result["frechet"]["tuned"] < result["frechet"]["base"]
    assert result["drift"]["base"] == 0 < result["drift"]["tuned"] == result["drift"]["difference"]
    assert read_index(tmp_path)["metrics"] == {"tuned": result}
    json.dumps(result, allow_nan=False)


def test_base_and_tuned_share_noise_whatever_the_batch(tmp_path: Path) -> None:
    painters = [Painter(0) for _ in range(4)]
    run(tmp_path / "a", painters[0], painters[1], batch_size=7)
    backwards = Task.of("held out", [text for _, text in TASK.prompts][::-1], seeds_per_prompt=2)
    run(tmp_path / "b", painters[2], painters[3], batch_size=64, task=backwards)
    assert all(painter.seen == painters[0].seen for painter in painters)
    assert len({seed for _, seed in painters[0].seen}) == 100


def test_killed_evaluation_goes_on_without_redoing_finished_shards(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Painter(0), Painter(60))
    base, tuned, eye = Painter(0), Painter(60, stop_after=80), Eye()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", base, tuned, {"eye": eye})
    assert base.calls == 100 and eye.calls == 0 and read_index(tmp_path / "killed") is None
    again, judge, told = Painter(60), Eye(), []
    unused = Painter(0, stop_after=0)
    result = run(tmp_path / "killed", unused, again, {"eye": judge}, progress=lambda *step: told.append(step))
    assert result == whole
    assert (unused.calls, again.calls, judge.calls) == (0, 50, 200)  # the second model's first shard of 50 stood
    assert told[0] == ("base: images", 50, 100) and told[-1] == ("tuned: eye", 100, 100)
    files = [
        {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.parquet"))} for root in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert files[0] == files[1]


def test_a_retrained_model_is_not_mixed_with_old_rows(tmp_path: Path) -> None:
    old = run(tmp_path, Painter(0), Painter(0))
    retrained, base = Painter(90), Painter(0, stop_after=0)
    new = run(tmp_path, base, retrained, prints=PRINTS | {"tuned": "t2"})
    assert retrained.calls == 100 and new["light"]["difference"] > old["light"]["difference"] == 0
    assert {row.metrics["light"] for row in read_rows(tmp_path)["tuned"]} != {row.metrics["light"] for row in read_rows(tmp_path)["base"]}


def test_another_judge_costs_no_image(tmp_path: Path) -> None:
    run(tmp_path, Painter(0), Painter(60))
    none, eye, nose = Painter(0, stop_after=0), Eye(), Nose()
    result = run(tmp_path, none, none, {"eye": eye, "nose": nose})
    assert (none.calls, eye.calls, nose.calls) == (0, 0, 200) and {"good", "smell"} <= set(result)
    with pytest.raises(RpoError, match="'good' comes from more than one"):
        run(tmp_path, none, none, {"eye": eye, "nose": Eye()}, prints=PRINTS | {"nose": "n2"})


def test_another_model_or_seed_costs_nothing_but_itself(tmp_path: Path) -> None:
    once = Task.of("held out", [text for _, text in TASK.prompts])
    run(tmp_path, Painter(0), Painter(60), task=once)
    base, tuned, broken, eye = Painter(0), Painter(60), Painter(-40), Eye()
    models = {"base": lambda: base, "tuned": lambda: tuned, "broken": lambda: broken}
    prints = PRINTS | {"broken": "x1"}
    result = evaluate(once, models, built({"eye": eye}), tmp_path, fingerprints=prints, curation_prompts=[])
    assert (base.calls, tuned.calls, broken.calls, eye.calls) == (0, 0, 50, 50)
    assert result["broken"]["light"]["difference"] < 0 < result["tuned"]["light"]["difference"]
    assert result["broken"]["light"]["win_rate"] < 0.05 and result["broken"]["light"]["p_holm"] < 1e-6
    both = evaluate(TASK, models, built({"eye": eye}), tmp_path, fingerprints=prints, curation_prompts=[])
    assert (base.calls, tuned.calls, broken.calls) == (50, 50, 100)
    assert both == evaluate(TASK, models, built({"eye": Eye()}), tmp_path / "anew", fingerprints=prints, curation_prompts=[])
    fewer = evaluate(once, models, built({"eye": Eye()}), tmp_path, fingerprints=prints, curation_prompts=[])
    assert fewer == result and (base.calls, tuned.calls, broken.calls) == (150, 150, 200), "of which the folder anew took 100 each"


def test_the_numbers_can_be_computed_from_the_published_rows(tmp_path: Path) -> None:
    """With nothing but numpy and scipy."""
    kinds = {text: "even" if int(text.split()[-1]) % 2 == 0 else "odd" for _, text in TASK.prompts}
    task = Task.of("held out", kinds, seeds_per_prompt=2, categories=kinds)
    result = run(tmp_path, Painter(0), Painter(30), task=task)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.num_rows == 200
    columns = {name: np.array(table[name].to_pylist()) for name in ("model", "prompt_id", "category", "seed_index", "light")}

    def means(model: str, kind: str | None = None) -> np.ndarray:
        rows = (columns["model"] == model) & (np.isin(columns["category"], [kind]) if kind else True)
        return np.array([columns["light"][rows & (columns["prompt_id"] == p)].mean() for p in np.unique(columns["prompt_id"][rows])])

    before, after = means("base"), means("tuned")
    light = result["light"]
    assert light["base"] == pytest.approx(before.mean()) and light["difference"] == pytest.approx((after - before).mean())
    assert light["p_value"] == pytest.approx(scipy.stats.wilcoxon(after - before, zero_method="pratt").pvalue)
    exact = scipy.stats.bootstrap((after - before,), np.mean, method="percentile", rng=1).confidence_interval
    assert light["ci95"] == pytest.approx(list(exact), abs=2e-3)
    for kind in ("even", "odd"):
        own = light["categories"][kind]
        assert own["n"] == 25 and own["difference"] == pytest.approx((means("tuned", kind) - means("base", kind)).mean())


def test_images_that_lie_apart_are_diverse(tmp_path: Path) -> None:
    class Stamp(Painter):
        def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
            return super().generate(prompts, [len(prompt) for prompt in prompts])

    result = run(tmp_path, Painter(0), Stamp(0))
    assert result["diversity"]["tuned"] == 0 < result["diversity"]["base"] and result["diversity"]["ci95"][1] < 0
    assert result["diversity"]["n"] == 50


def test_what_chose_the_pairs_is_no_evidence(tmp_path: Path) -> None:
    judges = {"eye": Eye(), "taste": ScorerJudge("taste", Taste())}
    result = run(tmp_path, Painter(0), Painter(60), judges, PRINTS | {"taste": "x"}, labelled_by=["taste", "elsewhere"])
    assert [name for name, value in result.items() if value.get("used_in_labelling")] == ["taste"]
    table = (tmp_path / "table.md").read_text()
    assert "| taste † |" in table and "† taste chose the training pairs or took part" in table and "| good |" in table
    assert table.index("| good |") < table.index("| taste † |")


class Preference:
    """Prefers the brighter first pixel by how much brighter it is; black is refused."""

    def __init__(self, refuses: bool = False) -> None:
        self.calls, self.refuses = 0, refuses

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        self.calls += len(first)
        light = [float(a[0, 0, 0]) - float(b[0, 0, 0]) for a, b in zip(first, second, strict=True)]
        return [
            RowError("refused") if self.refuses or "number 7" in prompt else 0.5 + d / 510 for d, prompt in zip(light, prompts, strict=True)
        ]


def test_a_comparer_says_which_of_two_images_is_better(tmp_path: Path) -> None:
    base, tuned, comparer = Painter(0), Painter(51), Preference()
    prints = PRINTS | {"taste": "p1"}
    result = run(tmp_path, base, tuned, prints=prints, judges={"eye": Eye(), "taste": comparer})["taste"]
    assert result["tuned"] == pytest.approx(0.6) and result["base"] == pytest.approx(0.4) and result["win_rate"] == 1.0
    assert result["n"] == 49 and comparer.calls == 100
    rows = read_rows(tmp_path)
    assert sum("taste" in row.metrics for row in rows["tuned"]) == 98 and not any("taste" in row.metrics for row in rows["base"])
    assert run(tmp_path, base, tuned, prints=prints, judges={"eye": Eye(), "taste": comparer})["taste"] == result and comparer.calls == 100
    worse = run(tmp_path, base, Painter(0), prints=prints | {"tuned": "t2"}, judges={"eye": Eye(), "taste": comparer})["taste"]
    assert worse["difference"] == 0 and worse["win_rate"] == 0.5 and comparer.calls == 200  # another model, so compared anew
    assert "| taste |" in (tmp_path / "table.md").read_text()


def test_a_comparer_that_mostly_refuses_stops_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="taste gave no answer to 16 of 16 questions; the first: refused"):
        run(tmp_path, Painter(0), Painter(51), prints=PRINTS | {"taste": "p1"}, judges={"eye": Eye(), "taste": Preference(refuses=True)})


class Taste:
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [float(image.mean()) for image in images]


def test_overlap_is_counted_where_it_is_allowed(tmp_path: Path) -> None:
    seen = ["A red star number 7", "a red star, number 8"]
    with pytest.raises(RpoError, match=r"2 of 50 evaluation prompts.*--allow-overlap"):
        run(tmp_path, Painter(0), Painter(60), curation_prompts=seen)
    run(tmp_path, Painter(0), Painter(60), curation_prompts=seen, allow_overlap=True)
    assert read_index(tmp_path)["curation_prompts"] == {"compared": 2, "shared": 2, "exact": 1, "near": 1}
    assert "Of 2 prompts of the curation 1 are among these word for word, 1 nearly." in (tmp_path / "table.md").read_text()


def test_images_come_back_as_they_were_painted(tmp_path: Path) -> None:
    base = Painter(0)
    run(tmp_path, base, Painter(60))
    places = {(p.prompt_id, p.seed_index): p for p in TASK.places()}
    wanted = list(places)[60:70]
    images = read_images(tmp_path, "base", wanted)
    assert set(images) == set(wanted)
    for key, encoded in images.items():
        place = places[key]
        assert hashlib.sha256(decode_image(encoded).tobytes()).hexdigest() == base.seen[place.prompt, place.seed]
    assert read_images(tmp_path / "nothing", "base", wanted) == {} and read_rows(tmp_path / "nothing") == {}


def test_prompts_of_the_curation_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    painter = Painter(0)
    with pytest.raises(RpoError, match="1 of 50 evaluation prompts"):
        evaluate(
            TASK, {"base": lambda: painter, "tuned": lambda: painter}, built({"eye": Eye()}), tmp_path,
            fingerprints=PRINTS, curation_prompts=["A red star number 7"],
        )  # fmt: skip
    assert painter.calls == 0 and not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named_and_redone_after_deletion(tmp_path: Path) -> None:
    result = run(tmp_path, Painter(0), Painter(60))
    shard = next(tmp_path.glob("images-tuned-*/00001.parquet"))
    data = bytearray(shard.read_bytes())
    data[-200] ^= 0xFF
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(RpoError, match=r"00001.parquet is damaged"):
        run(tmp_path, Painter(0), Painter(60))
    shard.unlink()
    with pytest.raises(RpoError, match="50 of 100 rows"):
        read_rows(tmp_path)
    tuned, eye = Painter(60), Eye()
    assert run(tmp_path, Painter(0), tuned, {"eye": eye}) == result
    assert (tuned.calls, eye.calls) == (50, 0)  # the images came out the same, so the rows stand


def test_rows_of_images_that_changed_are_measured_again(tmp_path: Path) -> None:
    run(tmp_path, Painter(0), Painter(60))
    shard = next(tmp_path.glob("images-tuned-*/00001.parquet"))
    shard.unlink()
    eye = Eye()
    run(tmp_path, Painter(0), Painter(80), {"eye": eye})
    assert eye.calls == 50


def test_images_are_stored_for_datasets(tmp_path: Path) -> None:
    run(tmp_path, Painter(0), Painter(60))
    table = read_shard(next(tmp_path.glob("images-base-*/00000.parquet")))
    assert table.column_names == ["prompt_id", "prompt", "seed_index", "seed", "image"] and table.num_rows == 50
    assert table["image"][0].as_py()["bytes"].startswith(b"\x89PNG")


def test_a_measure_that_is_no_number_names_the_judge_and_the_prompt(tmp_path: Path) -> None:
    class Blind(Eye):
        def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
            return [{"good": float("nan")} for _ in images]

    with pytest.raises(RpoError, match=r"Blind gave good=nan for prompt 'a red star, number 0'"):
        run(tmp_path, Painter(0), Painter(60), {"eye": Blind()})


@pytest.mark.parametrize(("match", "change"), [
    ("models must be at least two", {"models": {"base": lambda: Painter(0)}}),
    ("models: '../x' is no name", {"models": {"base": lambda: Painter(0), "../x": lambda: Painter(0)}}),
    ("at least one judge", {"judges": {}}),
    ("judges: '../eye' is no name", {"judges": built({"../eye": Eye()})}),
    ("judges: 'base' is no name", {"judges": built({"base": Eye()})}),
    ("which weights tuned", {"fingerprints": {"base": "b", "eye": "e"}}),
    ("batch_size", {"batch_size": 0}),
    ("models: 'n' is no name", {"models": {"base": lambda: Painter(0), "n": lambda: Painter(0)}}),
])  # fmt: skip
def test_wrong_arguments_are_refused(tmp_path: Path, match: str, change: dict) -> None:
    arguments = {
        "models": {"base": lambda: Painter(0), "tuned": lambda: Painter(0)}, "judges": built({"eye": Eye()}), "fingerprints": PRINTS,
        "batch_size": 4, "curation_prompts": [],
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=match):
        evaluate(TASK, folder=tmp_path, **arguments)


class Blind(Eye):
    """Measures, and has no features."""

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        return [{"dull": float(image[2, 2, 0])} for image in images]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), 0))


def test_drift_and_diversity_come_from_the_first_judge_with_features(tmp_path: Path) -> None:
    prints = PRINTS | {"blind": "x"}
    good_images = lambda: np.full((20, 8, 8, 3), 150, dtype=np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None]  # noqa: E731
    judges = {"blind": Blind(), "eye": Eye()}
    result = run(tmp_path, Painter(0), Painter(60), judges, prints, references=good_images)
    assert result["drift"]["tuned"] > 0 and {result[name]["judge"] for name in ("drift", "diversity", "frechet")} == {"eye"}
    alone = run(tmp_path / "eye", Painter(0), Painter(60), references=good_images)
    assert [alone[name] for name in ("drift", "frechet")] == [result[name] for name in ("drift", "frechet")]
    assert "drift" not in run(tmp_path / "blind", Painter(0), Painter(60), {"blind": Blind()}, prints)
    assert "drift: on the features of `eye`." in (tmp_path / "table.md").read_text()


def test_kinds_are_as_declared_and_never_guessed(tmp_path: Path) -> None:
    result = run(tmp_path, Painter(0), Painter(60))
    assert {name: result[name]["kind"] for name in ("good", "light", "red", "drift")} == {
        "good": "fraction", "light": "score", "red": "score", "drift": "distance",
    }  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert f"| {100 * result['good']['base']:.1f} % |" in table and f"| {result['light']['base']:.3f} |" in table


def test_fewer_wins_where_lower_is_better(tmp_path: Path) -> None:
    declared = {"light": Metric(kind="distance", better="lower")}
    result = run(tmp_path, Painter(0), Painter(60), declared=declared)["light"]
    assert result["difference"] > 0 and result["win_rate"] == 0.0 and result["win_ci95"] == [0.0, 0.0]


def test_models_keep_their_names(tmp_path: Path) -> None:
    models = {"theirs": lambda: Painter(0), "mine": lambda: Painter(60)}
    prints = {"theirs": "a", "mine": "b", "eye": "e"}
    kinds = {text: "one" for _, text in TASK.prompts}
    task = Task.of("held out", kinds, categories=kinds)
    result = evaluate(task, models, built({"eye": Eye()}), tmp_path, fingerprints=prints, curation_prompts=[])
    light = result["mine"]["light"]
    assert light["mine"] - light["theirs"] == pytest.approx(light["difference"]) and not {"base", "tuned"} & light.keys()
    assert light["categories"]["one"]["mine"] == light["mine"]


def test_the_headline_is_on_top_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Painter(0), Painter(60), headline="light")
    table = (tmp_path / "table.md").read_text()
    assert read_index(tmp_path)["headline"] == "light" and table.index("| light |") < table.index("| good |")
    with pytest.raises(ValueError, match="headline is 'lihgt', which no judge or scorer measures; its metrics are good, light, red"):
        run(tmp_path / "other", Painter(0), Painter(60), headline="lihgt", declared={})


def test_few_prompts_are_said_to_be_few(tmp_path: Path) -> None:
    few = Task.of("few", [text for _, text in TASK.prompts[:5]])
    result = run(tmp_path, Painter(0), Painter(60), task=few)
    assert result["good"]["interval"] == "t" and "Fewer than 30 prompts" in (tmp_path / "table.md").read_text()
    one = run(tmp_path / "one", Painter(0), Painter(60), task=Task.of("one", [TASK.prompts[0][1]]))
    assert one["good"]["ci95"] is None and one["good"]["interval"] is None and json.dumps(one, allow_nan=False)
    assert "there is none" in (tmp_path / "one" / "table.md").read_text()


def test_one_judge_or_model_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []
    most: list[int] = []

    class Counted(Eye):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            alive.append(name)
            most.append(len(alive))
            weakref.finalize(self, alive.remove, name)

    class CountedPainter(Painter):
        def __init__(self, skill: int) -> None:
            super().__init__(skill)
            alive.append("painter")
            most.append(len(alive))
            weakref.finalize(self, alive.remove, "painter")

    class CountedNose(Counted, Nose):
        pass

    judges = {"eye": lambda: Counted("eye"), "nose": lambda: CountedNose("nose")}
    models = {"base": lambda: CountedPainter(0), "tuned": lambda: CountedPainter(60)}
    evaluate(TASK, models, judges, tmp_path, fingerprints=PRINTS, curation_prompts=[])
    assert most == [1, 1, 1, 1] and alive == []


def test_the_time_of_an_evaluation_is_that_of_its_own_shards_over_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Painter(0), Painter(9, stop_after=60))
    run(tmp_path, Painter(0), Painter(9))
    first, known = shard_seconds(tmp_path)
    assert known and first == 8.0, "four shards of images, four of measures, a second each"
    run(tmp_path, Painter(0), Painter(9))
    assert shard_seconds(tmp_path) == (8.0, True), "nothing left to do"
    run(tmp_path, Painter(0), Painter(20), prints=PRINTS | {"tuned": "t2"})
    assert shard_seconds(tmp_path) == (8.0, True), "another model in the place of the last"
    run(tmp_path, Painter(0), Painter(20), prints=PRINTS | {"tuned": "t2"}, judges={"eye": Eye(), "nose": Nose()})
    assert shard_seconds(tmp_path) == (12.0, True)
    (tmp_path / "seconds.jsonl").unlink()
    run(tmp_path, Painter(0), Painter(20), prints=PRINTS | {"tuned": "t2"})
    assert shard_seconds(tmp_path) == (0, False), "made by an earlier version"
