"""From prompts to pairs."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from rpo.config import Curation, Recipe, SampleCuration
from rpo.curate.funnel import funnel, funnel_lines, stage_seconds
from rpo.curate.local_engine import run_stages
from rpo.curate.metering import account_in, metered, spent_lines
from rpo.curate.pipeline import fan_out, plan
from rpo.curate.select import controls, mixed, select_pairs, with_noise_floors
from rpo.curate.sidecars import adopt, lay_out, refuse_changed, remove_after
from rpo.curate.words import words
from rpo.data.images import decode_image
from rpo.data.ledger import LEDGER, Spent, spent
from rpo.data.pairs import Pair, write_pairs
from rpo.data.readers import load_pairs
from rpo.data.run_folder import RunFolder
from rpo.errors import RpoError
from rpo.train.health import fingerprint_auc
from rpo.workflow.folder import PAIRS, ROUNDS, understood_prompts, update_summary, write_recipe


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What making pairs may cost. A cap that is reached stops the run with all that is done kept."""

    max_cost: float | None = None
    """US dollars paid for answers, over every time the run is resumed."""
    max_calls: int | None = None
    """Requests to models over a wire, failed ones included, over every time the run is resumed."""
    max_time_min: float | None = None
    """Minutes, this time."""
    answers: Path | None = None
    """Where answers are kept, if not in the run folder."""


def curate(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    caps: Caps | None = None,
    *,
    adopt_from: Sequence[Path] = (),
) -> None:
    """Makes `pairs.parquet` and everything on the way to it; what a folder of `adopt_from` has made alike is taken over."""
    if recipe.curate is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    if (run.path / ROUNDS).exists():
        raise RpoError(f"{run.path} holds a run of several rounds. Go on with it by --rounds, begin anew with --overwrite, or elsewhere.")
    caps = caps or Caps()
    curation = metered(recipe.curate, account_in(run.path, caps.answers, caps.max_cost, caps.max_calls))
    rows = planned_rows(curation, prompts_file)
    stages = curation.stages()
    ready = with_noise_floors(stages, run.path, rows)
    layers = lay_out(run.path, rows, ready or stages[:-1])
    refuse_changed(run.path, layers, behind=ready is None)
    for folder in adopt_from:
        adopt(layers, folder)
    write_recipe(run, recipe)
    limit = caps.max_time_min and 60 * caps.max_time_min
    if ready is None:  # labels rest on noise floors of the whole run, so all before them is made first
        remove_after(run.path, layers)
        run_stages(run, rows, stages[:-1], console=console, max_seconds=limit)
        ready = with_noise_floors(stages, run.path, rows)
        assert ready is not None, "all stages before the label are done"
    run_stages(run, rows, ready, console=console, max_seconds=limit)
    began = time.monotonic()
    pairs = _selected(run.path, curation)
    write_pairs(run.path / PAIRS, pairs)
    told = {"recipe": recipe.name, "seed": curation.seed, **_numbers(run.path, curation.seed, pairs, console)}
    update_summary(run.path, told, stage_seconds(run.path) | {"select": time.monotonic() - began})
    console.print(f"{len(pairs)} pairs kept in {run.path / PAIRS}", highlight=False)


def planned_rows(curation: Curation | SampleCuration, prompts_file: Path | None = None) -> pa.Table:
    """Every prompt, as often as it is sampled."""
    prompts = understood_prompts(curation.prompts, curation.seed, prompts_file)
    return plan(fan_out(prompts, curation.samples), seed=curation.seed, columns={"sample": pa.int32()})


def _selected(folder: Path, curation: Curation | SampleCuration) -> list[Pair]:
    if isinstance(curation, SampleCuration):
        return select_pairs(folder, curation.label, held_out_share=curation.held_out_share)
    most = curation.pairs_per_prompt_max
    pairs = select_pairs(folder, curation.label, held_out_share=curation.held_out_share, per_prompt_max=most)
    if curation.human_pairs is None:
        return pairs
    return mixed(pairs, load_pairs(curation.human_pairs)[0], curation.human_share)


def _numbers(folder: Path, seed: int, pairs: Sequence[Pair], console: Console) -> dict[str, Any]:
    """What the summary says of a curation; funnel and costs are printed too."""
    stages, paid = funnel(folder), spent(folder / LEDGER)
    for line in (*funnel_lines(stages, stage_seconds(folder)), *spent_lines(paid, len(pairs))):
        console.print(line, highlight=False)
    auc = pairs_fingerprint(pairs, seed)
    return {
        "funnel": stages,
        "pairs_kept": len(pairs),
        "controls": {**controls(folder), "fingerprint_auc": None if math.isnan(auc) else auc},
        "words": words(folder),
        "wire": wire_summary(paid, len(pairs)),
    }


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


def pairs_fingerprint(pairs: Sequence[Pair], seed: int) -> float:
    chosen, rejected = ([decode_image(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return fingerprint_auc(chosen, rejected, seed)
