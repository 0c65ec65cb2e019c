"""The embedded world's critic and instructor: a small network looks, exact words say what differs and what to change."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rpo.data.schema import MAX_INSTRUCTIONS, AspectScore, Critique, Instruction, Instructions, Issue
from rpo.errors import RowError
from rpo.shapes.recognition import Recogniser, Seen, View
from rpo.shapes.render import RADII, SIDE
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Edit, Scene, caption, differences, parse_caption, random_edits

_ASPECTS = ("alignment", "count", "attribute_binding", "spatial")


@dataclass(frozen=True, kw_only=True)
class ShapesCriticConfig:
    """The embedded critic."""

    model: str
    """Folder of a recogniser."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "ShapesCritic":
        return ShapesCritic(Recogniser.load(Path(self.model)))


def _region(seen: Seen) -> tuple[float, ...]:
    reach = float(RADII[SIZES.index(seen.thing.size)]) * 1.25
    box = (seen.x - reach, seen.y - reach, seen.x + reach, seen.y + reach)
    return tuple(round(min(max(v / SIDE, 0.0), 1.0), 3) for v in box)


def _issue(edit: Edit, view: View) -> Issue:
    regions = {seen.thing.phrase: _region(seen) for seen in view.things}
    evidence = f"the background is {view.background}" if edit.target == "background" else f"a {edit.target} is seen"
    if edit.op == "add":
        evidence = f"no {edit.target} is seen"
    return Issue(
        aspect=edit.aspect,  # pyright: ignore[reportArgumentType]
        severity=3 if edit.aspect in ("count", "alignment") else 2,
        evidence=evidence,
        region=regions.get(edit.target),
        prompt_span=edit.expected,
    )


def critique_view(view: View, wanted: Scene) -> Critique:
    """What is wrong with what was seen, in the structured schema."""
    seen = view.scene()
    listed = ", ".join(f"a {s.thing.phrase}" for s in view.things) or "nothing"
    if seen is None or len(set(seen.things)) < len(seen.things):
        evidence = (
            f"{len(view.things)} things are seen" if seen is None else "two equal things are seen, which no instruction can tell apart"
        )
        reasoning = f"I see {listed} on a {view.background} background. Asked for is {caption(wanted)}."
        issue = Issue(aspect="count", severity=3, evidence=evidence, fixable_by_edit=False)
        scores = tuple(AspectScore(aspect=a, score=1) for a in _ASPECTS)
        return Critique(reasoning=reasoning, aspects=scores, issues=(issue,), keep=(), overall=1, no_issue=False)
    edits = differences(seen, wanted)
    wrong = [edit.aspect for edit in edits]
    scores = tuple(AspectScore(aspect=a, score=max(1, 5 - 2 * wrong.count(a))) for a in _ASPECTS)
    touched = {edit.target for edit in edits}
    keep = tuple(f"the {s.thing.phrase}" for s in view.things if s.thing.phrase not in touched)
    return Critique(
        reasoning=f"I see {caption(seen)}. Asked for is {caption(wanted)}. "
        + ("Nothing differs." if not edits else f"{len(edits)} thing(s) differ."),
        aspects=scores,
        issues=tuple(_issue(edit, view) for edit in edits[:8]),
        keep=keep,
        overall=max(1, 5 - len(edits)),
        no_issue=not edits,
    )


class ShapesCritic:
    """A `Critic`: looks with a recogniser, which is wrong sometimes, and compares with the caption."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        views = self.recogniser.view(list(images))
        return [critique_view(view, parse_caption(prompt)) for view, prompt in zip(views, prompts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ShapesInstructorConfig:
    """The embedded instructor: reads the critique's words, knows nothing of the picture."""

    max_instructions: int = 2
    """Changes asked for at once; the embedded editor was trained on one and two."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_instructions <= MAX_INSTRUCTIONS:
            raise ValueError(f"max_instructions must be 1 to {MAX_INSTRUCTIONS}, got {self.max_instructions}")

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "ShapesInstructor":
        return ShapesInstructor(self)


def _instruction(index: int, edit: Edit) -> Instruction:
    return Instruction(
        op=edit.op, target=edit.target, instruction=edit.instruction, addresses=(index,), expected_visible_change=edit.expected
    )


class ShapesInstructor:
    """An `Instructor`: from "I see A. Asked for is B." to the changes that lead from A to B."""

    def __init__(self, config: ShapesInstructorConfig) -> None:
        self.config = config

    def _one(self, prompt: str, critique: Critique) -> Instructions:
        if critique.no_issue:
            return Instructions(instructions=(), skip_reason="nothing to change")
        if not all(issue.fixable_by_edit for issue in critique.issues):
            return Instructions(instructions=(), skip_reason="no edit of ours can fix this")
        seen = parse_caption(critique.reasoning.split(". ")[0].removeprefix("I see "))
        edits = differences(seen, parse_caption(prompt))[: self.config.max_instructions]
        return Instructions(instructions=tuple(_instruction(i, edit) for i, edit in enumerate(edits)))

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        return [self._one(prompt, critique) for prompt, critique in zip(prompts, critiques, strict=True)]


@dataclass(frozen=True, kw_only=True)
class MistakenCriticConfig:
    """The embedded critic made worse on purpose: sometimes it says that a thing, or the background, looks other than it does."""

    of: ShapesCriticConfig
    """The critic."""
    rate: float
    """Share of images that it misreads, beside its own errors."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be between 0 and 1, got {self.rate}")

    def models(self) -> tuple[str, ...]:
        return self.of.models()

    def build(self) -> "MistakenCritic":
        return MistakenCritic(self.of.build().recogniser.view, self.rate)


def _misread(view: View, rng: np.random.Generator) -> View:
    fields = {"color": COLORS, "shape": SHAPES, "size": SIZES}
    kind = str(rng.choice([*fields, "background"])) if view.things else "background"
    if kind == "background":
        return replace(view, background=str(rng.choice([name for name in BACKGROUNDS if name != view.background])))
    i = int(rng.integers(len(view.things)))
    thing = view.things[i].thing
    other = str(rng.choice([value for value in fields[kind] if value != getattr(thing, kind)]))
    seen = replace(view.things[i], thing=replace(thing, **{kind: other}))
    return replace(view, things=(*view.things[:i], seen, *view.things[i + 1 :]))


def _rng_of(*parts: bytes) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(b"\x00".join(parts)).digest()[:8]))


class MistakenCritic:
    """A `Critic`; which images it misreads, and how, is decided by image and prompt."""

    def __init__(self, look: Callable[[list[np.ndarray]], list[View]], rate: float) -> None:
        self.look, self.rate = look, rate

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        answers: list[Critique | RowError] = []
        for image, prompt, view in zip(images, prompts, self.look(list(images)), strict=True):
            rng = _rng_of(image.tobytes(), prompt.encode())
            answers.append(critique_view(_misread(view, rng) if rng.random() < self.rate else view, parse_caption(prompt)))
        return answers


@dataclass(frozen=True, kw_only=True)
class RandomInstructorConfig:
    """Asks for some change of what the critic saw, whatever is wrong with it: a control for the critique's worth."""

    max_instructions: int = 2
    """As many changes as the critique calls for, and at most this many."""

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "RandomInstructor":
        return RandomInstructor(self)


class RandomInstructor:
    """An `Instructor` that takes from the critique what is in the picture, and how many changes to ask for; nothing else."""

    def __init__(self, config: RandomInstructorConfig) -> None:
        self.real = ShapesInstructor(ShapesInstructorConfig(max_instructions=config.max_instructions))

    def _one(self, prompt: str, critique: Critique, real: Instructions | RowError) -> Instructions | RowError:
        if isinstance(real, RowError) or not real.instructions:
            return real
        seen = parse_caption(critique.reasoning.split(". ")[0].removeprefix("I see "))
        rng = _rng_of(prompt.encode(), critique.reasoning.encode())
        _, _, edits = random_edits(seen, rng, len(real.instructions))
        return Instructions(instructions=tuple(_instruction(i, edit) for i, edit in enumerate(edits)))

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        asked = self.real.instruct(prompts, critiques)
        return [self._one(*row) for row in zip(prompts, critiques, asked, strict=True)]
