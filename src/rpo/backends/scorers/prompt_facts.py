"""A prompt taken apart into the single facts that an image must show: the question, and how its answer is read."""

from collections.abc import Mapping
from typing import Any

from rpo.data.model_text import TEXT_MAX, clean, read_json, spelled, unfenced, without_thought

FACTS_MAX = 12
FACT_CHARACTERS_MAX = 160
FACTS = (
    "Take the description of an image apart into the single facts that the image must show to follow it: every thing, how many of it, "
    "each of its attributes, each place and relation. Use the description's own words. Answer with one JSON object and nothing else: "
    f'its field "facts" is a list of at most {FACTS_MAX} short sentences, each another fact, in the form '
    '{{"facts": ["there is a <thing>", "the <thing> is <attribute>"]}}.\n'
    "Description: {}"
)
FACTS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "facts": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": FACT_CHARACTERS_MAX},
            "minItems": 1,
            "maxItems": FACTS_MAX,
        }
    },
    "required": ["facts"],
    "additionalProperties": False,
}
BULLETS = ("-", "*", "+", "•", "–", "—", "·", "◦", "▪", "‣", "✓", "✔")
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBERS = {str(number): word for number, word in enumerate(_COUNTS)} | dict.fromkeys(("pair", "couple", "twin", "twins"), "two")
_EXACT = frozenset(
    "red green blue yellow orange purple violet pink brown black white grey gray gold golden silver cyan magenta turquoise beige "
    "left right two three four five six seven eight nine ten eleven twelve".split()
)
"""Words that a fact must not add or exchange."""
_FRAME = frozenset(
    "a about above across against all also among an and another any appear appears are around as at background be behind being below "
    "beneath beside between bottom both by can center color colored colour coloured contain contains count depicted each every exactly "
    "feature features figure first for foreground from front has have having he her his holding holds how image in inside into is it its "
    "located looks made makes many middle must near next number object objects of on one only onto or other out outside over part "
    "picture placed position positioned present scene second see seen shape shaped she should show showing shown shows side sits "
    "sitting situated some standing stands that the their them there these they thing things this those to top toward under upon "
    "visible was wearing wears were what where which while who whose with within without".split()
)
"""Words of which sentences about images are made."""
_FOREIGN_SHARE_MAX = 1 / 3


def facts_in(text: str, prompt: str = "") -> list[str]:
    """The facts of an answer, each once, bounded in number and length: of JSON its texts, else the lines with a bullet or a number, else
    those inside a fence.

    Lines around them (preface, headings, closing) are no facts, and neither is what is not made of the words of `prompt`, if given.
    """
    found: dict[tuple[str, ...], str] = {}
    for line in _fact_lines(without_thought(text[:TEXT_MAX])):
        fact = clean(line)[:FACT_CHARACTERS_MAX].strip("*_ ")
        if fact and not fact.endswith(":") and (not prompt or _is_of(fact, prompt)):
            found.setdefault(spelled(fact), fact)
    return list(found.values())[:FACTS_MAX]


def _fact_lines(answer: str) -> list[str]:
    text = unfenced(answer)
    if text.startswith(("{", "[")):
        try:
            value = read_json(text)
        except ValueError:
            return []
        return [fact for one in _listed(value) if isinstance(fact := _only(one), str)]
    lines = [line.strip() for line in text.splitlines()]
    return [item for line in lines if (item := _item(line))] or (lines if text != answer else [])


def _listed(value: Any) -> list[Any]:
    """The list of facts: the value itself, the field "facts", or the only list of an object."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = value.get("facts", lists[0] if len(lists) == 1 else None)
    return value if isinstance(value, list) else []


def _only(value: Any) -> Any:
    """The text of an entry, which some models write as an object of one field."""
    return next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value


def _item(line: str) -> str:
    """A line without its bullet or number; empty for one that has neither."""
    mark, blank, _ = line[:6].replace("\t", " ").partition(" ")
    numbered = mark[:-1].removeprefix("(").isdecimal() and mark[-1:] in (".", ")", ":")
    return line[len(mark) :].strip() if blank and (numbered or mark in BULLETS) else ""


def _is_of(fact: str, prompt: str) -> bool:
    """Whether what the fact names comes from the prompt: colors, numbers and sides all, of other words two thirds, at least one."""
    words = spelled(prompt)
    given = {*words, *(_NUMBERS.get(word, word) for word in words), *("gray" for word in words if word == "grey")}
    content = [_NUMBERS.get(word, word) for word in spelled(fact)]
    content = [word for word in content if word not in _FRAME and (len(word) > 2 or word in given or word > "\x7f")]
    foreign = [word for word in content if not _comes_from(word, given, prompt)]
    exact = {"gray" if word == "grey" else word for word in foreign} & _EXACT
    return bool(content) and len(foreign) < len(content) and not exact and len(foreign) <= _FOREIGN_SHARE_MAX * len(content)


def _comes_from(word: str, given: set[str], prompt: str) -> bool:
    """Whether one of the given words is this one, or another form of it; scripts without blanks are compared letter by letter."""
    if word in given:
        return True
    if word in _EXACT:
        return False
    if word > "\u2e80":
        return 2 * sum(letter in prompt for letter in word) >= len(word)
    return any(_shared(word, one) >= max(3, min(len(word), len(one)) - 1) for one in given)


def _shared(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
