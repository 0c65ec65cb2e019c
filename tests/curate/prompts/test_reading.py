"""Nothing malformed is accepted, nothing crashes: a corpus of what models were seen to write, and what hypothesis thinks of."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo.curate.prompts.reading import clean, read_critique, read_free_critique, read_instructions, read_one_call
from rpo.data.schema import Critique, Instructions

ISSUE = {
    "aspect": "count", "severity": 2, "evidence": "two cats are seen", "region": [0.1, 0.2, 0.5, 0.9], "prompt_span": "a cat",
    "fixable_by_edit": True,
}  # fmt: skip
GOOD: dict[str, Any] = {
    "reasoning": "I see two cats.", "aspects": [{"aspect": "count", "score": 2}, {"aspect": "anatomy", "score": None}],
    "issues": [ISSUE], "keep": ["the sofa"], "overall": 3, "no_issue": False,
}  # fmt: skip
CHANGE = {
    "op": "remove", "target": "second cat", "location": "right", "instruction": "remove the second cat", "addresses": [0],
    "expected_visible_change": "one cat is seen",
}  # fmt: skip
CHANGES: dict[str, Any] = {"instructions": [CHANGE], "skip_reason": None}
LIMITS = {"max_instructions": 3, "max_words": 25}
read_changes = partial(read_instructions, num_issues=1, **LIMITS)
read_both = partial(read_one_call, **LIMITS)


def told(value: object) -> str:
    return json.dumps(value)


def critique(**changes: Any) -> str:
    return told(GOOD | changes)


def without(name: str) -> str:
    return told({key: value for key, value in GOOD.items() if key != name})


def issue(**changes: Any) -> str:
    return critique(issues=[ISSUE | changes])


def change(**changes: Any) -> str:
    return told({"instructions": [CHANGE | changes], "skip_reason": None})


def test_what_was_asked_for_is_read() -> None:
    found = read_critique(critique())
    assert found.issues[0].region == (0.1, 0.2, 0.5, 0.9) and found.aspects[1].score is None and found.agreement is None
    assert read_critique(f"```json\n{critique()}\n```") == read_critique(f"  {critique()}\n") == found
    assert read_critique(critique(issues=[], no_issue=True)).no_issue
    assert read_changes(told(CHANGES)).instructions[0].addresses == (0,)
    assert read_changes(told({"instructions": [], "skip_reason": "nothing helps"})).skip_reason == "nothing helps"
    both = read_both(told({"critique": GOOD, "instructions": CHANGES}))
    assert both.issues == found.issues and both.instructions is not None and both.instructions.instructions[0].op == "remove"
    free = read_free_critique("The cat has\nfive legs.\n\nOverall: 2")
    assert (free.reasoning, free.overall, free.no_issue) == ("The cat has five legs.", 2, False)
    assert read_free_critique("Fine.\n**Overall: 5/5**").no_issue


MALFORMED: dict[str, str] = {
    "empty": "",
    "blank": " \n ",
    "prose": "I see two cats.",
    "null": "null",
    "number": "3",
    "text": '"text"',
    "list": told([GOOD]),
    "empty object": "{}",
    "truncated": critique()[:-1],
    "truncated early": critique()[:20],
    "truncated in a string": critique()[:17],
    "white space without end": '{"reasoning": "a",' + " " * 5000,
    "prose before": f"Sure! {critique()}",
    "prose after": f"{critique()} Done.",
    "two objects": critique() * 2,
    "thinking": f"<think>hm</think>{critique()}",
    "fence without end": f"```json\n{critique()}",
    "two fences": f"```json\n{critique()}\n```\n```json\n{critique()}\n```",
    "fence with prose": f"Here:\n```json\n{critique()}\n```",
    "single quotes": str(GOOD),
    "trailing comma": critique()[:-1] + ",}",
    "comment": "{/* a */" + critique()[1:],
    "html": "<html></html>",
    "duplicate key": critique()[:-1] + ', "overall": 5}',
    "duplicate key inside": critique().replace('"severity"', '"severity": 1, "severity"'),
    "NaN": critique().replace("0.1", "NaN"),
    "Infinity": critique().replace("0.9", "Infinity"),
    "-Infinity": critique().replace("0.1", "-Infinity"),
    "1e999": critique().replace("0.9", "1e999"),
    "deep": "[" * 10_000,
    "deep object": '{"a":' * 10_000,
    "deep field": critique(keep=["x"]).replace('"x"', "[" * 100 + "]" * 100),
    "long number": critique().replace("2", "2" * 5000),
    "10 MB": critique(reasoning="x" * 10_000_000),
    "reasoning too long": critique(reasoning="x" * 2001),
    "reasoning empty": critique(reasoning=""),
    "reasoning null": critique(reasoning=None),
    "reasoning invisible": critique(reasoning="\u200b\u202e"),
    "reasoning list": critique(reasoning=["a"]),
    "overall text": critique(overall="3"),
    "overall float": critique(overall=3.0),
    "overall bool": critique(overall=True),
    "overall 0": critique(overall=0),
    "overall 6": critique(overall=6),
    "overall missing": without("overall"),
    "unknown field": critique(score=10),
    "no_issue text": critique(no_issue="false"),
    "no_issue 0": critique(no_issue=0),
    "no_issue missing": without("no_issue"),
    "no_issue with issues": critique(no_issue=True),
    "no issues but an issue": critique(issues=[]),
    "issues null": critique(issues=None),
    "issues object": critique(issues={}),
    "nine issues": critique(issues=[ISSUE] * 9),
    "issue text": critique(issues=["bad"]),
    "unknown aspect": issue(aspect="vibes"),
    "aspect case": issue(aspect="Count"),
    "severity 4": issue(severity=4),
    "severity text": issue(severity="2"),
    "evidence empty": issue(evidence=""),
    "evidence long": issue(evidence="x" * 301),
    "region text": issue(region="left"),
    "region of three": issue(region=[0.1, 0.2, 0.5]),
    "region of five": issue(region=[0.1, 0.2, 0.5, 0.6, 0.7]),
    "region outside": issue(region=[0, 0, 2, 1]),
    "region turned": issue(region=[0.5, 0.2, 0.1, 0.9]),
    "region of texts": issue(region=["0", "0", "1", "1"]),
    "fixable text": issue(fixable_by_edit="yes"),
    "issue with more": issue(confidence=1),
    "nine to keep": critique(keep=["a"] * 9),
    "keep text": critique(keep="the sofa"),
    "keep long": critique(keep=["x" * 301]),
    "aspect twice": critique(aspects=[{"aspect": "count", "score": 1}] * 2),
    "aspect score 9": critique(aspects=[{"aspect": "count", "score": 9}]),
    "aspect score float": critique(aspects=[{"aspect": "count", "score": 2.5}]),
    "ten aspects": critique(aspects=[{"aspect": "count", "score": 1}] * 10),
    "our own field": critique(agreement=1.0),
    "our own field, null": critique(instructions=None),
    "a key that is no field": told(GOOD | {"": 1}),
    "wrapped": told({"critique": GOOD}),
    "wrapped in a list of one": told([GOOD]),
    "byte order mark": "\ufeff" + critique(),
    "NUL": "\0" + critique(),
}


def test_the_corpus_is_large() -> None:
    assert len(MALFORMED) >= 60 and len(set(MALFORMED.values())) >= 60


@pytest.mark.parametrize("name", MALFORMED)
def test_nothing_of_the_corpus_is_a_critique(name: str) -> None:
    for read in (read_critique, read_both, read_changes):
        with pytest.raises(ValueError) as refused:
            read(MALFORMED[name])
        assert 0 < len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (change(op="ensure"), "op"),
        (change(instruction=""), "1 to 25 words"),
        (change(instruction="make " * 26), "1 to 25 words"),
        (change(instruction="fix what the critique says"), "must not mention"),
        (change(instruction="follow the prompt"), "must not mention"),
        (change(addresses=[1]), "there is no issue 1; the critique lists 1"),
        (change(addresses=[-1]), "no issue -1"),
        (change(addresses=["0"]), "addresses"),
        (change(target=""), "must not be empty"),
        (change(expected_visible_change=" "), "must not be empty"),
        (change(path="/etc/passwd"), "path"),
        (told({"instructions": [CHANGE] * 4, "skip_reason": None}), "instructions"),
        (told({"instructions": CHANGE}), "instructions"),
        (told({}), "instructions"),
    ],
)
def test_instructions_that_no_editor_should_read(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_changes(text)
    with pytest.raises(ValueError, match="at most 1, got 2"):
        read_instructions(told({"instructions": [CHANGE] * 2, "skip_reason": None}), 1, max_instructions=1, max_words=25)


def test_one_call_must_hold_both_and_they_must_agree() -> None:
    clean_image = GOOD | {"issues": [], "no_issue": True}
    for value in ({"critique": GOOD}, {"instructions": CHANGES}, {"critique": GOOD, "instructions": CHANGES, "more": 1}):
        with pytest.raises(ValueError, match="must have the fields"):
            read_both(told(value))
    with pytest.raises(ValueError, match="no issue 0; the critique lists 0"):
        read_both(told({"critique": clean_image, "instructions": CHANGES}))
    unaddressed = {"instructions": [CHANGE | {"addresses": []}], "skip_reason": None}
    with pytest.raises(ValueError, match="must be empty when"):
        read_both(told({"critique": clean_image, "instructions": unaddressed}))


@pytest.mark.parametrize("text", ["", "Overall: 3", "words\nOverall: 6", "words\nOverall: three", "Overall: 3\nwords",
                                  "x" * 2001 + "\nOverall: 1", "\u200b\nOverall: 2", "words\nOverall: 3 maybe", "x" * 70_000])  # fmt: skip
def test_free_critiques_without_a_mark_or_words(text: str) -> None:
    with pytest.raises(ValueError):
        read_free_critique(text)


def test_text_is_cleaned_of_what_nobody_sees() -> None:
    hidden = "a\u200bb\u202ec\u2066d\ue000e\U000e0041f\x00g\x1bh\ud800i\ufeffj"
    assert clean(hidden) == "abcdefghij" and clean(" two\n\t  lines\u2028more\xa0x ") == "two lines more x"
    assert clean("cafe\u0301 \U0001f600 \u6f22\u5b57 <b>&amp;") == "caf\xe9 \U0001f600 \u6f22\u5b57 <b>&amp;"
    assert read_critique(critique(reasoning="a\u200b\u202eb\nc\\ud800")).reasoning == "ab c\\ud800"
    escaped = critique(reasoning="SURROGATE").replace("SURROGATE", "x\\ud800y\\u0000z")
    assert read_critique(escaped).reasoning == "xyz"


READERS: dict[str, Callable[[str], object]] = {
    "critique": read_critique, "instructions": read_changes, "one_call": read_both, "free": read_free_critique
}  # fmt: skip
BAD_VALUES = st.sampled_from([None, "", "x", "3", -1, 0, 7, 2.5, True, [], {}, [[]], "x" * 3000, float("1e300"), {"a": 1}])
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def broken(draw: st.DrawFn) -> str:
    """A good answer with one thing done to it that makes it bad, or something else altogether."""
    whole = critique()
    kind = draw(st.sampled_from(["cut", "drop", "add", "value", "json", "text", "noise"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "drop":
        return without(draw(st.sampled_from(sorted(GOOD))))
    if kind == "add":
        return told(GOOD | {draw(st.text(max_size=10).filter(lambda name: name not in GOOD)): draw(BAD_VALUES)})
    if kind == "value":
        name = draw(st.sampled_from(["reasoning", "overall", "no_issue", "issues", "aspects"]))
        bad = draw(BAD_VALUES.filter(lambda value: not _fits(name, value)))
        return told(GOOD | {name: bad})
    if kind == "json":
        return told(draw(JSONS))
    if kind == "noise":
        place = draw(st.integers(0, len(whole)))
        return whole[:place] + draw(st.sampled_from(["{", "}", "[", '"', "\\", "NaN", "\x00", "\x01"])) + whole[place:]
    return draw(st.text(max_size=200))


def _fits(name: str, value: object) -> bool:
    fitting: dict[str, Callable[[object], bool]] = {
        "reasoning": lambda v: isinstance(v, str) and 0 < len(v) <= 2000, "aspects": lambda v: v == [],
        "overall": lambda v: type(v) is int and 1 <= v <= 5, "no_issue": lambda v: False, "issues": lambda v: False,
    }  # fmt: skip
    return fitting[name](value)


def holds(found: object) -> bool:
    """Whether an accepted critique is one, field by field."""
    return isinstance(found, Critique) and bool(found.reasoning) and found.no_issue == (not found.issues) and found.agreement is None


@pytest.mark.parametrize("examples", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_generated_malformed_answers_are_refused(examples: int) -> None:
    accepted: list[str] = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(broken())
    def check(text: str) -> None:
        for name, read in READERS.items():
            try:
                found = read(text)
            except ValueError as error:
                assert str(error)
                continue
            # Noise may fall where it does no harm: into a string. What is accepted then is whole.
            assert name == "critique" and holds(found)
            assert json.loads(text).keys() == GOOD.keys()
            accepted.append(text)

    check()
    assert all(len(text) - len(critique()) in (1, 3) for text in accepted), "only noise inside a string is harmless"


def test_what_is_read_can_be_stored() -> None:
    found = read_both(told({"critique": GOOD | {"reasoning": "\u6f22\\ud83d"}, "instructions": CHANGES}))
    assert Critique.model_validate_json(found.model_dump_json()) == found
    assert Instructions.model_validate_json(read_changes(told(CHANGES)).model_dump_json()) == read_changes(told(CHANGES))
