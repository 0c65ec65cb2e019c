"""Which rejected side the recipe `shapes` should take, and whether both sides should be projected through the policy.

    python benchmarks/variants.py [--seed N] [--out FOLDER] [--strength S]

Tunes and evaluates every combination on one curation, and prints a Markdown table. Can be stopped and started again.
"""

import argparse
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from rpo import workflow
from rpo.backends.diffusers_images import ProjectorConfig
from rpo.config import Recipe
from rpo.curate.stages import ProjectStage
from rpo.data.run_folder import open_run
from rpo.recipes.shapes import shapes

SIDES = ("original", "edited", "neutral")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--strength", type=float, default=0.5, help="of the projection")
    options = parser.parse_args()
    recipe = shapes().with_seed(options.seed)
    variants = sides(recipe, options.strength)
    console, first, rows = Console(stderr=True), None, []
    for number, (name, variant) in enumerate(variants.items()):
        folder = options.out / f"seed{options.seed}-{number}"
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
            f"| {quality['difference']:+.3f} |"
        )
    print("| rejected side | pairs | fingerprint AUC | base | tuned | 95 % interval, points | quality |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
