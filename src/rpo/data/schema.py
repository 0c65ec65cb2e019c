"""The structured values that pass between stages, and how they are stored (as JSON text in one column each).

Every string and list is bounded, and nothing unknown is accepted. What a model is asked for has smaller bounds
(`rpo.curation.vlm.schema`); what it answers is brought into this form by `rpo.curation.vlm.parse`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Aspect = Literal[
    "alignment", "count", "attribute_binding", "spatial", "anatomy", "artifacts", "text_rendering", "composition", "aesthetics"
]
LINE_MAX = 300
REASONING_MAX = 2000
ISSUES_MAX = 8
KEEP_MAX = 8
MAX_INSTRUCTIONS = 3
NOT_ASKED_FOR = frozenset({"no_issue", "instructions", "agreement", "adjustments"})
"""Fields of `Critique` and `Instructions` that no model is asked for: they are derived."""
Score = Annotated[int, Field(ge=1, le=5)]
Line = Annotated[str, Field(max_length=LINE_MAX)]
Adjustments = Annotated[tuple[Line, ...], Field(max_length=32)]
"""What was dropped, clipped or converted so that a model's answer could be read, such as "region dropped"; each kind once."""


def _without_issues(found: Mapping[str, Any]) -> bool:
    return not found.get("issues")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AspectScore(_Strict):
    """How one aspect of the image fares, 1 (bad) to 5 (good); `None` where it does not apply."""

    aspect: Aspect
    score: Score | None


class Issue(_Strict):
    """One thing that is wrong."""

    aspect: Aspect
    severity: Annotated[int, Field(ge=1, le=3)]
    evidence: Line
    """What is seen in the image."""
    region: Annotated[tuple[float, ...], Field(max_length=4)] | None = None
    """Box as (left, top, right, bottom), each a fraction of the image's side; `None` for the whole image."""
    prompt_span: Line = ""
    """The words of the prompt that are not met."""
    fixable_by_edit: bool = True


class Instruction(_Strict):
    """One atomic change for an image editor."""

    op: Literal["add", "remove", "replace", "recolor", "move", "fix", "restyle"]
    target: Line
    location: Line = ""
    instruction: Line
    """The imperative that the editor reads: one change."""
    addresses: Annotated[tuple[int, ...], Field(max_length=ISSUES_MAX)]
    """Indices into the critique's issues."""
    expected_visible_change: Line


class Instructions(_Strict):
    """What to change; an empty list with a `skip_reason` is a valid answer."""

    instructions: Annotated[tuple[Instruction, ...], Field(max_length=MAX_INSTRUCTIONS)]
    skip_reason: Line | None = None
    adjustments: Adjustments = ()


class Critique(_Strict):
    """What a critic says of one image. The reasoning comes first, then the scores."""

    reasoning: Annotated[str, Field(max_length=REASONING_MAX)]
    aspects: Annotated[tuple[AspectScore, ...], Field(max_length=9)]
    issues: Annotated[tuple[Issue, ...], Field(max_length=ISSUES_MAX)]
    keep: Annotated[tuple[Line, ...], Field(max_length=KEEP_MAX)]
    """What an edit must leave as it is."""
    overall: Score
    no_issue: bool = Field(default_factory=_without_issues)
    """Nothing is worth changing: without a value, that `issues` is empty."""
    instructions: Instructions | None = None
    """What to change, where it was asked for in the same call."""
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of several critiques of one image: how far they name the same aspects, 0 to 1; this is the one that the others agree with most."""
    adjustments: Adjustments = ()
