"""A vision-language model as a judge of pictures, through any `Chat`: VQAScore (arXiv 2404.01291), which of two is better, and whether
an edit did what it was told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer, ChatRequest, Message, Sampling
from rpo.errors import RowError
from rpo.protocols import Chat

SHOWS = 'Does this figure show "{}"? Please answer Yes or No.'
BETTER = (
    'Both images were made for the description "{}". Which one follows it better and has fewer faults? '
    "Answer with 1 for the first image or 2 for the second, nothing else."
)
CHANGED = (
    'The second image is an edit of the first. Is the following true of the second image, while the first may differ: "{}"? '
    "Please answer Yes or No."
)


@runtime_checkable
class ChatConfig(Protocol):
    """A frozen configuration that builds a `Chat`."""

    def models(self) -> tuple[str, ...]: ...

    def build(self) -> Chat: ...


def _question(*parts: str | np.ndarray, purpose: str) -> ChatRequest:
    message = Message(role="user", parts=parts)
    return ChatRequest(messages=(message,), sampling=Sampling(max_tokens=4), first_token=FIRST_TOKEN_MAX, purpose=purpose)


def first_word_probability(answer: ChatAnswer | RowError, yes: str, no: str) -> float | RowError:
    """P(yes) / (P(yes) + P(no)) of an answer's first word; 0 or 1, by what was said, from a server that tells no probabilities."""
    if isinstance(answer, RowError):
        return answer
    words = {token.strip(" \t\n\r\"'.▁Ġ").casefold(): 0.0 for token in answer.first_token}
    for token, logprob in answer.first_token.items():
        words[token.strip(" \t\n\r\"'.▁Ġ").casefold()] += math.exp(logprob)
    total = words.get(yes, 0.0) + words.get(no, 0.0)
    if total > 0:
        return words.get(yes, 0.0) / total
    said = answer.text.strip(" \t\n\r\"'.").casefold()
    if said.startswith((yes, no)):
        return float(said.startswith(yes))
    return RowError(f"the answer begins with neither {yes!r} nor {no!r}: {answer.text[:60]!r}")


@dataclass(frozen=True, kw_only=True)
class VqaScorerConfig:
    """How probable it is that the model says the picture shows the prompt, 0 to 1."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "VqaScorer":
        return VqaScorer(self.chat.build())


class VqaScorer:
    """A `Scorer`."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        questions = [_question(image, SHOWS.format(prompt), purpose="score") for image, prompt in zip(images, prompts, strict=True)]
        return [first_word_probability(answer, "yes", "no") for answer in self.chat.complete(questions)]


@dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """Which of two images fits a prompt better, asked in both orders."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "PairwiseComparer":
        return PairwiseComparer(self.chat.build())


class PairwiseComparer:
    """A `Comparer`. Who answers by place and not by picture says nothing: a preference that the swapped order contradicts is a tie."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        rows = list(zip(first, second, prompts, strict=True))
        questions = [_question(a, b, BETTER.format(prompt), purpose="compare") for a, b, prompt in rows]
        questions += [_question(b, a, BETTER.format(prompt), purpose="compare") for a, b, prompt in rows]
        said = [first_word_probability(answer, "1", "2") for answer in self.chat.complete(questions)]
        return [_agreed(one, other) for one, other in zip(said[: len(rows)], said[len(rows) :], strict=True)]


def _agreed(straight: float | RowError, swapped: float | RowError) -> float | RowError:
    if isinstance(straight, RowError):
        return straight
    if isinstance(swapped, RowError):
        return swapped
    contradicted = (straight - 0.5) * (0.5 - swapped) <= 0
    return 0.5 if contradicted else (straight + 1 - swapped) / 2


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """Whether the change that was expected can be seen, 0 to 1."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "ChatVerifier":
        return ChatVerifier(self.chat.build())


class ChatVerifier:
    """A `Verifier`."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def verify(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], changes: Sequence[str]) -> list[float | RowError]:
        rows = zip(before, after, changes, strict=True)
        questions = [_question(a, b, CHANGED.format(change), purpose="verify") for a, b, change in rows]
        return [first_word_probability(answer, "yes", "no") for answer in self.chat.complete(questions)]
