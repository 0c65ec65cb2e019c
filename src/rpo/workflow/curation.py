"""From prompts to pairs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from rpo.config import Curation, Recipe, SampleCuration
from rpo.curate.funnel import funnel, funnel_lines, stage_seconds
from rpo.curate.local_engine import run_stages
from rpo.curate.pipeline import fan_out, plan
from rpo.curate.select import controls, select_pairs
from rpo.curate.sidecars import adopt, lay_out, refuse_changed
from rpo.data.images import decode_image
from rpo.data.pairs import Pair, write_pairs
from rpo.data.run_folder import RunFolder
from rpo.errors import RpoError
from rpo.train.health import fingerprint_auc
from rpo.workflow.folder import PAIRS, ROUNDS, understood_prompts, update_summary, write_recipe


def curate(recipe: Recipe, run: RunFolder, console: Console, prompts_file: Path | None = None, *, adopt_from: Sequence[Path] = ()) -> None:
    """Makes `pairs.parquet` and everything on the way to it; what a folder of `adopt_from` has made alike is taken over."""
    curation = recipe.curate
    if curation is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    if (run.path / ROUNDS).exists():
        raise RpoError(f"{run.path} holds a run of several rounds. Go on with it by --rounds, begin anew with --overwrite, or elsewhere.")
    rows = planned_rows(curation, prompts_file)
    layers = lay_out(run.path, rows, curation.stages())
    refuse_changed(run.path, layers)
    for folder in adopt_from:
        adopt(layers, folder)
    write_recipe(run, recipe)
    run_stages(run, rows, curation.stages(), console=console)
    began = time.monotonic()
    stages, seconds = funnel(run.path), stage_seconds(run.path)
    for line in funnel_lines(stages, seconds):
        console.print(line, highlight=False)
    pairs = select_pairs(run.path, curation.label, held_out_share=curation.held_out_share)
    write_pairs(run.path / PAIRS, pairs)
    auc = pairs_fingerprint(pairs, curation.seed)
    health = {**controls(run.path), "fingerprint_auc": None if math.isnan(auc) else auc}
    update_summary(
        run.path,
        {"recipe": recipe.name, "seed": curation.seed, "funnel": stages, "pairs_kept": len(pairs), "controls": health},
        seconds | {"select": time.monotonic() - began},
    )
    console.print(f"{len(pairs)} pairs kept in {run.path / PAIRS}", highlight=False)


def planned_rows(curation: Curation | SampleCuration, prompts_file: Path | None = None) -> pa.Table:
    """Every prompt, as often as it is sampled."""
    prompts = understood_prompts(curation.prompts, curation.seed, prompts_file)
    return plan(fan_out(prompts, curation.samples), seed=curation.seed, columns={"sample": pa.int32()})


def pairs_fingerprint(pairs: Sequence[Pair], seed: int) -> float:
    chosen, rejected = ([decode_image(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return fingerprint_auc(chosen, rejected, seed)
