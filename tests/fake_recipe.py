"""A recipe of fakes that see perfectly: each picture carries its scene in its lowest bits. Only the tuned network is real, and tiny.

`FAKE_MODEL` names the folder of a pipeline made by `tiny_diffusion.save_pipeline`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rpo.backends.chat.openai import OpenAIChatConfig
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.curation.sample_pairs import DuelLabelStage, TwoSamplesStage
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.instruct import InstructStage
from rpo.curation.stages.label import LabelStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.source import SourceStage
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import VlmInstructorConfig
from rpo.data.schema import Critique
from rpo.errors import RowError
from rpo.recipe import Arm, BroughtPrompts, Curation, Evaluation, Recipe, SampleCuration, Study
from rpo.shapes.critic import ShapesInstructorConfig, critique_view
from rpo.shapes.recognition import Seen, View
from rpo.shapes.render import place, render_scene
from rpo.shapes.scenes import (
    COLORS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    differences,
    parse_caption,
    random_change,
    scenes,
)
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import DiffusionDPO
from tiny_diffusion import SIDE


def paint(scene: Scene, seed: int) -> np.ndarray:
    """A picture of the scene, with its caption in the lowest bit of the first pixels."""
    image = render_scene(scene, np.random.default_rng(seed))
    bits = np.unpackbits(np.frombuffer(caption(scene).ljust(100).encode(), dtype=np.uint8))
    flat = image.reshape(-1)
    flat[: len(bits)] = (flat[: len(bits)] & 254) | bits
    return image


def read(image: np.ndarray) -> Scene:
    return parse_caption(np.packbits(image.reshape(-1)[:800] & 1).tobytes().decode())


@dataclass(frozen=True, kw_only=True)
class Fake:
    """Builds one of the fakes below by its name."""

    kind: str
    weights: str = ""

    def models(self) -> tuple[str, ...]:
        return ()

    def tuned(self, weights: Path) -> "Fake":
        return replace(self, weights=str(weights))

    def other(self, model: str) -> "Fake":
        return replace(self, weights=model)

    def build(self) -> object:
        return {"generator": Painter, "critic": Onlooker, "editor": Retoucher, "scorer": Counter, "judge": Lamp}[self.kind]()


class Painter:
    """Draws the caption with no, one or two mistakes."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng, scene = np.random.default_rng(seed), parse_caption(prompt)
            for _ in range(rng.integers(0, 3)):
                scene = random_change(scene, rng)[0]
            images.append(paint(scene, seed))
        return images


class Onlooker:
    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        answers: list[Critique | RowError] = []
        for image, prompt in zip(images, prompts, strict=True):
            scene = read(image)
            if caption(scene).startswith("a small red"):
                answers.append(RowError("the critic does not look at small red things"))
                continue
            placed = place(scene, np.random.default_rng(0))
            view = View(tuple(Seen(p.thing, p.x, p.y, 1.0) for p in placed), scene.background)
            answers.append(critique_view(view, parse_caption(prompt)))
        return answers


def obey(scene: Scene, instruction: str) -> Scene:
    """The scene after one instruction, whose things are named as they were before any."""
    words = instruction.split()
    things, relation, background = list(scene.things), scene.relation, scene.background
    named = [i for i, thing in enumerate(things) if thing is not None and thing.phrase in instruction]
    if instruction.startswith("make the background"):
        background = words[-1]
    elif words[0] in ("make", "turn"):
        field = next(f for f, values in (("size", SIZES), ("color", COLORS), ("shape", SHAPES)) if words[-1] in values)
        things[named[0]] = replace(things[named[0]], **{field: words[-1]})
    elif words[0] == "remove":
        del things[named[0]]
        relation = None
    else:
        relation = next(phrase for phrase in RELATIONS if phrase in instruction)
        if words[0] == "add":
            things.insert(0, Thing(*words[2:5]))
        elif not instruction.startswith(f"move the {things[0].phrase}"):
            relation = INVERSE[relation]
    return Scene(tuple(things), relation, background)


class Retoucher:
    """Carries out one instruction, the first, unless two equal things would come of it; an honest editor of little memory."""

    def _one(self, image: np.ndarray, instruction: str, seed: int) -> np.ndarray:
        if instruction.startswith("keep"):
            return image
        after = obey(read(image), instruction.split(" and ")[0])
        return image if len(set(after.things)) < len(after.things) else paint(after, seed)

    def edit(self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        return [self._one(*row) for row in zip(images, instructions, seeds, strict=True)]

    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(images)


class Counter:
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        pairs = zip(images, prompts, strict=True)
        return [-float(len(differences(read(image), parse_caption(prompt)))) for image, prompt in pairs]


class Lamp:
    """Measures brightness, of pictures of any size."""

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        return [{"fully_correct": float(image.mean() > 127), "quality": float(image.mean() / 255)} for image in images]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean((0, 1)) for image in images])


@dataclass(frozen=True, kw_only=True)
class Captions:
    count: int
    held_out: bool = False

    def prompts(self, seed: int) -> list[str]:
        source = scenes(np.random.default_rng(seed), self.held_out)
        found: dict[Scene, str] = {}
        while len(found) < self.count:
            scene = next(source)
            found.setdefault(scene.canonical(), caption(scene))
        return list(found.values())

    def check(self, prompt: str) -> None:
        parse_caption(prompt)


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """A reward that can look at any picture; it bears the name of one that labels."""

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "Brightness":
        return self

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [float(image.mean()) for image in images]


@dataclass(frozen=True, kw_only=True)
class Greys:
    def images(self) -> list[np.ndarray]:
        return [np.full((SIDE, SIDE, 3), value, dtype=np.uint8) for value in range(100, 140)]


def fake_study(recipe: Recipe, quick: bool) -> Study:
    """Edits at two sizes, against edits and samples mixed."""
    curate = replace(recipe.curate, held_out_share=0.0)
    samples = SampleCuration(
        prompts=Captions(count=50),
        source=TwoSamplesStage(generator=Fake(kind="generator")),
        score=replace(curate.score, sides=("first", "second")),
        label=DuelLabelStage(rewards=curate.label.rewards),
        held_out_share=0.0,
    )
    trusted = replace(curate, label=replace(curate.label, rule="trust_edit"))
    slow, fast = (replace(recipe.train, lr=lr, steps=2) for lr in (1e-5, 1e-3))
    return Study(
        curations={"rpo": curate, "samples": samples, "trusted": trusted},
        arms=(
            Arm(name="rpo", says="edits", pairs_from=("rpo",), candidates=(slow, fast), main=True),
            Arm(name="mixture", says="both", pairs_from=("trusted", "samples"), candidates=(slow,)),
        ),
        sizes=(64, 100),
        seeds=(0, 1),
        side_seeds=1,
        pairs_per_source=0.2,
    )


def fake() -> Recipe:
    """Whole method, seconds."""
    model = os.environ["FAKE_MODEL"]
    generator = GeneratorConfig(model=model, steps=2, guidance=1.0)
    return Recipe(
        name="fake",
        generator=generator,
        understands=parse_caption,
        study=fake_study,
        curate=Curation(
            prompts=Captions(count=100),
            source=SourceStage(generator=Fake(kind="generator")),
            critique=CritiqueStage(critic=Fake(kind="critic")),
            instruct=InstructStage(instructor=ShapesInstructorConfig()),
            edit=EditStage(editor=Fake(kind="editor"), second_quality=None),
            score=ScoreStage(rewards=(("first", Fake(kind="scorer")), ("second", Fake(kind="scorer")))),
            label=LabelStage(rewards=("first", "second")),
        ),
        train=TrainConfig(
            model=model,
            objective=DiffusionDPO(k=50.0),
            steps=6,
            batch_pairs=4,
            accumulation=1,
            lr=1e-4,
            warmup_steps=1,
            lora_rank=4,
            resolution=SIDE,
            draws=2,
            log_every=2,
            eval_every=3,
            checkpoint_every=3,
        ),
        evaluate=Evaluation(
            prompts=Captions(count=20, held_out=True),
            validation=Captions(count=10, held_out=True),
            judges=(("judge", Fake(kind="judge")),),
            scorers=(("first", Brightness()),),
            headline="fully_correct",
            references=Greys(),
        ),
    )


def fake_brought() -> Recipe:
    """The same for prompts that are brought: none of its own to evaluate on."""
    recipe = fake()
    assert recipe.evaluate is not None
    return replace(recipe, evaluate=replace(recipe.evaluate, prompts=BroughtPrompts()))


def fake_vlm() -> Recipe:
    """Critic and instructor over a wire: `fake_vlm.py` serves them."""
    recipe, chat = fake(), OpenAIChatConfig(model="fake")
    assert recipe.curate is not None
    critique = CritiqueStage(critic=VlmCriticConfig(chat=chat))
    instruct = InstructStage(instructor=VlmInstructorConfig(chat=chat, max_instructions=2))
    return replace(recipe, name="fake_vlm", curate=replace(recipe.curate, critique=critique, instruct=instruct))
