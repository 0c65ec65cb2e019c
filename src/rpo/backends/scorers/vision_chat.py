"""A vision-language model as a judge of pictures, through any `Chat`: VQAScore (arXiv 2404.01291), marks, single facts, which of two is
better, and whether an edit did what it was told. Every answer about a picture is one word, read with its probability."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer, ChatRequest, Message, Sampling
from rpo.errors import RowError, answered
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


MARKS = {
    "vlm_follows": 'An image was made for the description "{}". How well does it show what is described: '
    "things, their number, attributes and places? 1: hardly anything; 5: everything, exactly.",
    "vlm_faultless": 'An image was made for the description "{}". Leave aside how well it fits. How free is it of visible faults: '
    "broken shapes, wrong anatomy, smears, artefacts? 1: ruined; 5: without fault.",
    "vlm_appeal": 'An image was made for the description "{}". Leave aside how well it fits. How good does it look: '
    "composition, light, colour? 1: ugly; 5: excellent.",
}
_MARK_ONLY = " Answer with a whole number from 1 to 5, nothing else."
_WORDS_OF_MARKS = ("1", "2", "3", "4", "5")
FACTS = (
    "Take the description of an image apart into the single facts that the image must show to follow it: every thing, how many of it, "
    "each of its attributes, each place and relation. One short sentence a line, no fact twice, at most {} lines, nothing else.\n"
    "Description: {}"
)
HOLDS = 'An image was made for the description "{}". Is this true of the image: "{}"? Please answer Yes or No.'
FACTS_MAX = 12
FACT_CHARACTERS_MAX = 200
YES_NO = ("yes", "no")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.):])\s+")
_AROUND = " \t\n\r\"'.▁Ġ"


@runtime_checkable
class ChatConfig(Protocol):
    """A frozen configuration that builds a `Chat`."""

    def models(self) -> tuple[str, ...]: ...

    def build(self) -> Chat: ...


def _question(*parts: str | np.ndarray, purpose: str) -> ChatRequest:
    message = Message(role="user", parts=parts)
    return ChatRequest(messages=(message,), sampling=Sampling(max_tokens=4), first_token=FIRST_TOKEN_MAX, purpose=purpose)


def first_word_shares(answer: ChatAnswer | RowError, words: Sequence[str]) -> list[float] | RowError:
    """How probable each of `words` is as an answer's first word, in all spellings, summing to 1; from a model in
    process that tells no probabilities, 1 for the one that was said (a server that tells none answers with a `RowError`)."""
    if isinstance(answer, RowError):
        return answer
    found = dict.fromkeys(words, 0.0)
    for token, logprob in answer.first_token.items():
        if (word := token.strip(_AROUND).casefold()) in found:
            found[word] += math.exp(logprob)
    if total := sum(found.values()):
        return [probability / total for probability in found.values()]
    said = re.match(r"\w*", answer.text.strip(_AROUND).casefold())
    if said is not None and said[0] in found:
        return [float(said[0] == word) for word in words]
    return RowError(f"the answer begins with none of {', '.join(words)}: {answer.text[:60]!r}")


def _first_share(answer: ChatAnswer | RowError, words: Sequence[str]) -> float | RowError:
    shares = first_word_shares(answer, words)
    return shares if isinstance(shares, RowError) else shares[0]


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
        return [_first_share(answer, YES_NO) for answer in self.chat.complete(questions)]


@dataclass(frozen=True, kw_only=True)
class RubricConfig:
    """Marks from 1 to 5, each the mean over the model's own probabilities of the five (as in G-Eval, arXiv 2303.16634)."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "Rubric":
        return Rubric(self.chat.build())


class Rubric:
    """A `Judge`: how well an image follows its prompt, how free of faults it is, how good it looks. No answer, no metric."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        rows = list(zip(images, prompts, strict=True))
        words = [text + _MARK_ONLY for text in MARKS.values()]
        asked = [_question(image, text.format(prompt), purpose="evaluate") for image, prompt in rows for text in words]
        marks = iter(answered([_mark(answer) for answer in self.chat.complete(asked)], "the model that judges"))
        return [{name: mark for name in MARKS if not isinstance(mark := next(marks), RowError)} for _ in rows]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), 0))


def _mark(answer: ChatAnswer | RowError) -> float | RowError:
    shares = first_word_shares(answer, _WORDS_OF_MARKS)
    return shares if isinstance(shares, RowError) else sum(float(word) * share for word, share in zip(_WORDS_OF_MARKS, shares, strict=True))


@dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """An object-level check: the prompt is taken apart into single facts, and each is asked for by itself (as in DSG, arXiv 2310.18235)."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "Facts":
        return Facts(self.chat.build())


class Facts:
    """A `Judge`: `vlm_facts`, the mean probability that a fact of the prompt holds, and `vlm_all_facts`, 1 where each of them is more
    likely than not. Without an answer to each of them, no metric."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        facts = self._facts(list(dict.fromkeys(prompts)))
        rows = zip(images, prompts, strict=True)
        asked = [_question(image, HOLDS.format(prompt, fact), purpose="evaluate") for image, prompt in rows for fact in facts[prompt]]
        shares = iter(answered([_first_share(answer, YES_NO) for answer in self.chat.complete(asked)], "the model that judges"))
        return [_held([next(shares) for _ in facts[prompt]]) for prompt in prompts]

    def _facts(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        """Of each prompt; none where the model gave none. An answer that is kept is the same for every image and model."""
        messages = [Message(role="user", parts=(FACTS.format(FACTS_MAX, prompt),)) for prompt in prompts]
        asked = [ChatRequest(messages=(message,), sampling=Sampling(max_tokens=600), purpose="evaluate") for message in messages]
        answers = answered(self.chat.complete(asked), "the model that judges")
        return {p: [] if isinstance(answer, RowError) else facts_in(answer.text) for p, answer in zip(prompts, answers, strict=True)}

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), 0))


def facts_in(text: str) -> list[str]:
    """The lines of an answer as facts: without bullets and numbers, each once, bounded in number and length. What is not printable goes."""
    lines = ("".join(letter for letter in _BULLET.sub("", line) if letter.isprintable()).strip() for line in text.splitlines())
    return list(dict.fromkeys(line[:FACT_CHARACTERS_MAX] for line in lines if line))[:FACTS_MAX]


def _held(shares: Sequence[float | RowError]) -> dict[str, float]:
    known = [share for share in shares if not isinstance(share, RowError)]
    if not known or len(known) < len(shares):
        return {}
    return {"vlm_facts": sum(known) / len(known), "vlm_all_facts": float(min(known) > 0.5)}


@dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """Which of two images fits a prompt better, asked in both orders."""

    chat: ChatConfig
    """The vision-language model that is asked."""
    purpose: Literal["compare", "evaluate"] = field(default="compare", metadata={"changes_results": False})
    """For the account: whether labels are made or models judged."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def build(self) -> "PairwiseComparer":
        return PairwiseComparer(self.chat.build(), self.purpose)


class PairwiseComparer:
    """A `Comparer`. Who answers by place and not by picture says nothing: a preference that the swapped order contradicts is a tie."""

    def __init__(self, chat: Chat, purpose: str = "compare") -> None:
        self.chat, self.purpose = chat, purpose

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        rows = list(zip(first, second, prompts, strict=True))
        questions = [_question(a, b, BETTER.format(prompt), purpose=self.purpose) for a, b, prompt in rows]
        questions += [_question(b, a, BETTER.format(prompt), purpose=self.purpose) for a, b, prompt in rows]
        said = [_first_share(answer, ("1", "2")) for answer in self.chat.complete(questions)]
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
        return [_first_share(answer, YES_NO) for answer in self.chat.complete(questions)]
