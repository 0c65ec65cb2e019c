"""What a vision-language model wrote, as data. Pure functions.

Strict where an error would reach the editor or the labels: the reasoning, each issue's evidence, each instruction with its target and
expected change, and the mark; an answer without them raises `ValueError`, whose words are fit for the model. Lenient with metadata
(aspects, severity, region, addresses, length, unknown fields): it is dropped, clipped or converted, and counted in `adjustments`.
"""

import json
import math
import re
from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rpo.curation.vlm.metadata import Metadata, check_placeholders
from rpo.curation.vlm.schema import INSTRUCTION_MAX
from rpo.data.model_text import TEXT_MAX, clean, read_json, spelled, unfenced, without_thought
from rpo.data.schema import ISSUES_MAX, REASONING_MAX, Critique, Instruction, Instructions

_MARK_LINE_MAX = 200
"""Characters of the last line's end in which the mark is looked for."""
_MARK = re.compile(
    r"[ *_]{0,8}(?:(?:score|rating|mark|grade|quality|assessment)[ *_]{0,8})?(?:\([^()]{1,20}\)[ *_]{0,8})?(?:[:：=–—-][ *_]{0,8})?"
    r"[\[(]?([0-9](?:\.\d{1,4})?)[ *_]{0,8}(?:(?:/|of|out of)[ *_]{0,8}5[ *_]{0,8})?(?:stars?)?[.!)\]*_ ]{0,8}",
    flags=re.I,
)
_ABOUT_TEXT = frozenset({"critique", "critic", "critics", "prompt"})
"""Words for what the editor cannot see."""
_WITHOUT_CONTENT = _ABOUT_TEXT | frozenset(
    "a above accordance according accurately actual address adhere adherence adjust align all also and "
    "any apply are as asked be been better by can carefully change changes closely complies comply "
    "conform correct described do does edit ensure entire error errors everything exact exactly fault "
    "faults feedback find fit fits fix flaw flaws follow follows for from fulfill generated given has "
    "have he her his how image implement improve improvements in instruction instructions is issue issues "
    "it its like listed look make match matched matches matching meet meets mend mention mentioned "
    "mentions more noted of on original out per picture please point pointed points problem problems "
    "provided reflect reflects request requested requirement requirements requires resolve s said say "
    "saying says she should so specified stated suggest suggested suggestion suggestions suggests sure "
    "text than that the their them there they thing things this to up update use using want wanted wants "
    "was what whatever which with words written wrong wrote you your".split()
)
Model = TypeVar("Model", bound=BaseModel)


def read_object(text: str) -> dict[str, Any]:
    """The one JSON object that `text` is, its strings cleaned. A thought before it and a fence around it are taken off."""
    value = read_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"the answer must be a JSON object, not a {type(value).__name__}")
    return value


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
    if not isinstance(value, dict):
        raise ValueError(f"the critique must be an object, not a {type(value).__name__}")
    adjusted = Metadata()
    adjusted.unknown(value, Critique)
    issues = value.get("issues")
    if not isinstance(issues, list):
        raise ValueError('"issues" must be a list; it is empty if nothing is wrong')
    found = {
        "reasoning": adjusted.required(value.get("reasoning"), "reasoning", "reasoning"),
        "aspects": adjusted.aspects(value.get("aspects")),
        "issues": [adjusted.issue(one, number) for number, one in enumerate(adjusted.items(issues, ISSUES_MAX, "issues"))],
        "keep": adjusted.keep(value.get("keep")),
        "overall": value.get("overall"),
    }
    if value.get("no_issue", not issues) is bool(issues):
        adjusted.note("no_issue dropped")
    return validated(found | {"adjustments": adjusted.kinds}, Critique)


def read_critique(text: str) -> Critique:
    """The answer to the template `critique_structured`."""
    return _critique(read_object(text))


def read_free_critique(text: str) -> Critique:
    """The answer to the template `critique_paper`: its words are the reasoning; the mark at the end says whether anything is wrong."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"the answer has {len(text):,} characters, at most {TEXT_MAX:,} are read")
    text = without_thought(text)
    text = unfenced(text) if text.startswith("```") else text
    if not text:
        raise ValueError("the answer is empty, or a thought that does not end")
    start = max(text.rfind("\n") + 1, len(text) - _MARK_LINE_MAX)
    start = text.lower().rfind("overall", start) if len(text.lower()) == len(text) else text.rfind("verall", start) - 1
    mark = _MARK.fullmatch(text, start + len("overall")) if start >= 0 else None
    if mark is None:
        raise ValueError('the last line must be "Overall: N" with N from 1 to 5')
    adjusted, number = Metadata(), float(mark[1])
    overall = math.ceil(number - 0.5)  # halves count as the lower mark: 4.5 is not flawless
    if number != overall:
        adjusted.note("overall rounded")
    if not 1 <= overall <= 5:
        raise ValueError('"Overall: N" needs N from 1 to 5')
    reasoning = clean(text[:start].rstrip("*_#( \n"))
    if not reasoning:
        raise ValueError("there must be a critique before the last line")
    reasoning = adjusted.clipped(reasoning, REASONING_MAX, "reasoning")
    return Critique(reasoning=reasoning, aspects=(), issues=(), keep=(), overall=overall, no_issue=overall == 5, adjustments=adjusted.kinds)


def _check_instruction(text: str, where: str, max_words: int, examples: Collection[tuple[str, ...]]) -> None:
    words = spelled(text)
    count = len(text.split())
    if not 1 <= count <= max_words:
        raise ValueError(f"{where} must have 1 to {max_words} words, got {count}")
    if len(text) >= INSTRUCTION_MAX:
        raise ValueError(f"{where} must have fewer than {INSTRUCTION_MAX} characters, got {len(text)}")
    check_placeholders(text, where)
    if not words:
        raise ValueError(f"{where} holds no word")
    if _ABOUT_TEXT & set(words) and _WITHOUT_CONTENT.issuperset(words):
        raise ValueError(f"{where} must not mention the critique or the prompt in place of a change: the editor sees the image only")
    if words in examples:
        raise ValueError(f"{where} repeats an example of the question; write what this image needs")


def _listed(value: Any) -> tuple[Any, Any]:
    """(instructions, skip_reason); an object inside the object, and a list in place of the object, are taken apart."""
    if isinstance(value, dict) and isinstance(value.get("instructions"), dict):
        value = value["instructions"]
    return (value.get("instructions"), value.get("skip_reason")) if isinstance(value, dict) else (value, None)


def _instructions(
    value: Any, num_issues: int, max_instructions: int, max_words: int, examples: Collection[tuple[str, ...]], reason_needed: bool
) -> Instructions:
    adjusted = Metadata()
    if isinstance(value, dict):
        adjusted.unknown(value, Instructions)
    listed, skip_reason = _listed(value)
    if not isinstance(listed, list):
        raise ValueError('"instructions" must be a list')
    if len(listed) > max_instructions:
        raise ValueError(f"instructions: at most {max_instructions}, got {len(listed)}")
    found = [_instruction(one, number, num_issues, adjusted) for number, one in enumerate(listed)]
    for number, one in enumerate(found):
        _check_instruction(one["instruction"], f"instructions.{number}.instruction", max_words, examples)
    if len({spelled(one["instruction"]) for one in found}) < len(found):
        raise ValueError("an instruction is repeated; each must be another change, and fewer are fine")
    reason = adjusted.line(skip_reason, "skip_reason") or None
    if not found and reason_needed and not reason:
        raise ValueError('"skip_reason" must say why "instructions" is empty although the critique finds faults')
    return validated({"instructions": found, "skip_reason": reason, "adjustments": adjusted.kinds}, Instructions)


def _instruction(value: Any, number: int, num_issues: int, adjusted: Metadata) -> dict[str, Any]:
    where = f"instructions.{number}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    adjusted.unknown(value, Instruction)
    instruction = value.get("instruction")
    if not isinstance(instruction, str):
        raise ValueError(f"{where}.instruction must be a text")
    return {
        "op": adjusted.op(value.get("op")),
        "target": adjusted.required(value.get("target"), "target", f"{where}.target"),
        "location": adjusted.line(value.get("location"), "location"),
        "instruction": instruction,
        "addresses": adjusted.addresses(value.get("addresses"), num_issues, where),
        "expected_visible_change": adjusted.required(
            value.get("expected_visible_change"), "expected_visible_change", f"{where}.expected_visible_change"
        ),
    }


def read_instructions(
    text: str,
    num_issues: int,
    *,
    max_instructions: int,
    max_words: int,
    examples: Collection[tuple[str, ...]] = (),
    reason_needed: bool | None = None,
) -> Instructions:
    """The answer to the template `instruct` about a critique of `num_issues` issues.

    `examples`: word sequences of the template that are no answers. `reason_needed`: whether an empty list needs a `skip_reason`; if
    not given, when there are issues.
    """
    needed = num_issues > 0 if reason_needed is None else reason_needed
    return _instructions(read_object(text), num_issues, max_instructions, max_words, examples, needed)


def read_one_call(text: str, *, max_instructions: int, max_words: int, examples: Collection[tuple[str, ...]] = ()) -> Critique:
    """The answer to the template `critique_one_call`: a critique that carries its instructions."""
    value = read_object(text)
    flat = {"reasoning", "issues", "instructions"} <= value.keys()  # the critique's fields beside the instructions
    if not flat and not {"critique", "instructions"} <= value.keys():
        raise ValueError(f'the object must have the fields "critique" and "instructions", got {sorted(value)[:5]}')
    critique = _critique({name: one for name, one in value.items() if name != "skip_reason"} if flat else value["critique"])
    given = value["instructions"]
    given = {"instructions": given, "skip_reason": value.get("skip_reason")} if isinstance(given, list) else given
    needed = bool(critique.issues)
    instructions = _instructions(given, len(critique.issues), max_instructions, max_words, examples, needed)
    if critique.no_issue and instructions.instructions:
        raise ValueError('"instructions" must be empty when "issues" is empty')
    return critique.model_copy(update={"instructions": instructions})
