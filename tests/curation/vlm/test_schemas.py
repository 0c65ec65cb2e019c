"""Every schema that is sent compiles, is bounded far below what grammar converters bear, and holds a model to what is read."""

import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from fake_chat import FakeChat, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from test_reading import CHANGE, CHANGES, GOOD, LIMITS, critique, told

from rpo.backends.scorers.vision_chat import FACTS_SCHEMA
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import VlmInstructorConfig
from rpo.curation.vlm.parse import read_critique, read_instructions, read_one_call
from rpo.curation.vlm.schema import REASONING_MAX, critique_schema, instructions_schema, one_call_schema
from rpo.data.schema import NOT_ASKED_FOR, Aspect, Critique, Instruction, Instructions, Issue

BYTES = LLTokenizer("byte")
REPETITIONS_MAX = 2000
"""llama.cpp refuses a grammar that repeats anything so often (its builds from November 2025 to September 2026)."""
SCHEMAS: dict[str, Any] = {
    "critique": critique_schema(),
    **{f"instructions {number} of {issues}": instructions_schema(number, issues) for number in (1, 3) for issues in (0, 1, 8)},
    "one_call": one_call_schema(3),
    "facts": FACTS_SCHEMA,
}


def accepts(schema: Any, text: str) -> bool:
    """Whether a model that the schema is a grammar for could write `text`."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(schema), log_level=0)
    return bool(matcher.validate_tokens(tokens := BYTES.tokenize_str(text)) == len(tokens) and matcher.consume_tokens(tokens)
                and matcher.is_accepting())  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_compiles(name: str) -> None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(SCHEMAS[name]), BYTES)
    assert not failed and messages == []


def test_a_schema_that_no_converter_knows_is_noticed() -> None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        LLMatcher.grammar_from_json_schema({"type": "string", "minLength": "x"}), BYTES
    )
    assert failed and messages


def repetitions(node: Any, outer: int = 1) -> Iterator[int]:
    """Each bound, times those of the lists around it."""
    if isinstance(node, dict):
        own = node.get("maxLength", node.get("maxItems", 1))
        yield outer * own
        for name, value in node.items():
            yield from repetitions(value, outer * own if name == "items" else outer)
    elif isinstance(node, list):
        for value in node:
            yield from repetitions(value, outer)


@pytest.mark.parametrize("name", SCHEMAS)
def test_bounds_are_below_what_llama_cpp_bears(name: str) -> None:
    assert max(repetitions(SCHEMAS[name])) < REPETITIONS_MAX
    assert REASONING_MAX == 1200 and "at most 1200 characters" in texts(asked("structured"))


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from nodes(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from nodes(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_everything_is_bounded_and_nothing_is_left_open(name: str) -> None:
    for node in nodes(SCHEMAS[name]):
        assert not {"$ref", "$defs", "default", "title", "minimum", "maximum"} & node.keys()
        if node.get("type") == "string":
            assert "enum" in node or node["maxLength"] <= 160 or node["maxLength"] == REASONING_MAX
        if node.get("type") == "integer":
            assert node["enum"]
        if node.get("type") == "array":
            assert node["maxItems"] >= 1
        if node.get("type") == "object":
            assert node["additionalProperties"] is False and node["required"] == list(node["properties"])


def test_the_fields_are_those_of_what_is_read() -> None:
    critique = critique_schema()["properties"]
    assert list(critique) == [name for name in Critique.model_fields if name not in NOT_ASKED_FOR]
    assert list(critique["issues"]["items"]["properties"]) == list(Issue.model_fields)
    assert critique["aspects"]["items"]["properties"]["aspect"]["enum"] == list(get_args(Aspect))
    instructions = instructions_schema(3)["properties"]
    assert list(instructions) == ["instructions", "skip_reason"]
    assert list(instructions["instructions"]["items"]["properties"]) == list(Instruction.model_fields)


def asked(profile: Any) -> Any:
    chat = FakeChat(lambda request: "")
    VlmCriticConfig(chat=chat, profile=profile).build().critique([np.zeros((8, 8, 3), dtype=np.uint8)], ["a cat"])
    return chat.asked[0]


def test_what_a_schema_lets_through() -> None:
    plain = {name: value for name, value in GOOD.items() if name != "no_issue"}
    issue = GOOD["issues"][0]
    assert accepts(critique_schema(), told(plain)) and accepts(critique_schema(), told(plain | {"issues": [], "aspects": []}))
    for changed in (
        {"overall": 6}, {"overall": 0}, {"no_issue": True}, {"reasoning": ""}, {"reasoning": "x" * 1201}, {"issues": [issue] * 9},
        {"aspects": [{"aspect": "count", "score": 10}]}, {"issues": [issue | {"severity": 4}]}, {"issues": [issue | {"evidence": ""}]},
        {"issues": [issue | {"region": [0.1, 0.2, 0.3]}]}, {"issues": [issue | {"region": [0.1] * 5}]}, {"keep": ["x" * 61]},
    ):  # fmt: skip
        assert not accepts(critique_schema(), told(plain | changed)), changed
    for num_issues, addresses, right in ((1, [0], True), (1, [1], False), (3, [2, 0], True), (3, [3], False), (3, [-1], False)):
        text = told(CHANGES | {"instructions": [CHANGE | {"addresses": addresses}]})
        assert accepts(instructions_schema(3, num_issues), text) == right, (num_issues, addresses)
    assert not accepts(instructions_schema(3, 0), told(CHANGES)), "there is nothing to address"
    assert not accepts(instructions_schema(3), told(CHANGES | {"instructions": [CHANGE | {"instruction": ""}]}))


def test_the_schema_is_made_for_each_question() -> None:
    chat = FakeChat(lambda request: told(CHANGES))
    one, two = read_critique(critique()), read_critique(critique(issues=GOOD["issues"] * 2))
    VlmInstructorConfig(chat=chat).build().instruct(["a", "b"], [one, two])
    first, second = chat.asked
    assert [accepts(request.schema, told(CHANGES | {"instructions": [CHANGE | {"addresses": [1]}]})) for request in chat.asked] == [
        False,
        True,
    ]
    assert "from 0 to 0" in texts(first) and "from 0 to 1" in texts(second)


def lines(length_max: int, length_min: int = 1) -> st.SearchStrategy[str]:
    return st.text(st.sampled_from("abcxyz \U0001f600"), min_size=length_min, max_size=min(length_max, 12))


def values(schema: Any) -> st.SearchStrategy[Any]:
    """Anything that the schema allows."""
    if "anyOf" in schema:
        return st.one_of([values(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        return st.lists(values(schema["items"]), min_size=schema["minItems"], max_size=min(schema["maxItems"], 4))
    if schema["type"] == "object":
        return st.fixed_dictionaries({name: values(one) for name, one in schema["properties"].items()})
    if schema["type"] == "string":
        return lines(schema["maxLength"], schema["minLength"])
    return {"number": st.floats(-1e4, 1e4).filter(math.isfinite), "boolean": st.booleans(), "null": st.none()}[schema["type"]]


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(values(critique_schema()))
def test_every_critique_that_the_schema_allows_is_read(value: Any) -> None:
    if value["reasoning"].strip() and all(issue["evidence"].strip() for issue in value["issues"]):
        found = read_critique(json.dumps(value))
        assert found.overall == value["overall"] and len(found.issues) == len(value["issues"]) and found.no_issue == (not value["issues"])
        assert set(found.adjustments) <= {"region dropped", "aspects dropped"}


def test_records_of_the_version_before_are_read() -> None:
    before = GOOD | {"reasoning": "x" * 2000, "instructions": None, "agreement": None}
    found = Critique.model_validate_json(told(before))
    assert not found.no_issue and found.adjustments == () and len(found.reasoning) == 2000
    free = Critique.model_validate_json(told(before | {"issues": [], "no_issue": False}))
    assert not free.no_issue, "a free critique lists no issues and may still find fault"
    assert Instructions.model_validate_json(told(CHANGES)).adjustments == ()
    assert read_instructions(told(CHANGES), 1, **LIMITS) and read_one_call(told({"critique": GOOD, "instructions": CHANGES}), **LIMITS)
