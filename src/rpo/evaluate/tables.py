"""The numbers of an evaluation as Markdown, ready to paste, with what a reader must know to believe them."""

from collections.abc import Mapping
from typing import Any

TABLE = "table.md"


def markdown(index: Mapping[str, Any]) -> str:
    """Of the content of `index.json`: a table for each model against the first, rewards that chose training pairs at the end of it."""
    first, *others = index["models"]
    task, shared = index["task"], index["curation_prompts"]
    lines = [f"{task['prompts']} prompts of {task['name']}, {task['seeds_per_prompt']} image(s) each, the same noise for every model."]
    for model in others:
        metrics = index["metrics"][model]
        compared = sorted((name for name in metrics if "ci95" in metrics[name]), key=lambda name: "used_in_labelling" in metrics[name])
        lines += [
            "",
            f"| metric | {first} | {model} | difference [95 %] | win rate [95 %] | p (Holm) | prompts |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(name, metrics[name]) for name in compared]
        lines += [f"| {name} | {value['base']:.3f} | {value['tuned']:.3f} | {value['difference']:+.3f} | | | {value['n']} |"
                  for name, value in metrics.items() if "ci95" not in value]  # fmt: skip
        small = [name for name in compared if _too_few(metrics[name])]
        if small:
            least = "; ".join(f"{name}: {metrics[name]['detectable']:.3f}" for name in small)
            lines += ["", f"Too few prompts to tell a difference below (power 80 %): {least}."]
        kinds = {kind for name in compared for kind in metrics[name].get("categories", {})}
        if kinds:
            main = compared[0]
            lines += ["", f"| kind of prompt | {first} | {model} | {main}: difference [95 %] | win rate [95 %] | | prompts |"]
            lines += ["|---|---|---|---|---|---|---|"]
            lines += [_row(kind, metrics[main]["categories"][kind]) for kind in sorted(metrics[main].get("categories", {}))]
    if index["used_in_labelling"]:
        lines += [
            "",
            f"† {', '.join(index['used_in_labelling'])} chose the training pairs, or had a word in them: "
            "their gain is what was asked for, not evidence.",
        ]
    lines += [
        "",
        f"Of {shared['compared']} prompts of the curation {shared['exact']} are among these word for word, {shared['near']} nearly.",
    ]
    lines += ["Intervals: bootstrap over prompts. p: signed-rank test over prompts, adjusted for the number of metrics."]
    lines += ["Judges: " + ", ".join(f"{name} ({digest[:12]})" for name, digest in index["judges"].items()) + "."]
    return "\n".join(lines) + "\n"


def _row(name: str, value: Mapping[str, Any]) -> str:
    mark = " †" if value.get("used_in_labelling") else ""
    low, high = value["ci95"]
    least, most = (100 * end for end in value["win_ci95"])
    p = f"{value['p_holm']:.2g}" if "p_holm" in value else ""
    return (
        f"| {name}{mark} | {value['base']:.3f} | {value['tuned']:.3f} | {value['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
        f"| {100 * value['win_rate']:.1f} % [{least:.1f}, {most:.1f}] | {p} | {value['n']} |"
    )


def _too_few(value: Mapping[str, Any]) -> bool:
    """Whether nothing is shown and a difference as large as the one seen could not have been."""
    low, high = value["ci95"]
    return low <= 0 <= high and value["detectable"] is not None and abs(value["difference"]) < value["detectable"]
