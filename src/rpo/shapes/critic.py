"""The embedded world's critic and instructor: a small network looks, exact words say what differs and what to change."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpo.data.schema import MAX_INSTRUCTIONS, AspectScore, Critique, Instruction, Instructions, Issue
from rpo.errors import RowError
from rpo.shapes.recognition import Recogniser, Seen, View
from rpo.shapes.render import RADII, SIDE
from rpo.shapes.scenes import SIZES, Edit, Scene, caption, differences, parse_caption

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
        return Instructions(
            instructions=tuple(
                Instruction(
                    op=edit.op, target=edit.target, instruction=edit.instruction, addresses=(i,), expected_visible_change=edit.expected
                )
                for i, edit in enumerate(edits)
            )
        )

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        return [self._one(prompt, critique) for prompt, critique in zip(prompts, critiques, strict=True)]
