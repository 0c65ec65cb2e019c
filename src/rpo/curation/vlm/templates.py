"""The words that are put to a vision-language model: files of this package, whose content is part of a run's fingerprint."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import numpy as np

from rpo.data.chat import Message, Part
from rpo.data.model_text import spelled

_PLACE = re.compile(r"\{\{([a-z_]+)\}\}")
_PLACEHOLDER = re.compile(r"<[a-z][^<>\n]{1,80}>")
_USER = "--- user ---\n"


@cache
def template(name: str) -> str:
    """The text of a template without its first line, which says what it is and its version."""
    title, _, text = files("rpo.curation.vlm").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8").partition("\n")
    assert title.startswith("# ") and re.search(r"version \d+$", title), f"template {name} must begin with its name and version"
    return text.strip()


@cache
def placeholders() -> tuple[str, ...]:
    """What stands for something else in the examples of the templates, such as `<thing>`: never an answer."""
    folder = files("rpo.curation.vlm").joinpath("templates")
    names = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
    return tuple(dict.fromkeys(found for name in names for found in _PLACEHOLDER.findall(template(name))))


@cache
def examples(*names: str) -> frozenset[tuple[str, ...]]:
    """The quoted phrases of these templates, word by word: examples, which are no answer."""
    phrases = (spelled(phrase) for name in names for phrase in template(name).split('"')[1::2])
    return frozenset(phrase for phrase in phrases if len(phrase) > 1)


def templates_hash(*names: str) -> str:
    """What tells these templates from any others: 16 hexadecimal digits over their words."""
    return hashlib.sha256("\0".join(template(name) for name in names).encode()).hexdigest()[:16]


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with every `{{name}}` replaced, in one pass: what a value holds is never a place itself. `KeyError` for a name not given."""
    return _PLACE.sub(lambda place: values[place[1]], text)


def messages(name: str, values: Mapping[str, str], image: np.ndarray | None = None) -> tuple[Message, ...]:
    """The template as system and user message, with the image at its place `{{image}}`."""
    system, _, user = template(name).partition(_USER)
    before, at_image, after = user.partition("{{image}}")
    parts: tuple[Part, ...] = (filled(before, values).strip(),)
    if at_image:
        assert image is not None, f"template {name} shows an image"
        parts += (image, filled(after, values).strip())
    return Message(role="system", parts=(filled(system, values).strip(),)), Message(role="user", parts=parts)
