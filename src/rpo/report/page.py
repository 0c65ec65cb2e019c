"""One self-contained HTML page of a run folder: no script, no request, at most 5 MB, every word from data escaped."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rpo.core.parquet import write_text
from rpo.report.comparisons import by_kind, forest, rounds
from rpo.report.controls import controls
from rpo.report.critiques import word_cards, word_figures
from rpo.report.curation import curated
from rpo.report.examples import Duels, duel_groups, extremes, pair_cards
from rpo.report.format import count, duration
from rpo.report.run_data import RunData, read_run
from rpo.report.sections import alarm, facts, funnel, result, times, training

REPORT = "report.html"
BYTES_MAX = 5_000_000
EXAMPLES = (12, 6, 3, 0)
"""How many pairs and duels are shown: the first number with which the page fits."""


@cache
def template(name: str) -> Template:
    """A page of this package, to be rendered."""
    # StrictUndefined: a misspelt name is an error, not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("rpo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    return environment.get_template(name)


def render(run: RunData, examples: int) -> str:
    """The page as HTML with at most `examples` pairs and as many duels."""
    summary = run.summary
    outcome = result(run.numbers, run.headline, *([run.compared] if run.compared else []))
    parts = {"curation": bool(summary.get("funnel") or run.pairs), "training": bool(run.steps), "evaluation": outcome is not None}
    seconds = summary.get("seconds", {})
    duels = Duels.of(run)
    return template("page.html.jinja").render(
        name=run.folder.resolve().name,
        counted=count,
        seed=summary.get("seed"),
        kept=summary.get("pairs_kept", len(run.pairs) or None),
        missing=[part for part, there in parts.items() if not there],
        result=outcome,
        seeds_per_prompt=_seeds_per_prompt(run),
        compared=run.compared,
        groups=duel_groups(duels, examples) if duels else [],
        extremes=extremes(duels, examples // 3) if duels else [],
        forest=forest(summary.get("comparisons", {}), run.headline),
        rounds=rounds(summary.get("rounds", []), run.headline),
        kinds=by_kind(run.numbers, run.headline, run.compared) if run.compared else [],
        labelled=any("used_in_labelling" in own for own in run.numbers.values()),
        facts=facts(run.record, summary, run.steps),
        funnel=funnel(summary.get("funnel", [])),
        controls=controls(summary),
        curated=curated(run.folder, examples),
        words=word_cards(run.folder, examples),
        word_figures=word_figures(summary),
        pairs=pair_cards(run.pairs, examples),
        num_pairs=len(run.pairs),
        training=training(run.steps),
        alarm=alarm(run.steps),
        times=times(seconds),
        total_seconds=sum(seconds.values()),
        recipe=run.recipe,
    )


def _seeds_per_prompt(run: RunData) -> int:
    return max((row.seed_index + 1 for rows in run.rows.values() for row in rows), default=1)


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into the run folder from what lies there; parts that were not run are left out and named.

    Raises `RpoError` when the folder holds nothing to report on or one of its files is damaged.
    """
    run = read_run(run_folder)
    page = ""
    for examples in EXAMPLES:
        page = render(run, examples)
        if len(page.encode()) <= BYTES_MAX:
            break
    path = run_folder / REPORT
    write_text(path, page)
    return path
