"""Which objective tunes best in the embedded world: each at its own best learning rate and k, over several seeds, with intervals.

    python benchmarks/objectives.py [--seeds 0 1 2] [--workers 2] [--out FOLDER]

All get the same pairs and steps of the recipe `shapes`. Learning rate and k are searched for on the first seed's pairs and 200 captions
that are in no seed's test; the best setting is then trained on every seed's pairs and tested as the recipe is. It is also trained on
pairs that invite ruin: edits by an editor whose weights were disturbed by noise, taken for better than their sources without
asking any reward. Prints Markdown tables. Can be stopped and started again.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from rich.console import Console

from rpo import workflow
from rpo.config import Recipe
from rpo.data.run_folder import open_run
from rpo.data.shards import write_text
from rpo.recipes.shapes import HeldOutCaptions, shapes
from rpo.train.objectives import SFT, DiffusionDPO, DiffusionKTO, MaPO, Objective, SoftDPO
from rpo.train.safeguards import LoserGradient, WinnerPreserving, WithSFT

DISTURBANCE = 0.15
"""Of the poor editor's weights: noise of this share of each tensor's own spread."""
UNCHANGED = 0.2
"""How much the masked objective looks at what the edit left alone."""
SLOW, FAST = 2e-5, 1e-4
OWN = "as the recipe has it"
OBJECTIVES: dict[str, Callable[[float], Objective]] = {
    "DPO": lambda k: DiffusionDPO(k=k),
    "DPO with SFT x20": lambda k: WithSFT(of=DiffusionDPO(k=k), weight=20.0),
    "DPO, loser gradient x0.1": lambda k: LoserGradient(of=DiffusionDPO(k=k), scale=0.1),
    "SDPO": lambda k: WinnerPreserving(of=DiffusionDPO(k=k)),
    "SFT": lambda k: SFT(),
    "DPO, soft labels": lambda k: SoftDPO(k=k, temperature=1.0),
    "DPO, masked": lambda k: DiffusionDPO(k=k),
    "KTO": lambda k: DiffusionKTO(k=k),
    "MaPO": lambda k: MaPO(weight=k),
}
K = (20.0, 200.0)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "DPO, soft labels": K[1:],
    "DPO, masked": K[1:],
    "DPO, loser gradient x0.1": K[1:],
    "MaPO": (1.0,),
    "SFT": (0.0,),
}
"""Values of k, or of what takes its place, where they are not all of `K`."""


@dataclass(frozen=True, kw_only=True)
class ValidationCaptions:
    """Captions of the held-out tenth that no seed's test asks for."""

    count: int
    tested: tuple[int, ...]

    def prompts(self, seed: int) -> list[str]:
        taken = {prompt for tested in self.tested for prompt in HeldOutCaptions(count=400).prompts(tested)}
        return [prompt for prompt in HeldOutCaptions(count=4 * self.count).prompts(9000) if prompt not in taken][: self.count]

    def check(self, prompt: str) -> None:
        HeldOutCaptions(count=1).check(prompt)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its measurement."""

    objective: str
    lr: float
    k: float
    seed: int
    pairs: Path
    folder: Path
    tested: tuple[int, ...] | None = None
    """Seeds whose test captions are to be kept away from; None measures on the seed's own test captions."""

    def recipe(self) -> Recipe:
        recipe = shapes().with_seed(self.seed)
        if self.objective == OWN:
            train = recipe.train
        else:
            masked = {"unchanged_weight": UNCHANGED} if self.objective == "DPO, masked" else {}
            train = replace(recipe.train, objective=OBJECTIVES[self.objective](self.k), lr=self.lr, ema_decay=None, **masked)
        assert recipe.evaluate is not None
        evaluate = recipe.evaluate
        if self.tested is not None:
            evaluate = replace(evaluate, prompts=ValidationCaptions(count=200, tested=self.tested), references=None)
        return replace(recipe, train=train, evaluate=evaluate)


def measured(cell: Cell) -> dict[str, Any]:
    """Trains and evaluates, or reads what is there already."""
    done = cell.folder / "result.json"
    if not done.exists():
        console, recipe = Console(stderr=True, quiet=True), cell.recipe()
        cache = cell.pairs.parent / "train-cache"  # files named by content: whoever needs the same finds it
        if cache.exists() and not (cell.folder / "train").exists():
            shutil.copytree(cache, cell.folder / "train" / "cache", copy_function=os.link)
        with open_run(cell.folder, resume=True) as run:
            workflow.tune(recipe, run, console, pairs_file=cell.pairs, resume=True, allow_fingerprint=True)
            workflow.compare(recipe, run, console)
        lines = [json.loads(line) for line in (cell.folder / "train" / "metrics.jsonl").read_text().splitlines()]
        alarm = next((f"{line['alarm']} (step {line['step']})" for line in lines if line.get("alarm")), "silent")
        numbers = workflow.read_summary(cell.folder)["evaluation"]
        kept = {name: numbers[name] for name in ("fully_correct", "quality")}
        drift = lines[-1].get("held_out_chosen_over_reference")
        write_text(done, json.dumps(kept | {"alarm": alarm, "chosen_over_reference": drift, "rows": rows_of(cell.folder)}) + "\n")
        cache.mkdir(exist_ok=True)
        for file in (cell.folder / "train" / "cache").iterdir():
            with suppress(FileExistsError):
                os.link(file, cache / file.name)
        for part in ("train/weights", "train/checkpoints", "train/cache", "evaluation"):
            shutil.rmtree(cell.folder / part)
    return json.loads(done.read_text())


def rows_of(folder: Path) -> dict[str, list[float]]:
    """Fully correct or not, caption by caption."""
    from rpo.evaluate.rows import read_rows

    return {model: [row.metrics["fully_correct"] for row in rows] for model, rows in read_rows(folder / "evaluation").items()}


def curated(recipe: Recipe, folder: Path) -> Path:
    with open_run(folder, resume=True) as run:
        if not (folder / workflow.PAIRS).exists():
            workflow.curate(recipe, run, Console(stderr=True))
    return folder / workflow.PAIRS


def with_poor_editor(recipe: Recipe, out: Path) -> Recipe:
    curate = recipe.curate
    assert curate is not None
    editor, folder = curate.edit.editor, out / "poor-editor"
    if not folder.exists():
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(editor.models()[0], safety_checker=None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.add_(DISTURBANCE * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
        pipeline.save_pretrained(folder)
    label = replace(curate.label, rule="trust_edit", rejected_side="original")
    return replace(recipe, curate=replace(curate, edit=replace(curate.edit, editor=replace(editor, model=str(folder))), label=label))


def grid(out: Path, pairs: Path, seeds: Sequence[int]) -> list[Cell]:
    own = shapes().train.lr
    cells = [Cell(objective=OWN, lr=own, k=0.0, seed=seeds[0], pairs=pairs, folder=out / "search" / "own", tested=tuple(seeds))]
    for name in OBJECTIVES:
        for lr, k in itertools.product((SLOW, FAST), STRENGTHS.get(name, K)):
            folder = out / "search" / f"{name.replace(' ', '-').replace(',', '')}-lr{lr:g}-k{k:g}"
            cells.append(Cell(objective=name, lr=lr, k=k, seed=seeds[0], pairs=pairs, folder=folder, tested=tuple(seeds)))
    return cells


def spread(parts: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean difference over all seeds' captions and its 95 % interval: captions and seeds are drawn anew, captions within a seed."""
    differences = [np.subtract(part["rows"]["tuned"], part["rows"]["base"]) for part in parts]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        seeds = rng.integers(len(differences), size=len(differences))
        means.append(np.mean([rng.choice(differences[seed], len(differences[seed])).mean() for seed in seeds]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def ready(threads: int) -> None:
    from rpo.workflow.progress import quiet

    torch.set_num_threads(threads)
    quiet()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="cells at once, which share the CPU's cores")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    out, seeds = options.out, options.seeds
    ready(os.cpu_count() or 1)
    pairs = {seed: curated(shapes().with_seed(seed), out / f"curation-seed{seed}") for seed in seeds}
    poor = curated(with_poor_editor(shapes().with_seed(seeds[0]), out), out / "curation-poor")
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=ready, initargs=(threads,)) as pool:
        searched = grid(out, pairs[seeds[0]], seeds)
        best: dict[str, tuple[float, Cell]] = {}
        print("| objective | lr | k | validation: tuned less base, points | quality | alarm |\n|---|---|---|---|---|---|")
        for cell, result in zip(searched, pool.map(measured, searched), strict=True):
            gain = result["fully_correct"]["difference"]
            quality = result["quality"]["difference"]
            print(f"| {cell.objective} | {cell.lr:g} | {cell.k:g} | {100 * gain:+.1f} | {quality:+.3f} | {result['alarm']} |", flush=True)
            if cell.objective not in best or gain > best[cell.objective][0]:
                best[cell.objective] = gain, cell
        chosen = [cell for _, cell in best.values()]
        final = [
            replace(cell, seed=seed, pairs=pairs[seed], folder=out / f"seed{seed}" / cell.folder.name, tested=None)
            for cell in chosen
            for seed in seeds
        ]
        ruin = [replace(cell, pairs=poor, folder=out / "poor" / cell.folder.name, tested=None) for cell in chosen]
        ruined = list(pool.map(measured, ruin))
        results = list(pool.map(measured, final))
    print("\n| objective | lr, k | tuned less base, points, by seed | mean [95 %] | quality | chosen error over the reference | alarm |")
    print("|---|---|---|---|---|---|---|")
    for number, cell in enumerate(chosen):
        mine = results[number * len(seeds) : (number + 1) * len(seeds)]
        mean, low, high = (100 * value for value in spread(mine))
        gains = ", ".join(f"{100 * part['fully_correct']['difference']:+.1f}" for part in mine)
        quality = np.mean([part["quality"]["difference"] for part in mine])
        drifts = [part["chosen_over_reference"] for part in mine if part["chosen_over_reference"] is not None]
        alarms = sum(part["alarm"] != "silent" for part in mine)
        print(
            f"| {cell.objective} | {cell.lr:g}, {cell.k:g} | {gains} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] | {quality:+.3f} "
            f"| {np.mean(drifts):+.5f} | {alarms} of {len(mine)} |"
        )
    print("\n| objective, on pairs that invite ruin | lr, k | tuned less base, points [95 %] | quality | alarm |\n|---|---|---|---|---|")
    for cell, part in zip(chosen, ruined, strict=True):
        low, high = part["fully_correct"]["ci95"]
        gain, quality = part["fully_correct"]["difference"], part["quality"]["difference"]
        told = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        print(f"| {cell.objective} | {cell.lr:g}, {cell.k:g} | {told} | {quality:+.3f} | {part['alarm']} |")


if __name__ == "__main__":
    main()
