"""What can be said to each command: its options, and every field of the recipe's sections it reads."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rpo.errors import RpoError


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
    """Remove what is in the run folder (`rpo train`: in its train/, but not the caches) and begin anew."""


@dataclass(frozen=True, kw_only=True)
class WireOptions:
    """Options of the commands that may ask models over a wire."""

    vlm_url: str | None = None
    """Address of the vision-language models that are asked, such as http://127.0.0.1:8000/v1; the recipe's own if not given."""
    vlm_model: str | None = None
    """Their name there; the recipe's own if not given."""
    max_cost: float | None = None
    """US dollars that may be paid for answers, over every time the run is resumed. The recipe must hold the model's price."""
    max_calls: int | None = None
    """Requests that may be sent to models over a wire, failed ones included, over every time the run is resumed."""
    answers: Path | None = None
    """File in which answers of models over a wire are kept; several runs may share one. In the run folder if not given."""


@dataclass(frozen=True, kw_only=True)
class CurateOptions(RunOptions, WireOptions):
    prompts: Path | None = None
    """Prompts: a .txt file with one a line, or .jsonl, .json, .csv, .tsv, .parquet with a column prompt, or a dataset of the Hub as
    owner/name or owner/name:split. The recipe's own if not given."""
    sources: Path | None = None
    """Images to begin with in place of samples of the model: pairs in any layout that --pairs of `rpo train` reads, or single images with
    captions (docs/data.md)."""
    edit_side: Literal["rejected", "chosen", "both"] = "rejected"
    """Which image of each of those pairs is criticised and edited."""
    engine: Literal["local", "ray"] = "local"
    """What runs the stages: threads of this process, or processes of a Ray cluster (pip install 'rpo-diffusion[ray]')."""
    stage_by_stage: bool = False
    """Load one model at a time: each stage makes all its rows before the next begins. For one small GPU."""
    workers: tuple[str, ...] = ()
    """STAGE=NUMBER: threads (on Ray, processes) of a stage."""
    cpus: tuple[str, ...] = ()
    """STAGE=SHARE: logical CPUs of each process of a stage on Ray."""
    gpus: tuple[str, ...] = ()
    """STAGE=SHARE: share of a GPU of each process of a stage on Ray."""
    max_time: float | None = None
    """Minutes after which making pairs stops, with all that is done kept."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of `rpo show`."""

    stage: str | None = None
    """critique, instruct or any other stage of the run, plan included; the last if not given."""
    rows: int = 10
    """How many rows."""
    kept: Literal["all", "live", "dropped", "errors"] = "all"
    """Which rows of those that reached the stage."""
    id: str = ""
    """The row whose id begins so."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    pairs: Path | None = None
    """Pairs to train on, a file or a folder in any layout of docs/data.md; pairs.parquet of the run folder if not given."""
    allow_fingerprint: bool = False
    """Train although a prompt-blind probe tells chosen from rejected."""
    dry_run: bool = False
    """Say what the run would take (settings, steps, caches, memory, time), after three steps that are thrown away."""


@dataclass(frozen=True, kw_only=True)
class RunAllOptions(CurateOptions):
    allow_fingerprint: bool = False
    """Train although a prompt-blind probe tells chosen from rejected."""
    rounds: int = 1
    """With more than one the prompts are dealt out among rounds, each of which samples from the policy that the last one left."""
    reference: Literal["previous", "first"] = "previous"
    """What later rounds are measured against: the policy they start from, or the model before any tuning."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(WireOptions):
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
    is `base`, a run folder with tuned weights, a folder of a pipeline or a LoRA, or a pipeline of the Hub as owner/name[@revision]."""
    task: str | None = None
    """Which public set --prompts holds (partiprompts, geneval, ...): sets how many images of each prompt are usual, and says if
    prompts are missing."""
    images_per_prompt: int | None = None
    """How many images of each prompt; the task's or the recipe's own number if not given."""
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
    """Where the picture goes: a name that ends in .png, .jpg, .jpeg or .webp."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of `rpo study`."""

    out: Path | None = None
    """Folder of the study; runs/RECIPE-study if not given. What is done there is not done again."""
    quick: bool = False
    """Only the main question, at one size and on one seed: tens of minutes in place of hours."""
    arms: tuple[str, ...] = ()
    """Names of the arms to compare, with the first one; all if not given."""
    workers: int = 2
    """Trainings at once, which share the CPU's cores; take 1 on a GPU."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `rpo doctor`."""

    vlm_url: str | None = None
    """Address of a served vision-language model, such as http://127.0.0.1:8000/v1: its server is checked in place of this machine."""
    vlm_model: str | None = None
    """Its name there; the first that the server lists if not given."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `rpo export`."""

    format: Literal["rpo", "pickapic", "diffusers", "jsonl", "folders", "webdataset"] = "rpo"
    """Layout of the dataset."""
    to: Path | None = None
    """New folder; published/FORMAT of the run folder if not given."""
    license: str = "unknown"
    """The Hub's word for the licence under which you give the pairs away, such as cc-by-4.0."""
    overwrite: bool = False
    """Replace an earlier export."""


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of `rpo push`."""

    to: str
    """owner/name of the dataset on the Hub; made if there is none."""
    public: bool = False
    """Let everyone see it; else only you."""
    license: str = "unknown"
    """For the card of a dataset that was not exported yet; one that was has its own."""


def export_lora_options() -> type[Any]:
    """Options of `rpo export-lora`; made when they are needed, since `for` is no name of a Python field."""
    import tyro

    from rpo.models.lora import LoraLayout

    text = "The tools that are to load the file: diffusers, ComfyUI, or the kohya scripts."
    fields: list[Any] = [
        ("layout", Annotated[LoraLayout, tyro.conf.arg(name="for", help=text)]),
        ("to", Annotated[Path | None, tyro.conf.arg(help="New file; lora-TOOL.safetensors in the run folder if not given.")], None),
        ("overwrite", Annotated[bool, tyro.conf.arg(help="Replace an existing file.")], False),
    ]
    return make_dataclass("ExportLoraOptions", fields, frozen=True, kw_only=True)


def parse_options(command: str, options: type[Any], arguments: Sequence[str]) -> Any:
    import tyro

    return tyro.cli(options, args=list(arguments), prog=f"rpo {command}")


def parse(command: str, name: str, options: type, sections: Sequence[str], arguments: Sequence[str], *, teach: str = "") -> tuple[Any, Any]:
    """(options, recipe) of the command line: the recipe's `sections` can be overridden field by field."""
    import tyro

    from rpo import recipes
    from rpo.core.progress import quiet

    quiet()
    recipe = recipes.load(name)
    shown = [section for section in sections if getattr(recipe, section) is not None]
    fields: list[Any] = [("options", Annotated[options, tyro.conf.arg(name="")])]
    fields += [(section, type(getattr(recipe, section)), getattr(recipe, section)) for section in shown]
    combined = make_dataclass("Arguments", fields, frozen=True, kw_only=True)
    parsed = tyro.cli(
        combined,
        args=list(arguments),
        prog=f"rpo {command} {name}",
        description=teach,
        config=(tyro.conf.AvoidSubcommands,),
    )
    recipe = replace(recipe, **{section: getattr(parsed, section) for section in shown})
    if recipe.ready is not None:
        recipe.ready()
    seed = getattr(parsed.options, "seed", None)
    for option, value in [("seed", seed), *((f"{section}.seed", getattr(getattr(parsed, section), "seed", None)) for section in shown)]:
        if value is not None and not 0 <= value < 2**63:
            raise ValueError(f"--{option} must be at least 0 and below 2^63, got {value}")
    return parsed.options, recipe if seed is None else recipe.with_seed(seed)


def run_folder(options: Any, recipe: Any) -> Path:
    return options.out or Path("runs") / (recipe.name + (f"-seed{options.seed}" if options.seed else ""))


def existing_folder(options: Any, recipe: Any) -> Path:
    folder = run_folder(options, recipe)
    if not folder.is_dir():
        raise RpoError(f"there is no run folder {folder}. Make one with `rpo curate {recipe.name}`, or name another with --out.")
    return folder


def existing_run(folder: str) -> Path:
    """A run folder by its path, or by its name below runs/."""
    return Path(folder) if Path(folder).is_dir() else Path("runs") / folder
