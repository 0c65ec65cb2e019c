"""From prompts to pairs."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from rich.console import Console

from rpo.config import Curation, Recipe
from rpo.curate.brought import BroughtStage, EditSide, plan_brought
from rpo.curate.engines import Engine
from rpo.curate.funnel import funnel, funnel_lines, stage_seconds
from rpo.curate.pipeline import fan_out, plan
from rpo.curate.select import controls, select_pairs
from rpo.curate.sidecars import lay_out, refuse_changed
from rpo.data.images import decode_image
from rpo.data.pairs import Pair, iterate_pairs, write_pairs
from rpo.data.readers import read_prompt_set
from rpo.data.run_folder import RunFolder
from rpo.train.health import MAX_PAIRS, fingerprint_auc
from rpo.workflow.folder import PAIRS, understood_prompts, update_summary, write_recipe

NOTES = {"prompt_source": pa.string(), "prompt_kind": pa.string(), "prompt_split": pa.string()}
"""What the plan tells of a prompt beside its text."""


def _plan(recipe: Recipe, curation: Curation, prompts_file: Path | None) -> pa.Table:
    """Every prompt, as often as the recipe samples it, with the set it comes from."""
    prompts = understood_prompts(curation.prompts, curation.seed, prompts_file)
    brought = {prompt.text: prompt for prompt in read_prompt_set(prompts_file)} if prompts_file else {}

    def rows() -> Iterator[dict[str, object]]:
        for row in fan_out(prompts, curation.samples):
            prompt = brought.get(cast(str, row["prompt"]))
            notes = (prompt.source, prompt.kind, prompt.split) if prompt else (f"recipe {recipe.name}", None, None)
            yield row | dict(zip(NOTES, notes, strict=True))

    return plan(rows(), seed=curation.seed, columns={"sample": pa.int32()}, notes=NOTES)


def curate(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    *,
    sources: Path | None = None,
    edit_side: EditSide = "rejected",
    engine: Engine | None = None,
) -> None:
    """Makes `pairs.parquet` and everything on the way to it, from prompts or from the pairs at `sources`."""
    curation = recipe.curate
    if curation is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    if sources and prompts_file:
        raise ValueError("--sources brings prompts with its images; leave out --prompts")
    if sources:
        rows = plan_brought(sources, edit_side, seed=curation.seed, check=curation.prompts.check)
        stages = curation.stages(BroughtStage(brought=sources))
    else:
        rows, stages = _plan(recipe, curation, prompts_file), curation.stages()
    engine = engine or Engine()
    engine.check(stages)
    refuse_changed(run.path, lay_out(run.path, rows, stages))
    write_recipe(run, recipe)
    engine.run(run, rows, stages, console)
    began = time.monotonic()
    funnel_stages, seconds = funnel(run.path), stage_seconds(run.path)
    for line in funnel_lines(funnel_stages, seconds):
        console.print(line, highlight=False)
    count = write_pairs(run.path / PAIRS, select_pairs(run.path, curation.label, held_out_share=curation.held_out_share))
    auc = pairs_fingerprint(_sample(run.path / PAIRS, count, curation.seed), curation.seed)
    health = {**controls(run.path), "fingerprint_auc": None if math.isnan(auc) else auc}
    update_summary(
        run.path,
        {"recipe": recipe.name, "seed": curation.seed, "funnel": funnel_stages, "pairs_kept": count, "controls": health},
        seconds | {"select": time.monotonic() - began},
    )
    console.print(f"{count} pairs kept in {run.path / PAIRS}", highlight=False)


def _sample(path: Path, count: int, seed: int) -> list[Pair]:
    """At most as many pairs as the probe looks at, so that memory does not grow with the run."""
    picked = set(np.random.default_rng(seed).permutation(count)[:MAX_PAIRS].tolist())
    return [pair for number, pair in enumerate(iterate_pairs(path)) if number in picked]


def pairs_fingerprint(pairs: Sequence[Pair], seed: int) -> float:
    chosen, rejected = ([decode_image(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return fingerprint_auc(chosen, rejected, seed)
