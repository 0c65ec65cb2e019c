"""An instructor made of any chat; or one that takes what the critic wrote in the same call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rpo.curation.vlm.ask import REPAIRS, ask
from rpo.curation.vlm.critic import INSTRUCTION_TEMPLATES, example_instructions, instruction_words
from rpo.curation.vlm.editor_style import WORDINGS, EditorFamily
from rpo.curation.vlm.parse import read_instructions
from rpo.curation.vlm.schema import instructions_schema
from rpo.curation.vlm.templates import messages, templates_hash
from rpo.data.chat import ChatRequest, Sampling
from rpo.data.model_text import quoted
from rpo.data.schema import MAX_INSTRUCTIONS, NOT_ASKED_FOR, Critique, Instructions
from rpo.errors import RowError
from rpo.protocols import Chat, Model


@dataclass(frozen=True, kw_only=True)
class VlmInstructorConfig:
    """A language model as instructor: reads the critique, not the image."""

    chat: Model
    """Builds a `Chat`."""
    family: EditorFamily = "ip2p"
    """How the editor wants to be spoken to."""
    max_instructions: int = MAX_INSTRUCTIONS
    """Changes per image; one is enough for editors of the Stable Diffusion 1.5 class."""
    temperature: float = 0.0
    """Of the answer."""
    max_tokens: int = 768
    """Of one answer."""
    templates: str = field(init=False)
    """Hash of the words that are used."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_instructions <= MAX_INSTRUCTIONS:
            raise ValueError(f"max_instructions must be 1 to {MAX_INSTRUCTIONS}, got {self.max_instructions}")
        names = ("instruct", *INSTRUCTION_TEMPLATES, WORDINGS[self.family].template, *REPAIRS)
        object.__setattr__(self, "templates", templates_hash(*names))

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "VlmInstructor":
        return VlmInstructor(self, self.chat.build())


class VlmInstructor:
    """An `Instructor`."""

    def __init__(self, config: VlmInstructorConfig, chat: Chat) -> None:
        self._config, self._chat = config, chat

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        requests = [self._request(*row) for row in zip(prompts, critiques, strict=True)]
        return ask(self._chat, requests, [self._reader(critique) for critique in critiques])

    def _reader(self, critique: Critique) -> Callable[[str], Instructions]:
        config = self._config
        return partial(
            read_instructions,
            num_issues=len(critique.issues),
            max_instructions=config.max_instructions,
            max_words=WORDINGS[config.family].max_words,
            examples=example_instructions(config.family),
            reason_needed=not critique.no_issue,
        )

    def _request(self, prompt: str, critique: Critique) -> ChatRequest:
        config = self._config
        num_issues = len(critique.issues)
        told = critique.model_dump_json(exclude=set(NOT_ASKED_FOR)) if num_issues else quoted(critique.reasoning)
        words = instruction_words(config.family, config.max_instructions, num_issues)
        return ChatRequest(
            messages=messages("instruct", {"prompt": quoted(prompt), "critique": told, **words}),
            schema=instructions_schema(config.max_instructions, num_issues),
            schema_name="instructions",
            sampling=Sampling(temperature=config.temperature, max_tokens=config.max_tokens),
            purpose="instruct",
        )


@dataclass(frozen=True, kw_only=True)
class FromCritiqueConfig:
    """The instructor of the one-call mode: asks nobody, takes the instructions that came with the critique."""

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "FromCritiqueConfig":
        return self

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]:
        missing = RowError("the critique carries no instructions; set the critic's profile to one_call")
        return [missing if critique.instructions is None else critique.instructions for critique in critiques]
