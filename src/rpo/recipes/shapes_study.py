"""The studies of the embedded world: does the critique earn its cost, and which objective tunes best? Every arm changes one thing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rpo.backends.diffusers.edit import DiffusersEditor, EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig, ProjectorConfig
from rpo.curation.sample_pairs import DuelLabelStage, TwoSamplesStage
from rpo.curation.stages.project import ProjectStage
from rpo.curation.stages.score import ScoreStage
from rpo.data.images import Frame
from rpo.recipe import Arm, Curation, Recipe, SampleCuration, Study
from rpo.shapes.critic import MistakenCriticConfig, RandomInstructorConfig, ShapesCriticConfig
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import SFT, DiffusionDPO, DiffusionKTO, MaPO, Objective, SoftDPO
from rpo.training.objectives.safeguards import Anchored, LoserGradient, WinnerPreserving, WithSFT

DISTURBANCE = 0.15
"""Of the poor editor's weights: noise of this share of each tensor's own spread."""
UNCHANGED = 0.2
"""How much the masked arm looks at what the edit left alone."""
STEPS = 150
"""Of each training: a third of the recipe's own, so that a whole study fits into hours."""
KS = (20.0, 200.0)
"""Strengths that the study of objectives tries."""
SAYS = {
    "own": "as the recipe has it",
    "dpo": "Diffusion-DPO",
    "dpo-soft": "Diffusion-DPO, labels as sure as the rewards are apart",
    "dpo-masked": "Diffusion-DPO, looking less at what the edit left alone",
    "dpo-sft": "Diffusion-DPO with SFT",
    "sdpo": "Diffusion-DPO, winner-preserving",
    "mapo": "MaPO, without a reference",
    "kto": "Diffusion-KTO",
    "sft": "SFT on the chosen images",
    "dpo-loser": "Diffusion-DPO, a tenth of the rejected side's gradient",
    "dpo-anchor": "Diffusion-DPO, anchored to the reference",
    "dpo-late": "Diffusion-DPO, the noisier half of the timesteps",
    "dpo-small-k": "Diffusion-DPO, a tenth of k",
    "dpo-slow": "Diffusion-DPO, a tenth of the learning rate",
}
"""The arms of the study of objectives."""
PROJECTION = 0.5
"""Share of the noise schedule that projection through the policy undoes and redoes."""


@dataclass(frozen=True, kw_only=True)
class DisturbedEditorConfig:
    """An editor made worse on purpose: noise on every weight of its network."""

    of: EditorConfig
    """The editor."""
    share: float
    """Standard deviation of the noise, as a share of each tensor's own."""

    def models(self) -> tuple[str, ...]:
        return self.of.models()

    def frame(self) -> Frame:
        return self.of.frame()

    def build(self) -> DiffusersEditor:
        editor, generator = self.of.build(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in editor.pipeline.unet.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(self.share * parameter.std(correction=0) * noise)
        return editor


def _settings(train: TrainConfig, objectives: Sequence[tuple[float, Objective]]) -> tuple[TrainConfig, ...]:
    # Held-out pairs, checkpoints and their pictures tell a study nothing: the test does.
    lean = replace(train, steps=STEPS, log_every=5, eval_every=STEPS, checkpoint_every=STEPS)
    return tuple(replace(lean, lr=lr, objective=objective) for lr, objective in objectives)


def _preference(train: TrainConfig) -> tuple[TrainConfig, ...]:
    def pulled(k: float) -> Objective:
        return WithSFT(of=DiffusionDPO(k=k), weight=20.0)

    # Plain Diffusion-DPO is not among them: on these pairs it gains little where slow and ruins where fast (docs/objectives.md).
    return _settings(train, [(1e-4, pulled(20.0)), (5e-5, pulled(20.0)), (1e-4, pulled(100.0))])


def _curations(curate: Curation, images: int) -> dict[str, Curation | SampleCuration]:
    def of(**changes: object) -> Curation:
        return replace(curate, prompts=replace(curate.prompts, count=images), held_out_share=0.0, **changes)  # type: ignore[type-var]

    def labelled(**changes: object) -> Curation:
        return of(label=replace(curate.label, **changes))

    editor, critic, generator = curate.edit.editor, curate.critique.critic, curate.source.generator
    assert isinstance(editor, EditorConfig) and isinstance(critic, ShapesCriticConfig) and isinstance(generator, GeneratorConfig)

    def by_editor(share: float) -> Curation:
        # Trusted: where the fingerprint starts to hurt is seen only where no reward stands in between.
        label = replace(curate.label, rule="trust_edit", rejected_side="original")
        return of(edit=replace(curate.edit, editor=DisturbedEditorConfig(of=editor, share=share)), label=label)

    sides = ("source", "original", "second", "edited", "neutral")
    projected = of(
        project=ProjectStage(projector=ProjectorConfig(generator=generator, strength=PROJECTION), batch_size=32),
        score=replace(curate.score, sides=(*sides, *(f"{side}_projected" for side in ("original", "edited", "neutral")))),
        label=replace(curate.label, projected=True),
    )
    samples = SampleCuration(
        prompts=replace(curate.prompts, count=images // 2),  # type: ignore[type-var]
        source=TwoSamplesStage(generator=generator, batch_size=32),
        score=ScoreStage(rewards=curate.score.rewards, sides=("first", "second")),
        label=DuelLabelStage(rewards=curate.label.rewards),
        held_out_share=0.0,
    )
    return {
        "rpo": of(),
        "samples": samples,
        "samples-random": replace(samples, label=replace(samples.label, rule="random")),
        "trusted": labelled(rule="trust_edit"),
        "against-source": labelled(rejected_side="original"),
        "trusted-against-source": labelled(rule="trust_edit", rejected_side="original"),
        "random-instructions": of(instruct=replace(curate.instruct, instructor=RandomInstructorConfig())),
        "critic-10": of(critique=replace(curate.critique, critic=MistakenCriticConfig(of=critic, rate=0.1))),
        "critic-30": of(critique=replace(curate.critique, critic=MistakenCriticConfig(of=critic, rate=0.3))),
        "projected": projected,
        "editor-disturbed": by_editor(DISTURBANCE),
        "editor-disturbed-half": by_editor(DISTURBANCE / 2),
    }


def _arms(train: TrainConfig) -> tuple[Arm, ...]:
    dpo = _preference(train)
    sft = _settings(train, [(1e-4, SFT()), (2e-4, SFT())])

    def arm(name: str, says: str, *pairs_from: str, main: bool = False, candidates: tuple[TrainConfig, ...] = dpo[:2]) -> Arm:
        return Arm(name=name, says=says, pairs_from=pairs_from or (name,), candidates=candidates, main=main)

    return (
        arm("rpo", "critique, edit, rewards decide", main=True, candidates=dpo),
        arm("samples", "best and worst of two samples, the same rewards decide", main=True, candidates=dpo),
        arm("random-instructions", "rpo with some instruction in place of the critique's"),
        arm("sft", "SFT on the chosen images of rpo", "rpo", candidates=sft),
        arm("rpo-fast", "rpo at twice the learning rate", "rpo", candidates=_settings(train, [(2e-4, dpo[0].objective)])),
        arm("samples-random", "two samples, labels by coin"),
        arm("trusted", "rpo without asking the rewards: the edit is chosen"),
        arm("critic-10", "rpo with a critic that misreads 10 % more images"),
        arm("critic-30", "rpo with a critic that misreads 30 % more images"),
        arm("mixture", "rpo and samples, half of the sources each", "rpo", "samples"),
        arm("masked", "rpo, looking less at what the edit left alone", "rpo",
            candidates=tuple(replace(setting, unchanged_weight=UNCHANGED) for setting in dpo[:2])),
        arm("against-source", "rpo with the source, not the neutral edit, as rejected side"),
        arm("projected", "rpo with both sides projected through the policy"),
        arm("trusted-against-source", "the edit is chosen over the source, no reward asked"),
        arm("editor-disturbed-half", "the same with an editor whose weights are disturbed a little"),
        arm("editor-disturbed", "the same with an editor whose weights are disturbed more"),
    )  # fmt: skip


def shapes_study(recipe: Recipe, quick: bool) -> Study:
    """What `rpo study shapes` compares; the quick one asks the main question only, at one size and on one seed."""
    curate = recipe.curate
    assert isinstance(curate, Curation)
    sizes, seeds = ((500,), (0,)) if quick else ((250, 500, 1000), (0, 1, 2, 3, 4))
    arms = _arms(recipe.train)
    if quick:
        kept = ("rpo", "samples", "sft", "random-instructions")
        arms = tuple(replace(arm, candidates=arm.candidates[:2]) for arm in arms if arm.name in kept)
    return Study(
        curations=_curations(curate, sizes[-1]),
        arms=arms,
        sizes=sizes,
        seeds=seeds,
        side_seeds=min(3, len(seeds)),
        pairs_per_source=0.25,
        beside=("quality",),
    )


def _objectives(train: TrainConfig) -> dict[str, tuple[TrainConfig, ...]]:
    """The settings of each objective that are tried: two learning rates times two values of k, or of what takes its place."""

    def settings(*objectives: Objective) -> tuple[TrainConfig, ...]:
        return _settings(train, [(lr, objective) for lr in (train.lr, train.lr / 10) for objective in objectives])

    dpo = settings(*(DiffusionDPO(k=k) for k in KS))
    return {
        "dpo": dpo,
        "dpo-soft": settings(*(SoftDPO(k=k, temperature=1.0) for k in KS)),
        "dpo-masked": tuple(replace(setting, unchanged_weight=UNCHANGED) for setting in dpo),
        "dpo-sft": settings(*(WithSFT(of=DiffusionDPO(k=KS[0]), weight=weight) for weight in (20.0, 60.0))),
        "sdpo": settings(*(WinnerPreserving(of=DiffusionDPO(k=k)) for k in KS)),
        "mapo": settings(*(MaPO(weight=weight) for weight in (0.1, 1.0))),
        "kto": settings(*(DiffusionKTO(k=k) for k in KS)),
        "sft": settings(SFT()),
    }


def _guards(train: TrainConfig) -> dict[str, TrainConfig]:
    """What may keep plain Diffusion-DPO from ruin, one at a time, at its most dangerous setting."""
    dpo = DiffusionDPO(k=KS[0])
    guarded = [LoserGradient(of=dpo, scale=0.1), Anchored(of=dpo), dpo]
    loser, anchor, late = _settings(train, [(train.lr, objective) for objective in guarded])
    small_k, slow = _settings(train, [(train.lr, DiffusionDPO(k=KS[0] / 10)), (train.lr / 10, dpo)])
    windowed = replace(late, timesteps=(500, 1000))
    return {"loser": loser, "anchor": anchor, "late": windowed, "small-k": small_k, "slow": slow}


def objectives_study(recipe: Recipe, quick: bool) -> Study:
    """What `rpo study shapes_objectives` compares: objectives and safeguards on the same pairs, and on a poor editor's, unchecked."""
    curate = recipe.curate
    assert isinstance(curate, Curation)
    images, seeds = (500, (0,)) if quick else (1000, (0, 1, 2))
    own = _settings(recipe.train, [(recipe.train.lr, recipe.train.objective)])
    plain = replace(recipe.train, ema_decay=None)  # the moving average is one more safeguard
    tried = {"own": own} | {name: settings[:1] if quick else settings for name, settings in _objectives(plain).items()}
    guards = {f"dpo-{name}": (setting,) for name, setting in _guards(plain).items()}

    def arm(name: str, settings: tuple[TrainConfig, ...], pairs: str, main: bool = False) -> Arm:
        poor = pairs != "rpo"
        says = SAYS[name] + (", on the poor editor's pairs" if poor else "")
        return Arm(name=f"{name}-poor" if poor else name, says=says, pairs_from=(pairs,), candidates=settings, main=main)

    arms = [arm(name, settings, "rpo", main=True) for name, settings in tried.items()]
    arms += [arm(name, settings, "rpo") for name, settings in guards.items()]
    arms += [arm(name, settings[:1], "editor-disturbed") for name, settings in (tried | guards).items()]
    curations = _curations(curate, images)
    return Study(
        curations={name: curations[name] for name in ("rpo", "editor-disturbed")},
        arms=tuple(arms),
        sizes=(images,),
        seeds=seeds,
        side_seeds=1,
        pairs_per_source=1.0,
        beside=("quality",),
    )
