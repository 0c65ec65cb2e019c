"""Which rejected side, and with or without projection through the policy: tunes and evaluates the embedded world on each combination.

    python benchmarks/sides.py [--seed N] [--out FOLDER] [--strength S]

Curates once, with both sides of every edit projected as well; the four ways of labelling then share those images. Prints a Markdown
table. Can be stopped and started again.
"""

import argparse
import dataclasses
import itertools
import shutil
from pathlib import Path

from rich.console import Console

from rpo import workflow
from rpo.backends.diffusers_images import ProjectorConfig
from rpo.config import Recipe
from rpo.curate.stages import ProjectStage
from rpo.data.run_folder import open_run
from rpo.recipes.shapes import shapes

SIDES = ("original", "edited", "neutral")


def variant(seed: int, rejected_side: str, projected: bool, strength: float) -> Recipe:
    recipe = shapes().with_seed(seed)
    curate = recipe.curate
    assert curate is not None
    label = dataclasses.replace(curate.label, rejected_side=rejected_side, projected=projected)
    score = dataclasses.replace(curate.score, sides=("source", *SIDES, *(f"{side}_projected" for side in SIDES)))
    project = ProjectStage(projector=ProjectorConfig(generator=recipe.generator, strength=strength), batch_size=32)
    return dataclasses.replace(recipe, curate=dataclasses.replace(curate, label=label, score=score, project=project))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sides"))
    parser.add_argument("--strength", type=float, default=0.5, help="of the projection")
    options = parser.parse_args()
    console, first, rows = Console(stderr=True), None, []
    for rejected_side, projected in itertools.product(("original", "neutral"), (False, True)):
        recipe = variant(options.seed, rejected_side, projected, options.strength)
        folder = options.out / f"seed{options.seed}-{rejected_side}{'-projected' if projected else ''}"
        if first is not None and not folder.exists():
            later = ("*_label-*", "train", "evaluation", "summary.json", "pairs.parquet", ".lock")
            shutil.copytree(first, folder, ignore=shutil.ignore_patterns(*later))
        with open_run(folder, resume=True) as run:
            workflow.curate(recipe, run, console)
            workflow.tune(recipe, run, console, resume=True, allow_fingerprint=True)
            workflow.compare(recipe, run, console)
        first = first or folder
        summary = workflow.read_summary(folder)
        done, quality = summary["evaluation"]["fully_correct"], summary["evaluation"]["quality"]
        rows.append(
            f"| {rejected_side} | {'yes' if projected else 'no'} | {summary['pairs_kept']} | {summary['controls']['fingerprint_auc']:.2f} "
            f"| {100 * done['base']:.1f} % | {100 * done['tuned']:.1f} % | {100 * done['ci95'][0]:+.1f} to {100 * done['ci95'][1]:+.1f} "
            f"| {quality['difference']:+.3f} |"
        )
    print("| rejected side | projected | pairs | fingerprint AUC | base | tuned | 95 % interval, points | quality |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
