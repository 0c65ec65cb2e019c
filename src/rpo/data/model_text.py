"""Text that a language model wrote: thoughts and fences taken off, JSON read, strings cleaned and bounded.

Pure functions whose time is linear in the text's length: no pattern here has two unbounded repeats next to each other.
"""

import json
import re
import unicodedata
from typing import Any

TEXT_MAX = 64_000
"""Characters of an answer that are read."""
DEPTH_MAX = 32
DIGITS_MAX = 18
MARKS_MAX = 30
"""Combining marks on one character (Stream-Safe Text Format, UAX #15): more make normalization quadratic."""

_THOUGHT = "thinking|think|thoughts|thought|reasoning|reason|reflection|analysis|scratchpad|cot"
_OPENED = re.compile(
    rf"[<\[◁]\|?(?:start_|begin_of_|begin_)?(?:seed:)?(?:{_THOUGHT})\|?[>\]▷]"
    r"|<unused94>(?:thought)?|<\|channel>thought|<\|channel\|>analysis<\|message\|>",
    flags=re.I,
)
_CLOSED = re.compile(
    rf"[<\[◁](?:\|?/|/\||\|end_of_|\|end_)(?:seed:)?(?:{_THOUGHT})\|?[>\]▷]"
    r"|<unused95>|<channel\|>|<\|channel\|>final<\|message\|>",
    flags=re.I,
)
_AROUND = (
    ("<answer>", "</answer>"),
    ("<final_answer>", "</final_answer>"),
    ("<response>", "</response>"),
    ("<output>", "</output>"),
    ("<json>", "</json>"),
    ("<|begin_of_box|>", "<|end_of_box|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|start_response|>", "<|end_response|>"),
)
"""What some models put around their answer."""
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|return|>", "<end_of_turn>", "</s>")
"""Tokens that mark an answer's end, which some servers leave in the text."""
_BARE = ("analysis", "assistantfinal")
"""What is left of a thought's tags (gpt-oss) where a server drops special tokens."""
_BLANK = " \t\r\n\v\f\u2028\u2029\ufeff"
_FENCE = "```"
_LANGUAGES = ("json5", "jsonc", "json", "javascript", "js", "markdown", "md", "plaintext", "plain", "text", "txt", "yaml")
_BRACKETS = re.compile(r"[\[\]{}]")
_JOINERS = "\u200c\u200d"


def without_thought(text: str) -> str:
    """The answer without the model's leading thought, tags around it, and a byte order mark; empty if the thought never ends.

    A thought stands between tags such as `<think>` and `</think>`; of one whose template wrote the opening tag only the closing
    one is left. JSON that holds such a tag in a string is no thought.
    """
    text = text.strip(_BLANK)
    if text.startswith(_BARE[0]) and _BARE[1] in text:
        text = text.partition(_BARE[1])[2].strip(_BLANK)
    while True:
        opened = _OPENED.match(text)
        if opened is None and text.startswith(("{", "[", _FENCE)):
            break
        closed = _CLOSED.search(text, opened.end() if opened else 0)
        if closed is None:
            late = opened or _OPENED.search(text)
            text = text[: late.start()] if late and late[0][0] in "<◁" else "" if opened else text
            break
        text = text[closed.end() :].strip(_BLANK)
    for end in _ENDS:
        text = text.removesuffix(end).rstrip(_BLANK)
    for before, after in _AROUND:
        if text[: len(before)].lower() == before:
            text = text[len(before) :]
            text = text[: -len(after)] if text[-len(after) :].lower() == after else text
    return text.strip(_BLANK)


def unfenced(text: str) -> str:
    """What stands inside the fence of backquotes, whatever comes before and after it; the text as it is without one."""
    start = text.find(_FENCE)
    if start < 0 or text.startswith(("{", "[")):
        return text
    end = text.rfind(_FENCE)
    inside = text[start + len(_FENCE) : end if end > start else len(text)].strip(_BLANK)
    head = inside[: max(map(len, _LANGUAGES))].lower()
    language = next((name for name in _LANGUAGES if head.startswith(name) and not inside[len(name) : len(name) + 1].isalnum()), "")
    return inside[len(language) :].strip(_BLANK)


def clean(text: str) -> str:
    """The text as one line without control, format (zero-width, direction, tags), surrogate, private and unassigned characters.

    A zero-width joiner or non-joiner stays between two characters of a script, or of an emoji, that needs it: never in ASCII.
    """
    kept: list[str] = []
    marks = 0
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if character.isspace():
            kept.append(" ")
        elif category[0] != "C":
            marks = marks + 1 if category[0] == "M" else 0
            if marks <= MARKS_MAX:
                kept.append(character)
        elif character in _JOINERS and _joins(kept[-1] if kept else " ") and _joins(text[place + 1 : place + 2]):
            kept.append(character)
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def _joins(character: str) -> bool:
    return character > "\x7f" and unicodedata.category(character)[0] in "LMS"


def read_json(text: str) -> Any:
    """The one JSON value that the answer is, its strings cleaned. Raises `ValueError`, whose words are fit for the model."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"the answer has {len(text):,} characters, at most {TEXT_MAX:,} are read")
    text = unfenced(without_thought(text))
    _check_depth(text)
    try:
        value = json.loads(text, parse_int=_whole, parse_constant=_no_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is not one JSON object ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error
    return _cleaned(value)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    return value


def _whole(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a field comes twice in one object")
    return found


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEPTH_MAX:
            raise ValueError(f"the JSON is nested more than {DEPTH_MAX} deep")


def quoted(text: str) -> str:
    """Data inside a question: one line between quotation marks, so that it cannot pass for the question's own words."""
    return json.dumps(text, ensure_ascii=False)


def spelled(text: str) -> tuple[str, ...]:
    """The words of a text in small letters, without punctuation."""
    return tuple("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())
