"""The JSON schemas that a server is asked to hold a model to: every field required, none unknown, everything bounded.

Bounds are far below what grammar converters bear (llama.cpp refuses repetitions from 2,000 on), and ranges are enums, since few
converters know `minimum` and `maximum`. What a model writes without a schema may be longer: `reading` clips it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

from rpo.data.schema import ISSUES_MAX, KEEP_MAX, Aspect, Instruction

Schema = Mapping[str, Any]
REASONING_MAX = 1200
INSTRUCTION_MAX = 160
"""Characters; an instruction that long was cut by the bound."""


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _text(length_max: int, *, length_min: int = 1) -> Schema:
    return {"type": "string", "minLength": length_min, "maxLength": length_max}


def _list(items: Schema, items_max: int, *, items_min: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": items_min, "maxItems": items_max}


def _one_of(values: Sequence[str] | Sequence[int]) -> Schema:
    return {"type": "string" if isinstance(values[0], str) else "integer", "enum": list(values)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


@cache
def critique_schema() -> Schema:
    aspect = _one_of(get_args(Aspect))
    issue = _object(
        aspect=aspect,
        severity=_one_of([1, 2, 3]),
        evidence=_text(120),
        region=_or_null(_list({"type": "number"}, 4, items_min=4)),
        prompt_span=_text(80, length_min=0),
        fixable_by_edit={"type": "boolean"},
    )
    score = _one_of([1, 2, 3, 4, 5])
    return _object(
        reasoning=_text(REASONING_MAX),
        aspects=_list(_object(aspect=aspect, score=_or_null(score)), len(get_args(Aspect))),
        issues=_list(issue, ISSUES_MAX),
        keep=_list(_text(60), KEEP_MAX),
        overall=score,
    )


@cache
def instructions_schema(max_instructions: int, num_issues: int = ISSUES_MAX) -> Schema:
    """For a critique of `num_issues` issues; without any there is nothing to address."""
    addresses = {"addresses": _list(_one_of(range(num_issues)), num_issues)} if num_issues else {}
    instruction = _object(
        op=_one_of(get_args(Instruction.model_fields["op"].annotation)),
        target=_text(60),
        location=_text(60, length_min=0),
        instruction=_text(INSTRUCTION_MAX),
        **addresses,
        expected_visible_change=_text(120),
    )
    return _object(instructions=_list(instruction, max_instructions), skip_reason=_or_null(_text(120)))


@cache
def one_call_schema(max_instructions: int) -> Schema:
    return _object(critique=critique_schema(), instructions=instructions_schema(max_instructions))
