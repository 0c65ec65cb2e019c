"""Preference tuning of a text-to-image network, from pairs to weights. Read this first.

    encode      images and prompts once, into a cache; the encoders are then freed
    reference   the untuned network's error of every draw of every pair, once, into the cache
    steps       draw -> noisy latents -> both sides in one call -> errors -> objective -> AdamW
    weights     in the format the model's own pipeline loads

Data order and noise are pure functions of (seed, step): a run that is killed at any moment and resumed ends, on one machine
and thread count, with the same bits; on a GPU, as far as its kernels give the same bits twice.
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rpo.core.atomic import atomic_folder
from rpo.core.described import described
from rpo.core.terminal import Terminal
from rpo.data.pairs import Pair
from rpo.errors import Interrupted, RpoError
from rpo.models.pipeline_folder import commit_of
from rpo.training.config import EVAL_DRAWS, TrainConfig
from rpo.training.inputs.batches import Visit, micro_batches
from rpo.training.inputs.cache import sha256
from rpo.training.inputs.errors import chosen_errors, pair_errors
from rpo.training.objectives.preference import PairErrors
from rpo.training.runtime.checkpoint import (
    TrainState,
    best_weights,
    check_weights,
    finite,
    is_trained,
    load_newest,
    open_train_folder,
    save_checkpoint,
)
from rpo.training.runtime.distributed import Processes, processes
from rpo.training.runtime.interruption import StopRequest, interruptible
from rpo.training.runtime.metrics import ADVICE, MetricsLog, batch_metrics, last_line
from rpo.training.runtime.optimizer import Descent
from rpo.training.runtime.trackers import Draw, Onlookers
from rpo.training.setup import Training, enough_memory, prepare
from rpo.training.validation import held_out_metrics

_CHANGES_NOTHING = ("keep_checkpoints", "log_every", "samples_every", "sample_prompts", "shard", "trackers")
"""Settings that may be others when a run goes on."""
_SAMPLE_PROMPTS = 4
"""On a sheet, when the config names none."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    weights: FilePath
    """LoRA folder (for `load_lora_weights`) or whole pipeline folder (for `from_pretrained`)."""
    lora: bool
    """Which of the two it is."""
    metrics: Mapping[str, Any]
    """The last line of `metrics.jsonl`."""


def train(
    config: TrainConfig,
    pairs: Sequence[Pair],
    run_folder: FilePath,
    *,
    resume: bool = False,
    overwrite: bool = False,
    draw: Draw | None = None,
) -> TrainResult:
    """Tunes `config.model` on the pairs whose split is "train", in `run_folder/train`; the "held_out" ones are only measured.

    `draw` makes the sample pictures, if the config asks for any. Raises `ValueError` or `RpoError` for what a user can mend, and
    `Interrupted` after a checkpoint on SIGINT or SIGTERM.
    """
    training_pairs = pairs_to_train_on(pairs)
    held_out = [pair for pair in pairs if pair.split == "held_out"][: config.eval_pairs]
    if config.result == "best" and not held_out:
        raise ValueError("result='best' needs held-out pairs (split 'held_out'), and there are none; take the last weights")
    folder = run_folder / "train"
    weights = folder / "weights"
    with processes(shard=config.shard) as group:
        if config.micro_pairs % group.count:
            raise ValueError(f"batch_pairs / accumulation is {config.micro_pairs}; it must be a multiple of the {group.count} processes")
        if config.shard and group.count == 1:
            raise ValueError("shard needs several processes; start it with torchrun, or leave shard out")
        if group.first:
            open_train_folder(folder, _resolved(config, pairs), resume=resume, overwrite=overwrite)
        group.wait()
        console = Terminal(stderr=True, quiet=not group.first)
        prompts = list(dict.fromkeys(pair.prompt for pair in (*held_out, *training_pairs)))[:_SAMPLE_PROMPTS]
        onlookers = Onlookers(config if group.first else replace(config, trackers=()), prompts, draw, folder)
        if is_trained(folder):  # the weights are written last: where they are, the run is done
            if group.first:
                check_weights(weights)
        else:
            with interruptible() as stop, _progress(console) as progress, enough_memory(config):
                training = prepare(config, training_pairs, held_out, folder / "cache", stop, progress, group)
                try:
                    result = run_steps(training, folder, stop, progress, console.print, onlookers)
                finally:
                    onlookers.finish()
                if group.first:
                    with atomic_folder(weights, manifest=True) as partial:
                        training.denoiser.save(partial, finite(result))
                group.wait()
                stop.check()
    return TrainResult(weights=weights, lora=config.lora_rank is not None, metrics=last_line(folder / "metrics.jsonl"))


def pairs_to_train_on(pairs: Sequence[Pair]) -> list[Pair]:
    """Those of the split "train". Raises `RpoError` when there are none."""
    found = [pair for pair in pairs if pair.split == "train"]
    if not found:
        raise RpoError("there are no pairs to train on (split 'train'); curate more prompts or loosen the selection")
    return found


def run_steps(
    training: Training, folder: FilePath, stop: StopRequest, progress: Progress, say: Callable[[str], None], onlookers: Onlookers
) -> dict[str, Tensor]:
    """All steps that the newest checkpoint in `folder` has not done; gives the weights that are the result."""
    config, group = training.config, training.group
    descent = Descent(config, training.denoiser.trainable())
    with group.first_goes_first():
        state = load_newest(folder / "checkpoints", descent, say, config.keep_checkpoints)
    network = training.denoiser.digests["network"]
    if state.step and state.network != network:
        raise RpoError(
            f"{config.model} is not the model that {folder} was started with, or is trained at other noise levels by this version; "
            "restore it, or start anew with --overwrite"
        )
    log = MetricsLog(folder / "metrics.jsonl" if group.first else None, step=state.step, say=say)
    say(config.objective.describe())
    bar = progress.add_task("steps", total=config.steps, completed=state.step)
    started = time.monotonic() - state.seconds
    if state.step == 0:
        _show(training, descent, 0, onlookers)

    for step in range(state.step, config.steps):
        tensors = take_step(training, step, descent)
        done, best = step + 1, False
        known: dict[str, float | int] = {"step": done, "lr": config.lr_at(step), "fresh": training.held_out is None}
        if training.held_out is not None and (done % config.eval_every == 0 or done == config.steps):
            tensors |= held_out_metrics(training)
            known["measured_draws"] = EVAL_DRAWS * len(training.held_out)
            accuracy = float(tensors[f"{training.measured}_accuracy"])
            if best := training.measured == "held_out" and accuracy > state.best_accuracy:
                state = replace(state, best_step=done, best_accuracy=accuracy)
        log.add({**known, "seconds": round(time.monotonic() - started, 3)}, tensors)
        asked = group.asked(stop)  # looked at once: a signal after this line is for the next step, or nothing would be saved for it
        save = asked or best or done % config.checkpoint_every == 0 or done == config.steps
        alarms: list[str] = []
        if save or done % config.log_every == 0:
            watch, lines = log.flush(state.watch)
            onlookers.told(lines)
            alarms = [name for name in watch.alarms if name not in state.watch.alarms]
            for name in alarms:
                say(f"warning: step {done}: {name}: {ADVICE[name]}")
            state = replace(state, step=done, network=network, seconds=time.monotonic() - started, watch=watch)
        halt = config.stop_on_alarm and bool(alarms)
        if save or halt:
            _save(training, descent, state, folder / "checkpoints")
        _show(training, descent, done, onlookers)
        progress.update(bar, completed=done)
        if asked or halt:
            group.wait()  # for the checkpoint, which the others' end must not cut short
        if halt:
            raise RpoError(f"stopped at step {done}: {alarms[0]}: {ADVICE[alarms[0]]} --resume goes on all the same.")
        if asked:
            raise Interrupted(stop.signal or signal.SIGTERM)
    if config.result == "best":
        say(f"the result is step {state.best_step}'s, with a held-out accuracy of {state.best_accuracy:.3f}")
        return best_weights(folder / "checkpoints", state) if group.first else {}
    return descent.result() if group.first or config.shard else {}


def _save(training: Training, descent: Descent, state: TrainState, folder: FilePath) -> None:
    if training.group.first or training.config.shard:  # a network that is split is read out by all of them
        weights, optimizer = descent.weights(), descent.state()
        if training.group.first:
            save_checkpoint(folder, state, weights, optimizer, keep=training.config.keep_checkpoints)


def _show(training: Training, descent: Descent, step: int, onlookers: Onlookers) -> None:
    if onlookers.due(step) and (training.group.first or training.config.shard):
        weights = descent.result()
        if training.group.first:
            onlookers.shown(training.denoiser, weights, step)


def take_step(training: Training, step: int, descent: Descent) -> dict[str, Tensor]:
    """Moves the weights once; gives the step's metrics, which the device may still be computing."""
    config, group = training.config, training.group
    parts = [group.share(visits) for visits in micro_batches(config, step, len(training.pairs))]
    whole = cache(partial(_errors_of_step, training, parts))
    measured: list[PairErrors] = []
    losses: list[Tensor] = []
    for visits in parts:
        errors = replace(policy_and_reference_errors(training, visits), progress=step / config.steps)
        errors = replace(errors, step=whole if len(parts) > 1 else partial(_joined, [errors], group))
        loss = config.objective(errors).sum() / config.batch_pairs
        descent.backward(loss)
        measured.append(errors)
        losses.append(loss.detach())
    group.sum_gradients(descent.trained.values())
    gradient_norm = descent.step(config.lr_at(step))
    loss = group.total(torch.stack(losses).sum())
    return {"loss": loss, "gradient_norm": gradient_norm, **batch_metrics(_joined(measured, group))}


@torch.no_grad()
def _errors_of_step(training: Training, parts: Sequence[Sequence[Visit]]) -> PairErrors:
    """One more forward pass over all micro-batches, so that an objective's statistic over the step does not depend on their number."""
    return _joined([policy_and_reference_errors(training, visits) for visits in parts], training.group)


def policy_and_reference_errors(training: Training, visits: Sequence[Visit]) -> PairErrors:
    """A micro-batch of pairs through the network, beside what the reference makes of the very same inputs."""
    inputs = training.pairs.inputs(visits, training.noise)
    gap, weight = training.pairs.gap_and_weight(visits)
    known: dict[str, Any] = {"timestep": inputs.draws.timestep, "gap": gap, "weight": weight}
    if training.reference is not None:
        known["ref_chosen"], known["ref_rejected"] = training.reference.errors(visits, inputs)
    if not training.config.objective.paired():
        return PairErrors(chosen_errors(training.denoiser, training.path, inputs), **known)
    sides = pair_errors(training.denoiser, training.path, inputs)
    return PairErrors(sides.chosen, sides.rejected, alignment=sides.alignment, **known)


def _joined(parts: Sequence[PairErrors], group: Processes) -> PairErrors:
    """The errors of a whole step, for its metrics."""
    names = [name for name in ("chosen", "rejected", "ref_chosen", "ref_rejected") if getattr(parts[0], name) is not None]
    rows = group.gather(torch.stack([torch.cat([getattr(part, name) for part in parts]).detach() for name in names]))
    joined: dict[str, Any] = dict(zip(names, rows, strict=True))
    return PairErrors(**joined)


def _resolved(config: TrainConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What decides the result, for `config.json`: settings, pairs, and the versions that computed it."""
    content = sha256(*(f"{sha256(p.id, p.prompt, p.chosen.sha256, p.rejected.sha256)} {p.gap} {p.weight} {p.split}" for p in pairs))
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    for name in (config.model, config.reference_model):
        if name is not None and (commit := commit_of(name)):
            packages[name] = commit
    decides = {name: value for name, value in described(config).items() if name not in _CHANGES_NOTHING}
    return {**decides, "pairs": content, "versions": packages}


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)
