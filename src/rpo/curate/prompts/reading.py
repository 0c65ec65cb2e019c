"""What a vision-language model wrote, as data: parsed strictly, cleaned, bounded, or refused with the reason. Pure functions.

Nothing is guessed or repaired: an answer that is not what was asked for raises `ValueError`, whose words are fit to be told to the model.
"""

import json
import re
import unicodedata
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rpo.data.schema import Critique, Instructions

TEXT_MAX = 64_000
DEPTH_MAX = 32
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", flags=re.S)
_OVERALL = re.compile(r"\**overall:?\**:?\s*([1-5])(?:\s*(?:/|of|out of)\s*5)?\.?\**", flags=re.I)
_BRACKETS = re.compile(r"[\[\]{}]")
_MENTIONS = re.compile(r"\b(critique|the prompt|critic)\b", flags=re.I)
_NOT_ASKED_FOR = ("agreement", "instructions")
"""Fields of a `Critique` that we fill in ourselves."""

Model = TypeVar("Model", bound=BaseModel)


def clean(text: str) -> str:
    """The text as one line without control, format (zero-width, direction, tags), surrogate, private and unassigned characters."""
    spaced = "".join(" " if character.isspace() else character for character in text)
    kept = (character for character in spaced if unicodedata.category(character)[0] != "C")
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    return value


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


def read_object(text: str) -> dict[str, Any]:
    """The one JSON object that `text` is, its strings cleaned. A fence of backquotes around the whole is taken off."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"the answer has {len(text):,} characters, at most {TEXT_MAX:,} are read")
    fenced = _FENCED.fullmatch(text.strip())
    text = fenced[1] if fenced else text
    _check_depth(text)
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is not one JSON object ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"the answer must be a JSON object, not a {type(value).__name__}")
    return _cleaned(value)


def validated(value: Any, model: type[Model]) -> Model:
    """The value as `model`, without any conversion of types. Raises `ValueError` that names the first few faults."""
    try:
        return model.model_validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)[:3]
        raise ValueError("; ".join(f"{'.'.join(map(str, fault['loc'])) or 'the object'}: {fault['msg']}" for fault in faults)) from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error


def _critique(value: Any) -> Critique:
    if isinstance(value, dict) and (ours := [name for name in _NOT_ASKED_FOR if name in value]):
        raise ValueError(f"{ours[0]}: Extra inputs are not permitted")
    critique = validated(value, Critique)
    if not critique.reasoning:
        raise ValueError("reasoning is empty")
    if critique.no_issue == bool(critique.issues):
        raise ValueError('"no_issue" must be true exactly when "issues" is empty')
    named = [aspect.aspect for aspect in critique.aspects]
    if len(set(named)) < len(named):
        raise ValueError("an aspect is scored twice")
    for number, issue in enumerate(critique.issues):
        if not issue.evidence:
            raise ValueError(f"issues.{number}.evidence is empty")
        if issue.region is not None and not _is_box(issue.region):
            raise ValueError(f"issues.{number}.region must be null or [left, top, right, bottom] from 0 to 1, got {list(issue.region)}")
    return critique


def _is_box(region: tuple[float, ...]) -> bool:
    if len(region) != 4 or not all(0 <= edge <= 1 for edge in region):
        return False
    left, top, right, bottom = region
    return left < right and top < bottom


def read_critique(text: str) -> Critique:
    """The answer to the template `critique_structured`."""
    return _critique(read_object(text))


def read_free_critique(text: str) -> Critique:
    """The answer to the template `critique_paper`: its words are the reasoning; the last line's mark says whether anything is wrong."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"the answer has {len(text):,} characters, at most {TEXT_MAX:,} are read")
    words, _, last = text.strip().rpartition("\n")
    mark = _OVERALL.fullmatch(last.strip())
    if mark is None:
        raise ValueError('the last line must be "Overall: N" with N from 1 to 5')
    reasoning, overall = clean(words), int(mark[1])
    if not 1 <= len(reasoning) <= 2000:
        raise ValueError(f"the critique before the last line must have 1 to 2000 characters, got {len(reasoning)}")
    return Critique(reasoning=reasoning, aspects=(), issues=(), keep=(), overall=overall, no_issue=overall == 5)


def _instructions(value: Any, num_issues: int, max_instructions: int, max_words: int) -> Instructions:
    found = validated(value, Instructions)
    if len(found.instructions) > max_instructions:
        raise ValueError(f"instructions: at most {max_instructions}, got {len(found.instructions)}")
    for number, one in enumerate(found.instructions):
        where, words = f"instructions.{number}", len(one.instruction.split())
        if not 1 <= words <= max_words:
            raise ValueError(f"{where}.instruction must have 1 to {max_words} words, got {words}")
        if not (one.target and one.expected_visible_change):
            raise ValueError(f"{where}: target and expected_visible_change must not be empty")
        if mention := _MENTIONS.search(one.instruction):
            raise ValueError(f'{where}.instruction must not mention "{mention[0]}": the editor sees the image only')
        if wrong := [index for index in one.addresses if not 0 <= index < num_issues]:
            raise ValueError(f"{where}.addresses: there is no issue {wrong[0]}; the critique lists {num_issues}")
    return found


def read_instructions(text: str, num_issues: int, *, max_instructions: int, max_words: int) -> Instructions:
    """The answer to the template `instruct` about a critique of `num_issues` issues."""
    return _instructions(read_object(text), num_issues, max_instructions, max_words)


def read_one_call(text: str, *, max_instructions: int, max_words: int) -> Critique:
    """The answer to the template `critique_one_call`: a critique that carries its instructions."""
    value = read_object(text)
    if set(value) != {"critique", "instructions"}:
        raise ValueError(f'the object must have the fields "critique" and "instructions", got {sorted(value)[:5]}')
    critique = _critique(value["critique"])
    instructions = _instructions(value["instructions"], len(critique.issues), max_instructions, max_words)
    if critique.no_issue and instructions.instructions:
        raise ValueError('"instructions" must be empty when "no_issue" is true')
    return critique.model_copy(update={"instructions": instructions})
