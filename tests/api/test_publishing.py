"""A run as others read it: what the card says can be computed again from the published files alone."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo.cli import main
from rpo.curation.leakage import leakage
from rpo.data.hub import check_published
from rpo.data.pairs import read_pairs
from rpo.data.readers import load_pairs
from rpo.engine.layers import read_run
from tiny_diffusion import save_pipeline

RECIPE = f"{Path(__file__).parents[1] / 'fake_recipe.py'}:fake"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets.*", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["FAKE_MODEL"] = str(save_pipeline(tmp_path_factory.mktemp("model") / "tiny", pooled=True))
    folder = tmp_path_factory.mktemp("runs") / "fake"
    assert main(["curate", RECIPE, "--out", str(folder), "--curate.prompts.count", "70"]) == 0
    assert main(["export", str(folder), "--license", "cc-by-4.0"]) == 0
    return folder


def opened(run: Path, name: str, split: str) -> Any:
    import datasets

    return datasets.load_dataset(str(run / "published" / "rpo"), name, split=split, cache_dir=str(run / "cache"))


def test_every_number_of_the_card_is_computed_again(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    card = (run / "published" / "rpo" / "README.md").read_text()
    rows = [row | {"values": json.loads(row["values"])} for row in opened(run, "rows", "rows")]
    pairs = {split: opened(run, "default", split) for split in ("train", "held_out")}

    live, stages = len(rows), []
    for stage in summary["funnel"]:
        fell = Counter(row["status"].removeprefix("drop:") for row in rows if row["fell_at"] == stage["stage"])
        stages.append({"stage": stage["stage"], "rows_in": live, "kept": live - fell.total(), "dropped": dict(sorted(fell.items()))})
        live -= fell.total()
    assert stages == summary["funnel"] and live == summary["pairs_kept"]
    told = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (.*) \|$", card, flags=re.M)
    assert [(name, int(a), int(b)) for name, a, b, _ in told] == [(s["stage"], s["rows_in"], s["kept"]) for s in stages]
    for stage, (*_, why) in zip(stages, told, strict=True):
        assert sum(int(number) for number in re.findall(r" (\d+)(?:,|$)", why)) == sum(stage["dropped"].values())

    images = [[np.array(pair[side]) for split in pairs.values() for pair in split] for side in ("chosen", "rejected")]
    for reward, bias in summary["controls"]["roundtrip"].items():
        values = [[row["values"][f"{reward}_{side}"] for side in ("source", "original")] for row in rows]
        rises = [np.sign(after - before) for before, after in values if before is not None]
        assert bias["rows"] == len(rises) and bias["sign_rate"] == pytest.approx((np.mean(rises) + 1) / 2)
    order = {pair.id: number for number, pair in enumerate(read_pairs(run / "pairs.parquet"))}
    ids = [pair["id"] for split in pairs.values() for pair in split]
    as_made = np.argsort([order[name] for name in ids])
    side = json.loads((run / "recipe.json").read_text())["recipe"]["train"]["resolution"]
    found = leakage(((images[0][i], images[1][i]) for i in as_made), seed=0, side=side)
    assert (None if isinstance(found, str) else found.auc) == summary["controls"]["fingerprint_auc"]
    assert not isinstance(found, str) and f"| leakage, paired | {found.paired:.4f} (" in card
    counts = {split: len(found) for split, found in pairs.items()}
    assert f"{sum(counts.values())} preference pairs" in card and f"(train {counts['train']}, held_out {counts['held_out']})" in card
    assert f"Of {len(rows)} rows {len(rows) - live} were dropped" in card


def test_what_fell_comes_along_with_its_reason(run: Path) -> None:
    fell = opened(run, "rejected", "rejected")
    by_status = Counter(row["status"] for row in fell)
    assert by_status["drop:no_issue"] and sum(by_status.values()) == 70 - json.loads((run / "summary.json").read_text())["pairs_kept"]
    for row in fell:
        assert row["source"].size == (64, 64) and row["fell_at"]
        assert (row["edited"] is None) == (row["fell_at"] in ("critique", "instruct"))
        assert json.loads(row["values"])["prompt_source"] == "recipe fake"


def test_the_card_names_models_thresholds_and_no_path_of_this_machine(run: Path) -> None:
    card = (run / "published" / "rpo" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "| check.change\\_min | 1.0 |" in card
    assert "| source.generator | " not in card, "the fakes have no model"
    assert str(run.parent) not in card and os.environ["FAKE_MODEL"] not in card
    assert all((run / "published" / "rpo" / name).is_file() for name in re.findall(r"\]\((examples/[^)]+)\)", card))


def test_what_was_published_trains_and_is_what_was_made(run: Path) -> None:
    published, dropped = load_pairs(run / "published" / "rpo")
    made = read_pairs(run / "pairs.parquet")
    assert sorted(pair.id for pair in published) == sorted(pair.id for pair in made) and not dropped
    assert {pair.id: pair for pair in published} == {pair.id: pair for pair in made}


@pytest.mark.parametrize("layout", ["pickapic", "jsonl", "folders", "webdataset", "diffusers"])
def test_other_formats(run: Path, tmp_path: Path, layout: str) -> None:
    assert main(["export", str(run), "--format", layout, "--to", str(tmp_path / layout)]) == 0
    check_published(tmp_path / layout)
    assert "preference pairs" in (tmp_path / layout / "README.md").read_text()
    if layout in ("pickapic", "diffusers"):
        import datasets

        splits = datasets.load_dataset(str(tmp_path / layout), cache_dir=str(tmp_path / "cache"))
        counts = Counter(pair.split for pair in read_pairs(run / "pairs.parquet"))
        assert {name: len(rows) for name, rows in splits.items()} == counts


def test_published_pairs_are_sources(run: Path, tmp_path: Path) -> None:
    sources = run / "published" / "rpo"
    assert main(["curate", RECIPE, "--sources", str(sources), "--edit-side", "both", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    pairs = read_pairs(run / "pairs.parquet")
    trained = sum(pair.split == "train" for pair in pairs)
    assert summary["funnel"][0]["rows_in"] == 2 * len(pairs) and summary["funnel"][0]["kept"] == 2 * trained
    assert summary["funnel"][1]["dropped"]["no_issue"], "the better image of a pair is often right"
    sides = read_run(tmp_path / "run", ["source", "other", "source_side"]).to_pylist()
    known = {frozenset((pair.chosen.read(), pair.rejected.read())) for pair in pairs if pair.split == "train"}
    assert {frozenset((row["source"]["bytes"], row["other"]["bytes"])) for row in sides if row["source"]} == known
    assert main(["curate", RECIPE, "--sources", str(sources), "--prompts", "x.txt", "--out", str(tmp_path / "other")]) == 2


def test_wrong_input_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(run)]) == 1
    assert "replace it by --overwrite" in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(run), "--overwrite", "--license", "cc-by-4.0"]) == 0
    assert main(["export", str(tmp_path / "nothing")]) == 1
    assert "rpo curate" in " ".join(capsys.readouterr().err.split())
    assert main(["push", str(run), "--to", "me/pairs", "--license", "mit"]) == 2
    assert "--license mit --overwrite" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(run), "--to", "me/pairs"]) == 1
    assert "hf auth login" in " ".join(capsys.readouterr().err.split())


def test_a_card_is_no_place_for_markup_of_strangers() -> None:
    from rpo.data.card import _plain

    assert _plain("<script>x</script> [a](http://b) `c` | d\n# e") == r"&lt;script&gt;x&lt;/script&gt; \[a\]\(http://b\) \`c\` \| d \# e"


def test_licences_are_read_where_the_model_lies(tmp_path: Path) -> None:
    from rpo.data.card import NOT_STATED, licence_of
    from rpo.shapes.weights import weights_folder

    assert licence_of(str(tmp_path)) == NOT_STATED and licence_of("nobody/nothing") == NOT_STATED
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\nlicense: mit\n")
    assert licence_of(str(tmp_path)) == "openrail++"
    assert licence_of(str(weights_folder() / "base")) == "Apache-2.0", "the embedded models have one card together"
