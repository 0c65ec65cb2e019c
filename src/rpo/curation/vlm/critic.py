"""A critic made of any chat: template, question, parser."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from rpo.curation.vlm.ask import REPAIRS, ask
from rpo.curation.vlm.editor_style import WORDINGS, EditorFamily
from rpo.curation.vlm.parse import read_critique, read_free_critique, read_one_call
from rpo.curation.vlm.schema import Schema, critique_schema, one_call_schema
from rpo.curation.vlm.templates import examples, filled, messages, template, templates_hash
from rpo.data.chat import ChatRequest, Sampling
from rpo.data.model_text import quoted
from rpo.data.schema import ISSUES_MAX, MAX_INSTRUCTIONS, Critique
from rpo.errors import RowError
from rpo.protocols import Chat, Model

logger = logging.getLogger(__name__)
Profile = Literal["structured", "paper", "one_call"]
_TEMPLATES: dict[Profile, str] = {
    "structured": "critique_structured",
    "paper": "critique_paper",
    "one_call": "critique_one_call",
}
INSTRUCTION_TEMPLATES = ("instructions_format", "instruction_example", "addresses")
EQUAL_ROWS_MAX = 2
"""So many images whose samples are all equal, and the server is suspected to ignore the temperature."""


@dataclass(frozen=True, kw_only=True)
class VlmCriticConfig:
    """A vision-language model as critic."""

    chat: Model
    """Builds a `Chat`."""
    profile: Profile = "structured"
    """structured: scores and issues as JSON; paper: free text (arXiv 2503.11720), from which the instructor extracts; one_call:
    structured, with the instructions in the same answer, for an instructor with `from_critique`."""
    samples: int = 1
    """Critiques per image. Of several, the one that the others agree with most is kept, with the agreement."""
    temperature: float | None = None
    """0 for one critique, 0.7 for several, if not given."""
    max_tokens: int = 1536
    """Of one answer."""
    family: EditorFamily = "ip2p"
    """How the editor wants to be spoken to; of the profile one_call only."""
    max_instructions: int = MAX_INSTRUCTIONS
    """Changes per image; of the profile one_call only."""
    templates: str = field(init=False)
    """Hash of the words that are used."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not 1 <= self.max_instructions <= MAX_INSTRUCTIONS:
            raise ValueError(f"max_instructions must be 1 to {MAX_INSTRUCTIONS}, got {self.max_instructions}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are one and the same; raise temperature or ask for one sample")
        names = [_TEMPLATES[self.profile], *REPAIRS]
        if self.profile == "one_call":
            names += [*INSTRUCTION_TEMPLATES, WORDINGS[self.family].template]
        object.__setattr__(self, "templates", templates_hash(*names))

    @property
    def sampling(self) -> Sampling:
        temperature = self.temperature if self.temperature is not None else 0.7 * (self.samples > 1)
        return Sampling(temperature=temperature, max_tokens=self.max_tokens)

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "VlmCritic":
        return VlmCritic(self, self.chat.build())


class VlmCritic:
    """A `Critic`."""

    def __init__(self, config: VlmCriticConfig, chat: Chat) -> None:
        self._config, self._chat = config, chat
        self._equal_rows = 0

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]:
        samples = self._config.samples
        requests = [self._request(*row, sample) for row in zip(images, prompts, strict=True) for sample in range(samples)]
        found = ask(self._chat, requests, [self._reader()] * len(requests))
        return [self._agreed(found[start : start + samples]) for start in range(0, len(found), samples)]

    def _agreed(self, critiques: Sequence[Critique | RowError]) -> Critique | RowError:
        """The critique kept of one image's samples. Equal samples are one sample: they have no agreement."""
        kept = agreed(critiques)
        if isinstance(kept, RowError) or len(critiques) == 1 or any(critique != critiques[0] for critique in critiques):
            return kept
        self._equal_rows += 1
        if self._equal_rows == EQUAL_ROWS_MAX:
            logger.warning(
                "all %d critiques of each of %d images are equal: %s seems to ignore the temperature, so more samples cost more and "
                "say nothing (no agreement is computed); set samples to 1, or check with `rpo doctor --vlm-url URL`",
                len(critiques),
                self._equal_rows,
                ", ".join(self._config.models()),
            )
        return kept.model_copy(update={"agreement": None})

    def _request(self, image: np.ndarray, prompt: str, sample: int) -> ChatRequest:
        config = self._config
        return ChatRequest(
            messages=messages(_TEMPLATES[config.profile], {"prompt": quoted(prompt), **self._wording()}, image),
            schema=self._schema(),
            schema_name="critique_and_instructions" if config.profile == "one_call" else "critique",
            sampling=config.sampling,
            sample=sample,
            purpose="critique",
        )

    def _wording(self) -> dict[str, str]:
        return instruction_words(self._config.family, self._config.max_instructions) if self._config.profile == "one_call" else {}

    def _schema(self) -> Schema | None:
        profile = self._config.profile
        if profile == "one_call":
            return one_call_schema(self._config.max_instructions)
        return critique_schema() if profile == "structured" else None

    def _reader(self) -> Callable[[str], Critique]:
        if self._config.profile == "one_call":
            config = self._config
            return partial(
                read_one_call,
                max_instructions=config.max_instructions,
                max_words=WORDINGS[config.family].max_words,
                examples=example_instructions(config.family),
            )
        return read_critique if self._config.profile == "structured" else read_free_critique


def instruction_words(family: EditorFamily, max_instructions: int, num_issues: int = ISSUES_MAX) -> dict[str, str]:
    """What the templates say about instructions to an editor of `family`, for a critique of `num_issues` issues."""
    wording = WORDINGS[family]
    addresses = filled(template("addresses"), {"last": str(num_issues - 1)}) + " " if num_issues else ""
    counted = {"max_instructions": str(max_instructions), "addresses": addresses}
    example = {"addresses": '"addresses": [<index>], ' if num_issues else ""}
    return {
        "instructions_format": filled(template("instructions_format"), counted),
        "example": filled(template("instruction_example"), example),
        "wording": filled(template(wording.template), {"max_words": str(wording.max_words)}),
    }


def example_instructions(family: EditorFamily) -> frozenset[tuple[str, ...]]:
    """Instructions that the templates show, and that are no answers."""
    return examples(WORDINGS[family].template, "instruction_example")


def _likeness(one: Critique, other: Critique) -> float:
    """Shared part of the aspects named in issues (Jaccard); without any in either, whether both see a fault or none does."""
    mine, theirs = ({issue.aspect for issue in critique.issues} for critique in (one, other))
    if not mine and not theirs:
        return float(one.no_issue == other.no_issue)
    return len(mine & theirs) / len(mine | theirs)


def agreed(critiques: Sequence[Critique | RowError]) -> Critique | RowError:
    """Of several critiques of one image the one most like the others, with their mean likeness as `agreement`.

    Whether there is an issue at all is put to the vote first, a tie counts as an issue. `RowError`, the first one's, unless more
    than half are readable.
    """
    good = [critique for critique in critiques if isinstance(critique, Critique)]
    if 2 * len(good) <= len(critiques):
        return next(error for error in critiques if isinstance(error, RowError))
    if len(critiques) == 1:
        return good[0]
    pairs = [_likeness(one, other) for one, other in itertools.combinations(good, 2)]
    agreement = sum(pairs) / len(pairs) if pairs else 1.0
    no_issue = 2 * sum(critique.no_issue for critique in good) > len(good)
    voted = [critique for critique in good if critique.no_issue == no_issue]
    best = max(voted, key=lambda critique: sum(_likeness(critique, other) for other in good))  # the first, among equals
    return best.model_copy(update={"agreement": agreement})
