"""No regular expression of the package has two unbounded repeats next to each other or one inside another: on text of strangers its
time would grow with the square, the cube or the power of the length, and the interpreter's lock is held all the while."""

import ast
from collections.abc import Iterator
from pathlib import Path
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rpo"
CALLS = {"compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer", "subn"}
REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT)
MANY = 100
"""A repeat that may be so long counts as unbounded."""


def patterns() -> Iterator[tuple[str, str]]:
    """(place, pattern) of every literal that is given to `re`; what is formatted into one counts as a letter."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS and node.args):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
                continue
            first = node.args[0]
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            if any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                texts = [part.value if isinstance(part, ast.Constant) else "a" for part in parts]
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", "".join(map(str, texts))


def faults(pattern: str) -> list[str]:
    found: list[str] = []
    _look(list(parser.parse(pattern)), False, found)
    return found


def _look(items: list[Any], inside: bool, found: list[str]) -> bool:
    """Whether the sequence ends in an unbounded repeat."""
    before = False
    for kind, value in items:
        if kind in REPEATS:
            least, most, content = value
            unbounded = most is constants.MAXREPEAT or most >= MANY
            if unbounded and inside:
                found.append("one unbounded repeat inside another")
            if unbounded and before:
                found.append("two unbounded repeats next to each other")
            ends = _look(list(content), inside or unbounded, found)
            before = unbounded or ends or (least == 0 and before)
        elif kind is constants.SUBPATTERN:
            starts, before_group = _starts(list(value[3])), before
            ends = _look(list(value[3]), inside, found)
            if starts and before_group:
                found.append("two unbounded repeats next to each other")
            before = ends
        elif kind is constants.BRANCH:
            before = any(_look(list(branch), inside, found) for branch in value[1])
        elif kind is not constants.AT and not (kind is constants.LITERAL and chr(value).isspace()):
            before = False  # white space separates nothing: repeats of `.` and `\\s` match it too
    return before


def _starts(items: list[Any]) -> bool:
    kind, value = items[0] if items else (None, None)
    return kind in REPEATS and (value[1] is constants.MAXREPEAT or value[1] >= MANY)


PATTERNS = list(patterns())


def test_there_are_some() -> None:
    assert len(PATTERNS) > 20 and any(place.startswith("data/model_text.py") for place, _ in PATTERNS)


@pytest.mark.parametrize(("place", "pattern"), PATTERNS, ids=[place for place, _ in PATTERNS])
def test_no_pattern_is_slow(place: str, pattern: str) -> None:
    assert faults(pattern) == []


@pytest.mark.parametrize("pattern", [r"```(?:json)?\s*\n(.*)\n\s*```", r"(a+)+", r"\s*(\s*x)", r"a*b?a*", r"(?:a|b*)*", r"\w+\s*[\w ]+x"])
def test_slow_patterns_are_noticed(pattern: str) -> None:
    assert faults(pattern)
