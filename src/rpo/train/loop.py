"""Preference tuning of a text-to-image network, from pairs to weights. Read this first.

    encode      images and prompts once, into a cache; the encoders are then freed
    reference   the untuned network's error of every draw of every pair, once, into the cache
    steps       draw -> noisy latents -> both sides in one call -> errors -> objective -> AdamW
    weights     in the format the model's own pipeline loads

Data order and noise are pure functions of (seed, step): a run that is killed at any moment and resumed ends, on one machine
and thread count, with the same bits.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rpo.data.pairs import Pair
from rpo.described import described
from rpo.errors import Interrupted, RpoError
from rpo.models.denoiser import Denoiser
from rpo.models.diffusers_denoiser import load_denoiser
from rpo.train.batches import EncodedPairs, Visit, encode_pairs, micro_batches
from rpo.train.cache import Cache, Tick, chunks, sha256
from rpo.train.config import EVAL_DRAWS, TrainConfig
from rpo.train.denoising import chosen_errors, pair_errors
from rpo.train.descent import Descent
from rpo.train.interruption import StopRequest, interruptible
from rpo.train.metrics import ADVICE, MetricsLog, accuracy, batch_metrics, last_line
from rpo.train.noise import DrawRange, DrawTable, FreshDraws, NoiseProvider, seed_of
from rpo.train.objectives import PairErrors
from rpo.train.parallel import Processes, processes
from rpo.train.paths import Path, path_of
from rpo.train.reference import AdapterOff, CachedScalars, ReferenceProvider, SecondModel, precompute
from rpo.train.state import TrainState, commit_folder, load_newest, open_train_folder, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    weights: FilePath
    """LoRA folder (for `load_lora_weights`) or whole pipeline folder (for `from_pretrained`)."""
    lora: bool
    """Which of the two it is."""
    metrics: Mapping[str, Any]
    """The last line of `metrics.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that the steps read: the network, the pairs as it takes them, and where their noise and reference come from."""

    config: TrainConfig
    group: Processes
    denoiser: Denoiser
    path: Path
    pairs: EncodedPairs
    noise: NoiseProvider
    reference: ReferenceProvider | None
    held_out: EncodedPairs | None
    held_out_noise: DrawTable
    held_out_reference: CachedScalars | None


def train(
    config: TrainConfig, pairs: Sequence[Pair], run_folder: FilePath, *, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Tunes `config.model` on the pairs whose split is "train", in `run_folder/train`; the "held_out" ones are only measured.

    Raises `ValueError` or `RpoError` for what a user can mend, and `Interrupted` after a checkpoint on SIGINT or SIGTERM.
    """
    training_pairs = pairs_to_train_on(pairs)
    held_out = [pair for pair in pairs if pair.split == "held_out"][: config.eval_pairs]
    folder = run_folder / "train"
    weights, partial = folder / "weights", folder / ".partial-weights"
    with processes() as group:
        if config.micro_pairs % group.count:
            raise ValueError(f"batch_pairs / accumulation is {config.micro_pairs}; it must be a multiple of the {group.count} processes")
        if group.first:
            open_train_folder(folder, _resolved(config, pairs), resume=resume, overwrite=overwrite)
        group.wait()
        console = Console(stderr=True, quiet=not group.first)
        if not weights.exists():  # written last: where it is, the run is done
            with interruptible() as stop, _progress(console) as progress:
                training = prepare(config, training_pairs, held_out, folder / "cache", stop, progress, group)
                descent = run_steps(training, folder, stop, progress, console.print)
                if group.first:
                    shutil.rmtree(partial, ignore_errors=True)
                    with descent.averaged():
                        training.denoiser.save(partial)
                    commit_folder(partial, weights)
                group.wait()
                stop.check()
    return TrainResult(weights=weights, lora=config.lora_rank is not None, metrics=last_line(folder / "metrics.jsonl"))


def pairs_to_train_on(pairs: Sequence[Pair]) -> list[Pair]:
    """Those of the split "train". Raises `RpoError` when there are none."""
    found = [pair for pair in pairs if pair.split == "train"]
    if not found:
        raise RpoError("there are no pairs to train on (split 'train'); curate more prompts or loosen the selection")
    return found


def prepare(
    config: TrainConfig,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: FilePath,
    stop: StopRequest,
    progress: Progress,
    group: Processes,
) -> Training:
    """Everything before the first step; what is in the cache in `folder` already is not computed again."""
    device = group.device
    denoiser = load_denoiser(
        config.model,
        lora=config.lora(),
        dtype=config.dtype,
        device=device,
        seed=seed_of(config.seed, "lora"),
        gradient_checkpointing=config.gradient_checkpointing,
    )
    path = path_of(denoiser.schedule, device)
    timesteps = config.timesteps or (0, path.num_timesteps)
    if timesteps[1] > path.num_timesteps:
        raise ValueError(f"timesteps must end at {path.num_timesteps} or before for {config.model}, got {timesteps}")
    draws = DrawRange(seed=config.seed, timesteps=timesteps, drop_probability=config.caption_dropout, density=path.density)
    noise = FreshDraws(range=draws) if config.draws is None else DrawTable(range=draws, num_draws=config.draws)
    held_out_range = replace(draws, seed=seed_of(config.seed, "held out"), drop_probability=0.0)
    held_out_noise = DrawTable(range=held_out_range, num_draws=EVAL_DRAWS)

    cache = Cache(folder=folder, group=group, tick=_ticker(progress, stop, "encoding images and prompts"))
    groups = encode_pairs(denoiser, config, [pairs, held_out], cache)
    cache = replace(cache, tick=_ticker(progress, stop, "reference errors"))
    key = sha256(*denoiser.digests.values(), config.precision, str(config.resolution), str(config.unchanged_weight))

    def scalars(of: EncodedPairs, table: DrawTable, num_visits: int) -> CachedScalars:
        return precompute(denoiser, path, of, table, cache, num_visits=num_visits, batch=config.cache_batch, key=key)

    return Training(
        config=config,
        group=group,
        denoiser=denoiser,
        path=path,
        pairs=groups[0],
        noise=noise,
        reference=_reference(config, denoiser, path, groups[0], noise, scalars),
        held_out=groups[1] if held_out else None,
        held_out_noise=held_out_noise,
        held_out_reference=scalars(groups[1], held_out_noise, EVAL_DRAWS) if held_out else None,
    )


def run_steps(training: Training, folder: FilePath, stop: StopRequest, progress: Progress, say: Callable[[str], None]) -> Descent:
    """All steps that the newest checkpoint in `folder` has not done."""
    config, group = training.config, training.group
    descent = Descent(config, training.denoiser.trainable())
    with group.first_goes_first():
        state = load_newest(folder / "checkpoints", descent, say)
    network = training.denoiser.digests["network"]
    if state.step and state.network != network:
        raise RpoError(f"{config.model} is not the model that {folder} was started with; restore it, or start anew with --overwrite")
    log = MetricsLog(folder / "metrics.jsonl" if group.first else None, step=state.step)
    bar = progress.add_task(config.objective.describe(), total=config.steps, completed=state.step)
    started = time.monotonic() - state.seconds

    for step in range(state.step, config.steps):
        tensors = take_step(training, step, descent)
        done = step + 1
        if training.held_out is not None and (done % config.eval_every == 0 or done == config.steps):
            tensors |= held_out_metrics(training)
        log.add({"step": done, "lr": config.lr_at(step), "seconds": round(time.monotonic() - started, 3)}, tensors)
        asked = group.asked(stop)  # looked at once: a signal after this line is for the next step, or nothing would be saved for it
        save = asked or done % config.checkpoint_every == 0 or done == config.steps
        alarms: list[str] = []
        if save or done % config.log_every == 0:
            watch = log.flush(state.watch)[0]
            alarms = [name for name in watch.alarms if name not in state.watch.alarms]
            for name in alarms:
                say(f"[bold yellow]warning[/]: step {done}: {name}: {ADVICE[name]}")
            state = TrainState(step=done, network=network, seconds=time.monotonic() - started, watch=watch)
        halt = config.stop_on_alarm and bool(alarms)
        if group.first and (save or halt):
            save_checkpoint(folder / "checkpoints", state, descent)
        progress.update(bar, completed=done)
        if asked or halt:
            group.wait()  # for the checkpoint, which the others' end must not cut short
        if halt:
            raise RpoError(f"stopped at step {done}: {alarms[0]}: {ADVICE[alarms[0]]} --resume goes on all the same.")
        if asked:
            raise Interrupted(stop.signal or signal.SIGTERM)
    return descent


def take_step(training: Training, step: int, descent: Descent) -> dict[str, Tensor]:
    """Moves the weights once; gives the step's metrics, which the device may still be computing."""
    config, group = training.config, training.group
    measured: list[PairErrors] = []
    losses: list[Tensor] = []
    for visits in micro_batches(config, step, len(training.pairs)):
        errors = replace(policy_and_reference_errors(training, group.share(visits)), progress=step / config.steps)
        loss = config.objective(errors).sum() / config.batch_pairs
        loss.backward()
        measured.append(errors)
        losses.append(loss.detach())
    group.sum_gradients(descent.trained.values())
    gradient_norm = descent.step(config.lr_at(step))
    loss = group.total(torch.stack(losses).sum())
    return {"loss": loss, "gradient_norm": gradient_norm, **batch_metrics(_joined(measured, group))}


def policy_and_reference_errors(training: Training, visits: Sequence[Visit]) -> PairErrors:
    """A micro-batch of pairs through the network, beside what the reference makes of the very same inputs."""
    inputs = training.pairs.inputs(visits, training.noise)
    gap, weight = training.pairs.gap_and_weight(visits)
    known: dict[str, Any] = {"timestep": inputs.draws.timestep, "gap": gap, "weight": weight}
    if training.reference is not None:
        known["ref_chosen"], known["ref_rejected"] = training.reference.errors(visits, inputs)
    if not training.config.objective.paired:
        return PairErrors(chosen_errors(training.denoiser, training.path, inputs), **known)
    sides = pair_errors(training.denoiser, training.path, inputs)
    return PairErrors(sides.chosen, sides.rejected, alignment=sides.alignment, **known)


@torch.no_grad()
def held_out_metrics(training: Training) -> dict[str, Tensor]:
    """Implicit accuracy and chosen error on pairs that are never trained on, always at the same noise and timesteps."""
    assert training.held_out is not None and training.held_out_reference is not None
    every, group = range(len(training.held_out)), training.group
    visits = [Visit(pair=pair, number=draw) for pair in group.share(every) for draw in range(EVAL_DRAWS)]
    sums = torch.zeros(3, device=group.device)
    for part in chunks(visits, EVAL_DRAWS * max(1, training.config.cache_batch // (2 * EVAL_DRAWS))):
        inputs = training.held_out.inputs(part, training.held_out_noise)
        chosen, rejected, _ = pair_errors(training.denoiser, training.path, inputs)
        ref_chosen, ref_rejected = training.held_out_reference.errors(part)
        margin = ((ref_chosen - chosen) - (ref_rejected - rejected)).view(-1, EVAL_DRAWS).mean(dim=1)
        over = (chosen - ref_chosen).view(-1, EVAL_DRAWS).mean(dim=1)
        sums += torch.stack([accuracy(margin) * len(margin), margin.sum(), over.sum()])
    names = ("held_out_accuracy", "held_out_margin", "held_out_chosen_over_reference")
    return dict(zip(names, group.total(sums) / len(every), strict=True))


def _reference(
    config: TrainConfig,
    denoiser: Denoiser,
    path: Path,
    pairs: EncodedPairs,
    noise: NoiseProvider,
    scalars: Callable[[EncodedPairs, DrawTable, int], CachedScalars],
) -> ReferenceProvider | None:
    if not config.objective.referenced:
        return None
    if config.reference == "live":
        return AdapterOff(denoiser, path) if config.lora_rank is not None else SecondModel(denoiser.frozen_copy(), path)
    if not isinstance(noise, DrawTable):
        raise ValueError("cached reference errors need a table of draws; set draws, or reference='live'")
    return scalars(pairs, noise, math.ceil(config.steps * config.batch_pairs / len(pairs)))


def _joined(parts: Sequence[PairErrors], group: Processes) -> PairErrors:
    """The errors of a whole step, for its metrics."""
    names = [name for name in ("chosen", "rejected", "ref_chosen", "ref_rejected") if getattr(parts[0], name) is not None]
    rows = group.gather(torch.stack([torch.cat([getattr(part, name) for part in parts]).detach() for name in names]))
    joined: dict[str, Any] = dict(zip(names, rows, strict=True))
    return PairErrors(**joined)


def _resolved(config: TrainConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What decides the result, for `config.json`: settings, pairs, and the versions that computed it."""
    content = sha256(*(f"{sha256(p.id, p.prompt, p.chosen, p.rejected)} {p.gap} {p.weight} {p.split}" for p in pairs))
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return {**described(config), "pairs": content, "versions": packages}


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def _ticker(progress: Progress, stop: StopRequest, what: str) -> Tick:
    """Counts files of the cache, and stops between two of them when asked to."""
    bar = progress.add_task(what, total=None)

    def tick() -> None:
        progress.advance(bar)
        stop.check()

    return tick
