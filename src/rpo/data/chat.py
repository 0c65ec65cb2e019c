"""A talk with a vision-language model as data: what is asked, what is answered. Backends of `rpo.protocols.Chat` carry it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Part = str | np.ndarray
"""A text, or an image: `uint8` of shape (height, width, 3), RGB."""
FIRST_TOKEN_MAX = 20
"""How many alternatives of the first token a server must be able to tell."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """One turn of the talk."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]
    """Texts and images in the order in which the model reads them; images only from the user."""


def without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The talk without system messages: their texts come first in the user message that follows."""
    texts: tuple[Part, ...] = ()
    turns: list[Message] = []
    for message in messages:
        if message.role == "system":
            texts += message.parts
        elif message.role == "user":
            turns.append(replace(message, parts=texts + message.parts))
            texts = ()
        else:
            turns.append(message)
    return tuple(turns)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""
    max_tokens: int = 1024
    """An answer that is not finished by then is an error, unless only its first token was asked for."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be 0 to 2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatRequest:
    """One question. Requests that are equal in all but `purpose` have the same answer."""

    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    """JSON schema that the server should hold the answer to. Some servers ignore it in silence: the caller validates, always."""
    schema_name: str = "answer"
    """Letters, digits, `_` and `-`; servers want one."""
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    """Tells repeated questions apart; at a temperature above 0 another number is another draw."""
    first_token: int = 0
    """For yes/no questions: with how many of its alternatives the answer's first token is told, 0 to 20."""
    purpose: str = ""
    """For the ledger: which stage asks. No part of the question."""

    def __post_init__(self) -> None:
        if not 0 <= self.first_token <= FIRST_TOKEN_MAX:
            raise ValueError(f"first_token must be 0 to {FIRST_TOKEN_MAX}, got {self.first_token}")


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """What the model said, as it said it; nothing of it is validated."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    first_token: Mapping[str, float] = field(default_factory=dict)
    """Alternatives of the first token and their log probabilities, when asked for."""
