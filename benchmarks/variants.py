"""What the recipe `shapes` is worth with another choice in one place: tunes and evaluates each variant on one curation.

    python benchmarks/variants.py sides [--seed N] [--out FOLDER] [--strength S]
    python benchmarks/variants.py objectives [--seed N] [--out FOLDER]
    python benchmarks/variants.py poor [--seed N] [--out FOLDER]

`sides` varies the rejected side and whether both sides are projected through the policy; `objectives` what training minimises; `poor`
does so on pairs that invite ruin: edits by an editor whose weights were disturbed, taken for better than their sources without asking any
reward. All variants share the curated images. Prints a Markdown table. Can be stopped and started again.
"""

import argparse
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from rich.console import Console

from rpo import workflow
from rpo.backends.diffusers_images import ProjectorConfig
from rpo.config import Recipe
from rpo.curate.stages import ProjectStage
from rpo.data.run_folder import open_run
from rpo.recipes.shapes import shapes
from rpo.train.objectives import SFT, DiffusionDPO
from rpo.train.safeguards import Anchored, LoserGradient, WinnerPreserving, WithSFT

DISTURBANCE = 0.15
"""Of the poor editor's weights: noise of this share of each tensor's own spread."""
SIDES = ("original", "edited", "neutral")
OBJECTIVES = {
    "DPO, k=20": DiffusionDPO(k=20.0),
    "DPO, k=200": DiffusionDPO(k=200.0),
    "DPO, k=200, loser gradient x0.1": LoserGradient(of=DiffusionDPO(k=200.0), scale=0.1),
    "DPO, k=200, anchored x1000": Anchored(of=DiffusionDPO(k=200.0), weight=1000.0),
    "winner-preserving DPO, k=60": WinnerPreserving(of=DiffusionDPO(k=60.0)),
    "DPO, k=20, with SFT x20": WithSFT(of=DiffusionDPO(k=20.0), weight=20.0),
    "SFT": SFT(),
}


def sides(recipe: Recipe, strength: float) -> dict[str, Recipe]:
    """Every combination; the curation makes both sides of every edit projected as well."""
    curate = recipe.curate
    assert curate is not None
    score = replace(curate.score, sides=("source", *SIDES, *(f"{side}_projected" for side in SIDES)))
    project = ProjectStage(projector=ProjectorConfig(generator=recipe.generator, strength=strength), batch_size=32)
    curate = replace(curate, score=score, project=project)
    return {
        f"{rejected}{', projected' if projected else ''}": replace(
            recipe, curate=replace(curate, label=replace(curate.label, rejected_side=rejected, projected=projected))
        )
        for rejected, projected in product(("original", "neutral"), (False, True))
    }


def objectives(recipe: Recipe) -> dict[str, Recipe]:
    return {name: replace(recipe, train=replace(recipe.train, objective=objective)) for name, objective in OBJECTIVES.items()}


def poor(recipe: Recipe, out: Path) -> dict[str, Recipe]:
    curate = recipe.curate
    assert curate is not None
    editor = curate.edit.editor
    folder = out / "poor-editor"
    if not folder.exists():
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(editor.models()[0], safety_checker=None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.add_(DISTURBANCE * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
        pipeline.save_pretrained(folder)
    label = replace(curate.label, rule="trust_edit", rejected_side="original")
    curate = replace(curate, edit=replace(curate.edit, editor=replace(editor, model=str(folder))), label=label)
    return objectives(replace(recipe, curate=curate))


def first_alarm(folder: Path) -> str:
    lines = map(json.loads, (folder / "train" / "metrics.jsonl").read_text().splitlines())
    return next((f"{line['alarm']} (step {line['step']})" for line in lines if line.get("alarm")), "silent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sides", "objectives", "poor"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--strength", type=float, default=0.5, help="of the projection")
    options = parser.parse_args()
    recipe = shapes().with_seed(options.seed)
    match options.what:
        case "sides":
            variants = sides(recipe, options.strength)
        case "objectives":
            variants = objectives(recipe)
        case _:
            variants = poor(recipe, options.out)
    console, first, rows = Console(stderr=True), None, []
    for number, (name, variant) in enumerate(variants.items()):
        folder = options.out / f"{options.what}-seed{options.seed}-{number}"
        if first is not None and not folder.exists():
            later = ("*_label-*", "train", "evaluation", "summary.json", "pairs.parquet", ".lock")
            shutil.copytree(first, folder, ignore=shutil.ignore_patterns(*later))
        with open_run(folder, resume=True) as run:
            workflow.curate(variant, run, console)
            workflow.tune(variant, run, console, resume=True, allow_fingerprint=True)
            workflow.compare(variant, run, console)
        first = first or folder
        summary = workflow.read_summary(folder)
        done, quality = summary["evaluation"]["fully_correct"], summary["evaluation"]["quality"]
        rows.append(
            f"| {name} | {summary['pairs_kept']} | {summary['controls']['fingerprint_auc']:.2f} "
            f"| {100 * done['base']:.1f} % | {100 * done['tuned']:.1f} % | {100 * done['ci95'][0]:+.1f} to {100 * done['ci95'][1]:+.1f} "
            f"| {quality['difference']:+.3f} | {first_alarm(folder)} |"
        )
    print(f"| {options.what} | pairs | fingerprint AUC | base | tuned | 95 % interval, points | quality | alarm |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
