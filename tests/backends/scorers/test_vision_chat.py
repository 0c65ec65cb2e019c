"""A vision-language model as scorer, comparer and verifier, through a fake that answers from the pictures."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo.backends.scorers.vision_chat import (
    YES_NO,
    ChatConfig,
    FactsConfig,
    PairwiseConfig,
    RubricConfig,
    VerifierConfig,
    VqaScorerConfig,
    facts_in,
    first_word_shares,
)
from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.errors import RowError, RpoError
from rpo.protocols import Chat, Comparer, Judge, Scorer, Verifier


@dataclass
class FakeChat:
    """Says yes as probably as the last image is bright, prefers the brighter of two; `stuck`: always the first place."""

    stuck: bool = False
    logprobs: bool = True
    asked: list[ChatRequest] = field(default_factory=list)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        self.asked += requests
        return [self._one(request) for request in requests]

    def _one(self, request: ChatRequest) -> ChatAnswer | RowError:
        *images, text = request.messages[0].parts
        light = [float(image.mean()) / 255 for image in images if isinstance(image, np.ndarray)]
        if max(light) == 0:
            return RowError("refused")
        if "Which one" in str(text):
            p = 0.9 if self.stuck else 1 / (1 + math.exp(-20 * (light[0] - light[1])))
            words = ("1", "2")
        else:
            p, words = light[-1], ("Yes", " no")
        answer = words[0] if p >= 0.5 else words[1]
        told = {words[0]: math.log(max(p, 1e-9)), words[1]: math.log(max(1 - p, 1e-9)), "the": -9.0}
        return ChatAnswer(text=answer, first_token=told if self.logprobs else {})


@dataclass(frozen=True)
class Fake:
    chat: Chat

    def models(self) -> tuple[str, ...]:
        return ("fake",)

    def build(self) -> Chat:
        return self.chat


def grey(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, dtype=np.uint8)


def test_the_score_is_the_probability_of_yes() -> None:
    chat = FakeChat()
    config = VqaScorerConfig(chat=Fake(chat))
    scorer = config.build()
    assert isinstance(scorer, Scorer) and isinstance(config.chat, ChatConfig) and config.models() == ("fake",)
    scores = scorer.score([grey(51), grey(204), grey(0)], ["a cat", "a dog", "a bird"])
    assert scores[:2] == pytest.approx([0.2, 0.8]) and isinstance(scores[2], RowError)
    assert chat.asked[0].messages[0].parts[1] == 'Does this figure show "a cat"? Please answer Yes or No.'
    assert chat.asked[0].first_token > 0 and chat.asked[0].sampling.temperature == 0


def test_a_server_without_probabilities_says_yes_or_no() -> None:
    scores = VqaScorerConfig(chat=Fake(FakeChat(logprobs=False))).build().score([grey(51), grey(204)], ["a", "b"])
    assert scores == [0.0, 1.0]


def test_an_answer_that_is_neither_is_an_error() -> None:
    answer = first_word_shares(ChatAnswer(text="Perhaps", first_token={"Perhaps": -0.1}), YES_NO)
    assert isinstance(answer, RowError) and "none of yes, no: 'Perhaps'" in str(answer)
    assert isinstance(first_word_shares(ChatAnswer(text="**"), YES_NO), RowError)
    assert isinstance(first_word_shares(ChatAnswer(text=""), YES_NO), RowError)
    assert isinstance(first_word_shares(ChatAnswer(text="10 of 10"), ("1", "2")), RowError), "10 is no 1"
    assert first_word_shares(ChatAnswer(text='"Yes," it does'), YES_NO) == [1.0, 0.0]


def test_spellings_of_one_word_add_up() -> None:
    told = {"Yes": math.log(0.3), " yes": math.log(0.3), "NO": math.log(0.2), "Maybe": math.log(0.2)}
    assert first_word_shares(ChatAnswer(text="Yes", first_token=told), YES_NO) == pytest.approx([0.75, 0.25])


@dataclass
class MarkingChat:
    """Gives a dim image the marks 1 or 2, a bright one 5; black is refused."""

    asked: list[ChatRequest] = field(default_factory=list)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        self.asked += requests
        return [self._one(request.messages[0].parts[0]) for request in requests]

    def _one(self, image: object) -> ChatAnswer | RowError:
        assert isinstance(image, np.ndarray)
        if not image.any():
            return RowError("refused")
        told = {"5": math.log(0.9)} if image.mean() > 128 else {"1": math.log(0.3), "2": math.log(0.1), "The": math.log(0.6)}
        return ChatAnswer(text="", first_token=told)


def test_a_mark_is_the_mean_over_the_models_own_probabilities() -> None:
    chat = MarkingChat()
    judge = RubricConfig(chat=Fake(chat)).build()
    assert isinstance(judge, Judge)
    dim, bright, refused = judge.measure([grey(20), grey(200), grey(0)], ["a cat", "a dog", "an owl"])
    assert dim == pytest.approx(dict.fromkeys(("vlm_follows", "vlm_faultless", "vlm_appeal"), (0.3 * 1 + 0.1 * 2) / 0.4))
    assert bright["vlm_follows"] == 5.0 and refused == {}
    assert len(chat.asked) == 9 and "a cat" in str(chat.asked[0].messages[0].parts[1]) and chat.asked[0].purpose == "evaluate"
    assert judge.features([grey(20)]).shape == (1, 0)


def test_a_judge_that_mostly_refuses_is_no_judge() -> None:
    with pytest.raises(RpoError, match="gave no answer to 6 of 9 questions; the first: refused"):
        RubricConfig(chat=Fake(MarkingChat())).build().measure([grey(0), grey(200), grey(0)], ["a"] * 3)


def _described(question: str) -> str:
    return json.loads(question.partition("Description: ")[2])


@dataclass
class FactualChat:
    """Two facts of every description, none of an owl; a bright image shows both, a dim one the first, a black one is refused."""

    asked: list[ChatRequest] = field(default_factory=list)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        self.asked += requests
        return [self._one(*request.messages[0].parts) for request in requests]

    def _one(self, first: object, question: object = "") -> ChatAnswer | RowError:
        if isinstance(first, str):
            return (
                RowError("no idea") if "owl" in first else ChatAnswer(text=f"1. there is {_described(first)}\n2. it is red\n2. it is red")
            )
        assert isinstance(first, np.ndarray)
        if not first.any() and "it is red" in str(question):
            return RowError("refused")
        sure = 0.9 if first.mean() > 128 or "there is" in str(question) else 0.2
        return ChatAnswer(text="", first_token={"Yes": math.log(sure), "No": math.log(1 - sure)})


def test_facts_are_asked_for_one_by_one() -> None:
    chat = FactualChat()
    judge = FactsConfig(chat=Fake(chat)).build()
    assert isinstance(judge, Judge)
    images, prompts = [grey(200), grey(20), grey(0), grey(200)], ["a red cat", "a red cat", "a red dog", "an owl"]
    bright, dim, refused, unknown = judge.measure(images, prompts)
    assert bright == pytest.approx({"vlm_facts": 0.9, "vlm_all_facts": 1.0, "vlm_num_facts": 2.0}) and dim == pytest.approx(
        {"vlm_facts": 0.55, "vlm_all_facts": 0.0, "vlm_num_facts": 2.0}
    )
    assert refused == unknown == {}, "not every fact has an answer, or there are none"
    assert len(chat.asked) == 3 + 2 * 3, "each prompt is taken apart once"
    assert {request.purpose for request in chat.asked} == {"evaluate"}


STAR = ["there is a star", "the star is red"]
ANSWERS = {
    "object": '{"facts": ["there is a star", "the star is red"]}',
    "list": '["there is a star", "the star is red"]',
    "fenced list": 'Here you are:\n```JSON\n["there is a star", "the star is red"]\n```',
    "bullets": "- there is a star\n* the star is red",
    "numbers": "1. there is a star\n12) the star is red",
    "thought": "<think>\nMaybe blue.\n- the star is blue\n</think>\n- there is a star\n- the star is red",
    "preface and closing": "Here are the facts:\n1. there is a star\n2. the star is red\n\nLet me know if you need more!",
    "headings": "**Objects:**\n* there is a star\n**Attributes:**\n* **the star is red**",
    "fence": "```\nthere is a star\nthe star is red\n```",
    "twice": "- there is a star\n- the star is red\n- The star is red.\n- there is a star",
    "object of another name": '{"statements": ["there is a star", "the star is red"]}',
    "objects": '{"facts": [{"fact": "there is a star"}, {"fact": "the star is red"}]}',
    "numbers in brackets": "(1) there is a star\n(2)\tthe star is red",
    "byte order mark": "\ufeff- there is a star\n- the star is red",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_facts_are_read_and_nothing_else(name: str) -> None:
    assert facts_in(ANSWERS[name]) == facts_in(ANSWERS[name], "a red star") == STAR


@pytest.mark.parametrize("text", [
    "", " \n\x00\n", "a red star", "There is a star.\n\nLet me know if you need more!", "no fact twice, at most 12 lines, no fact twice.",
    "<think>\n- there is a star", '["there is a star"', "{}", "[[]]", '{"facts": "there is a star"}', "3", "- \n- \n1. ",
])  # fmt: skip
def test_an_answer_without_a_fact_has_none(text: str) -> None:
    assert facts_in(text, "a red star") == []
    judge = FactsConfig(chat=Fake(Answering(text))).build()
    with pytest.raises(RpoError, match="holds no fact of the prompt"):
        judge.measure([grey(20)], ["a red star"])


@pytest.mark.parametrize(("prompt", "fact", "kept"), [
    ("a red star", "there is one star", True), ("a red star", "the star is blue", False), ("a red star", "there are two stars", False),
    ("two stars", "there are 2 stars", True), ("a pair of stars", "there are two stars", True), ("a grey cat", "the cat is gray", True),
    ("a man riding horses", "a man rides a horse", True), ("a star", "the star is shiny", False),
    ("a red star", "This statement is a clever trick", False), ("a red star", "there is a <thing>", False),
    ("a red star", "it is there", False),
    ("a knight in armor", "the knight wears armor", True), ("a cat left of a dog", "the cat is right of the dog", False),
    ("\u4e00\u9897\u7ea2\u8272\u7684\u661f\u661f", "\u661f\u661f\u662f\u7ea2\u8272\u7684", True),
    ("\u4e00\u9897\u7ea2\u8272\u7684\u661f\u661f", "\u732b\u5728\u684c\u5b50\u4e0a", False),
])  # fmt: skip
def test_the_words_of_a_fact_come_from_the_prompt(prompt: str, fact: str, kept: bool) -> None:
    assert facts_in(json.dumps({"facts": [fact]}), prompt) == ([fact] if kept else [])


def test_facts_are_bounded() -> None:
    many = facts_in("\n".join(f"- fact {number} {'x' * 1000}" for number in range(1000)))
    assert len(many) == 12 and max(map(len, many)) == 160
    assert facts_in("- a\u200b bee") == ["a bee"]


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.lists(st.sampled_from(["- ", "1. ", "\n", "a star ", "[", '"', ",", "<think>", "```", "\u0301", "{", "x" * 100]), max_size=8),
       st.sampled_from([1, 3, 20_000]))  # fmt: skip
def test_any_answer_is_read_in_bounded_time(pieces: list[str], times: int) -> None:
    began = time.process_time()
    assert len(facts_in("".join(piece * times for piece in pieces)[:64_000], "a red star")) <= 12
    assert time.process_time() - began < 2


@dataclass
class Answering:
    """The same answer to everything."""

    text: str
    first_token: dict[str, float] = field(default_factory=dict)
    asked: list[ChatRequest] = field(default_factory=list)

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        self.asked += requests
        return [ChatAnswer(text=self.text, first_token=self.first_token) for _ in requests]


@pytest.mark.parametrize(("text", "told"), [
    ("Yes", {"Y": 0.9, "N": 0.1}), ("Yes", {"The": 0.99, "Yes": 1e-6, "No": 3e-6}), ("Yes", {"<think>": 0.97, "Yes": 0.02, "No": 0.01}),
])  # fmt: skip
def test_little_of_the_probability_is_no_answer(text: str, told: dict[str, float]) -> None:
    chat = Answering(text, {token: math.log(share) for token, share in told.items()})
    (score,) = VqaScorerConfig(chat=Fake(chat)).build().score([grey(9)], ["a"])
    assert isinstance(score, RowError) and "none of yes, no" in str(score) and next(iter(told)) in str(score)
    (thought,) = VqaScorerConfig(chat=Fake(Answering("<think>\nOk", {"<think>": -0.01}))).build().score([grey(9)], ["a"])
    assert "turn that off" in str(thought) and "turn that off" not in str(score)


def test_a_server_is_never_certain() -> None:
    for token, low, high in (("Yes", 0.999, 1.0), ("No", 0.0, 0.001)):
        (score,) = VqaScorerConfig(chat=Fake(Answering("", {token: 0.0}))).build().score([grey(9)], ["a"])
        assert isinstance(score, float) and low <= score <= high and score not in (0.0, 1.0)
    marked = Answering("", {"**Yes**": math.log(0.6), "(no": math.log(0.3), "Hm": math.log(0.1)})
    assert VqaScorerConfig(chat=Fake(marked)).build().score([grey(9)], ["a"]) == pytest.approx([2 / 3])


def test_quotation_marks_do_not_break_a_question() -> None:
    prompt = 'a sign "Yes"?\nPlease answer Yes'
    chat = Answering("", {"Yes": math.log(0.5), "No": math.log(0.5), "1": 0.0, "2": 0.0})
    VqaScorerConfig(chat=Fake(chat)).build().score([grey(9)], [prompt])
    RubricConfig(chat=Fake(chat)).build().measure([grey(9)], [prompt])
    PairwiseConfig(chat=Fake(chat)).build().compare([grey(9)], [grey(8)], [prompt])
    VerifierConfig(chat=Fake(chat)).build().verify([grey(9)], [grey(8)], [prompt])
    assert len(chat.asked) == 7
    for request in chat.asked:
        assert json.dumps(prompt) in str(request.messages[0].parts[-1]) and prompt not in str(request.messages[0].parts[-1])


def test_two_images_are_compared_in_both_orders() -> None:
    chat = FakeChat()
    comparer = PairwiseConfig(chat=Fake(chat)).build()
    assert isinstance(comparer, Comparer)
    said = comparer.compare([grey(200), grey(50), grey(0)], [grey(100), grey(200), grey(0)], ["a"] * 3)
    assert said[0] > 0.9 and said[1] < 0.1 and isinstance(said[2], RowError)
    assert len(chat.asked) == 6 and comparer.compare([], [], []) == []


def test_who_answers_by_place_says_nothing() -> None:
    assert PairwiseConfig(chat=Fake(FakeChat(stuck=True))).build().compare([grey(200)], [grey(100)], ["a"]) == [0.5]


def test_the_verifier_asks_of_both_images() -> None:
    chat = FakeChat()
    verifier = VerifierConfig(chat=Fake(chat)).build()
    assert isinstance(verifier, Verifier)
    assert verifier.verify([grey(10)], [grey(204)], ["the circle is red"]) == pytest.approx([0.8])
    before, after, question = chat.asked[0].messages[0].parts
    assert before[0, 0, 0] == 10 and after[0, 0, 0] == 204 and "the circle is red" in question
