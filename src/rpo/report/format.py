"""Numbers and sentences as a person reads them. Pure functions of the summary's values."""

from collections.abc import Mapping
from typing import Any

from rpo.evaluation.judges import direction, metric_of, value_of

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


def count(number_of: int, noun: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{number_of:,} {noun}" + ("" if number_of == 1 else "s")


def value(numbers: Mapping[str, Any], mean: float) -> str:
    """A mean by the metric's kind: fractions in per cent."""
    return percent(mean) if metric_of(numbers).kind == "fraction" else number(mean)


def change(numbers: Mapping[str, Any], difference: float) -> str:
    """A difference by the metric's kind: of fractions in percentage points."""
    return signed(100 * difference) if metric_of(numbers).kind == "fraction" else signed(difference, 3)


def span(numbers: Mapping[str, Any]) -> str:
    """The interval of the difference."""
    ends = numbers.get("ci95")
    return "–" if ends is None else f"{change(numbers, ends[0])} to {change(numbers, ends[1])}"


def p_value(numbers: Mapping[str, Any]) -> str:
    """After Holm's correction."""
    found = numbers.get("p_holm")
    return "–" if found is None else "< 0.001" if found < 0.001 else f"{found:.2g}" if found < 0.1 else f"{found:.2f}"


def _of_hundred(mean: float) -> str:
    return f"{100 * mean:.0f}"


def headline(metric: str, numbers: Mapping[str, Any], names: tuple[str, str] = ("base", "tuned")) -> str:
    """What the main figure says of the models `names`, and what it does not, in plain words."""
    base, tuned = (value_of(numbers, name, role) for name, role in zip(names, ("base", "tuned"), strict=True))
    tuning = names == ("base", "tuned")
    after, before = ("after tuning", "before") if tuning else (f"for {names[1]}", f"for {names[0]}")
    how = metric_of(numbers)
    if how.kind == "fraction" and how.says and tuning:
        said = f"Of 100 images, {_of_hundred(tuned)} now {how.says}; before tuning it was {_of_hundred(base)}."
    elif how.kind == "fraction" and how.says:
        said = f"Of 100 images of {names[1]}, {_of_hundred(tuned)} {how.says}; of {names[0]}'s, {_of_hundred(base)}."
    else:
        said = f"{label(metric)} is {value(numbers, tuned)} {after} and was {value(numbers, base)} {before}."
    if "used_in_labelling" in numbers:
        return f"{said} This reward chose the training pairs: its gain is what was asked for, not evidence."
    return f"{said} {_meaning(numbers)}"


def _meaning(numbers: Mapping[str, Any]) -> str:
    ends = numbers.get("ci95")
    if ends is None:
        return f"{count(numbers['n'], 'prompt').capitalize()}: too few for an interval, so nothing can be concluded."
    kind = direction(numbers)
    if kind != "open":
        side = "above" if ends[0] > 0 else "below"
        if kind == "better":
            return f"The whole interval lies {side} zero: the gain does not depend on which prompts happened to be drawn."
        return f"The whole interval lies {side} zero: it is worse, and not by chance of the prompts."
    least = numbers.get("detectable")
    unit = " points" if metric_of(numbers).kind == "fraction" else ""
    hint = f" Only a true difference of about {change(numbers, least)[1:]}{unit} or more would show reliably." if least else ""
    return f"The interval includes zero: {count(numbers['n'], 'prompt')} cannot tell the two apart.{hint}"
