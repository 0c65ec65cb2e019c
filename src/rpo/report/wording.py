"""Numbers and sentences as a person reads them. Pure functions of the summary's values."""

from collections.abc import Mapping
from typing import Any

MINUS = "\N{MINUS SIGN}"


def label(name: str) -> str:
    """`fully_correct` -> `Fully correct`."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def reason_words(reason: str) -> str:
    """`low_margin` -> `low margin`, `error:critique:no JSON` -> `error in critique: no JSON`."""
    if not reason.startswith("error:"):
        return reason.replace("_", " ")
    stage, _, why = reason.removeprefix("error:").partition(":")
    return f"error in {stage}: {why}" if why else f"error: {stage}"


def number(value: float, digits: int = 3) -> str:
    """Fixed digits, a real minus sign, thousands apart; very small values in scientific form."""
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}".replace("-", MINUS)
    return f"{value:,.{digits}f}".replace("-", MINUS)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%".replace("-", MINUS)


def signed(value: float, digits: int = 1) -> str:
    """With its sign, as a change is written."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def duration(seconds: float) -> str:
    """`0.4 s`, `48 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def is_share(numbers: Mapping[str, Any]) -> bool:
    """Whether a metric is a fraction that reads well as per cent."""
    return all(0 <= numbers[side] <= 1 for side in ("base", "tuned"))


def verdict(numbers: Mapping[str, Any]) -> str:
    """ "better", "worse" or "open": where the interval of the difference lies."""
    low, high = numbers["ci95"]
    return "better" if low > 0 else "worse" if high < 0 else "open"


def _of_hundred(value: float) -> str:
    return f"{100 * value:.0f}"


def headline(metric: str, numbers: Mapping[str, Any], names: tuple[str, str] = ("base", "tuned")) -> str:
    """What the main figure says of the models `names`, and what it does not, in plain words."""
    base, tuned = numbers["base"], numbers["tuned"]
    tuning = names == ("base", "tuned")
    after, before = ("after tuning", "before") if tuning else (f"for {names[1]}", f"for {names[0]}")
    if metric == "fully_correct" and tuning:
        said = f"Of 100 images, {_of_hundred(tuned)} now show everything their caption asks for; before tuning it was {_of_hundred(base)}."
    elif metric == "fully_correct":
        right = f"{_of_hundred(tuned)} show everything their caption asks for; of {names[0]}'s, {_of_hundred(base)}."
        said = f"Of 100 images of {names[1]}, {right}"
    elif is_share(numbers):
        said = f"{label(metric)} is {percent(tuned)} {after} and was {percent(base)} {before}."
    else:
        said = f"{label(metric)} is {number(tuned)} {after} and was {number(base)} {before}."
    return f"{said} {_meaning(numbers)}"


def _meaning(numbers: Mapping[str, Any]) -> str:
    kind = verdict(numbers)
    if kind == "better":
        return "The whole interval lies above zero: the gain does not hang on which prompts happened to be drawn."
    if kind == "worse":
        return "The whole interval lies below zero: it is worse, and not by chance of the prompts."
    least = numbers.get("detectable")
    share = is_share(numbers)
    hint = f" Only a true difference of about {100 * least:.1f} points or more would show reliably." if least and share else ""
    return f"The interval includes zero: {numbers['n']} prompts cannot tell the two apart.{hint}"
