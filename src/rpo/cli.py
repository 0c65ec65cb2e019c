"""The command line: `rpo COMMAND RECIPE [options]`.

Only this file looks into `rpo.recipes`; nothing heavy is imported before a recipe is asked for.
"""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from rpo.errors import Interrupted, RpoError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the commands that write in a run folder."""

    out: Path | None = None
    """Run folder; runs/RECIPE if not given, with -seedN behind it for another seed than 0."""
    seed: int | None = None
    """Decides every random draw of the run; the recipe's own, 0, if not given."""
    resume: bool = False
    """Go on with what is in the run folder."""
    overwrite: bool = False
    """Remove what is in the run folder and begin anew."""


@dataclass(frozen=True, kw_only=True)
class CurateOptions(RunOptions):
    prompts: Path | None = None
    """File of prompts, one a line; the recipe's own if not given."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    pairs: Path | None = None
    """Pairs file to train on, ours or a Parquet file of Pick-a-Pic v2; pairs.parquet of the run folder if not given."""
    allow_fingerprint: bool = False
    """Train although a prompt-blind probe tells chosen from rejected."""
    dry_run: bool = False
    """Say what the run would take (settings, steps, caches, memory, time), after three steps that are thrown away."""


@dataclass(frozen=True, kw_only=True)
class RunAllOptions(CurateOptions):
    allow_fingerprint: bool = False
    """Train although a prompt-blind probe tells chosen from rejected."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `rpo evaluate`."""

    out: Path | None = None
    """Run folder with tuned weights; runs/RECIPE if not given."""
    seed: int | None = None
    """Decides the prompts and their noise; the recipe's own, 0, if not given."""
    prompts: Path | None = None
    """File of prompts that the training has not seen: one a line, or .jsonl, .csv, .tsv, .parquet with a column prompt, and
    category if they have kinds. The recipe's own if not given."""
    models: tuple[str, ...] = ()
    """NAME=MODEL of each model, the first of which the others are compared with; base and the run's tuned one if not given. A model
    is `base`, a run folder with tuned weights, or a folder of a pipeline or a LoRA."""
    images_per_prompt: int | None = None
    """How many images of each prompt; the recipe's own number if not given."""
    allow_overlap: bool = False
    """Evaluate although some prompts were trained on; how many is reported."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `rpo generate`."""

    prompt: str
    """What to draw."""
    out: Path | None = None
    """Run folder with tuned weights: base and tuned are drawn side by side. Without one, only the base."""
    seed: int = 0
    """Decides the initial noise."""
    image: Path = Path("generated.png")
    """Where the picture goes."""


def _quiet() -> None:
    """Switches off the libraries' own bars and their advice to install torchvision, which this package does without."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def parse(command: str, name: str, options: type, sections: Sequence[str], arguments: Sequence[str]) -> tuple[Any, Any]:
    """(options, recipe) of the command line: the recipe's `sections` can be overridden field by field."""
    import tyro

    from rpo import recipes

    _quiet()
    recipe = recipes.load(name)
    shown = [section for section in sections if getattr(recipe, section) is not None]
    fields: list[Any] = [("options", Annotated[options, tyro.conf.arg(name="")])]
    fields += [(section, type(getattr(recipe, section)), getattr(recipe, section)) for section in shown]
    combined = make_dataclass("Arguments", fields, frozen=True, kw_only=True)
    parsed = tyro.cli(
        combined,
        args=list(arguments),
        prog=f"rpo {command} {name}",
        description=COMMANDS[command].teach,
        config=(tyro.conf.AvoidSubcommands,),
    )
    recipe = replace(recipe, **{section: getattr(parsed, section) for section in shown})
    if recipe.ready is not None:
        recipe.ready()
    seed = parsed.options.seed
    return parsed.options, recipe if seed is None else recipe.with_seed(seed)


def _folder(options: Any, recipe: Any) -> Path:
    return options.out or Path("runs") / (recipe.name + (f"-seed{options.seed}" if options.seed else ""))


def _existing(options: Any, recipe: Any) -> Path:
    folder = _folder(options, recipe)
    if not folder.is_dir():
        raise RpoError(f"there is no run folder {folder}. Make one with `rpo curate {recipe.name}`, or name another with --out.")
    return folder


def _run(name: str, arguments: Sequence[str], console: Console) -> None:
    options, recipe = parse("run", name, RunAllOptions, ("generator", "curate", "train", "evaluate"), arguments)
    from rpo import workflow
    from rpo.data.run_folder import open_run
    from rpo.report.page import write_report

    with open_run(_folder(options, recipe), resume=options.resume, overwrite=options.overwrite) as run:
        workflow.curate(recipe, run, console, options.prompts)
        workflow.tune(recipe, run, console, resume=options.resume, overwrite=options.overwrite, allow_fingerprint=options.allow_fingerprint)
        workflow.compare(recipe, run, console)
        page = write_report(run.path)
        Console().print(*workflow.results_tables(workflow.read_summary(run.path)))
        Console(soft_wrap=True).print(f"report: {page}  (open it in any browser; it needs no network)", highlight=False)


def _curate(name: str, arguments: Sequence[str], console: Console) -> None:
    options, recipe = parse("curate", name, CurateOptions, ("curate",), arguments)
    from rpo import workflow
    from rpo.data.run_folder import open_run

    with open_run(_folder(options, recipe), resume=options.resume, overwrite=options.overwrite) as run:
        workflow.curate(recipe, run, console, options.prompts)


def _train(name: str, arguments: Sequence[str], console: Console) -> None:
    options, recipe = parse("train", name, TrainOptions, ("train",), arguments)
    from rpo import workflow
    from rpo.data.run_folder import RunFolder, open_run
    from rpo.train.parallel import launched_rank

    folder = _folder(options, recipe) if options.pairs else _existing(options, recipe)
    if options.dry_run:
        workflow.rehearse_tuning(recipe, options.pairs or folder / workflow.PAIRS, console)
        return
    first = launched_rank() == 0
    with open_run(folder, resume=True) if first else nullcontext(RunFolder(folder)) as run:
        if options.pairs and first:
            workflow.write_recipe(run, recipe)
        workflow.tune(
            recipe,
            run,
            console,
            pairs_file=options.pairs,
            resume=options.resume,
            overwrite=options.overwrite,
            allow_fingerprint=options.allow_fingerprint,
        )


def _evaluate(name: str, arguments: Sequence[str], console: Console) -> None:
    options, recipe = parse("evaluate", name, EvaluateOptions, ("generator", "evaluate"), arguments)
    from rpo import workflow
    from rpo.data.run_folder import open_run

    with open_run(_folder(options, recipe) if options.models else _existing(options, recipe), resume=True) as run:
        workflow.compare(
            recipe,
            run,
            console,
            options.prompts,
            models=options.models,
            images_per_prompt=options.images_per_prompt,
            allow_overlap=options.allow_overlap,
        )
        first = options.models[0].partition("=")[0] if options.models else "base"
        Console().print(*workflow.results_tables(workflow.read_summary(run.path), first))


def _report(folder: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.report.page import write_report

    path = Path(folder) if Path(folder).is_dir() else Path("runs") / folder
    Console(soft_wrap=True).print(f"report: {write_report(path)}  (open it in any browser; it needs no network)", highlight=False)


def _generate(name: str, arguments: Sequence[str], console: Console) -> None:
    options, recipe = parse("generate", name, GenerateOptions, ("generator",), arguments)
    from rpo import workflow
    from rpo.data.run_folder import open_run

    if options.out is None:
        workflow.generate(recipe, None, options.prompt, options.seed, options.image)
    else:
        with open_run(_existing(options, recipe), resume=True) as run:
            workflow.generate(recipe, run, options.prompt, options.seed, options.image)
    console.print(f"wrote {options.image}" + (" (base left, tuned right)" if options.out else ""), highlight=False)


def _doctor(name: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.doctor import examine

    if not examine(Console()):
        raise SystemExit(1)


def _shapes(name: str, arguments: Sequence[str], console: Console) -> None:
    from rpo.shapes.making import main as shapes_main

    shapes_main(name, arguments, console)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after `rpo`."""

    call: Callable[[str, Sequence[str], Console], None]
    usage: str
    """What follows the command."""
    summary: str
    """One line for `rpo --help`."""
    teach: str
    """The paragraph of its own --help."""
    needs_argument: bool = True


COMMANDS = {
    "run": Command(
        call=_run,
        usage="RECIPE",
        summary="everything, from prompts to a tuned model and a report",
        teach="Runs the whole method: sources, critiques, instructions, edits, scores, labels and pairs; then Diffusion-DPO; then base "
        "against tuned on prompts that nothing was tuned on; then the report. A run that was stopped goes on with --resume.",
    ),
    "curate": Command(
        call=_curate,
        usage="RECIPE",
        summary="make preference pairs: critique, instruct, edit, score, label",
        teach="Makes pairs.parquet in the run folder. Every row is kept with the reason it fell, every stage can be resumed, and a setting "
        "that changes results is refused on a folder that holds others.",
    ),
    "train": Command(
        call=_train,
        usage="RECIPE",
        summary="tune the model on the pairs of a run folder, or on --pairs FILE",
        teach="Looks at the pairs' health first (can a probe that never sees the prompt tell chosen from rejected?), then tunes. "
        "Weights are left in train/weights of the run folder: a LoRA for load_lora_weights, or a whole pipeline for from_pretrained.",
    ),
    "evaluate": Command(
        call=_evaluate,
        usage="RECIPE",
        summary="base against tuned, or any models, on unseen prompts, with intervals",
        teach="All models draw every prompt from the same noise; judges that never labelled a pair measure the images. "
        "Differences come with 95 % intervals by bootstrap over prompts. What is measured stays on disk: one more model, judge or image "
        "per prompt costs nothing but itself. evaluation/rows.parquet holds every measure, evaluation/table.md the numbers.",
    ),
    "generate": Command(
        call=_generate,
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
    "shapes": Command(
        call=_shapes,
        usage="train|measure",
        summary="make the embedded world's weights again, or measure them",
        teach="train makes every embedded model from a seed (hours on two cores, resumable); measure prints what they can do.",
    ),
    "doctor": Command(
        call=_doctor,
        usage="",
        summary="is this machine ready? versions, device, disk, and what mends it",
        teach="Checks versions, device, disk and the embedded weights, and prints the line that mends what is wrong.",
        needs_argument=False,
    ),
}


def _help(console: Console) -> None:
    console.print(
        "usage: rpo COMMAND ...\n\nMake a text-to-image model better without annotators (Rich Preference Optimization).\n", highlight=False
    )
    for name, command in COMMANDS.items():
        console.print(f"  rpo {name + ' ' + command.usage:<36} {command.summary}", highlight=False, markup=False)
    console.print("\nrecipes: " + ", ".join(_recipe_names()) + ", or your own as module:function or file.py:function", highlight=False)
    console.print("rpo COMMAND RECIPE --help shows every setting. Start with: rpo run shapes", highlight=False)


def _recipe_names() -> list[str]:
    from rpo.recipes import BUILT_IN

    return list(BUILT_IN)


def _dispatch(arguments: Sequence[str], console: Console) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        return _help(Console())
    if arguments[0] == "--version":
        from importlib.metadata import version

        return Console().print(f"rpo {version('rpo')}", highlight=False)
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(
            f"there is no command {name!r}." + (f" Did you mean {close[0]!r}?" if close else "") + f" Known are {', '.join(COMMANDS)}."
        )
    command = COMMANDS[name]
    wants_help = not rest or rest[0] in ("-h", "--help")
    if wants_help and (command.needs_argument or rest):
        Console().print(f"usage: rpo {name} {command.usage} [options]\n\n{command.teach}", highlight=False, markup=False)
        if command.needs_argument and name not in ("report", "shapes"):
            Console().print(
                f"\nrecipes: {', '.join(_recipe_names())}. All settings: rpo {name} {_recipe_names()[0]} --help", highlight=False
            )
        if not rest:
            raise SystemExit(2)
        return None
    return command.call(rest[0] if rest else "", rest[1:], console)


def _terminated(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def _said_by_us(error: BaseException) -> bool:
    """Whether this package raised it on purpose; a ValueError out of a library is a bug of ours, and its traceback is wanted."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).split(".")[0] == "rpo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0, 1 (the run cannot go on), 2 (wrong input), 130 or 143 (stopped)."""
    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _dispatch(sys.argv[1:] if arguments is None else list(arguments), console)
    except Interrupted as stop:
        console.print(str(stop), highlight=False)
        return stop.exit_code
    except KeyboardInterrupt:
        console.print("stopped; what is done is kept, go on with --resume")
        return 130
    except (RpoError, ValueError) as error:
        if not _said_by_us(error):
            raise
        console.print("[red]error[/red]: ", end="")
        console.print(str(error), highlight=False, markup=False)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def entry() -> None:
    """The `rpo` program. After a stop it leaves at once: a thread that is deep in a model's batch would hold the interpreter."""
    code = main()
    if code >= 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
