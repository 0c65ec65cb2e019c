"""`rpo shapes train` makes every embedded model again from a seed; `rpo shapes measure` says what they can do."""

import copy
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from rpo.backends.diffusers.edit import DiffusersEditor, EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.core.parquet import write_text
from rpo.core.terminal import Terminal
from rpo.errors import RpoError
from rpo.shapes.measure import editor_figures, held_out_scenes, recogniser_accuracy, round_trip_accuracy, round_trip_unchanged, sample
from rpo.shapes.networks import tokenizer
from rpo.shapes.recognition import Recogniser
from rpo.shapes.scoring import compare
from rpo.shapes.serving import ServeOptions, serve
from rpo.shapes.training.autoencoder import train_autoencoder
from rpo.shapes.training.autoencoder_finish import finish_autoencoder
from rpo.shapes.training.clip import train_clip
from rpo.shapes.training.denoiser import CALLED, MISCALLED, base_pipeline, editor_pipeline, go_on, train_base, train_editor, train_together
from rpo.shapes.training.recognizer import train_recogniser
from rpo.shapes.weights import BASE_SAMPLER, CARD, EDITOR_SAMPLER, checked_weights, file_hashes, weights_folder

_STEPS = {
    "critic": (2000, 700),
    "checklist": (1200, 500),
    "judge": (2000, 700),
    "clip": (800, 300),
    "autoencoder": (4500, 1500),
    "text": (800, 0),
    "together": (12_000, 0),
    "base": (9000, 2600),
    "editor": (16_000, 4500),
    "finish": (1900, 1200),
}
"""Of each part's training, from nothing and when it goes on from other weights."""
_RECORD = "made_from.json"
"""In the work folder: what its files are made from."""


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + "-making")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `rpo shapes train`."""

    out: Path = Path("weights/shapes")
    """Where the models go; checkpoints, data and logs are kept in OUT-making, so a run that was stopped goes on."""
    seed: int = 0
    """Decides every first weight, picture and batch."""
    share: float = 1.0
    """Share of the full number of steps and pictures; a thousandth tries the program out in a minute."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    begin_from: Path | None = None
    """Folder of embedded models to go on from with a third of the steps: after a change of the colours, say. From nothing if not given."""

    def steps(self, name: str) -> int:
        return max(2, round(_STEPS[name][self.begin_from is not None] * self.share))

    def count(self, full: int) -> int:
        """Of pictures or texts: a multiple of 200, in which the pictures are drawn."""
        return 200 * max(1, round(full * self.share / 200))


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of `rpo shapes measure`."""

    folder: Path | None = None
    """Folder of embedded models; the ones that ship with the package if not given."""
    images: int = 400
    """Samples of the base model that are judged and edited."""


def _claim(work: Path, options: TrainOptions) -> None:
    """Writes down what the work folder's files are made from. Raises `RpoError` when they were made from something else."""
    words = json.dumps(sorted(tokenizer().get_vocab().items()))
    wanted = {"seed": options.seed, "share": options.share, "words": hashlib.sha256(words.encode()).hexdigest()}
    if options.begin_from:
        wanted["begin_from"] = hashlib.sha256(json.dumps(file_hashes(options.begin_from)).encode()).hexdigest()
    record = work / _RECORD
    found = json.loads(record.read_text()) if record.exists() else None
    if found is None and any(work.iterdir()):
        raise RpoError(f"{work} does not say what it was made from; delete it to start again, or choose another --out")
    if found not in (None, wanted):
        other = next(name for name in wanted | found if found.get(name) != wanted.get(name))
        raise RpoError(f"{work} was made with another {other}; delete it to start again, or choose another --out")
    write_text(record, json.dumps(wanted, indent=2) + "\n")


def train_all(options: TrainOptions, console: Console) -> None:
    """Every model, in the order they need each other; a step that is done is not done again."""
    work = _work_folder(options.out)
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, options)
    seed = 100 * options.seed
    steps, count, begun = options.steps, options.count, options.begin_from

    def recogniser(name: str, kind: str, offset: int) -> Recogniser:
        made = train_recogniser(
            name,
            kind,
            seed=seed + offset,
            folder=work,
            steps=steps(name),
            pictures=count(20_000),
            grades_quality=name == "judge",
            begin_from=begun,
        )
        made.save(options.out / name)
        return made

    critic = recogniser("critic", "plain", 11)
    checklist = recogniser("checklist", "residual", 12)
    recogniser("judge", "depthwise", 13)
    clip = train_clip(seed=seed + 31, folder=work, steps=steps("clip"), pictures=count(24_000), begin_from=begun)
    _save_clip(*clip, options.out / "clip")
    vae = train_autoencoder(seed=seed + 41, folder=work, steps=steps("autoencoder"), pictures=count(16_000), begin_from=begun)
    texts = count(150_000)
    if begun:
        first_base, first_editor, tasks = go_on(vae, begun, seed=seed + 51, folder=work, texts=texts)
    else:
        both, tasks = train_together(vae, seed=seed + 51, folder=work, steps=steps("together"), text_steps=steps("text"), texts=texts)
        first_base = first_editor = both
    base = train_base(first_base, tasks, seed=seed + 53, folder=work, steps=steps("base"))
    editor = train_editor(first_editor, base, tasks, seed=seed + 54, folder=work, steps=steps("editor"), samples=count(4000))
    readers = critic, checklist
    finish_autoencoder(vae, base, editor, readers, tasks, seed=seed + 55, folder=work, steps=steps("finish"), samples=count(3_000))
    _save_pipeline(base_pipeline(base), options.out / "base")
    _save_pipeline(editor_pipeline(editor), options.out / "editor")
    console.print(f"models in {options.out}, logs in {work}", highlight=False)
    console.print(f"what they can do: rpo shapes measure --folder {options.out}", highlight=False)


def _save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """In half precision, of copies: the pipelines share their autoencoder and text encoder, which go on in full precision."""
    parts = {name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part for name, part in pipeline.components.items()}
    type(pipeline)(**parts, requires_safety_checker=False).save_pretrained(folder)


def _save_clip(model: CLIPModel, words: CLIPTokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    side = model.config.vision_config.image_size
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    text = json.dumps(settings | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}, indent=2)
    write_text(folder / "preprocessor_config.json", text + "\n")


@dataclass(frozen=True)
class Figure:
    """One measured quality and the bar it must meet."""

    name: str
    value: float
    least: float
    most: float = 1.0

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most


def figures(folder: Path, images: int) -> list[Figure]:
    """Everything the card says, measured now."""
    critic, checklist, judge = (Recogniser.load(folder / name) for name in ("critic", "checklist", "judge"))
    editor = DiffusersEditor(EditorConfig(model=str(folder / "editor"), **EDITOR_SAMPLER))  # pyright: ignore[reportArgumentType]
    shown = held_out_scenes(images, seed=7)
    samples = sample(GeneratorConfig(model=str(folder / "base"), **BASE_SAMPLER).build(), shown, seed=3)  # pyright: ignore[reportArgumentType]
    views = judge.view(samples)
    correct = [compare(view, scene)["fully_correct"] for view, scene in zip(views, shown, strict=True)]
    readings = [(mine.scene(), truth.scene()) for mine, truth in zip(critic.view(samples), views, strict=True)]
    misread = [mine is None or truth is None or mine.canonical() != truth.canonical() for mine, truth in readings]
    edited = editor_figures(editor, judge, samples)
    return [
        Figure("judge: renders read without mistake, noise and blur", recogniser_accuracy(judge), 0.995),
        Figure("critic: renders read without mistake, noise and blur", recogniser_accuracy(critic), 0.95),
        Figure("checklist: renders read without mistake, noise and blur", recogniser_accuracy(checklist), 0.95),
        Figure("autoencoder: renders read without mistake after it", round_trip_accuracy(editor, judge), 0.99),
        Figure("autoencoder: samples read by the judge as before it", round_trip_unchanged(editor, judge, samples), 0.0),
        Figure("base: samples fully correct", sum(correct) / len(correct), 0.35, 0.65),
        Figure("critic: samples read otherwise than by the judge", sum(misread) / len(misread), 0.0, 0.25),
        Figure("editor: one instruction followed", edited["single_followed"], 0.85),
        Figure("editor: two instructions followed", edited["double_followed"], 0.85),
        Figure("editor: the rest left alone", edited["rest_left_alone"], 0.90),
        Figure("editor: neutral instruction changes nothing", edited["neutral_unchanged"], 0.97),
    ]


def write_card(folder: Path, measured: Sequence[Figure]) -> None:
    """How the models were made, what they can do, and the hashes that are checked at load."""
    record = _work_folder(folder) / _RECORD
    card = {
        "made_by": "rpo shapes train",
        "made_from": json.loads(record.read_text()) if record.exists() else "unknown",
        "what": "models of a closed world of coloured shapes; of no use outside it",
        "licence": "Apache-2.0",
        "miscalled": {"shapes": MISCALLED, "colours": CALLED},
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "figures": {figure.name: round(figure.value, 4) for figure in measured},
        "sha256": file_hashes(folder),
    }
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def main(action: str, arguments: Sequence[str], console: Console) -> None:
    """`rpo shapes ACTION`."""
    import tyro

    if action == "train":
        return train_all(tyro.cli(TrainOptions, args=list(arguments), prog="rpo shapes train"), console)
    if action == "serve":
        return serve(tyro.cli(ServeOptions, args=list(arguments), prog="rpo shapes serve"), console)
    if action != "measure":
        raise ValueError(f"rpo shapes knows train, measure and serve, not {action!r}")
    options = tyro.cli(MeasureOptions, args=list(arguments), prog="rpo shapes measure")
    measured = figures(options.folder or checked_weights(weights_folder()), options.images)
    if options.folder:
        write_card(options.folder, measured)
    table = Table(title="the embedded models, measured by the judge", title_justify="left")
    for column in ("what", "measured", "bar", ""):
        table.add_column(column)
    for figure in measured:
        bar = f"at least {figure.least}" if figure.most == 1.0 else f"{figure.least} to {figure.most}"
        bar = bar if (figure.least, figure.most) != (0.0, 1.0) else "none"
        table.add_row(figure.name, f"{figure.value:.3f}", bar, "ok" if figure.met else "MISSED")
    Terminal().print(table)
    return None
