"""A vision-language model as a judge of pictures, through any `Chat`: VQAScore (arXiv 2404.01291), marks, single facts, which of two is
better, and whether an edit did what it was told. Every answer about a picture is one word, read with its probability."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from rpo.backends.scorers.prompt_facts import FACTS, FACTS_SCHEMA, facts_in
from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer, ChatRequest, Message, Sampling
from rpo.data.model_text import quoted, without_thought
from rpo.errors import RowError, answered
from rpo.protocols import Chat, Metric

SHOWS = "Does this figure show {}? Please answer Yes or No."
BETTER = (
    "Both images were made for the description {}. Which one follows it better and has fewer faults? "
    "Answer with 1 for the first image or 2 for the second, nothing else."
)
CHANGED = (
    "The second image is an edit of the first. Is the following true of the second image, while the first may differ: {}? "
    "Please answer Yes or No."
)
MARKS = {
    "vlm_follows": "An image was made for the description {}. How well does it show what is described: "
    "things, their number, attributes and places? 1: hardly anything; 5: everything, exactly.",
    "vlm_faultless": "An image was made for the description {}. Leave aside how well it fits. How free is it of visible faults: "
    "broken shapes, wrong anatomy, smears, artifacts? 1: ruined; 5: without fault.",
    "vlm_appeal": "An image was made for the description {}. Leave aside how well it fits. How good does it look: "
    "composition, light, color? 1: ugly; 5: excellent.",
}
_MARK_ONLY = " Answer with a whole number from 1 to 5, nothing else."
_WORDS_OF_MARKS = ("1", "2", "3", "4", "5")
HOLDS = "An image was made for the description {}. Is this true of the image: {}? Please answer Yes or No."
YES_NO = ("yes", "no")
MASS_MIN = 0.05
"""Of the first word's probability: how much must be on the words that were asked for. Below it the answer is another one."""
_SHARE_MIN = 1e-6
"""A server tells the likeliest tokens only: a word that is not among them has a small probability, and none is certain."""
_AROUND = " \t\n\r\"'`.,:;!*_()[]▁ĠĊ"


@runtime_checkable
class ChatConfig(Protocol):
    """A frozen configuration that builds a `Chat`."""

    def models(self) -> tuple[str, ...]: ...

    def build(self) -> Chat: ...


def _question(*parts: str | np.ndarray, purpose: str) -> ChatRequest:
    message = Message(role="user", parts=parts)
    return ChatRequest(messages=(message,), sampling=Sampling(max_tokens=4), first_token=FIRST_TOKEN_MAX, purpose=purpose)


PLAIN = np.full((64, 64, 3), 128, dtype=np.uint8)
"""The image of the question that is asked in advance."""


def first_word_shares(answer: ChatAnswer | RowError, words: Sequence[str]) -> list[float] | RowError:
    """How probable each of `words` is as an answer's first word, in all spellings, summing to 1; from a model in process without
    probabilities, 1 for the one that was said. `RowError` where the words have less than `MASS_MIN` of the probability."""
    if isinstance(answer, RowError):
        return answer
    text = without_thought(answer.text)
    if not answer.first_token:
        said = re.match(r"\w*", text.strip(_AROUND).casefold())
        if said is not None and said[0] in words:
            return [float(said[0] == word) for word in words]
        return RowError(f"the answer begins with none of {', '.join(words)}: {text[:60]!r}")
    found = dict.fromkeys(words, 0.0)
    for token, logprob in answer.first_token.items():
        if (word := token.strip(_AROUND).casefold()) in found:
            found[word] += math.exp(logprob)
    total = sum(found.values())
    if total >= MASS_MIN:
        return [probability / total for probability in found.values()]
    thinks = "; the model thinks first: turn that off, see docs/vlm.md" if answer.text.strip() and not text else ""
    likeliest = ", ".join(repr(token[:20]) for token in sorted(answer.first_token, key=lambda token: -answer.first_token[token])[:3])
    found_share = f"{total:.1%} of the probability; likeliest {likeliest}{thinks}"
    return RowError(f"the answer begins with none of {', '.join(words)}: {answer.text[:60]!r} ({found_share})")


def _first_share(answer: ChatAnswer | RowError, words: Sequence[str]) -> float | RowError:
    shares = first_word_shares(answer, words)
    if isinstance(shares, RowError):
        return shares
    certain = isinstance(answer, ChatAnswer) and not answer.first_token
    return shares[0] if certain else min(max(shares[0], _SHARE_MIN), 1 - _SHARE_MIN)


@dataclass(frozen=True, kw_only=True)
class VqaScorerConfig:
    """How probable it is that the model says the picture shows the prompt, 0 to 1."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def metric(self) -> Metric:
        return Metric(kind="probability")

    def build(self) -> "VqaScorer":
        return VqaScorer(self.chat.build())


class VqaScorer:
    """A `Scorer`."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def check(self, prompt: str) -> None:
        answered(self.score([PLAIN], [prompt]), "the model that scores")

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        questions = [_question(image, SHOWS.format(quoted(prompt)), purpose="score") for image, prompt in zip(images, prompts, strict=True)]
        return [_first_share(answer, YES_NO) for answer in self.chat.complete(questions)]


@dataclass(frozen=True, kw_only=True)
class RubricConfig:
    """Marks from 1 to 5, each the mean over the model's own probabilities of the five (as in G-Eval, arXiv 2303.16634)."""

    chat: ChatConfig
    """The vision-language model that is asked."""

    def models(self) -> tuple[str, ...]:
        return self.chat.models()

    def metrics(self) -> dict[str, Metric]:
        return {name: Metric(kind="score") for name in MARKS}

    def build(self) -> "Rubric":
        return Rubric(self.chat.build())


class Rubric:
    """A `Judge`: how well an image follows its prompt, how free of faults it is, how good it looks. No answer, no metric."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def check(self, prompt: str) -> None:
        self.measure([PLAIN], [prompt])

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        rows = list(zip(images, prompts, strict=True))
        words = [text + _MARK_ONLY for text in MARKS.values()]
        asked = [_question(image, text.format(quoted(prompt)), purpose="evaluate") for image, prompt in rows for text in words]
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

    def metrics(self) -> dict[str, Metric]:
        facts, every = Metric(kind="probability"), Metric(kind="fraction")
        return {"vlm_facts": facts, "vlm_all_facts": every, "vlm_num_facts": Metric(kind="score", better="neither")}

    def build(self) -> "Facts":
        return Facts(self.chat.build())


class Facts:
    """A `Judge`: `vlm_facts`, the mean probability that a fact of the prompt holds; `vlm_all_facts`, 1 where each of them is more likely
    than not; `vlm_num_facts`, how many there are (about 1: `vlm_facts` is VQAScore under another name). Without an answer to each of
    them, no metric."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def check(self, prompt: str) -> None:
        self.measure([PLAIN], [prompt])

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        facts = self._facts(list(dict.fromkeys(prompts)))
        rows = zip(images, prompts, strict=True)
        asked = [
            _question(image, HOLDS.format(quoted(prompt), quoted(fact)), purpose="evaluate")
            for image, prompt in rows
            for fact in facts[prompt]
        ]
        shares = iter(answered([_first_share(answer, YES_NO) for answer in self.chat.complete(asked)], "the model that judges"))
        return [_held([next(shares) for _ in facts[prompt]]) for prompt in prompts]

    def _facts(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        """Of each prompt; none where the model gave none. An answer that is kept is the same for every image and model."""
        asked = [
            ChatRequest(
                messages=(Message(role="user", parts=(FACTS.format(quoted(prompt)),)),),
                schema=FACTS_SCHEMA,
                schema_name="facts",
                sampling=Sampling(max_tokens=600),
                purpose="evaluate",
            )
            for prompt in prompts
        ]
        read = [_read_facts(answer, prompt) for answer, prompt in zip(self.chat.complete(asked), prompts, strict=True)]
        facts = answered(read, "the model that takes prompts apart")
        return {p: [] if isinstance(found, RowError) else found for p, found in zip(prompts, facts, strict=True)}

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), 0))


def _read_facts(answer: ChatAnswer | RowError, prompt: str) -> list[str] | RowError:
    if isinstance(answer, RowError):
        return answer
    if facts := facts_in(answer.text, prompt):
        return facts
    return RowError(f"the answer holds no fact of the prompt: {without_thought(answer.text)[:60]!r}", raw=answer.text)


def _held(shares: Sequence[float | RowError]) -> dict[str, float]:
    known = [share for share in shares if not isinstance(share, RowError)]
    if not known or len(known) < len(shares):
        return {}
    return {"vlm_facts": sum(known) / len(known), "vlm_all_facts": float(min(known) > 0.5), "vlm_num_facts": float(len(known))}


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

    def check(self, prompt: str) -> None:
        answered(self.compare([PLAIN], [PLAIN], [prompt]), "the model that compares")

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | RowError]:
        rows = list(zip(first, second, prompts, strict=True))
        questions = [_question(a, b, BETTER.format(quoted(prompt)), purpose=self.purpose) for a, b, prompt in rows]
        questions += [_question(b, a, BETTER.format(quoted(prompt)), purpose=self.purpose) for a, b, prompt in rows]
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
        questions = [_question(a, b, CHANGED.format(quoted(change)), purpose="verify") for a, b, change in rows]
        return [_first_share(answer, YES_NO) for answer in self.chat.complete(questions)]
