"""The curation as the page shows it, from a run folder made by a stage that stands for all before it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_run import HOSTILE
from test_page import Outline

from rpo.api.folder import update_summary
from rpo.core.parquet import IMAGE
from rpo.core.run_folder import open_run
from rpo.data.images import encode_png, image_cell
from rpo.engine.local import run_stages
from rpo.engine.stage import Batch, StageCall, StageSpec, plan
from rpo.report.curation import changed_boxes, curated
from rpo.report.figures import histogram
from rpo.report.page import write_report

SIDE = 64
IMAGES = ("source", "original", "edited", "neutral", "attempt_0", "attempt_1")


def blank() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)


def dotted(level: int = 250) -> np.ndarray:
    image = blank()
    image[8:24, 32:56] = level
    return image


@dataclass(frozen=True, kw_only=True)
class Curation:
    """Row i of ten: the third falls, the fourth is an error; reward a likes every edit, b the even ones."""

    @property
    def spec(self) -> StageSpec:
        outputs: dict = dict.fromkeys(IMAGES, IMAGE)
        outputs |= {f"{reward}_{side}": pa.float64() for reward in "ab" for side in ("source", "original", "edited", "neutral")}
        outputs |= {
            "edited_by": pa.string(),
            "attempts": pa.string(),
            "attempt": pa.int32(),
            "instruction": pa.string(),
            "change_fraction": pa.float64(),
        }
        return StageSpec(name="all", version="1", inputs=("prompt",), outputs=outputs, batch_size=64)

    def build(self) -> StageCall:
        def run(batch: Batch) -> Batch:
            rows = range(len(batch["prompt"]))
            plain, changed = image_cell(encode_png(blank())), image_cell(encode_png(dotted()))
            told = [{"seed": 1, "guidance": 3.0, "status": "drop:no_op", "scores": {"a": 0.5}}, {"scores": {"a": 2.5}}]
            columns: dict[str, list] = {name: [plain if name in ("source", "original") else changed for _ in rows] for name in IMAGES}
            for k, reward in enumerate("ab"):
                liked = [1.0 if k == 0 or row % 2 == 0 else -1.0 for row in rows]
                columns |= {f"{reward}_source": [0.0 for _ in rows], f"{reward}_original": [0.1 for _ in rows]}
                columns |= {f"{reward}_edited": liked, f"{reward}_neutral": [0.0 for _ in rows]}
            columns |= {"attempts": [json.dumps(told) for _ in rows], "attempt": [1 for _ in rows]}
            columns |= {"edited_by": [json.dumps({"second": f"JPEG 90, {HOSTILE}"}) for _ in rows]}
            columns |= {"instruction": [HOSTILE for _ in rows], "change_fraction": [0.25 for _ in rows]}
            status = {2: "drop:no_op", 3: "error:score:no answer"}
            return {**columns, "status": [status.get(row) for row in rows]}

        return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "made"
    with open_run(folder) as opened:
        run_stages(opened, plan(({"prompt": f"{i} {HOSTILE}"} for i in range(10)), seed=0), [Curation()])
        update_summary(folder, {"pairs_kept": 8}, {})
    return folder


def test_what_changed_is_framed() -> None:
    (box,) = changed_boxes(encode_png(blank()), encode_png(dotted()))
    reach = 3 / SIDE
    assert box.left == pytest.approx(0.5 - reach) and box.top == pytest.approx(0.125 - reach)
    assert box.width == pytest.approx(0.375 + 2 * reach) and box.height == pytest.approx(0.25 + 2 * reach)
    assert changed_boxes(encode_png(blank()), encode_png(blank())) == []
    assert changed_boxes(encode_png(blank()), encode_png(255 - blank())) == [], "a change of everything needs no frame"
    assert changed_boxes(encode_png(blank()), encode_png(blank()[:32])) == []


def test_reasons_attempts_and_agreement(run: Path) -> None:
    found = curated(run, 5)
    assert [(reason.name, reason.count) for reason in found.reasons] == [("no op", 1), ("error in score: no answer", 1)]
    (case,) = found.reasons[0].cases
    assert [picture.words for picture in case.pictures] == ["source", "edit"] and case.measured == "change fraction 0.250"
    assert all(len(picture.boxes) == 1 for picture in case.pictures)
    assert len(found.attempts) == 5 and [p.chosen for p in found.attempts[0].pictures] == [False, False, True]
    assert found.attempts[0].pictures[1].words == "guidance 3 · a 0.500 · no op"
    assert found.agreement is not None and found.agreement.cells[0][1] == ("50\N{NARROW NO-BREAK SPACE}%", "a2")
    assert [gap.wins for gap in found.gaps] == ["100\N{NARROW NO-BREAK SPACE}%", "50\N{NARROW NO-BREAK SPACE}%"]
    assert found.second == f"JPEG 90, {HOSTILE}"
    assert curated(run, 0).attempts == [] and curated(run.parent, 3).gaps == []


def test_a_run_that_is_not_finished_shows_nothing_of_it(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    next(copy.glob("1_all-*/*.parquet")).unlink()
    assert curated(copy, 3).reasons == [] and curated(copy, 3).gaps == []


def test_the_page_shows_them_and_escapes_what_they_hold(run: Path) -> None:
    page = write_report(run).read_text()
    outline = Outline(page)
    ids = {attributes.get("id") for attributes in outline.all("section")}
    assert {"rewards", "attempts", "drops"} <= ids and "rounds" not in ids
    assert {str(a["href"])[1:] for a in outline.all("a")} == ids
    assert not outline.all("script") and outline.text.count("<script>alert(1)</script>") >= 12
    assert "goes on" in outline.text and "1 row" in outline.text and 'class="changed"' in page


def test_a_histogram_holds_every_value_and_the_marks() -> None:
    drawn = str(histogram([-1.0, 0.2, 0.3, 5.0], "gaps <b>", marks=(-0.5, 0.5)))
    counts = [int(text.split("<")[0]) for text in drawn.split("<title>")[1:]]
    assert sum(counts) == 4 and drawn.count('class="level"') == 2 and "<b>" not in drawn
    assert "<svg" in str(histogram([0.0, 0.0], "flat"))
