"""The embedded world: the whole method with no GPU, no hub and no key."""

from dataclasses import dataclass, replace

import numpy as np

from rpo.backends.chat.openai import OpenAIChatConfig
from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.instruct import InstructStage
from rpo.curation.stages.label import LabelStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.source import SourceStage
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import VlmInstructorConfig
from rpo.recipe import Curation, Evaluation, Recipe
from rpo.recipes.shapes_study import objectives_study, shapes_study
from rpo.shapes.critic import ShapesCriticConfig, ShapesInstructorConfig
from rpo.shapes.measure import held_out_scenes, renders
from rpo.shapes.scenes import NEUTRAL_INSTRUCTION, caption, is_held_out, parse_caption, scenes
from rpo.shapes.scoring import ChecklistScorerConfig, ShapesJudgeConfig
from rpo.shapes.weights import BASE_SAMPLER, EDITOR_SAMPLER, checked_weights, weights_folder
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import DiffusionDPO
from rpo.training.objectives.safeguards import WithSFT


@dataclass(frozen=True, kw_only=True)
class CurationCaptions:
    """Random captions, none of them from the held-out tenth of the world."""

    count: int
    """How many."""

    def prompts(self, seed: int) -> list[str]:
        source, found = scenes(np.random.default_rng([seed, 1]), held_out=False, two_things=0.75), {}
        while len(found) < self.count:
            scene = next(source)
            found.setdefault(scene.canonical(), caption(scene))
        return list(found.values())

    def check(self, prompt: str) -> None:
        if is_held_out(parse_caption(prompt)):
            raise ValueError(f"caption {prompt!r} belongs to the tenth of the world that is kept for evaluation; leave it out")


@dataclass(frozen=True, kw_only=True)
class HeldOutCaptions:
    """Random captions from the tenth of the world that nothing was trained on."""

    count: int
    """How many."""

    def prompts(self, seed: int) -> list[str]:
        return [caption(scene) for scene in held_out_scenes(self.count, seed=1000 + seed)]

    def check(self, prompt: str) -> None:
        if not is_held_out(parse_caption(prompt)):
            raise ValueError(f"caption {prompt!r} is not held out: models were trained on it; leave it out")


@dataclass(frozen=True, kw_only=True)
class ValidationCaptions:
    """Captions from the held-out tenth that no test of the seeds 0 to 9, or of the seed asked for, holds."""

    count: int
    """How many."""
    test: HeldOutCaptions
    """What the tests ask for."""

    def prompts(self, seed: int) -> list[str]:
        tested = {prompt for test in {*range(10), seed} for prompt in self.test.prompts(test)}
        return [prompt for prompt in HeldOutCaptions(count=5 * self.count).prompts(9000) if prompt not in tested][: self.count]

    def check(self, prompt: str) -> None:
        self.test.check(prompt)


@dataclass(frozen=True, kw_only=True)
class HeldOutRenders:
    """Clean pictures of held-out scenes."""

    count: int
    """How many."""

    def images(self) -> list[np.ndarray]:
        return renders(self.count, seed=900)[0]


def shapes() -> Recipe:
    """The embedded world of coloured shapes: minutes on two CPU cores, and the truth of every image is known."""
    weights = weights_folder()
    generator = GeneratorConfig(model=str(weights / "base"), **BASE_SAMPLER)
    rewards = (
        ("clip", ClipScorerConfig(model=str(weights / "clip"))),
        ("checklist", ChecklistScorerConfig(model=str(weights / "checklist"))),
    )
    return Recipe(
        name="shapes",
        generator=generator,
        ready=lambda: checked_weights(weights),
        understands=parse_caption,
        study=shapes_study,
        curate=Curation(
            prompts=CurationCaptions(count=1000),
            source=SourceStage(generator=generator, batch_size=32),
            critique=CritiqueStage(critic=ShapesCriticConfig(model=str(weights / "critic"))),
            instruct=InstructStage(instructor=ShapesInstructorConfig()),
            edit=EditStage(
                editor=EditorConfig(model=str(weights / "editor"), **EDITOR_SAMPLER),
                neutral_instruction=NEUTRAL_INSTRUCTION,
                batch_size=32,
            ),
            check=CheckStage(agreement_min=-1.0),  # a new background or shape leaves nothing of a lone flat thing in place
            score=ScoreStage(rewards=rewards),
            label=LabelStage(rewards=tuple(name for name, _ in rewards)),
        ),
        train=TrainConfig(
            model=str(weights / "base"),
            # Without the pull towards the chosen images both sides get worse together; with it DPO gains most: docs/objectives.md.
            objective=WithSFT(of=DiffusionDPO(k=20.0), weight=20.0),
            steps=450,
            batch_pairs=32,
            accumulation=1,
            lr=2e-4,
            ema_decay=0.97,
            warmup_steps=10,
            lora_rank=None,
            draws=8,
            caption_dropout=0.1,
            log_every=10,
            eval_every=50,
            checkpoint_every=50,
        ),
        evaluate=Evaluation(
            prompts=HeldOutCaptions(count=400),
            validation=ValidationCaptions(count=200, test=HeldOutCaptions(count=400)),
            judges=(("judge", ShapesJudgeConfig(model=str(weights / "judge"))),),
            scorers=rewards,
            headline="fully_correct",
            references=HeldOutRenders(count=500),
        ),
    )


def shapes_objectives() -> Recipe:
    """The embedded world, with a study of objectives."""
    return replace(shapes(), name="shapes_objectives", study=objectives_study)


def shapes_vlm() -> Recipe:
    """The embedded world with critic and instructor over a wire: `rpo shapes serve` is one, any vision-language model may try."""
    recipe = shapes()
    assert recipe.curate is not None
    chat = OpenAIChatConfig(model="shapes")
    curate = replace(
        recipe.curate,
        critique=CritiqueStage(critic=VlmCriticConfig(chat=chat), workers=2),
        instruct=InstructStage(instructor=VlmInstructorConfig(chat=chat, max_instructions=2), workers=2),
    )
    return replace(recipe, name="shapes_vlm", curate=curate)
