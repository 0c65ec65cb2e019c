"""From weights to numbers and pictures."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rpo.config import Evaluation, Recipe, Sampler
from rpo.curate.fingerprints import canonical, digest, model_identity
from rpo.curate.metering import EVALUATE, connections_closed, spent_lines
from rpo.curate.select import planned_prompts
from rpo.data.atomic import MANIFEST, check_manifest
from rpo.data.images import encode_as
from rpo.data.ledger import LEDGER, spent
from rpo.data.pairs import Pair
from rpo.data.readers import load_pairs
from rpo.data.records import read_record
from rpo.data.run_folder import RunFolder
from rpo.errors import disk_errors
from rpo.evaluate.judges import ScorerJudge
from rpo.evaluate.run import evaluate
from rpo.evaluate.tasks import Task, prompt_set
from rpo.models.diffusers_denoiser import LORA_FILE
from rpo.protocols import Comparer
from rpo.train.state import read_config
from rpo.workflow.curation import Caps
from rpo.workflow.folder import PAIRS, check_drawn_by, read_summary, read_weights, understood_prompts, update_summary
from rpo.workflow.progress import bars_of, reporter

_RESTORE = "Restore the folder, or give another model."
_JUDGED_PAIRS = 64
"""Pairs in memory when a judge looks at them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def _samplers(recipe: Recipe, run: RunFolder, models: Sequence[str]) -> dict[str, Sampler]:
    """The models to compare, by name. Raises `ValueError` for a wrong NAME=MODEL."""
    if not models:
        return {"base": recipe.generator, "tuned": _tuned(recipe, run)}
    samplers: dict[str, Sampler] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name or not model or name in samplers:
            raise ValueError(f"--models takes NAME=MODEL, each name once, got {text!r}")
        folder = Path(model)
        if model == "base":
            samplers[name] = recipe.generator
        elif (folder / "train" / "weights").is_dir():
            samplers[name] = recipe.generator.tuned(read_weights(RunFolder(folder)))
        elif (folder / "model_index.json").is_file() or (folder / LORA_FILE).is_file():
            if "files" in (read_record(folder / MANIFEST, _RESTORE) or {}):  # another tool's manifest is none of ours
                check_manifest(folder, _RESTORE)
            samplers[name] = recipe.generator.tuned(folder)
        elif _HUB_ID.fullmatch(model) and not folder.exists():
            samplers[name] = recipe.generator.other(model)
        else:
            raise ValueError(
                f"--models {name}={model}: give `base`, a run folder with tuned weights, a folder of a pipeline or with {LORA_FILE}, "
                "or a pipeline of the Hub as owner/name or owner/name@revision"
            )
    return samplers


def _tuned(recipe: Recipe, run: RunFolder) -> Sampler:
    """What the run tuned. Raises `ValueError` where the recipe's generator draws with another model than that."""
    weights, model = read_weights(run), read_config(run.path / "train").get("model")
    if model is not None:
        check_drawn_by(recipe.generator, model)
    return recipe.generator.tuned(weights)


def _training_pairs(folder: Path, console: Console) -> list[Pair]:
    """What a run was tuned on: its own pairs or the file that was brought. Says so if that is gone."""
    brought = read_summary(folder).get("training", {}).get("pairs")
    path = Path(brought or folder / PAIRS)
    if path.exists():
        return load_pairs(path)[0]
    if brought:
        console.print(f"warning: {path} is gone, which {folder} was tuned on: its prompts and rewards are not checked", highlight=False)
    return []


def _runs(run: RunFolder, models: Sequence[str], others: Sequence[Path]) -> list[Path]:
    """The run, `others`, and every run that is compared: what the models were tuned in."""
    named = [Path(text.partition("=")[2]) for text in models]
    return list(dict.fromkeys([run.path, *others, *(folder for folder in named if (folder / "train" / "weights").is_dir())]))


def _trained_on(runs: Sequence[Path], console: Console) -> tuple[list[Pair], set[str], set[str]]:
    """The first run's pairs; prompts that any of the runs has seen; rewards that chose the pairs of any."""
    pairs = {folder: _training_pairs(folder, console) for folder in runs}
    every = [pair for own in pairs.values() for pair in own]
    seen = {prompt for folder in runs for prompt in planned_prompts(folder)} | {pair.prompt for pair in every}
    return pairs[runs[0]], seen, {reward for pair in every for reward in json.loads(pair.scores)}


def _judges(evaluation: Evaluation) -> dict[str, Any]:
    judges: dict[str, Any] = {name: config.build() for name, config in evaluation.judges}
    return judges | {name: ScorerJudge(name, config.build()) for name, config in evaluation.scorers}


def _asked_for_pairs(evaluation: Evaluation, runs: Sequence[Path]) -> set[str]:
    """Judges that a model is asked for which was asked for the pairs of a run, as critic or otherwise: they repeat themselves."""
    asked = {line.model for folder in runs for line in spent(folder / LEDGER) if line.purpose != EVALUATE}
    return {name for name, config in (*evaluation.judges, *evaluation.scorers) if asked & set(config.models())}


def _tell_costs(run: RunFolder, console: Console) -> None:
    for line in spent_lines([line for line in spent(run.path / LEDGER) if line.purpose == EVALUATE], pairs=0):
        console.print(line, highlight=False)


def _of_public_set(task: str, found: int, console: Console) -> int:
    """How many images of each prompt are usual. Says so if the set is not whole."""
    known, said = prompt_set(task, found)
    if said:
        console.print(said, highlight=False)
    return known.images_per_prompt


def compare(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    *,
    task: str | None = None,
    models: Sequence[str] = (),
    images_per_prompt: int | None = None,
    allow_overlap: bool = False,
    trained_on: Sequence[Path] = (),
    caps: Caps | None = None,
) -> None:
    """Base against tuned, or the first of `models` (NAME=MODEL) against the others, on prompts that the training has not seen.

    `task` names a public set that the prompts are, `trained_on` are further run folders whose prompts and rewards the models have seen.
    """
    evaluation = recipe.evaluate
    if evaluation is None:
        raise ValueError(f"the recipe {recipe.name!r} has no judge, so there is nothing to evaluate with")
    samplers = _samplers(recipe, run, models)
    prompts = understood_prompts(evaluation.prompts, evaluation.seed, prompts_file)
    pairs, seen, rewards = _trained_on(runs := _runs(run, models, trained_on), console)
    judges = _judges(accounted := (caps or Caps()).metered(evaluation, run.path))
    first = next(iter(judges))
    configs: dict[str, Any] = {**samplers, **dict(evaluation.judges), **dict(evaluation.scorers)}
    usual = evaluation.seeds_per_prompt if task is None else _of_public_set(task, len(prompts), console)
    name = f"{task or (prompts_file.stem if prompts_file else recipe.name)}-{evaluation.seed}"
    asked = _asked(name, prompts, images_per_prompt or usual)
    began = time.monotonic()
    with connections_closed(accounted), bars_of(console) as bars:
        numbers = evaluate(
            asked,
            {name: sampler.build for name, sampler in samplers.items()},
            judges,
            run.path / "evaluation",
            fingerprints={name: _identity(config) for name, config in configs.items()},
            curation_prompts=seen,
            labelled_by=rewards | _asked_for_pairs(evaluation, runs),
            allow_overlap=allow_overlap,
            batch_size=evaluation.batch_size,
            reference_features=_reference_features(evaluation, first, judges[first]),
            seed=evaluation.seed,
            progress=reporter(bars),
        )
        headline = _headline(evaluation.headline, next(iter(numbers.values())), judges)
        preferred = _judge_prefers_edit(pairs, judges.get(headline, judges[first]), headline)  # a reward's metric bears its name
    _tell_costs(run, console)
    update_summary(
        run.path,
        {
            "evaluation": numbers.get("tuned") or next(iter(numbers.values())),
            "comparisons": numbers,
            "pairs": {"judge_prefers_edit": preferred},
            "recipe": recipe.name,
            "seed": read_summary(run.path).get("seed", evaluation.seed),  # a run on pairs that were brought has had no curation
            "headline": headline,
        },
        {"evaluate": max(time.monotonic() - began, read_summary(run.path)["seconds"].get("evaluate", 0.0))},
    )


def _reference_features(evaluation: Evaluation, name: str, judge: Any) -> tuple[str, np.ndarray] | None:
    return None if evaluation.references is None else (name, judge.features(evaluation.references.images()))


def _asked(name: str, prompts: Mapping[str, str | None], images_per_prompt: int) -> Task:
    kinds = {prompt: kind for prompt, kind in prompts.items() if kind}
    return Task.of(name, prompts, seeds_per_prompt=images_per_prompt, categories=kinds)


def _headline(wanted: str, numbers: Mapping[str, Mapping[str, Any]], judges: Mapping[str, Any]) -> str:
    """The wanted one, or the first of single images that did not choose the training pairs; what was asked for is no evidence."""
    compared = [name for name in numbers if "ci95" in numbers[name] and not isinstance(judges.get(name), Comparer)]
    evidence = [name for name in compared if "used_in_labelling" not in numbers[name]]
    return wanted if wanted in evidence or not evidence else evidence[0]


def _identity(config: Any) -> str:
    models = {model: model_identity(model) for model in config.models()}
    return digest(canonical(config, models))


def _judge_prefers_edit(pairs: Sequence[Pair], judge: Any, metric: str) -> float | None:
    """Share of edited pairs in which the judge's metric is higher for the edit than for its opponent, a tie as half."""
    sides = {pair.id: [json.loads(pair.provenance).get(side, "") for side in ("chosen", "rejected")] for pair in pairs}
    pairs = [pair for pair in pairs if any(side.startswith("edited") for side in sides[pair.id])]
    if not pairs:
        return None
    edit_won = [sides[pair.id][0].startswith("edited") for pair in pairs]
    measured: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for start in range(0, len(pairs), _JUDGED_PAIRS):
        part = pairs[start : start + _JUDGED_PAIRS]
        for side, values in measured.items():
            images = [getattr(pair, side).decode() for pair in part]
            values += [m[metric] for m in judge.measure(images, [pair.prompt for pair in part])]
    chosen, rejected = np.array(measured["chosen"]), np.array(measured["rejected"])
    preferred = (1 + np.sign(chosen - rejected)) / 2
    return float(np.where(edit_won, preferred, 1 - preferred).mean())


def generate(recipe: Recipe, run: RunFolder | None, prompt: str, seed: int, out: Path) -> None:
    """A picture of the prompt, in the format that `out` ends in; with a run, base beside tuned from the same noise."""
    encode_as(np.zeros((1, 1, 3), dtype=np.uint8), out.suffix)  # refuses an ending before anything is drawn
    if recipe.understands is not None:
        recipe.understands(prompt)
    samplers = [recipe.generator] + ([_tuned(recipe, run)] if run else [])
    pictures = [sampler.build().generate([prompt], [seed])[0] for sampler in samplers]
    gap = np.full((pictures[0].shape[0], 4, 3), 255, dtype=np.uint8)
    row = pictures[0] if len(pictures) == 1 else np.concatenate([pictures[0], gap, pictures[1]], axis=1)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_as(row, out.suffix))


def results_tables(summary: Mapping[str, Any], first: str = "base") -> list[Table]:
    """The numbers of an evaluation, none where there was none: a table for each model against the first, the headline on top."""
    tables: list[Table] = []
    for model, numbers in summary.get("comparisons", {}).items():
        title = f"{summary['recipe']}, seed {summary['seed']}: {first} against {model}"
        table = Table(title=title, title_justify="left")
        for column in ("metric", first, model, "difference", "95 % interval", "n"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        order = sorted(
            numbers, key=lambda name: (name != summary["headline"], "used_in_labelling" in numbers[name], list(numbers).index(name))
        )
        for name in order:
            value = numbers[name]
            interval = "[{:+.3f}, {:+.3f}]".format(*value["ci95"]) if "ci95" in value else ""
            cells = (f"{value['base']:.3f}", f"{value['tuned']:.3f}", f"{value['difference']:+.3f}", interval, str(value["n"]))
            shown = f"{name} (used in labelling)" if "used_in_labelling" in value else name
            table.add_row(shown, *cells, style="bold" if name == summary["headline"] else None)
        tables.append(table)
    return tables
