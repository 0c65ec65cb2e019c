"""From weights to numbers and pictures."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rpo.accounting.ledger import LEDGER, spent
from rpo.accounting.metering import EVALUATE, connections_closed, spent_lines
from rpo.api.curation import Caps
from rpo.api.folder import PAIRS, check_base, read_summary, read_weights, understood_prompts, update_summary
from rpo.core.atomic import MANIFEST, check_manifest
from rpo.core.hashing import canonical, digest, model_identity
from rpo.core.progress import bars_of, reporter
from rpo.core.records import read_record
from rpo.core.run_folder import RunFolder
from rpo.curation.select import planned_prompts
from rpo.data.images import encode_as
from rpo.data.pairs import Pair
from rpo.data.readers import load_pairs
from rpo.errors import RowError, disk_errors
from rpo.evaluation.judges import ScorerJudge, check_headline, declared_metrics, is_compared, metric_of, value_of
from rpo.evaluation.rows import read_index, shard_seconds
from rpo.evaluation.run import evaluate
from rpo.evaluation.tables import few_prompts, in_order, loss_sentence, shown, shown_change, shown_interval
from rpo.evaluation.tasks import Task, prompt_set
from rpo.models.diffusers_denoiser import LORA_FILE
from rpo.protocols import Comparer, Judge, Preflight
from rpo.recipe import Evaluation, Recipe, Sampler

_RESTORE = "Restore the folder, or give another model."
_JUDGED_PAIRS = 64
"""Pairs in memory when a judge looks at them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def check_evaluation(recipe: Recipe) -> None:
    """Raises `ValueError` if the recipe's headline is a metric that nobody measures."""
    if recipe.evaluate is not None:
        check_headline(recipe.evaluate.headline, recipe.evaluate.judges, recipe.evaluate.scorers)


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
            check_base(recipe.generator, folder, f"--models {text}")
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
    """The run's tuned model. Raises `ValueError` where the recipe's generator draws with another base than was tuned."""
    weights = read_weights(run)
    check_base(recipe.generator, run.path)
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


def _judges(evaluation: Evaluation) -> dict[str, Callable[[], Any]]:
    """Builders by name."""
    judges: dict[str, Callable[[], Any]] = {name: config.build for name, config in evaluation.judges}
    return judges | {name: _scorer_judge(name, config) for name, config in evaluation.scorers}


def _scorer_judge(name: str, config: Any) -> Callable[[], ScorerJudge]:
    return lambda: ScorerJudge(name, config.build())


def _preflight(judges: Mapping[str, Callable[[], Any]], prompt: str) -> None:
    """Builds each judge once and lets it go: one that cannot be loaded, or whose server is of no use, is found before any image is made."""
    for build in judges.values():
        judge = build()
        inner = judge.scorer if isinstance(judge, ScorerJudge) else judge
        if isinstance(inner, Preflight):
            inner.check(prompt)


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
    check_evaluation(recipe)
    samplers = _samplers(recipe, run, models)
    prompts = understood_prompts(evaluation.prompts, evaluation.seed, prompts_file)
    pairs, seen, rewards = _trained_on(runs := _runs(run, models, trained_on), console)
    judges = _judges(accounted := (caps or Caps()).metered(evaluation, run.path))
    configs: dict[str, Any] = {**samplers, **dict(evaluation.judges), **dict(evaluation.scorers)}
    usual = evaluation.seeds_per_prompt if task is None else _of_public_set(task, len(prompts), console)
    name = f"{task or (prompts_file.stem if prompts_file else recipe.name)}-{evaluation.seed}"
    with connections_closed(accounted), bars_of(console) as bars:
        _preflight(judges, next(iter(prompts)))
        numbers = evaluate(
            _asked(name, prompts, images_per_prompt or usual),
            {name: sampler.build for name, sampler in samplers.items()},
            judges,
            run.path / "evaluation",
            fingerprints={name: _identity(config) for name, config in configs.items()},
            curation_prompts=seen,
            labelled_by=rewards | _asked_for_pairs(evaluation, runs),
            declared=declared_metrics(evaluation.judges, evaluation.scorers)[0],
            headline=evaluation.headline,
            allow_overlap=allow_overlap,
            batch_size=evaluation.batch_size,
            references=None if evaluation.references is None else evaluation.references.images,
            seed=evaluation.seed,
            progress=reporter(bars),
        )
        headline = _headline(evaluation.headline, run.path / "evaluation", console)
        lower = metric_of(next(iter(numbers.values())).get(headline, {})).better == "lower"
        preferred = _judge_prefers_edit(pairs, judges, headline, lower=lower)
    _tell_costs(run, console)
    found = {
        "evaluation": numbers.get("tuned") or next(iter(numbers.values())),
        "comparisons": numbers,
        "baseline": next(iter(samplers)),
        "pairs": {"judge_prefers_edit": preferred},
        "recipe": recipe.name,
        "headline": headline,
    }
    _tell(run, found, evaluation.seed)


def _tell(run: RunFolder, found: Mapping[str, Any], seed: int) -> None:
    """Enters the numbers in the summary, and the time that their images and measures took, whenever they were made."""
    summary = read_summary(run.path)
    own = {"seed": summary.get("seed", seed)}  # a run on pairs that were brought has had no curation
    seconds, known = shard_seconds(run.path / "evaluation")
    if not known:  # shards of an earlier version
        seconds = max(seconds, summary["seconds"].get("evaluate", 0.0))
    update_summary(run.path, {**found, **own}, {"evaluate": seconds})


def _headline(wanted: str, folder: Path, console: Console) -> str:
    """The metric that decided. Says so where it is another one than was wanted."""
    index = read_index(folder)
    assert index is not None, "it was just written"
    if index["headline"] != wanted:
        why = "its reward chose the training pairs" if wanted in index["used_in_labelling"] else "it is no evidence here"
        console.print(f"headline: {index['headline']} in place of {wanted}, because {why}", highlight=False)
    return index["headline"]


def _asked(name: str, prompts: Mapping[str, str | None], images_per_prompt: int) -> Task:
    kinds = {prompt: kind for prompt, kind in prompts.items() if kind}
    return Task.of(name, prompts, seeds_per_prompt=images_per_prompt, categories=kinds)


def _identity(config: Any) -> str:
    models = {model: model_identity(model) for model in config.models()}
    return digest(canonical(config, models))


def _judge_prefers_edit(pairs: Sequence[Pair], judges: Mapping[str, Callable[[], Any]], metric: str, *, lower: bool) -> float | None:
    """Share of edited pairs in which the headline is better (higher, or `lower`) for the edit than for its opponent, a tie as half.

    Only pairs of which both sides have the metric count; `None` if there are none.
    """
    sides = {pair.id: [json.loads(pair.provenance).get(side, "") for side in ("chosen", "rejected")] for pair in pairs}
    edited = [pair for pair in pairs if any(side.startswith("edited") for side in sides[pair.id])]
    for build in judges.values() if edited else ():
        preferred: list[float] = []
        judge = build()
        for start in range(0, len(edited), _JUDGED_PAIRS):
            part = edited[start : start + _JUDGED_PAIRS]
            for pair, chosen_wins in zip(part, _chosen_wins(part, judge, metric, -1 if lower else 1), strict=True):
                if chosen_wins is not None:
                    preferred.append(chosen_wins if sides[pair.id][0].startswith("edited") else 1 - chosen_wins)
            if not preferred:
                break  # this judge does not measure it
        if preferred:
            return float(np.mean(preferred))
    return None


def _chosen_wins(pairs: Sequence[Pair], judge: Judge | Comparer, metric: str, sign: int) -> list[float | None]:
    """1 where the chosen side is better by the metric, 0.5 for a tie, 0 where the rejected is; `None` where it was not measured."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = [pair.chosen.decode() for pair in pairs], [pair.rejected.decode() for pair in pairs]
    if isinstance(judge, Comparer):
        said = judge.compare(chosen, rejected, prompts)
        return [None if isinstance(value, RowError) else (1 + float(np.sign(value - 0.5))) / 2 for value in said]
    after, before = ([own.get(metric) for own in judge.measure(side, prompts)] for side in (chosen, rejected))
    return [None if a is None or b is None else (1 + sign * float(np.sign(a - b))) / 2 for a, b in zip(after, before, strict=True)]


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


def results_tables(summary: Mapping[str, Any]) -> list[Table | str]:
    """The numbers of an evaluation, none where there was none: a table for each model against the first, the headline on top."""
    tables: list[Table | str] = []
    first = summary.get("baseline", "base")
    for model, numbers in summary.get("comparisons", {}).items():
        title = f"{summary['recipe']}, seed {summary['seed']}: {first} against {model}"
        table = Table(title=title, title_justify="left", caption=_caption(numbers), caption_justify="left")
        for column in ("metric", first, model, "difference", "95 % interval", "p (Holm)", "n"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for name in in_order(numbers, summary["headline"]):
            value = numbers[name]
            means = [shown(value_of(value, of, role), value) for of, role in ((first, "base"), (model, "tuned"))]
            interval = shown_interval(value) if is_compared(value) else ""
            p = f"{value['p_holm']:.2g}" if "p_holm" in value else ""
            mark = f"{name} (used in labelling)" if "used_in_labelling" in value else name
            cells = (mark, *means, shown_change(value["difference"], value), interval, p, str(value["n"]))
            table.add_row(*cells, style="bold" if name == summary["headline"] else None)
        tables += [table, *([worse] if (worse := loss_sentence(numbers, summary["headline"])) else [])]
    return tables


def _caption(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """What the rows that are no judge's metric are, and how intervals of few prompts are made."""
    judged = next((own["judge"] for own in numbers.values() if "judge" in own), None)
    words = {"drift": "distance of each image from the first model's", "diversity": "distance of one prompt's images from each other",
             "frechet": "distance of all images from good ones, lower is better"}  # fmt: skip
    known = [f"{name}: {said}" for name, said in words.items() if name in numbers]
    of_features = [f"{'; '.join(known)}; on the features of {judged or 'the first judge'}."] if known else []
    return " ".join([*of_features, *([said] if (said := few_prompts(numbers.values())) else [])])
