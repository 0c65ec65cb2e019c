"""From prompts to pairs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from rpo.config import Recipe
from rpo.curate.funnel import funnel, funnel_lines, stage_seconds
from rpo.curate.local_engine import run_stages
from rpo.curate.pipeline import fan_out, plan
from rpo.curate.select import controls, mixed, select_pairs, with_noise_floors
from rpo.curate.sidecars import lay_out, refuse_changed, remove_after
from rpo.data.images import decode_image
from rpo.data.pairs import Pair, write_pairs
from rpo.data.readers import load_pairs
from rpo.data.run_folder import RunFolder
from rpo.train.health import fingerprint_auc
from rpo.workflow.folder import PAIRS, understood_prompts, update_summary, write_recipe


def curate(recipe: Recipe, run: RunFolder, console: Console, prompts_file: Path | None = None) -> None:
    """Makes `pairs.parquet` and everything on the way to it."""
    curation = recipe.curate
    if curation is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    prompts = understood_prompts(curation.prompts, curation.seed, prompts_file)
    rows = plan(fan_out(prompts, curation.samples), seed=curation.seed, columns={"sample": pa.int32()})
    stages = curation.stages()
    ready = with_noise_floors(stages, run.path, rows)
    refuse_changed(run.path, lay_out(run.path, rows, ready or stages[:-1]), behind=ready is None)
    write_recipe(run, recipe)
    if ready is None:  # labels rest on noise floors of the whole run, so all before them is made first
        remove_after(run.path, lay_out(run.path, rows, stages[:-1]))
        run_stages(run, rows, stages[:-1], console=console)
        ready = with_noise_floors(stages, run.path, rows)
        assert ready is not None, "all stages before the label are done"
    run_stages(run, rows, ready, console=console)
    began = time.monotonic()
    stages, seconds = funnel(run.path), stage_seconds(run.path)
    for line in funnel_lines(stages, seconds):
        console.print(line, highlight=False)
    share, most = curation.held_out_share, curation.pairs_per_prompt_max
    pairs = select_pairs(run.path, curation.label, held_out_share=share, per_prompt_max=most)
    if curation.human_pairs is not None:
        pairs = mixed(pairs, load_pairs(curation.human_pairs)[0], curation.human_share)
    write_pairs(run.path / PAIRS, pairs)
    auc = pairs_fingerprint(pairs, curation.seed)
    health = {**controls(run.path), "fingerprint_auc": None if math.isnan(auc) else auc}
    update_summary(
        run.path,
        {"recipe": recipe.name, "seed": curation.seed, "funnel": stages, "pairs_kept": len(pairs), "controls": health},
        seconds | {"select": time.monotonic() - began},
    )
    console.print(f"{len(pairs)} pairs kept in {run.path / PAIRS}", highlight=False)


def pairs_fingerprint(pairs: Sequence[Pair], seed: int) -> float:
    chosen, rejected = ([decode_image(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return fingerprint_auc(chosen, rejected, seed)
