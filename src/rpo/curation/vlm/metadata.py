"""The fields of a model's answer, read one by one: what an edit does not depend on is dropped, clipped or converted, and noted."""

import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from rpo.curation.vlm.templates import placeholders
from rpo.data.schema import ISSUES_MAX, KEEP_MAX, LINE_MAX, NOT_ASKED_FOR, REASONING_MAX, Aspect, AspectScore, Instruction, Issue

_ASPECTS: tuple[str, ...] = get_args(Aspect)
_OPS: tuple[str, ...] = get_args(Instruction.model_fields["op"].annotation)
_SEVERITIES = {
    "minor": 1, "low": 1, "slight": 1, "small": 1, "mild": 1, "moderate": 2, "medium": 2,
    "severe": 3, "high": 3, "major": 3, "critical": 3, "serious": 3,
}  # fmt: skip


class Metadata:
    """Reads the fields of one answer, and notes what had to be dropped, clipped or converted."""

    def __init__(self) -> None:
        self._kinds: dict[str, None] = {}

    def note(self, kind: str) -> None:
        self._kinds[kind] = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(self._kinds))

    def unknown(self, value: Mapping[str, Any], model: type[BaseModel]) -> None:
        if value.keys() - model.model_fields.keys() or value.keys() & (NOT_ASKED_FOR - {"no_issue", "instructions"}):
            self.note("unknown field dropped")

    def clipped(self, text: str, length_max: int, name: str) -> str:
        if len(text) > length_max:
            self.note(f"{name} clipped")
        return text[:length_max].strip()

    def line(self, value: Any, name: str) -> str:
        """Metadata that is a text."""
        if isinstance(value, str) and _placeholder(value) is None:
            return self.clipped(value, LINE_MAX, name)
        if value is not None:
            self.note(f"{name} dropped")
        return ""

    def required(self, value: Any, name: str, where: str) -> str:
        """A text that nothing can do without."""
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where} must be a text and must not be empty")
        check_placeholders(value, where)
        return self.clipped(value, REASONING_MAX if name == "reasoning" else LINE_MAX, name)

    def items(self, value: Any, items_max: int, name: str) -> list[Any]:
        """Metadata that is a list."""
        if not isinstance(value, list):
            if value is not None:
                self.note(f"{name} dropped")
            return []
        if len(value) > items_max:
            self.note(f"{name} clipped")
        return value[:items_max]

    def name(self, value: Any, names: Collection[str], fallback: str, name: str) -> str:
        """One of a list of names; in another spelling, or in place of an unknown one, the fallback."""
        if isinstance(value, str) and value in names:
            return value
        self.note(f"{name} converted")
        spelled = "_".join(value[:LINE_MAX].lower().replace("-", " ").replace("_", " ").split()) if isinstance(value, str) else ""
        return spelled if spelled in names else fallback

    def op(self, value: Any) -> str:
        return self.name(value, _OPS, "fix", "op")

    def severity(self, value: Any) -> int:
        if type(value) is int and 1 <= value <= 3:
            return value
        self.note("severity converted")
        word = value.strip().lower() if isinstance(value, str) else ""
        number = number_in(value)
        return _SEVERITIES.get(word, 2) if number is None else round(min(max(number, 1), 3))

    def region(self, value: Any) -> list[float] | None:
        """A box of fractions. One in pixels or thousandths is dropped: which of the two it is, nobody can tell."""
        if value is None or _is_box(value):
            return value
        self.note("region dropped")
        return None

    def flag(self, value: Any, name: str) -> bool:
        if isinstance(value, bool):
            return value
        self.note(f"{name} converted")
        return str(value)[:8].strip().lower() not in ("no", "false", "0")

    def aspects(self, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, dict):
            self.note("aspects converted")
            value = [{"aspect": name, "score": score} for name, score in value.items()]
        scores: dict[str, int | None] = {}
        for one in self.items(value, 2 * len(_ASPECTS), "aspects"):
            aspect, score = self._aspect_score(one)
            if not aspect or aspect in scores:
                self.note("aspects dropped")
            else:
                scores[aspect] = score
        return [{"aspect": aspect, "score": score} for aspect, score in scores.items()]

    def _aspect_score(self, value: Any) -> tuple[str, int | None]:
        if not isinstance(value, dict):
            return "", None
        self.unknown(value, AspectScore)
        score = value.get("score")
        aspect = self.name(value.get("aspect"), _ASPECTS, "", "aspects")
        if type(score) is not int and score is not None:
            self.note("aspects converted")
            number = number_in(score)
            score = None if number is None else round(number)
        return (aspect, score) if score is None or 1 <= score <= 5 else ("", None)

    def issue(self, value: Any, number: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"issues.{number} must be an object")
        self.unknown(value, Issue)
        return {
            "aspect": self.name(value.get("aspect"), _ASPECTS, "alignment", "aspect"),
            "severity": self.severity(value.get("severity")),
            "evidence": self.required(value.get("evidence"), "evidence", f"issues.{number}.evidence"),
            "region": self.region(value.get("region")),
            "prompt_span": self.line(value.get("prompt_span"), "prompt_span"),
            "fixable_by_edit": self.flag(value.get("fixable_by_edit", True), "fixable_by_edit"),
        }

    def keep(self, value: Any) -> list[str]:
        if isinstance(value, str):
            self.note("keep converted")
            value = [value]
        lines = [self.line(one, "keep") for one in self.items(value, KEEP_MAX, "keep")]
        return [line for line in lines if line]

    def addresses(self, value: Any, num_issues: int, where: str) -> list[int]:
        numbers = [number_in(one) for one in self.items([value] if isinstance(value, int) else value, 10 * ISSUES_MAX, "addresses")]
        known = [int(one) for one in numbers if one is not None and one.is_integer() and 0 <= one < num_issues]
        if len(known) < len(numbers):
            self.note("addresses dropped")
        if num_issues and len(set(numbers)) < len(numbers):
            raise ValueError(f"{where}.addresses names an issue twice")
        return known


def _placeholder(text: str) -> str | None:
    return next((placeholder for placeholder in placeholders() if placeholder in text), None)


def check_placeholders(text: str, where: str) -> None:
    if found := _placeholder(text):
        raise ValueError(f"{where} still holds {found} of the question; write what it stands for")


def number_in(value: Any) -> float | None:
    """A finite number, also one that is written as a short text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value[:20] if isinstance(value, str) else value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_box(region: Any) -> bool:
    if not isinstance(region, list) or len(region) != 4 or not all(type(edge) in (int, float) and 0 <= edge <= 1 for edge in region):
        return False
    left, top, right, bottom = region
    return left < right and top < bottom
