"""The commands: what each does, and the words that teach it. Heavy imports wait until a command is called."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rpo.cli.options import (
    CurateOptions,
    EvaluateOptions,
    GenerateOptions,
    RunAllOptions,
    ShowOptions,
    StudyOptions,
    TrainOptions,
    existing_folder,
    existing_run,
    run_folder,
)
from rpo.core.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after `rpo`."""

    call: Callable[[str, Sequence[str], Console], None]
    """Takes the word after the command, what follows it, and the console."""
    usage: str
    """What follows the command."""
    summary: str
    """One line for `rpo --help`."""
    teach: str
    """The paragraph of its own --help."""
    needs_argument: bool = True


@dataclass(frozen=True, kw_only=True)
class RecipeCommand:
    """One word after `rpo` that is followed by a recipe."""

    call: Callable[[Any, Any, Console], None]
    """Takes the options, the recipe with what was overridden, and the console."""
    options: type
    """Its own options; a field `seed` among them."""
    sections: tuple[str, ...]
    """Sections of the recipe that can be overridden field by field."""
    summary: str
    """One line for `rpo --help`."""
    teach: str
    """The paragraph of its own --help."""
    usage: str = "RECIPE"
    """What follows the command."""
    needs_argument: bool = True


def _run(options: Any, recipe: Any, console: Console) -> None:
    from rpo import api
    from rpo.core.run_folder import open_run
    from rpo.report.page import write_report

    api.check_drawn_by(recipe.generator, recipe.train.model)
    api.check_evaluation(recipe)
    recipe = _served(options, recipe)
    with open_run(run_folder(options, recipe), resume=options.resume, overwrite=options.overwrite) as run:
        if options.rounds == 1:
            _once(options, recipe, run, console)
        elif options.sources is not None or options.engine != "local":
            raise ValueError("--rounds samples from its own policies on the local engine; leave out --sources and --engine")
        elif options.max_cost is not None or options.max_calls is not None:
            raise ValueError("each round has its own account: --max-cost and --max-calls cannot be held over --rounds; leave them out")
        else:
            api.run_rounds(
                recipe,
                run,
                console,
                options.prompts,
                caps=_caps(options),
                rounds=options.rounds,
                reference=options.reference,
                allow_fingerprint=options.allow_fingerprint,
            )
        page = write_report(run.path)
        Terminal().print(*api.results_tables(api.read_summary(run.path)))
        Terminal(soft_wrap=True).print(f"report: {page}  (open it in any browser; it needs no network)")


def _once(options: Any, recipe: Any, run: Any, console: Console) -> None:
    from rpo import api
    from rpo.recipe import BroughtPrompts

    _caps(options).metered(recipe.evaluate, run.path)  # a price or a key that is missing is found before the first image
    _make_pairs(options, recipe, run, console)
    api.tune(recipe, run, console, resume=options.resume, overwrite=options.overwrite, allow_fingerprint=options.allow_fingerprint)
    if recipe.evaluate is None or isinstance(recipe.evaluate.prompts, BroughtPrompts):
        way = f"`rpo evaluate {recipe.name} --out {run.path} --prompts FILE` does"
        console.print(f"not evaluated: the recipe has no prompts that nothing was tuned on; {way}")
    else:
        api.compare(recipe, run, console, caps=_caps(options))


def _curate(options: Any, recipe: Any, console: Console) -> None:
    from rpo.core.run_folder import open_run

    recipe = _served(options, recipe)
    with open_run(run_folder(options, recipe), resume=options.resume, overwrite=options.overwrite) as run:
        _make_pairs(options, recipe, run, console)


def _make_pairs(options: Any, recipe: Any, run: Any, console: Console) -> None:
    from rpo import api
    from rpo.engine.run import Engine

    shares = {name: getattr(options, name) for name in ("stage_by_stage", "workers", "cpus", "gpus")}
    engine = Engine(kind=options.engine, **shares)
    where: dict[str, Any] = {"sources": options.sources, "edit_side": options.edit_side, "engine": engine}
    api.curate(recipe, run, console, options.prompts, _caps(options), **where)


def _served(options: Any, recipe: Any) -> Any:
    """The recipe with its models over a wire where --vlm-url and --vlm-model say."""
    from rpo import api

    if options.vlm_url is None and options.vlm_model is None:
        return recipe
    return replace(recipe, curate=api.served_by(recipe.curate, base_url=options.vlm_url, model=options.vlm_model))


def _caps(options: Any) -> Any:
    from rpo import api

    minutes = getattr(options, "max_time", None)
    return api.Caps(max_cost=options.max_cost, max_calls=options.max_calls, max_time_min=minutes, answers=options.answers)


def _train(options: Any, recipe: Any, console: Console) -> None:
    from rpo import api
    from rpo.core.run_folder import RunFolder, open_run
    from rpo.training.runtime.distributed import launched_rank

    folder = run_folder(options, recipe) if options.pairs else existing_folder(options, recipe)
    if options.dry_run:
        api.rehearse_tuning(recipe, options.pairs or folder / api.PAIRS, console)
        return
    first = launched_rank() == 0
    with open_run(folder, resume=True) if first else nullcontext(RunFolder(folder)) as run:
        if options.pairs and first:
            api.write_recipe(run, recipe)
        api.tune(
            recipe,
            run,
            console,
            pairs_file=options.pairs,
            resume=options.resume,
            overwrite=options.overwrite,
            allow_fingerprint=options.allow_fingerprint,
        )


def _evaluate(options: Any, recipe: Any, console: Console) -> None:
    from rpo import api
    from rpo.core.run_folder import open_run
    from rpo.recipes.dpo import judged_by_vlm

    if recipe.evaluate is not None and (options.vlm_url, options.vlm_model) != (None, None):
        recipe = replace(recipe, evaluate=judged_by_vlm(recipe.evaluate, base_url=options.vlm_url, model=options.vlm_model))
    with open_run(run_folder(options, recipe) if options.models else existing_folder(options, recipe), resume=True) as run:
        api.compare(
            recipe,
            run,
            console,
            options.prompts,
            task=options.task,
            models=options.models,
            images_per_prompt=options.images_per_prompt,
            allow_overlap=options.allow_overlap,
            caps=_caps(options),
        )
        Terminal().print(*api.results_tables(api.read_summary(run.path)))


def _study(options: Any, recipe: Any, console: Console) -> None:
    from rpo.study.run import study

    page = study(
        recipe,
        options.out or Path("runs") / f"{recipe.name}-study",
        console,
        quick=options.quick,
        arms=options.arms,
        workers=options.workers,
    )
    Terminal(soft_wrap=True).print(f"study: {page}  (open it in any browser; it needs no network)")


def _report(folder: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.report.page import write_report

    page = write_report(existing_run(folder))
    Terminal(soft_wrap=True).print(f"report: {page}  (open it in any browser; it needs no network)")


def _export(folder: str, arguments: Sequence[str], console: Console) -> None:
    from rpo import api
    from rpo.cli.options import ExportOptions, parse_options

    options = parse_options(f"export {folder}", ExportOptions, arguments)
    run = existing_run(folder)
    made = api.export(run, options.format, options.to, licence=options.license, overwrite=options.overwrite)
    console.print(f"wrote {made}")


def _export_lora(folder: str, arguments: Sequence[str], console: Console) -> None:
    from rpo import api
    from rpo.cli.options import export_lora_options, parse_options

    options = parse_options(f"export-lora {folder}", export_lora_options(), arguments)
    console.print(f"wrote {api.export_lora(existing_run(folder), options.layout, options.to, overwrite=options.overwrite)}")


def _push(folder: str, arguments: Sequence[str], console: Console) -> None:
    from rpo import api
    from rpo.cli.options import PushOptions, parse_options

    options = parse_options(f"push {folder}", PushOptions, arguments)
    address = api.push(existing_run(folder), options.to, private=not options.public, licence=options.license)
    Terminal(soft_wrap=True).print(f"pushed to {address}")


def _show(folder: str, arguments: Sequence[str], console: Console) -> None:
    from itertools import islice

    import tyro

    from rpo.engine.inspect import row_lines, stage_rows
    from rpo.engine.layers import stored_layers

    options = tyro.cli(ShowOptions, args=list(arguments), prog=f"rpo show {folder}")
    path = existing_run(folder)
    stage = options.stage or stored_layers(path)[-1].name
    output, shown = Terminal(), 0
    for row in islice(stage_rows(path, stage, options.kept, options.id), options.rows):
        shown += 1
        for name, text in row_lines(row):
            output.print(Text(f"{name:>18}  ", "bold"), end="")
            output.print(text.replace("\n", "\n" + " " * 20), soft_wrap=True)
        output.print()
    console.print(f"{shown} rows of stage {stage}")


def _generate(options: Any, recipe: Any, console: Console) -> None:
    from rpo import api
    from rpo.core.run_folder import open_run

    if options.out is None:
        api.generate(recipe, None, options.prompt, options.seed, options.image)
    else:
        with open_run(existing_folder(options, recipe), resume=True) as run:
            api.generate(recipe, run, options.prompt, options.seed, options.image)
    console.print(f"wrote {options.image}" + (" (base left, tuned right)" if options.out else ""))


def _doctor(name: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.cli.options import DoctorOptions, parse_options
    from rpo.doctor import Finding, examine

    options = parse_options("doctor", DoctorOptions, [name, *arguments] if name else [])
    if options.vlm_url is None:
        if options.vlm_model is not None:
            raise ValueError("--vlm-model names a model of the server that --vlm-url gives; give both")
        well = examine(Terminal())
    else:
        from rpo.recipes import server_checks

        well = examine(Terminal(), (Finding(*check) for check in server_checks(options.vlm_url, options.vlm_model)))
    if not well:
        raise SystemExit(1)


def _shapes(name: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.core.progress import quiet

    quiet()
    from rpo.shapes.training.run import main as shapes_main

    shapes_main(name, arguments, console)


COMMANDS: dict[str, Command | RecipeCommand] = {
    "run": RecipeCommand(
        call=_run,
        options=RunAllOptions,
        sections=("generator", "curate", "train", "evaluate"),
        summary="everything, from prompts to a tuned model and a report",
        teach="Runs the whole method: sources, critiques, instructions, edits, scores, labels and pairs; then Diffusion-DPO; then base "
        "against tuned on prompts that nothing was tuned on; then the report. A run that was stopped goes on with --resume.",
    ),
    "curate": RecipeCommand(
        call=_curate,
        options=CurateOptions,
        sections=("curate",),
        summary="make preference pairs: critique, instruct, edit, score, label",
        teach="Makes pairs.parquet in the run folder. Dropped rows are kept with their reason, every stage can be resumed, and a setting "
        "that changes results is refused on a folder that holds others.",
    ),
    "train": RecipeCommand(
        call=_train,
        options=TrainOptions,
        sections=("train",),
        summary="tune the model on the pairs of a run folder, or on --pairs FILE",
        teach="Looks at the pairs' health first (can a probe that never sees the prompt tell chosen from rejected?), then tunes. "
        "Weights are left in train/weights of the run folder: a LoRA for load_lora_weights, or a whole pipeline for from_pretrained.",
    ),
    "evaluate": RecipeCommand(
        call=_evaluate,
        options=EvaluateOptions,
        sections=("generator", "evaluate"),
        summary="base against tuned, or any models, on unseen prompts, with intervals",
        teach="All models draw every prompt from the same noise; judges that never labelled a pair measure the images. "
        "Differences come with 95 % intervals by bootstrap over prompts. What is measured stays on disk: one more model, judge or image "
        "per prompt costs nothing but itself. With --vlm-url or --vlm-model a vision-language model gives marks too, and says which of two "
        "images is better, asked in both orders. evaluation/rows.parquet holds every measure, evaluation/table.md the numbers.",
    ),
    "study": RecipeCommand(
        call=_study,
        options=StudyOptions,
        sections=(),
        summary="is the critique worth its cost? many ways to make pairs, compared",
        teach="Trains the base model on pairs made in many ways, at equal source images, pairs and steps, each with its own best "
        "setting, at several sizes and seeds, and compares them with intervals. Can be stopped at any time: the same command goes on.",
    ),
    "generate": RecipeCommand(
        call=_generate,
        options=GenerateOptions,
        sections=("generator",),
        usage='RECIPE --prompt "..."',
        summary="a picture of a prompt, base beside tuned",
        teach="Draws the prompt with the base model and, given a run folder by --out, with the tuned one beside it from the same noise.",
    ),
    "report": Command(
        call=_report,
        usage="RUN_FOLDER",
        summary="write report.html of a run folder",
        teach="One self-contained page of what the run folder holds: numbers, funnel, pairs, pictures, training curves.",
    ),
    "show": Command(
        call=_show,
        usage="RUN_FOLDER",
        summary="print rows of a stage: critiques, instructions, scores, reasons",
        teach="Prints what a stage made of its rows, also of a run that is not finished: --stage critique, --kept errors, --rows 3. "
        "Of a row that ended in an error the raw answer is shown.",
    ),
    "export": Command(
        call=_export,
        usage="RUN_FOLDER",
        summary="the pairs of a run as a dataset: ours, Pick-a-Pic's columns, JSONL, folders …",
        teach="Writes a folder with the pairs, a card and a manifest of hashes. --format rpo (dropped rows come along, with the reasons), "
        "pickapic, diffusers (ImageFolder), jsonl, folders (kohya) or webdataset.",
    ),
    "export-lora": Command(
        call=_export_lora,
        usage="RUN_FOLDER --for TOOL",
        summary="the tuned LoRA as a file for diffusers, ComfyUI or kohya's scripts",
        teach="Writes the LoRA of a run under the names that --for diffusers, comfyui or kohya expects. For Stable Diffusion 1, 2 and XL "
        "one file serves all three; for SD3 and FLUX the kohya scripts want the original checkpoint's layers, which are put together here.",
    ),
    "push": Command(
        call=_push,
        usage="RUN_FOLDER --to OWNER/NAME",
        summary="upload the dataset of a run to the Hugging Face Hub",
        teach="Exports the run if that was not done, proves every file against its manifest, and uploads. Private unless --public.",
    ),
    "shapes": Command(
        call=_shapes,
        usage="train|measure|serve",
        summary="the embedded world: make its weights, measure them, serve its critic",
        teach="train makes every embedded model from a seed (hours on two cores, resumable); measure prints what they can do; serve puts "
        "critic and instructor behind an OpenAI-compatible address on the loopback, which the recipe shapes_vlm asks.",
    ),
    "doctor": Command(
        call=_doctor,
        usage="[--vlm-url URL]",
        summary="is this machine, or a VLM's server, ready? what is wrong, and what mends it",
        teach="Checks versions, device, disk and the embedded weights, and prints the line that mends what is wrong. With --vlm-url URL "
        "(and --vlm-model NAME) it asks a served vision-language model a few questions instead: is it listed, does it see images, does it "
        "honor schemas and the temperature, does it give log probabilities? They cost a few hundred tokens.",
        needs_argument=False,
    ),
}
