"""Critiques and instructions on the page: every fate is there, unreadable answers too, hostile words stay words."""

from pathlib import Path

import pytest

from rpo.backends.chat.openai import hang_up
from rpo.report.critiques import word_cards, word_figures
from rpo.report.page import write_report
from rpo.testing.server import Asked, FakeServer
from vlm_pipeline import answer, main

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def hostile(asked: Asked) -> str:
        return answer(asked).replace("I would rather not.", HOSTILE).replace("I see", f"{HOSTILE} I see")

    folder = tmp_path_factory.mktemp("report") / "run"
    with FakeServer(hostile) as server:
        main(str(folder), server.url, "40")
    hang_up()
    return folder


def test_every_fate_is_shown_in_proportion(run: Path) -> None:
    cards = word_cards(run, 10)
    assert len(cards) == 10 and [card.prompt for card in cards] == [card.prompt for card in word_cards(run, 10)]
    fates = [card.fate for card in cards]
    assert fates.count("") == 8 and fates.count("already right") == 1
    (unread,) = [card for card in cards if card.raw]
    assert (
        unread.state == "off"
        and unread.fate.startswith("error in critique: answer not understood")
        and unread.raw == HOSTILE
        and unread.critique is None
    )
    edited = next(card for card in cards if not card.fate)
    assert edited.request.startswith("add thing") and edited.instructions is not None and edited.critique is not None
    assert len(word_cards(run, 100)) == 40 and word_cards(run, 0) == []


def test_the_page_shows_them_as_words(run: Path) -> None:
    (run / "summary.json").write_text('{"seed": 1}')
    page = write_report(run).read_text()
    assert "Critiques and instructions" in page and "&lt;script&gt;alert(1)" in page and HOSTILE not in page
    assert page.count("The answer that could not be read") == 1 and "“add thing" in page


def test_figures_of_words() -> None:
    words = {"asked": 50, "parsed": 40, "no_issue": 10, "instructed": 20, "instructions": 30, "skipped": 2, "agreement": 0.75}
    words["adjustments"] = {"region dropped": 1200, "evidence clipped": 34}
    wire = {"purpose": "critique", "model": "m", "calls": 60, "answered": 50, "cost": 0.5, "tokens_per_pair": 1234.5, "cost_per_pair": 0.05}
    told = [(figure.name, figure.value) for figure in word_figures({"words": words, "wire": [wire]})]
    assert [name for name, _ in told] == ["Parsed", "No issue", "Instructions per image", "Agreement", "Adjusted", "Tokens for critique"]
    assert [value.split("\N{NARROW NO-BREAK SPACE}")[0] for _, value in told] == ["80.0", "25.0", "1.50", "75.0", "1,234", "1,234"]
    assert "$0.05000" in word_figures({"wire": [wire]})[0].meaning
    (none,) = word_figures({"wire": [wire | {"tokens_per_pair": None}]})
    assert none.value == "60" and word_figures({}) == []


def test_a_run_without_such_stages_shows_none(tmp_path: Path) -> None:
    assert word_cards(tmp_path, 5) == []
