"""Nothing malformed is accepted, nothing crashes: a corpus of what models were seen to write, and what hypothesis thinks of."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rpo.curation.vlm.critic import example_instructions
from rpo.curation.vlm.editor_style import WORDINGS
from rpo.curation.vlm.parse import read_critique, read_free_critique, read_instructions, read_one_call
from rpo.data.model_text import clean
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
    "two fences": f"```json\n{critique()}\n```\n```json\n{critique()}\n```",
    "single quotes": str(GOOD),
    "trailing comma": critique()[:-1] + ",}",
    "comment": "{/* a */" + critique()[1:],
    "html": "<html></html>",
    "duplicate key": critique()[:-1] + ', "overall": 5}',
    "duplicate key inside": critique().replace('"severity"', '"severity": 1, "severity"'),
    "NaN": critique().replace("0.1", "NaN"),
    "Infinity": critique().replace("0.9", "Infinity"),
    "-Infinity": critique().replace("0.1", "-Infinity"),
    "deep": "[" * 10_000,
    "deep object": '{"a":' * 10_000,
    "deep field": critique(keep=["x"]).replace('"x"', "[" * 100 + "]" * 100),
    "long number": critique().replace("2", "2" * 5000),
    "10 MB": critique(reasoning="x" * 10_000_000),
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
    "issues null": critique(issues=None),
    "issues object": critique(issues={}),
    "issue text": critique(issues=["bad"]),
    "evidence empty": issue(evidence=""),
    "wrapped": told({"critique": GOOD}),
    "wrapped in a list of one": told([GOOD]),
    "NUL": "\0" + critique(),
}


TAGS = [
    ("<think>", "</think>"), ("<THINKING>", "</THINKING>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<unused94>thought", "<unused95>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]  # fmt: skip
AROUND: dict[str, str] = {
    "empty thought": f"<think>\n\n</think>\n\n{critique()}",
    "two thoughts": f"<think>a</think>\n<think>b</think>\n{critique()}",
    "closing tag only": f"The cats are two.</think>\n{critique()}",
    "closing tag twice": f"<think>a</think>b</think>{critique()}",
    "thought with JSON in it": '<think>maybe {"reasoning": 1}</think>' + critique(),
    "thought and fence": f"<think>hm</think>\nHere:\n```JSON\n{critique()}\n```",
    "answer tags": f"<think>hm</think><answer>{critique()}</answer>",
    "box tags": f"<|begin_of_box|>{critique()}<|end_of_box|>",
    "fence in capitals": f"```JSON\n{critique()}\n```",
    "fence on one line": f"```json {critique()} ```",
    "fence without language": f"```\n{critique()}\n```",
    "fence without the last line break": f"```json\n{critique()}```",
    "fence without end": f"```json\n{critique()}",
    "fence with Windows line ends": f"```json\r\n{critique()}\r\n```",
    "fence after a preface": f"Here is the JSON:\n\n```json\n{critique()}\n```",
    "fence before a closing": f"```json\n{critique()}\n```\nLet me know if you need more!",
    "byte order mark": "\ufeff" + critique(),
    "byte order mark and fence": f"\ufeff```json\n{critique()}\n```",
    "greeting before a thought": f"Sure.\n<think>hm</think>\n{critique()}",
    "thought without its special tokens": f"analysisTwo cats.assistantfinal{critique()}",
    "end token": critique() + "<|im_end|>",
    **{f"tags {before}": f"{before}\nTwo cats, or one?\n{after}\n{critique()}" for before, after in TAGS},
}


@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_an_answer_is_taken_off(name: str) -> None:
    assert read_critique(AROUND[name]) == read_critique(critique())


@pytest.mark.parametrize(("before", "after"), TAGS)
def test_a_thought_is_no_critique(before: str, after: str) -> None:
    """In the free profile it would become the reasoning, and the instructor would read it."""
    whole = read_free_critique(f"{before}\nMaybe blue. Overall: 5\n{after}\nThe cat has five legs.\nOverall: 2")
    assert (whole.reasoning, whole.overall) == ("The cat has five legs.", 2)
    assert read_free_critique(f"Maybe blue.{after}The cat has five legs.\nOverall: 2") == whole
    for reader in (read_free_critique, read_critique, read_changes, read_both):
        with pytest.raises(ValueError):
            reader(f"{before}\nThe cat has five legs.\nOverall: 2")
        if before[0] != "[":
            with pytest.raises(ValueError):
                reader(f"Let me look.\n{before}\nThe cat has five legs.\nOverall: 2")


def test_tags_and_backquotes_inside_a_string_are_text() -> None:
    words = "the sign says </think> and ```"
    assert read_critique(critique(reasoning=words)).reasoning == words
    assert read_critique(f"```json\n{critique(reasoning=words)}\n```").reasoning == words


LENIENT: dict[str, tuple[str, str]] = {
    "reasoning too long": (critique(reasoning="x" * 2001), "reasoning clipped"),
    "unknown field": (critique(score=10), "unknown field dropped"),
    "our own field": (critique(agreement=1.0), "unknown field dropped"),
    "no_issue with issues": (critique(no_issue=True), "no_issue dropped"),
    "nine issues": (critique(issues=[ISSUE] * 9), "issues clipped"),
    "unknown aspect": (issue(aspect="vibes"), "aspect converted"),
    "aspect in another spelling": (issue(aspect="Count"), "aspect converted"),
    "severity 4": (issue(severity=4), "severity converted"),
    "severity as a text": (issue(severity="2"), "severity converted"),
    "severity as a word": (issue(severity="Moderate"), "severity converted"),
    "severity as a float": (issue(severity=2.0), "severity converted"),
    "severity missing": (issue(severity=None), "severity converted"),
    "evidence long": (issue(evidence="x" * 301), "evidence clipped"),
    "region in pixels": (issue(region=[10, 20, 300, 400]), "region dropped"),
    "region in thousandths": (issue(region=[100, 200, 500, 900]), "region dropped"),
    "region text": (issue(region="left"), "region dropped"),
    "region of three": (issue(region=[0.1, 0.2, 0.5]), "region dropped"),
    "region turned": (issue(region=[0.5, 0.2, 0.1, 0.9]), "region dropped"),
    "region of texts": (issue(region=["0", "0", "1", "1"]), "region dropped"),
    "region without end": (critique().replace("0.9", "1e999"), "region dropped"),
    "region object": (issue(region={"left": 0}), "region dropped"),
    "prompt_span list": (issue(prompt_span=["a"]), "prompt_span dropped"),
    "fixable text": (issue(fixable_by_edit="yes"), "fixable_by_edit converted"),
    "issue with more": (issue(confidence=1), "unknown field dropped"),
    "nine to keep": (critique(keep=["a"] * 9), "keep clipped"),
    "keep text": (critique(keep="the sofa"), "keep converted"),
    "keep long": (critique(keep=["x" * 301]), "keep clipped"),
    "keep a placeholder": (critique(keep=["<thing to keep>"]), "keep dropped"),
    "aspect twice": (critique(aspects=[{"aspect": "count", "score": 1}] * 2), "aspects dropped"),
    "aspect score 9": (critique(aspects=[{"aspect": "count", "score": 9}]), "aspects dropped"),
    "aspect score text": (critique(aspects=[{"aspect": "count", "score": "2"}]), "aspects converted"),
    "aspects as an object": (critique(aspects={"count": 2}), "aspects converted"),
    "aspects text": (critique(aspects="fine"), "aspects dropped"),
    "aspects of texts": (critique(aspects=["count"]), "aspects dropped"),
}


@pytest.mark.parametrize("name", LENIENT)
def test_metadata_is_no_reason_to_lose_a_row(name: str) -> None:
    text, kind = LENIENT[name]
    found = read_critique(text)
    assert found.adjustments == (kind,) and holds(found)
    assert Critique.model_validate_json(found.model_dump_json()) == found
    assert read_both(f'{{"critique": {text}, "instructions": {told(CHANGES)}}}').adjustments == (kind,)


def test_metadata_is_converted_rightly() -> None:
    assert [read_critique(issue(severity=value)).issues[0].severity for value in ("2", 9, 0, "severe", "minor", None)] == [2, 3, 1, 3, 1, 2]
    assert read_critique(issue(aspect="Attribute Binding")).issues[0].aspect == "attribute_binding"
    assert read_critique(issue(region=[10, 20, 300, 400])).issues[0].region is None
    assert not read_critique(issue(fixable_by_edit="No")).issues[0].fixable_by_edit
    assert [one.score for one in read_critique(critique(aspects={"count": "2", "spatial": "n/a"})).aspects] == [2, None]
    assert read_critique(without("aspects")).aspects == read_critique(without("keep")).keep == ()
    assert read_critique(critique(no_issue=True, issues=[])).adjustments == ()
    assert not read_critique(without("no_issue")).no_issue and read_critique(critique(issues=[], no_issue=False)).no_issue


def test_the_corpus_is_large() -> None:
    assert len(set(MALFORMED.values())) >= 46


@pytest.mark.parametrize("name", MALFORMED)
def test_nothing_of_the_corpus_is_a_critique(name: str) -> None:
    for read in (read_critique, read_both, read_changes):
        with pytest.raises(ValueError) as refused:
            read(MALFORMED[name])
        assert 0 < len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (change(instruction=""), "1 to 25 words"),
        (change(instruction="make " * 26), "1 to 25 words"),
        (change(instruction="\u628a\u7ea2\u8272\u7684\u661f\u661f\u53d8 " * 21), "fewer than 160 characters"),
        (change(instruction="\u628a\u7ea2\u8272\u7684\u661f\u661f\u53d8" * 40), "fewer than 160 characters, got 280"),
        (change(instruction="fix what the critique says"), "must not mention"),
        (change(instruction="Follow the prompt."), "must not mention"),
        (change(instruction="make the image match the prompt more closely"), "must not mention"),
        (change(instruction="fix all the issues that the critic mentioned"), "must not mention"),
        (change(instruction="make the <thing> <color>"), "still holds <thing>"),
        (change(target="<thing>"), "still holds <thing>"),
        (change(instruction="!!!"), "holds no word"),
        (change(instruction=["a"]), "must be a text"),
        (change(addresses=[0, 0]), "names an issue twice"),
        (change(addresses=[10, 10]), "names an issue twice"),
        (change(target=""), "must not be empty"),
        (change(expected_visible_change=" "), "must not be empty"),
        (told({"instructions": [CHANGE] * 2, "skip_reason": None}), "an instruction is repeated"),
        (told({"instructions": [CHANGE, CHANGE | {"instruction": "Remove the second cat."}]}), "an instruction is repeated"),
        (told({"instructions": [CHANGE] * 4, "skip_reason": None}), "at most 3, got 4"),
        (told({"instructions": [], "skip_reason": None}), '"skip_reason" must say why'),
        (told({"instructions": [], "skip_reason": " "}), '"skip_reason" must say why'),
        (told({"instructions": CHANGE}), "instructions"),
        (told({}), "instructions"),
    ],
)
def test_instructions_that_no_editor_should_read(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_changes(text)
    with pytest.raises(ValueError, match="at most 1, got 2"):
        read_instructions(told({"instructions": [CHANGE] * 2, "skip_reason": None}), 1, max_instructions=1, max_words=25)


@pytest.mark.parametrize("text", [
    "remove the food critic on the left", "add a sign that says the prompt", "make the prompt on the screen green",
    "recolor the critic's hat", "replace the movie critique on the page with a photo",
])  # fmt: skip
def test_an_instruction_may_name_what_is_seen(text: str) -> None:
    assert read_changes(change(instruction=text)).instructions[0].instruction == text


def test_the_templates_examples_are_no_answers() -> None:
    examples = example_instructions("ip2p")
    assert ("remove", "the", "thing") in examples and len(examples) >= 4
    for text in ("remove the thing", "Make the thing color", "verb the thing change", "add a thing to the place."):
        with pytest.raises(ValueError, match="repeats an example"):
            read_changes(change(instruction=text), examples=examples)
    assert read_changes(change(), examples=examples).instructions
    for family in WORDINGS:
        for example in example_instructions(family):
            with pytest.raises(ValueError):
                read_changes(change(instruction=" ".join(example)), examples=example_instructions(family))


LENIENT_CHANGES: dict[str, tuple[str, str]] = {
    "address that does not exist": (change(addresses=[0, 1]), "addresses dropped"),
    "negative address": (change(addresses=[-1, 0]), "addresses dropped"),
    "addresses text": (change(addresses="all"), "addresses dropped"),
    "unknown operation": (change(op="ensure"), "op converted"),
    "operation in capitals": (change(op="REMOVE"), "op converted"),
    "location list": (change(location=["left"]), "location dropped"),
    "location long": (change(location="x" * 301), "location clipped"),
    "target long": (change(target="x" * 301), "target clipped"),
    "change long": (change(expected_visible_change="x" * 301), "expected_visible_change clipped"),
    "unknown field": (change(path="/etc/passwd"), "unknown field dropped"),
    "unknown field outside": (told(CHANGES | {"note": "x"}), "unknown field dropped"),
}


@pytest.mark.parametrize("name", LENIENT_CHANGES)
def test_metadata_of_an_instruction_is_no_reason_either(name: str) -> None:
    text, kind = LENIENT_CHANGES[name]
    found = read_changes(text)
    assert found.adjustments == (kind,) and found.instructions[0].instruction == "remove the second cat"
    assert Instructions.model_validate_json(found.model_dump_json()) == found


def test_a_critique_without_issues_has_nothing_to_address() -> None:
    found = read_instructions(change(), 0, **LIMITS)
    assert found.instructions[0].addresses == () and found.adjustments == ("addresses dropped",)
    assert read_changes(change(addresses=["0"])).instructions[0].addresses == (0,)
    assert read_changes(change(location=None)).instructions[0].location == ""
    assert read_instructions(told({"instructions": []}), 0, **LIMITS).instructions == ()
    with pytest.raises(ValueError, match="must say why"):
        read_instructions(told({"instructions": []}), 0, reason_needed=True, **LIMITS)


def test_one_call_must_hold_both_and_they_must_agree() -> None:
    clean_image = GOOD | {"issues": []}
    for value in ({"critique": GOOD}, {"instructions": CHANGES}):
        with pytest.raises(ValueError, match="must have the fields"):
            read_both(told(value))
    unaddressed = {"instructions": [CHANGE | {"addresses": []}], "skip_reason": None}
    with pytest.raises(ValueError, match="must be empty when"):
        read_both(told({"critique": clean_image, "instructions": unaddressed}))
    with pytest.raises(ValueError, match="must say why"):
        read_both(told({"critique": GOOD, "instructions": {"instructions": [], "skip_reason": None}}))
    assert read_both(told({"critique": clean_image, "instructions": {"instructions": [], "skip_reason": None}})).no_issue


def test_one_call_may_be_flat() -> None:
    both = read_both(told({"critique": GOOD, "instructions": CHANGES}))
    assert both.adjustments == () and both.instructions is not None and both.instructions.adjustments == ()
    assert read_both(told({"critique": GOOD, "instructions": [CHANGE]})) == both
    assert read_both(told({"critique": GOOD, "instructions": [CHANGE], "skip_reason": None})) == both
    assert read_both(told(GOOD | {"instructions": [CHANGE]})) == read_both(told(GOOD | {"instructions": CHANGES})) == both
    assert read_changes(told({"instructions": CHANGES})) == read_changes(told(CHANGES))


@pytest.mark.parametrize(("end", "overall"), [
    ("\nOverall: 2", 2), (" Overall: 2", 2), ("\nOverall score: 2", 2), ("\nOverall Rating: 2/5", 2), ("\n**Overall:** 2", 2),
    ("\n**Overall: 2**", 2), ("\n## Overall: 2 out of 5", 2), ("\nOVERALL 2.", 2), ("\nOverall = 2", 2), ("\n- Overall: 2\n", 2),
    ("\nOverall\uff1a2", 2), ("\n*Overall*: **2** / 5", 2), ("\nOverall (1-5): 2", 2), ("\nOverall: 2 stars", 2), ("\n\nOverall: [2]", 2),
    ("\nOverall: 3.5", 3), ("\nOverall: 4.5", 4), ("\nOverall: 2.0/5", 2), ("\nOverall: 4.9", 5),
])  # fmt: skip
def test_the_mark_of_a_free_critique(end: str, overall: int) -> None:
    found = read_free_critique(f"The cat has five legs.{end}")
    assert found.reasoning.rstrip(" -") == "The cat has five legs." and found.overall == overall and found.no_issue == (overall == 5)
    assert found.adjustments == (("overall rounded",) if "." in end.rstrip(".") and "2.0" not in end else ())


def test_a_long_free_critique_is_clipped() -> None:
    found = read_free_critique("x" * 2001 + "\nOverall: 1")
    assert len(found.reasoning) == 2000 and found.adjustments == ("reasoning clipped",)


@pytest.mark.parametrize("text", ["", "Overall: 3", "words\nOverall: 6", "words\nOverall: 0", "words\nOverall: three", "Overall: 3\nwords",
                                  "\u200b\nOverall: 2", "words\nOverall: 3 maybe", "words\nOverall: 3/10", "words\nOverall: 35",
                                  "words\nOverall: 0.4", "words\nOverall: -3 of 5, or so", "x" * 70_000])  # fmt: skip
def test_free_critiques_without_a_mark_or_words(text: str) -> None:
    with pytest.raises(ValueError):
        read_free_critique(text)


def test_joiners_stay_where_a_script_needs_them() -> None:
    family, persian = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert clean(family) == family and clean(persian) == persian
    heart = "\u2764\ufe0f\u200d\U0001f525"
    assert clean(heart) == heart and clean(f"a {family}.") == f"a {family}."
    assert clean("a\u200db") == "ab" and clean("\u200d\u200c") == "" and clean("\u0645\u200d\u200d\u200d ") == "\u0645"
    assert clean("\u0645\u200c\u200c\u200c\u0645") == "\u0645\u200c\u0645", "a row of joiners is one"
    assert read_changes(change(instruction=f"make the \u661f {family}")).instructions[0].instruction.endswith(family)


def test_text_is_cleaned_of_what_nobody_sees() -> None:
    hidden = "a\u200bb\u202ec\u2066d\ue000e\U000e0041f\x00g\x1bh\ud800i\ufeffj"
    assert clean(hidden) == "abcdefghij" and clean(" two\n\t  lines\u2028more\xa0x ") == "two lines more x"
    assert clean("cafe\u0301 \U0001f600 \u6f22\u5b57 <b>&amp;") == "caf\xe9 \U0001f600 \u6f22\u5b57 <b>&amp;"
    assert read_critique(critique(reasoning="a\u200b\u202eb\nc\\ud800")).reasoning == "ab c\\ud800"
    escaped = critique(reasoning="SURROGATE").replace("SURROGATE", "x\\ud800y\\u0000z")
    assert read_critique(escaped).reasoning == "xyz"


READERS: dict[str, Callable[[str], BaseModel]] = {
    "critique": read_critique, "instructions": read_changes, "one_call": read_both, "free": read_free_critique
}  # fmt: skip
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def holds(found: object) -> bool:
    """Whether an accepted critique is one, field by field."""
    return isinstance(found, Critique) and bool(found.reasoning) and found.no_issue == (not found.issues) and found.agreement is None


PIECES = [
    "```", "```json\n", "\n", " ", "\t", "<think>", "</think>", "\u25c1think\u25b7", "Overall: 3", "overall", "*", "{", "}", "[", "]", '"',
    "\\", ",", ":", '{"a":', "1", "-1e9", "\u0301", "\u200d", "\U0001f468\u200d", "x", "- ", "1. ", "<", "|", "\x00", "\ufeff", "\ud800",
    critique(), told(CHANGES), '"issues": [', '"reasoning": "', "(", "/", "of", "\u1100\u1161\u11a8", "&lt;",
]  # fmt: skip
SECONDS_MAX = 2.0


@st.composite
def anything(draw: st.DrawFn) -> str:
    """Up to 64,000 characters: pieces that readers look for, each many times over, or text of any kind."""
    if draw(st.booleans()):
        return draw(st.text(max_size=2000))
    repeated = [draw(st.sampled_from(PIECES)) * draw(st.sampled_from([1, 2, 3, 50, 64_000])) for _ in range(draw(st.integers(1, 5)))]
    budget = 64_000 // len(repeated)
    return "".join(piece[:budget] for piece in repeated)


@pytest.mark.parametrize("examples", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_is_read_in_bounded_time_or_refused_in_words(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(anything())
    def check(text: str) -> None:
        for name, read in READERS.items():
            began = time.process_time()
            try:
                found = read(text)
            except ValueError as error:
                assert 0 < len(str(error)) < 600
            else:
                assert type(found).model_validate_json(found.model_dump_json()) == found
            assert time.process_time() - began < SECONDS_MAX, f"{name} took {time.process_time() - began:.1f} s"

    check()


ONCE_SLOW = {
    "fence": "```" + "\n" * 63_990 + "x", "marks": "a" + "\u0301" * 63_990, "marks of two classes": "\u0301\u0327" * 32_000,
    "overall": "Overall" * 9_000, "stars": "*" * 64_000, "tags": "<think>" * 9_000, "closing tags": "</think>" * 7_900,
    "fences": "```json" * 9_000, "blanks": "words\nOverall" + " " * 63_900,
}  # fmt: skip


@pytest.mark.parametrize("text", ONCE_SLOW.values(), ids=ONCE_SLOW)
def test_what_once_took_forever(text: str) -> None:
    began = time.process_time()
    for read in (*READERS.values(), clean):
        with suppress(ValueError):
            read(text)
    assert time.process_time() - began < SECONDS_MAX


@given(st.recursive(JSONS, lambda inner: st.fixed_dictionaries({}, optional=dict.fromkeys([*GOOD, *ISSUE], inner)), max_leaves=10))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_any_value_in_any_field_is_read_whole_or_refused_in_words(value: Any) -> None:
    for name in GOOD:
        text = told(GOOD | {name: value})
        try:
            found = read_critique(text)
        except ValueError as error:
            assert 0 < len(str(error)) < 600
        else:
            assert holds(found) and Critique.model_validate_json(found.model_dump_json()) == found


def test_what_is_read_can_be_stored() -> None:
    found = read_both(told({"critique": GOOD | {"reasoning": "\u6f22\\ud83d"}, "instructions": CHANGES}))
    assert Critique.model_validate_json(found.model_dump_json()) == found
    assert Instructions.model_validate_json(read_changes(told(CHANGES)).model_dump_json()) == read_changes(told(CHANGES))
