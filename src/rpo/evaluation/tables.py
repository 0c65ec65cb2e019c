"""The numbers of an evaluation as text: cells for every table, and the whole as Markdown, ready to paste."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rpo.evaluation.judges import is_compared, losses, metric_of, value_of
from rpo.evaluation.statistics import BOOTSTRAP_MIN, INTERVAL_MIN

TABLE = "table.md"
NO_INTERVAL = "–"


def shown(value: float, numbers: Mapping[str, Any]) -> str:
    """A mean of a metric, by its kind: fractions in per cent."""
    return f"{100 * value:.1f} %" if metric_of(numbers).kind == "fraction" else f"{value:.3f}"


def shown_change(value: float, numbers: Mapping[str, Any]) -> str:
    """A difference: of fractions in percentage points."""
    return f"{100 * value:+.1f}" if metric_of(numbers).kind == "fraction" else f"{value:+.3f}"


def shown_interval(numbers: Mapping[str, Any]) -> str:
    """The interval of the difference."""
    ends = numbers.get("ci95")
    return NO_INTERVAL if ends is None else "[{}, {}]".format(*(shown_change(end, numbers) for end in ends))


def in_order(numbers: Mapping[str, Mapping[str, Any]], headline: str) -> list[str]:
    """Metrics as tables list them: the headline, other evidence, rewards that chose the pairs, what was not compared by prompt."""
    return sorted(numbers, key=lambda name: (name != headline, not is_compared(numbers[name]), "used_in_labelling" in numbers[name]))


def few_prompts(every: Iterable[Mapping[str, Any]]) -> str:
    """What to say of intervals that come from few prompts; nothing where all come from enough."""
    sizes = [numbers["n"] for numbers in every if is_compared(numbers) and numbers.get("interval", "bootstrap") != "bootstrap"]
    if not sizes:
        return ""
    said = f"Fewer than {BOOTSTRAP_MIN} prompts (at least {min(sizes)}): intervals are Student's t, wide, and assume no skew."
    return said if min(sizes) >= INTERVAL_MIN else f"{said} With fewer than {INTERVAL_MIN} there is none."


def loss_sentence(numbers: Mapping[str, Mapping[str, Any]], headline: str) -> str:
    """Which other metrics got worse, each with its interval and p; nothing if none did. For the line under a headline."""
    parts: list[str] = []
    for name in losses(numbers, headline):
        own = numbers[name]
        unit = " points" if metric_of(own).kind == "fraction" else ""
        verb = "rose" if own["difference"] > 0 else "fell"
        p = f", p {own['p_holm']:.2g} after Holm" if "p_holm" in own else ""
        labelled = ", a reward that labelled the pairs" if "used_in_labelling" in own else ""
        size = shown_change(abs(own["difference"]), own)[1:]
        wins = f"better in {100 * own['win_rate']:.0f} of 100 images"
        parts.append(f"{name.replace('_', ' ')}{labelled} {verb} by {size}{unit} (95 % {shown_interval(own)}{p}; {wins})")
    return f"But it got worse elsewhere: {'; '.join(parts)}." if parts else ""


def markdown(index: Mapping[str, Any]) -> str:
    """Of the content of `index.json`: a table for each model against the first, the headline on top."""
    first, *others = index["models"]
    task, shared = index["task"], index["curation_prompts"]
    lines = [f"{task['prompts']} prompts of {task['name']}, {task['seeds_per_prompt']} image(s) each, the same noise for every model."]
    for model in others:
        lines += _of_model(index["metrics"][model], first, model, index["headline"])
    if index["used_in_labelling"]:
        lines += [
            "",
            f"† {', '.join(index['used_in_labelling'])} chose the training pairs or took part in making them: "
            "their gain is what was asked for, not evidence.",
        ]
    lines += [
        "",
        f"Of {shared['compared']} prompts of the curation {shared['exact']} are among these word for word, {shared['near']} nearly.",
    ]
    every = [numbers for own in index["metrics"].values() for numbers in own.values()]
    family = "one model's metrics" if len(others) == 1 else "the metrics of one model, each model by itself"
    lines += [f"Intervals: bootstrap over prompts. p: signed-rank test over prompts, Holm's correction over {family}."]
    lines += [said for said in (few_prompts(every),) if said]
    lines += [f"{name}: on the features of `{own['judge']}`." for name, own in index["metrics"][others[0]].items() if "judge" in own]
    lines += ["Judges: " + ", ".join(f"{name} ({digest[:12]})" for name, digest in index["judges"].items()) + "."]
    return "\n".join(lines) + "\n"


def _of_model(metrics: Mapping[str, Mapping[str, Any]], first: str, model: str, headline: str) -> list[str]:
    columns = f"{first} | {model} | difference [95 %] | win rate [95 %] | p (Holm) | prompts |"
    lines = ["", f"| metric | {columns}", "|---|---|---|---|---|---|---|"]
    names = in_order(metrics, headline)
    lines += [_row(name, metrics[name], first, model) for name in names]
    if worse := loss_sentence(metrics, headline):
        lines += ["", worse]
    if small := [name for name in names if _too_few(metrics[name])]:
        least = "; ".join(f"{name}: {metrics[name]['detectable']:.3f}" for name in small)
        lines += ["", f"Too few prompts to tell a difference below (power 80 %): {least}."]
    kinds: Mapping[str, Mapping[str, Any]] = metrics.get(headline, {}).get("categories", {})
    if kinds:
        lines += ["", f"| kind of prompt: {headline} | {columns}", "|---|---|---|---|---|---|---|"]
        lines += [_row(kind, kinds[kind], first, model) for kind in sorted(kinds)]
    return lines


def _row(name: str, value: Mapping[str, Any], first: str, model: str) -> str:
    mark = " †" if value.get("used_in_labelling") else ""
    means = [shown(value_of(value, of, role), value) for of, role in ((first, "base"), (model, "tuned"))]
    difference, won, p = shown_change(value["difference"], value), "", ""
    if is_compared(value):
        difference += f" {shown_interval(value)}"
        won = f"{100 * value['win_rate']:.1f} %" + _ends(value["win_ci95"])
        p = f"{value['p_holm']:.2g}" if "p_holm" in value else ""
    return f"| {name}{mark} | {' | '.join(means)} | {difference} | {won} | {p} | {value['n']} |"


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else " [{:.1f}, {:.1f}]".format(*(100 * end for end in interval))


def _too_few(value: Mapping[str, Any]) -> bool:
    """Whether nothing is shown and a difference as large as the one seen could not have been."""
    if not is_compared(value) or value["ci95"] is None or value["detectable"] is None:
        return False
    low, high = value["ci95"]
    return low <= 0 <= high and abs(value["difference"]) < value["detectable"]
