"""Several rounds: each samples from the policy of the last, makes pairs of that, and tunes on them.

rounds/1/ rounds/2/ …   a run folder each; policy/ is the pipeline it leaves, validation/ what rounds are chosen by
train/weights           those of the round that did best on validation prompts
evaluation/             the base model against the policy of every round, on test prompts
summary.json            also "rounds", a line each
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rpo.api.curation import Caps, curate
from rpo.api.evaluation import compare
from rpo.api.folder import ROUNDS, read_summary, read_weights, understood_prompts, update_summary, write_recipe
from rpo.api.training import tune
from rpo.core.atomic import MANIFEST, atomic_folder, check_manifest
from rpo.core.run_folder import RunFolder
from rpo.curation.select import planned_prompts
from rpo.errors import RpoError
from rpo.evaluation.judges import DIVERSITY, DRIFT, check_headline, metric_of, value_of
from rpo.models.lora import merge_lora
from rpo.recipe import Curation, GivenPrompts, Recipe, Sampler

Reference = Literal["previous", "first"]
IMAGES_PER_PROMPT = 2
"""In the test, for diversity."""


def run_rounds(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    *,
    caps: Caps | None = None,
    rounds: int,
    reference: Reference = "previous",
    allow_fingerprint: bool = False,
) -> None:
    """Carries out up to `rounds` rounds, the prompts dealt out among them; stops after one that gains nothing on validation prompts.

    `caps` hold for each round alone.
    """
    curation, evaluation = recipe.curate, recipe.evaluate
    if not isinstance(curation, Curation) or evaluation is None or evaluation.validation is None:
        raise ValueError(f"the recipe {recipe.name!r} needs a curation, judges and validation prompts for rounds; run it without --rounds")
    check_headline(evaluation.headline, evaluation.judges, ())  # rounds are chosen by judges alone
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}; one round is a run without --rounds")
    if planned_prompts(run.path):
        raise RpoError(f"{run.path} holds a run of one round. Go on with it without --rounds, begin anew with --overwrite, or elsewhere.")
    prompts = list(understood_prompts(curation.prompts, curation.seed, prompts_file))
    if len(prompts) < rounds:
        raise ValueError(f"{rounds} rounds need as many prompts, got {len(prompts)}")
    write_recipe(run, recipe)
    policies: list[Path] = []
    gains: list[float] = []
    while len(policies) < rounds and (len(gains) < 2 or gains[-1] > gains[-2]):
        number = len(policies) + 1
        folder = run.path / ROUNDS / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        console.rule(f"round {number} of {rounds}")
        dealt = prompts[len(policies) * len(prompts) // rounds : number * len(prompts) // rounds]
        current = _of_round(recipe, curation, dealt, policies[-1] if policies else None, reference)
        inner = RunFolder(folder)
        curate(current, inner, console, caps=caps)
        tune(current, inner, console, resume=True, allow_fingerprint=allow_fingerprint)
        policies.append(_policy(current, inner))
        gains.append(_validated(recipe, policies, folder, console))
        _tell(recipe, run, policies, gains, console)
    if len(policies) < rounds:
        console.print(f"round {len(policies)} gained nothing on validation prompts: stopped", highlight=False)
    best = gains.index(max(gains))
    _take(policies[best], run)
    _tell(recipe, run, [policies[best], *policies[:best], *policies[best + 1 :]], gains, console)


def _of_round(recipe: Recipe, curation: Curation, prompts: Sequence[str], policy: Path | None, reference: Reference) -> Recipe:
    curation = replace(curation, prompts=GivenPrompts(texts=tuple(prompts)))
    if policy is None:
        return replace(recipe, curate=curation)
    generator = curation.source.generator
    if not isinstance(generator, Sampler):
        raise ValueError(f"the recipe {recipe.name!r} takes its sources from a {type(generator).__name__}, which cannot take tuned weights")
    source = replace(curation.source, generator=generator.tuned(policy))
    first = recipe.train.model if reference == "first" else None
    train = replace(recipe.train, model=str(policy), reference_model=first)
    return replace(recipe, generator=recipe.generator.tuned(policy), curate=replace(curation, source=source), train=train)


def _policy(recipe: Recipe, run: RunFolder) -> Path:
    """The pipeline that a round leaves: the tuned one, or what was tuned with the LoRA merged into it."""
    weights, merged = read_weights(run), run.path / "policy"
    if (weights / "model_index.json").exists():
        return weights
    if not merged.exists():
        merge_lora(recipe.train.model, weights, merged)
    check_manifest(merged, "Remove that folder and go on with --resume: it is made again.")
    return merged


def _validated(recipe: Recipe, policies: Sequence[Path], folder: Path, console: Console) -> float:
    """By how much the newest policy is better than the base model on validation prompts."""
    evaluation = recipe.evaluate
    assert evaluation is not None and evaluation.validation is not None
    run = RunFolder(folder / "validation")
    run.path.mkdir(exist_ok=True)
    validating = replace(evaluation, prompts=evaluation.validation, scorers=(), references=None)
    compare(replace(recipe, evaluate=validating), run, console, models=("base=base", f"tuned={policies[-1]}"))
    gained = read_summary(run.path)["comparisons"]["tuned"][evaluation.headline]
    return float(-gained["difference"] if metric_of(gained).better == "lower" else gained["difference"])


def _tell(recipe: Recipe, run: RunFolder, policies: Sequence[Path], gains: Sequence[float], console: Console) -> None:
    """Tests every policy so far, the first of them as the run's own, and writes what is known of the rounds."""
    evaluation = recipe.evaluate
    assert evaluation is not None
    named = {f"round_{_round_of(policy)}": policy for policy in policies}
    trained_on = [run.path / ROUNDS / str(_round_of(policy)) for policy in policies]
    models = ("base=base", *(f"{name}={policy}" for name, policy in named.items()))
    compare(recipe, run, console, models=models, images_per_prompt=IMAGES_PER_PROMPT, trained_on=trained_on)
    numbers = read_summary(run.path)["comparisons"]
    lines: list[dict[str, Any]] = []
    for name in sorted(named, key=lambda name: int(name.removeprefix("round_"))):
        number = int(name.removeprefix("round_"))
        own, told = read_summary(run.path / ROUNDS / str(number)), numbers[name]
        lines.append(
            {
                "round": number,
                "sources": own["funnel"][0]["rows_in"],
                "pairs": own["pairs_kept"],
                "fingerprint_auc": own["controls"]["fingerprint_auc"],
                "validation_gain": gains[number - 1],
                evaluation.headline: _means(told[evaluation.headline], name)
                | {key: told[evaluation.headline][key] for key in ("difference", "ci95", "n", "kind", "better")},
                DRIFT: _means(told[DRIFT], name)["tuned"] if DRIFT in told else None,
                DIVERSITY: _means(told[DIVERSITY], name) if DIVERSITY in told else None,
            }
        )
    update_summary(run.path, {"rounds": lines, "pairs_kept": sum(line["pairs"] for line in lines)}, {})


def _means(numbers: Mapping[str, Any], name: str) -> dict[str, float]:
    return {"base": value_of(numbers, "base", "base"), "tuned": value_of(numbers, name, "tuned")}


def _round_of(policy: Path) -> int:
    return int((policy.parent if policy.name == "policy" else policy.parents[1]).name)


def _take(policy: Path, run: RunFolder) -> None:
    """Leaves the policy where the weights of a run are looked for, by hard links."""
    with atomic_folder(run.path / "train" / "weights", manifest=True) as weights:
        shutil.copytree(policy, weights, copy_function=os.link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
