"""The funnel of words and the rows as they are shown, of a run that is finished and of one that is not."""

from pathlib import Path

import pytest

from rpo.backends.chat.openai import hang_up
from rpo.curation.critiques import words
from rpo.engine.inspect import row_lines, stage_rows
from rpo.engine.layers import stored_layers
from rpo.testing.server import FakeServer
from vlm_pipeline import answer, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "run"
    with FakeServer(answer) as server:
        main(str(folder), server.url, "40")
    hang_up()
    return folder


def test_words_are_counted(run: Path) -> None:
    assert words(run) == {
        "asked": 40, "parsed": 36, "no_issue": 4, "instructed": 32, "instructions": 32, "skipped": 0, "agreement": None,
        "adjustments": {"addresses dropped": 4, "region dropped": 4},
    }  # fmt: skip


def test_rows_of_a_stage_are_those_that_reached_it(run: Path) -> None:
    assert [len(list(stage_rows(run, "critique", kept))) for kept in ("all", "live", "dropped", "errors")] == [40, 32, 4, 4]
    assert len(list(stage_rows(run, "instruct"))) == 32 and len(list(stage_rows(run, "plan"))) == 40
    row = next(stage_rows(run, "instruct"))
    assert [found["id"] for found in stage_rows(run, "instruct", row_id=row["id"][:10])] == [row["id"]]
    with pytest.raises(ValueError, match="has no stage 'label'; it has plan, source, critique, instruct"):
        list(stage_rows(run, "label"))


def test_a_row_is_told_readably(run: Path) -> None:
    told = dict(row_lines(next(stage_rows(run, "critique", "live"))))
    assert told["id"].endswith("  live") and told["prompt"].startswith("picture ")
    assert "\nissues:\n  - aspect: count, severity: 2, evidence: one of" in told["critique"] and "critique_raw" not in told
    failed = dict(row_lines(next(stage_rows(run, "critique", "errors"))))
    assert "error:critique:answer not understood" in failed["id"] and failed["critique_raw"] == "I would rather not."
    assert dict(row_lines(next(stage_rows(run, "source"))))["source"].startswith("image 8x8, ")


def test_what_a_model_wrote_cannot_steer_the_terminal() -> None:
    row = {
        "id": "1",
        "status": None,
        "critique_raw": "a\x1b[2Jb\u202ec" + "x" * 3000,
        "broken": '{"a": ',
        "image": {"bytes": b"?", "path": None},
    }
    told = dict(row_lines(row))
    assert "\x1b" not in told["critique_raw"] and "\u202e" not in told["critique_raw"] and len(told["critique_raw"]) == 2001
    assert told["broken"] == '{"a": ' and told["image"].startswith("1 bytes, image refused")


def test_an_unfinished_run_shows_what_is_done(run: Path) -> None:
    layers = stored_layers(run)
    (layers[2].folder / "00004.parquet").rename(layers[2].folder / "aside")
    try:
        assert len(list(stage_rows(run, "critique"))) == 32 and len(list(stage_rows(run, "source"))) == 40
    finally:
        (layers[2].folder / "aside").rename(layers[2].folder / "00004.parquet")
