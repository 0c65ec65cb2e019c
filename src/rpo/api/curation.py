"""From prompts to pairs."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from rich.console import Console

from rpo.accounting.ledger import LEDGER, Spent, spent
from rpo.accounting.metering import EVALUATE, Config, account_in, connections_closed, metered, spent_lines
from rpo.api.folder import PAIRS, ROUNDS, understood_prompts, update_summary, write_recipe
from rpo.api.preflight import check_models
from rpo.core.run_folder import RunFolder
from rpo.curation.controls import control_lines, editor_patterns, reward_biases
from rpo.curation.critiques import words
from rpo.curation.external_pairs import BroughtStage, EditSide, plan_brought
from rpo.curation.leakage import MAX_PAIRS, Leakage, leakage
from rpo.curation.select import mixed, select_pairs, widest
from rpo.curation.stages.label import LabelStage, with_noise_floors
from rpo.data.pairs import Pair, iterate_pairs, write_pairs
from rpo.data.prompts import read_prompt_set
from rpo.data.readers import load_pairs
from rpo.engine.funnel import FunnelStage, funnel, funnel_lines, stage_seconds
from rpo.engine.layers import adopt, forget_unanswered, lay_out, read_run, refuse_changed, remove_after, stored_layers
from rpo.engine.run import Engine
from rpo.engine.stage import Stage, fan_out, plan
from rpo.errors import UNANSWERED, RpoError
from rpo.recipe import Curation, Recipe, SampleCuration

NOTES = {"prompt_source": pa.string(), "prompt_kind": pa.string(), "prompt_split": pa.string()}
"""What the plan tells of a prompt beside its text."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What may be spent. A cap that is reached stops the run with all that is done kept."""

    max_cost: float | None = None
    """US dollars paid for answers, over every time the run is resumed."""
    max_calls: int | None = None
    """Requests to models over a wire, failed ones included, over every time the run is resumed."""
    max_time_min: float | None = None
    """Minutes of making pairs, this time."""
    answers: Path | None = None
    """Where answers are kept, if not in the run folder."""

    def metered(self, config: Config, folder: Path) -> Config:
        """The configuration with every model over a wire keeping the run folder's account."""
        return metered(config, account_in(folder, self.answers, self.max_cost, self.max_calls))


def curate(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    caps: Caps | None = None,
    *,
    sources: Path | None = None,
    edit_side: EditSide = "rejected",
    engine: Engine | None = None,
    adopt_from: Sequence[Path] = (),
) -> None:
    """Makes `pairs.parquet` and everything on the way to it, from prompts or from the pairs or captioned images at `sources`.

    What a folder of `adopt_from` has made alike is taken over.
    """
    if recipe.curate is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    if (run.path / ROUNDS).exists():
        raise RpoError(f"{run.path} holds a run of several rounds. Go on with it by --rounds, begin anew with --overwrite, or elsewhere.")
    if sources and prompts_file:
        raise ValueError("--sources brings prompts with its images; leave out --prompts")
    caps, engine = caps or Caps(), engine or Engine()
    curation = caps.metered(recipe.curate, run.path)
    if sources:
        pairs_only = isinstance(curation, Curation) and "other" in curation.label.combinations
        rows = plan_brought(sources, edit_side, seed=curation.seed, check=curation.prompts.check, pairs_only=pairs_only)
        stages = curation.stages(BroughtStage(brought=sources))
    else:
        rows, stages = planned_rows(recipe.name, curation, prompts_file), curation.stages()
    engine.check(stages)
    ready = with_noise_floors(stages, run.path, rows)
    layers = lay_out(run.path, rows, ready or stages[:-1])
    refuse_changed(run.path, layers, behind=ready is None)
    if not layers[0].folder.exists() and not adopt_from:  # a run that goes on has what it needs, or asks for nothing more
        check_models(recipe.curate, servers=not (caps.answers and caps.answers.exists()))
    for folder in adopt_from:
        adopt(layers, folder)
    write_recipe(run, recipe)
    ends = None if caps.max_time_min is None else time.monotonic() + 60 * caps.max_time_min
    with connections_closed(curation):
        if again := forget_unanswered(layers):
            console.print(f"{again} rows without an answer of a remote model are asked again", highlight=False)
            ready = None
        if ready is None:  # labels rest on noise floors of the whole run, so all before them is made first
            remove_after(run.path, layers[: len(stages)])
            engine.run(run, rows, stages[:-1], console, ends and ends - time.monotonic())
            ready = with_noise_floors(stages, run.path, rows)
            assert ready is not None, "all stages before the label are done"
        engine.run(run, rows, ready, console, ends and ends - time.monotonic())
    began = time.monotonic()
    count = write_pairs(run.path / PAIRS, _selected(run.path, curation))
    numbers = _numbers(run.path, ready[-1], recipe.train.resolution, curation.seed, count, console)
    told = {"recipe": recipe.name, "seed": curation.seed, **numbers}
    update_summary(run.path, told, stage_seconds(run.path) | {"select": time.monotonic() - began})
    console.print(f"{count} pairs kept in {run.path / PAIRS}", highlight=False)
    if unanswered := sum(unanswered_rows(stage) for stage in numbers["funnel"]):
        console.print(f"{unanswered} rows have no answer of a remote model; the same command with --resume asks again", highlight=False)
    if not count:
        raise RpoError(nothing_kept(run.path, numbers["funnel"]))


def unanswered_rows(stage: FunnelStage) -> int:
    """Rows that ended in a stage because a remote model gave no answer."""
    return sum(rows for reason, rows in stage["dropped"].items() if reason.startswith(f"error:{stage['stage']}:{UNANSWERED.rstrip()}"))


def nothing_kept(folder: Path, stages: Sequence[FunnelStage]) -> str:
    """Why a curation has no pair, by the reason that took most rows; where to look, and how to go on."""
    dropped = [(rows, reason, stage) for stage in stages for reason, rows in stage["dropped"].items()]
    if not dropped:
        return "no pair is kept, and no stage has dropped a row: look at the recipe's selection of pairs"
    # The stage that let no row pass, if there is one, and there the commonest reason.
    rows, reason, stage = max(dropped, key=lambda item: (item[2]["kept"] == 0, item[0]))
    name, (errors, why) = stage["stage"], (reason.startswith("error:"), reason.removeprefix(f"error:{stage['stage']}:"))
    ended = sum(rows for reason, rows in stage["dropped"].items() if reason.startswith("error:"))
    if errors and ended == stage["rows_in"]:
        what = f"every row of stage {name!r} ended in an error, most by: {why} ({rows} of {stage['rows_in']})"
    else:
        what = f"no pair is kept; most rows ended in stage {name!r} by: {why} ({rows} of {stage['rows_in']})"
    again = (
        "the same command with --resume asks again"
        if unanswered_rows(stage)
        else "then change the recipe and use --overwrite or another --out"
    )
    return f"{what}. To see them: rpo show {folder} --stage {name} --kept {'errors' if errors else 'dropped'}; {again}."


def planned_rows(name: str, curation: Curation | SampleCuration, prompts_file: Path | None = None) -> pa.Table:
    """Every prompt, as often as it is sampled, with the set it comes from; `name` is the recipe's."""
    prompts = understood_prompts(curation.prompts, curation.seed, prompts_file)
    brought = {prompt.text: prompt for prompt in read_prompt_set(prompts_file)} if prompts_file else {}

    def rows() -> Iterator[dict[str, object]]:
        for row in fan_out(prompts, curation.samples):
            prompt = brought.get(cast(str, row["prompt"]))
            notes = (prompt.source, prompt.kind, prompt.split) if prompt else (f"recipe {name}", None, None)
            yield row | dict(zip(NOTES, notes, strict=True))

    return plan(rows(), seed=curation.seed, columns={"sample": pa.int32()}, notes=NOTES)


def _selected(folder: Path, curation: Curation | SampleCuration) -> Iterable[Pair]:
    def candidates() -> Iterator[Pair]:
        return select_pairs(folder, curation.label, held_out_share=curation.held_out_share)

    pairs: Iterable[Pair] = candidates()
    if isinstance(curation, Curation):
        if curation.pairs_per_prompt_max is not None:
            kept = widest(pairs, curation.pairs_per_prompt_max)
            pairs = (pair for pair in candidates() if pair.id in kept)
        if curation.human_pairs is not None:
            pairs = mixed(pairs, load_pairs(curation.human_pairs)[0], curation.human_share, curation.held_out_share)
    return pairs


def _numbers(folder: Path, label: Stage, side: int | None, seed: int, count: int, console: Console) -> dict[str, Any]:
    """What the summary says of a curation with so many pairs; funnel, controls and costs are printed too."""
    stages, paid = funnel(folder), [line for line in spent(folder / LEDGER) if line.purpose != EVALUATE]
    for line in (*funnel_lines(stages, stage_seconds(folder)), *spent_lines(paid, count)):
        console.print(line, highlight=False)
    if cut := cut_line(folder):
        console.print(cut, highlight=False)
    found = pairs_leakage(iterate_pairs(folder / PAIRS), count, seed, side)
    known = None if isinstance(found, str) else asdict(found)
    controls: dict[str, Any] = {"fingerprint_auc": known and known["auc"], "leakage": known}
    if isinstance(label, LabelStage):
        controls |= reward_biases(folder, label) | {"pattern": editor_patterns(folder)}
        for line in control_lines(controls):
            console.print(line, highlight=False)
    return {
        "funnel": stages,
        "pairs_kept": count,
        "controls": controls,
        "words": words(folder),
        "wire": wire_summary(paid, count),
    }


def cut_line(folder: Path) -> str | None:
    """How much of the sources the editor's frame cuts off, if it does."""
    if "cut" not in {column for layer in stored_layers(folder) for column in layer.columns}:
        return None
    shares = np.array([share for share in read_run(folder, ["cut"]).column("cut").to_pylist() if share], dtype=np.float64)
    if not len(shares):
        return None
    return (
        f"sources that the editor's frame cuts: {len(shares)}, by {np.median(shares):.0%} of their area (median), "
        f"at most {shares.max():.0%}. --curate.edit.editor.fit: letterbox cuts nothing, nearest less (training then takes center squares)"
    )


def wire_summary(paid: Sequence[Spent], pairs: int) -> list[dict[str, Any]]:
    """Per stage that asked a model over a wire: what it asked and paid, and that divided by the kept pairs."""
    return [
        asdict(line)
        | {
            "tokens_per_pair": (line.input_tokens + line.output_tokens) / pairs if pairs else None,
            "cost_per_pair": line.cost / pairs if pairs else None,
        }
        for line in paid
    ]


def pairs_leakage(pairs: Iterable[Pair], count: int, seed: int, side: int | None) -> Leakage | str:
    """What the health probe says of `count` pairs, or of as many drawn from them as it looks at, at the size that is trained on."""
    picked = set(np.random.default_rng(seed).permutation(count)[:MAX_PAIRS].tolist())
    looked_at = (pair for number, pair in enumerate(pairs) if number in picked)
    return leakage(((pair.chosen.decode(), pair.rejected.decode()) for pair in looked_at), seed, side)
