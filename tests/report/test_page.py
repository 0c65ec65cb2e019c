"""The page as text: what it holds, what it leaves out, and that nothing from data becomes markup."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import HOSTILE, make_run

from rpo.core.records import write_record
from rpo.data.pairs import Pair, write_pairs
from rpo.errors import RpoError
from rpo.report import page as page_module
from rpo.report.examples import Duels, extremes
from rpo.report.page import write_report
from rpo.report.run_data import read_run


class Outline(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "shapes", num_pairs=40, num_prompts=60)


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text()


def test_every_compared_model_has_its_win_rates(run: Path, html: str) -> None:
    comparisons = json.loads((run / "summary.json").read_text())["comparisons"]
    part = html[html.index("All compared models") : html.index('id="controls"')]
    rate = f"{100 * comparisons['broken']['fully_correct']['win_rate']:.0f}"
    assert comparisons["broken"]["fully_correct"]["win_ci95"][1] < 0.5
    line = part[part.index("broken") :]
    assert f'<td class="r worse">{rate}\u202f%</td>' in line, "the broken model loses, and is said to"
    assert "one thing" in part and "two things" in part, "kinds of prompts"


def test_without_a_tuned_model_the_second_is_shown(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, other := tmp_path / "other")
    index = other / "evaluation" / "index.json"
    told = json.loads(index.read_text())
    told["models"] = {name: told["models"][name] for name in ("base", "broken")}
    write_record(index, told)
    page = write_report(other).read_text()
    assert "Base and broken, side by side" in page and "Broken loses" in page


def test_what_gained_and_lost_most_is_shown_for_a_graded_metric(run: Path) -> None:
    duels = Duels.of(read_run(run))
    assert duels is not None and extremes(duels, 3) == [], "yes or no: all gains are alike"
    graded = replace(duels, main="quality")
    (best, gained), (worst, lost) = extremes(graded, 3)
    assert (best, worst) == ("Gained most", "Lost most") and len(gained) == len(lost) == 3
    gains = sorted(graded.gain(key) for key in graded.keys)
    shown = [float(duel.after.verdict) - float(duel.before.verdict) for duel in gained]
    assert shown == pytest.approx(gains[::-1][:3], abs=2e-3)


def test_everything_a_reader_needs_is_there(run: Path, html: str) -> None:
    outline = Outline(html)
    text = " ".join(outline.text.split())
    numbers = json.loads((run / "summary.json").read_text())["evaluation"]["fully_correct"]
    for said in (f"{100 * numbers['base']:.1f}", f"{100 * numbers['tuned']:.1f}", f"{numbers['difference'] * 100:+.1f}", "95 % interval"):
        assert said.replace("-", "\u2212") in text
    for heading in (
        "Result",
        "Base and tuned, side by side",
        "Can the pairs be trusted?",
        "Funnel",
        "Pairs, with their reasons",
        "Training",
    ):
        assert heading in text
    assert "already right 731 · dropped 11: error in critique: unreadable 11" in text and "700 of 801" in text
    assert "0.87" in text and "just outside" in text  # the leakage of the fake run is above 0.85
    assert text.count("rejected · source") == 12 and "“turn the" in text and "pick score" in text
    assert len(outline.all("img")) == 2 * (12 + 12) and all(image["alt"] for image in outline.all("img"))
    ids = {attributes.get("id") for attributes in outline.all("section")}
    assert {str(a["href"])[1:] for a in outline.all("a")} == ids


def test_the_page_is_one_file_that_asks_for_nothing(html: str) -> None:
    outline = Outline(html)
    assert not outline.all("script") and len(html.encode()) < 5_000_000
    policy = next(meta["content"] for meta in outline.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    sources = [attributes[name] for _, attributes in outline.tags for name in ("src", "href") if attributes.get(name)]
    assert all(str(source).startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import", html)


def test_the_same_run_gives_the_same_page(run: Path, html: str) -> None:
    assert write_report(run).read_text() == html


def test_headings_go_down_one_level_at_a_time(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Outline(html).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def unlike_accessible(outline: Outline, html: str) -> list[str]:
    """What an accessibility checker finds first: ids that come twice, headers of tables without words."""
    ids = [attributes["id"] for _, attributes in outline.tags if attributes.get("id")]
    twice = [f"id {name}" for name in {*ids} if ids.count(name) > 1]
    return twice + list(re.findall(r"<th[^>]*>\s*</th>", html))


def test_ids_are_unique_and_headers_have_words(html: str) -> None:
    assert unlike_accessible(Outline(html), html) == []
    assert unlike_accessible(Outline(bad := '<p id="a"></p><p id="a"></p><th scope="col"></th>'), bad) == ["id a", '<th scope="col"></th>']


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "<b>run", num_pairs=5, num_prompts=6, hostile=True)).read_text()
    outline = Outline(html)
    assert not outline.all("script") and not outline.all("b")
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert all(str(image["src"]).startswith("data:image/webp") for image in outline.all("img"))
    # As prompt, instruction, reason, metric and recipe: shown as written, and no template of it evaluated.
    assert outline.text.count("<script>alert(1)</script>") >= 12 and "{{ 7*7 }}" in outline.text
    assert any(HOSTILE in str(image["alt"]) for image in outline.all("img"))


def test_a_run_that_only_curated_says_what_is_missing(tmp_path: Path, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({key: summary[key] for key in ("seed", "funnel", "controls", "pairs_kept")}))
    outline = Outline(write_report(tmp_path).read_text())
    assert "Not in this run folder yet: training, evaluation." in outline.text and "Funnel" in outline.text
    assert "result" not in {attributes.get("id") for attributes in outline.all("section")}


def test_pairs_of_another_origin_need_no_critique(tmp_path: Path, run: Path) -> None:
    from rpo.data.pairs import read_pairs

    stranger = read_pairs(run / "pairs.parquet")[0]
    bare = {"critique": "null", "instruction": "", "scores": "{}", "provenance": "{}"}
    write_pairs(tmp_path / "pairs.parquet", [Pair(**{**vars(stranger), **bare})])
    text = Outline(write_report(tmp_path).read_text()).text
    assert "The only pair; the widest gap first" in text and stranger.prompt in text and "Critique, overall" not in text


def test_a_page_too_large_shows_fewer_examples(run: Path, html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "BYTES_MAX", 250_000)
    small = write_report(run).read_text()
    assert 40_000 < len(small.encode()) <= 250_000 < len(html.encode())
    assert 0 < len(Outline(small).all("img")) < 96


def test_the_alarm_is_told_and_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 0.7, "alarm": ""},
        {"step": 2, "loss": 0.6, "alarm": "too loud"},
        {"step": 3, "alarm": "too loud; too late"},
    ]
    (tmp_path / "train").mkdir()
    log = tmp_path / "train" / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    with pytest.warns(UserWarning, match="metrics.jsonl: line 4, the last, is cut and is left out"):
        text = Outline(write_report(tmp_path).read_text()).text
    assert "rang at 2 of 3 steps, first at 2: too loud; too late." in text and "Margin" not in text.split("How to read")[0]
    log.write_text('{"step": 1, "lo\n' + json.dumps(lines[1]) + "\n")
    with pytest.raises(RpoError, match=r"metrics.jsonl line 1 is damaged"):
        write_report(tmp_path)


@pytest.mark.parametrize(("name", "content", "match"), [
    (None, "", "nothing to report on"),
    ("summary.json", "{", "summary.json is damaged"),
    ("recipe.json", "[1]", r"recipe\.json is damaged \(a JSON object was expected, found list\)"),
    ("recipe.json", "{}", "nothing to report on"),
])  # fmt: skip
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str | None, content: str, match: str) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(RpoError, match=match):
        write_report(tmp_path)
    with pytest.raises(RpoError, match="no run folder"):
        write_report(tmp_path / "nowhere")
