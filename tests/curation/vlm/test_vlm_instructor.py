"""An instructor made of a chat, and the one of the one-call mode."""

import json
from dataclasses import replace

import pytest
from fake_chat import FakeChat, texts
from test_reading import CHANGE, CHANGES, critique, told

from rpo.curation.vlm.instructor import FromCritiqueConfig, VlmInstructorConfig
from rpo.curation.vlm.parse import read_critique, read_free_critique
from rpo.data.schema import Instructions
from rpo.errors import RowError


def test_the_critique_is_data_and_its_own_hidden_fields_stay_out() -> None:
    chat = FakeChat(lambda request: told(CHANGES))
    given = read_critique(critique()).model_copy(update={"agreement": 0.5})
    (answer,) = VlmInstructorConfig(chat=chat, max_instructions=2).build().instruct(["a cat"], [given])
    assert isinstance(answer, Instructions) and answer.instructions[0].instruction == "remove the second cat"
    said = texts(chat.asked[0])
    assert 'Prompt: "a cat"' in said and '"evidence":"two cats are seen"' in said and "agreement" not in said and "{{" not in said
    assert "at most 2, the most important first" in said and "at most 25 words" in said and chat.asked[0].purpose == "instruct"


def test_of_a_free_critique_the_words_are_given() -> None:
    chat = FakeChat(lambda request: told({"instructions": [CHANGE | {"addresses": []}], "skip_reason": None}))
    given = read_free_critique('The cat says "hi".\nOverall: 2')
    (answer,) = VlmInstructorConfig(chat=chat, family="qwen").build().instruct(["a cat"], [given])
    assert isinstance(answer, Instructions)
    assert f"Critique: {json.dumps(given.reasoning)}" in texts(chat.asked[0]) and "at most 40 words" in texts(chat.asked[0])


def test_each_answer_is_held_against_its_own_critique() -> None:
    chat = FakeChat(lambda request: told({"instructions": [CHANGE | {"addresses": [0, 1]}], "skip_reason": None}))
    one, two = read_critique(critique()), read_critique(critique(issues=json.loads(critique())["issues"] * 2))
    first, second = VlmInstructorConfig(chat=chat).build().instruct(["a", "b"], [one, two])
    assert isinstance(first, Instructions) and first.instructions[0].addresses == (0,) and first.adjustments == ("addresses dropped",)
    assert isinstance(second, Instructions) and second.instructions[0].addresses == (0, 1) and second.adjustments == ()


def test_no_row_falls_for_an_address_of_a_free_critique() -> None:
    """The critic lists no issues there, so no address exists; every row once fell for it."""
    chat = FakeChat(lambda request: told(CHANGES))
    (answer,) = VlmInstructorConfig(chat=chat).build().instruct(["a cat"], [read_free_critique("The cat has five legs.\nOverall: 2")])
    assert isinstance(answer, Instructions) and answer.instructions[0].addresses == () and len(chat.asked) == 1
    assert "addresses" not in texts(chat.asked[0]) and "addresses" not in json.dumps(chat.asked[0].schema)


@pytest.mark.parametrize(("text", "match"), [
    (told({"instructions": [CHANGE | {"instruction": "remove the thing"}]}), "repeats an example"),
    (told({"instructions": [], "skip_reason": None}), "must say why"),
])  # fmt: skip
def test_what_is_no_answer_is_refused(text: str, match: str) -> None:
    chat = FakeChat(lambda request: text)
    for given in (read_critique(critique()), read_free_critique("The cat has five legs.\nOverall: 2")):
        (answer,) = VlmInstructorConfig(chat=chat).build().instruct(["a cat"], [given])
        assert isinstance(answer, RowError) and match in str(answer)


def test_the_one_call_mode_takes_what_came_with_the_critique() -> None:
    given = read_critique(critique())
    answer = Instructions.model_validate_json(told(CHANGES))
    instructor = FromCritiqueConfig().build()
    found, missing = instructor.instruct(["a", "b"], [given.model_copy(update={"instructions": answer}), given])
    assert found == answer and isinstance(missing, RowError) and "profile to one_call" in str(missing)


def test_settings_are_checked_and_the_words_counted_in() -> None:
    config = VlmInstructorConfig(chat=FakeChat(lambda request: ""))
    with pytest.raises(ValueError, match="max_instructions"):
        replace(config, max_instructions=0)
    assert len({replace(config, family=family).templates for family in ("ip2p", "kontext")}) == 2
