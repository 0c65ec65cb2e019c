"""The page in a real browser: it renders without a complaint and without asking for anything."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import BROWSER, Tab, open_tab
from fake_run import make_run

from rpo.report.page import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "shapes", num_pairs=30, num_prompts=40))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def _look(tab: Tab, page: Path, **how) -> None:
    tab.requests.clear()
    tab.complaints.clear()
    tab.look(page.as_uri(), **how)


@pytest.mark.parametrize("how", [{"width": 1280}, {"width": 1280, "dark": True}, {"width": 390}], ids=["light", "dark", "phone"])
def test_page_renders_without_complaint_or_request(tab: Tab, report: Path, tmp_path: Path, how: dict) -> None:
    _look(tab, report, **how)
    headings = tab.ask("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings[:3] == ["Result", "Base and tuned, side by side", "All compared models"] and len(headings) == 10
    broken = tab.ask(
        "Promise.all([...document.images].map(i => i.decode().then(() => 0, () => 1))).then(all => all.reduce((a, b) => a + b))"
    )
    assert broken == 0 and tab.ask("document.images.length") == 48
    assert tab.ask("document.documentElement.scrollWidth") == how["width"], "the page scrolls sideways"
    empty = tab.ask("[...document.querySelectorAll('svg')].filter(s => !s.getBoundingClientRect().height || !s.children.length).length")
    assert empty == 0
    tab.screenshot(tmp_path / "view.png")
    assert (tmp_path / "view.png").stat().st_size > 10_000
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [report.as_uri()]


def test_text_can_be_read_in_light_and_dark(tab: Tab, report: Path) -> None:
    """Contrast of at least 4.5 to 1 for every colour that text has (WCAG 2.2, 1.4.3)."""
    for dark in (False, True):
        _look(tab, report, dark=dark)
        background, *inks = tab.ask("""(() => {
            const colors = new Set();
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) if (walk.currentNode.data.trim()) colors.add(getComputedStyle(walk.currentNode.parentElement).color);
            return [getComputedStyle(document.body).backgroundColor, ...colors];
        })()""")
        assert len(inks) >= 4
        for ink in inks:
            assert _contrast(ink, background) >= 4.5, f"{ink} on {background}"


def _luminance(color: str) -> float:
    channels = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_hostile_text_runs_nothing(tab: Tab, tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "hostile", num_pairs=4, num_prompts=4, hostile=True))
    _look(tab, page)
    assert tab.ask("document.querySelectorAll('script').length") == 0 and "<script>alert(1)" in tab.ask("document.body.innerText")
    assert tab.complaints == [] and [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]


def test_the_watching_itself_works(tab: Tab, tmp_path: Path) -> None:
    """A page that asks for a file and throws is noticed; otherwise the tests above would prove nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='other.png'><script>throw Error('seen')</script>")
    _look(tab, bad)
    assert any("seen" in complaint for complaint in tab.complaints)
    assert any(url.endswith("other.png") for url in tab.requests)
