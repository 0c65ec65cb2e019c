"""The card of a published dataset, written from the run: a reader finds there what made the pairs, and what was dropped."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo.core.parquet import create
from rpo.data.formats.dropped import commonest, others
from rpo.data.images import encode_png, fit_square
from rpo.data.pairs import Pair

EXAMPLES = 3
EXAMPLE_SIDE = 256
NOT_STATED = "not stated where the model lies"

_LICENCE = re.compile(r"^license(?:_name)?:[ \t]{0,20}['\"]?([\w.+-]+)", re.M)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells."""

    name: str
    layout: str
    """Format of the export."""
    licence: str
    """The Hub's word for the licence of the dataset."""
    pairs: Mapping[str, int]
    """By split."""
    rows: int
    """Rows of the run, kept or not; 0 when nothing was curated there."""
    dropped: int
    summary: Mapping[str, Any]
    """`summary.json` of the run."""
    record: Mapping[str, Any]
    """`recipe.json` of the run."""
    configs: Mapping[str, Mapping[str, str]]
    """What `rpo.data.hub.configs` found."""


def _plain(text: object, limit: int = 300) -> str:
    """Text of a stranger inside Markdown: one line, no mark-up."""
    line = " ".join(str(text).split())
    cut = line if len(line) <= limit else line[: limit - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(cut, quote=False))


def licence_of(model: str) -> str:
    """What a model's folder, or the copy of a Hub model that this machine has, says of its licence."""
    folder = Path(model)
    card: Path | str | None = folder / "README.md"
    if not folder.exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "README.md") if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else None
        card = found if isinstance(found, str) else None
    try:
        text = Path(card).read_text(encoding="utf-8", errors="replace")[:20_000] if card else ""
    except OSError:
        text = ""
    named = _LICENCE.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    return named.group(1) if named else _of_a_set(folder)


def _of_a_set(folder: Path) -> str:
    """The licence of models that came together, as the embedded ones do: their `card.json` lies around their folders."""
    try:
        return str(json.loads((folder.parent / "card.json").read_text(encoding="utf-8"))["licence"])
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_STATED


def models_of(config: object, role: str = "") -> list[tuple[str, str]]:
    """(role, model) of every model that a described configuration names, in order."""
    if isinstance(config, Mapping):
        named = config.get("model")
        own = [(role, named)] if isinstance(named, str) and named else []
        return own + [found for key, value in config.items() for found in models_of(value, f"{role}.{key}".strip("."))]
    if isinstance(config, list):
        return [found for item in config for found in models_of(item, role)]
    return []


def _front(facts: Facts) -> list[str]:
    lines = ["---", f"license: {facts.licence}", f"pretty_name: {json.dumps(facts.name)}", "task_categories:", "- text-to-image"]
    lines += ["tags:", "- preference", "- dpo", "- rpo"]
    lines += ["configs:"] if facts.configs else []
    for config, splits in facts.configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, files in splits.items() for line in (f"  - split: {split}", f"    path: {files}")]
    return [*lines, "---", ""]


def _models(facts: Facts) -> list[str]:
    curate = facts.record.get("recipe", {}).get("curate")
    found = dict.fromkeys(models_of(curate))
    if not found:
        return []
    lines = ["## Models", "", "| part | model | licence |", "|---|---|---|"]
    for role, model in found:
        name = Path(model).name if Path(model).is_absolute() else model  # where it lies on somebody's disk is nobody's business
        lines.append(f"| {_plain(role)} | {_plain(name)} | {_plain(licence_of(model))} |")
    return [*lines, ""]


def _funnel(facts: Facts) -> list[str]:
    stages: Sequence[Mapping[str, Any]] = facts.summary.get("funnel", [])
    if not stages:
        return []
    lines = ["## Funnel", "", "| stage | rows in | kept | dropped, and why |", "|---|---:|---:|---|"]
    for stage in stages:
        named, rest = commonest(stage["dropped"])
        why = ", ".join([*(f"{_plain(reason)} {count}" for reason, count in named), *([others(rest)] if rest else [])])
        lines.append(f"| {stage['stage']} | {stage['rows_in']} | {stage['kept']} | {why} |")
    return [*lines, ""]


def _thresholds(facts: Facts) -> list[str]:
    curate = facts.record.get("recipe", {}).get("curate") or {}
    settings = [(f"{part}.{name}", value) for part in ("check", "label") for name, value in (curate.get(part) or {}).items()]
    shown = [(name, value) for name, value in settings if not name.endswith(".type") and not isinstance(value, dict)]
    rows = [f"| {_plain(name)} | {_plain(json.dumps(value))} |" for name, value in shown]
    return ["## Thresholds", "", "| setting | value |", "|---|---|", *rows, ""] if rows else []


_NO_EVIDENCE = ("roundtrip_win_rate",)
"""Controls of older runs that no reward could fail: their threshold came from the same differences."""
_CONTROLS = {
    "fingerprint_auc": "how well a probe that never sees the prompt tells chosen from rejected images; 0.5 = only content differs",
    "paired": "the same from the difference of the sides: the share of pairs that are told apart",
    "roundtrip": "what the editor's autoencoder alone adds to this reward, in units of its noise floor",
    "neutral": "the same of an edit that was asked to change nothing",
    "pattern": "what all edits have in common, in levels of 255",
}


def _controls(facts: Facts) -> list[str]:
    found: Mapping[str, Any] = facts.summary.get("controls", {})
    controls = {name: value for name, value in found.items() if name not in _NO_EVIDENCE}
    if not controls:
        return []
    lines = ["## Controls", "", "| control | value | meaning |", "|---|---:|---|"]
    for name, value in controls.items():
        if isinstance(value, Mapping):
            lines += _nested(name, value)
        else:
            number = "unknown" if value is None else f"{value:.4f}" if isinstance(value, float) else _plain(value)
            lines.append(f"| {_plain(name)} | {number} | {_CONTROLS.get(name, '')} |")
    return [*lines, ""]


def _nested(name: str, values: Mapping[str, Any]) -> list[str]:
    """The paired number, and each reward's bias or each side's pattern with its interval."""
    if name == "leakage":
        span = f"{values['paired']:.4f} ({values['paired_low']:.2f} to {values['paired_high']:.2f}, {values['pairs']} pairs)"
        return [f"| leakage, paired | {span} | {_CONTROLS['paired']} |"]
    key = "levels" if name == "pattern" else "shift"
    low, high = ("low", "high") if name == "pattern" else ("shift_low", "shift_high")
    told = [(of, one) for of, one in values.items() if isinstance(one, Mapping)]
    return [
        f"| {name}, {_plain(of)} | {one[key]:.4f} ({one[low]:.2f} to {one[high]:.2f}) | {_CONTROLS.get(name, '')} |" for of, one in told
    ]


def write_examples(folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """The card's pictures, chosen on the left, and the lines that show them."""
    lines = ["## Examples", "", "Chosen on the left, rejected on the right.", ""] if pairs else []
    for pair in pairs[:EXAMPLES]:
        sides = [pair.chosen.decode(), pair.rejected.decode()]
        side = min(EXAMPLE_SIDE, *(min(image.shape[:2]) for image in sides))
        path = folder / "examples" / f"{pair.id}.png"
        path.parent.mkdir(exist_ok=True)
        with create(path) as file:
            file.write(encode_png(np.concatenate([fit_square(image, side) for image in sides], axis=1)))
        told = f"  \nInstruction: {_plain(pair.instruction)}" if pair.instruction else ""
        lines += [f"![chosen and rejected](examples/{path.name})", "", f"{_plain(pair.prompt)}{told}", ""]
    return lines


def card(facts: Facts, examples: Sequence[str]) -> str:
    """The whole README.md."""
    total = sum(facts.pairs.values())
    counts = ", ".join(f"{split} {count}" for split, count in facts.pairs.items())
    recipe, versions = facts.record.get("recipe", {}).get("name", "?"), facts.record.get("versions", {})
    lines = [f"# {_plain(facts.name)}", "", f"{total} preference pairs for text-to-image models ({counts}), made by Rich Preference"]
    lines += [
        "Optimization (arXiv 2503.11720): a critic says what is wrong with an image, an editor mends it, rewards decide which is better."
    ]
    lines += ["", f"Recipe `{_plain(recipe)}`, seed {facts.summary.get('seed', '?')}, rpo {_plain(versions.get('rpo', '?'))}."]
    if facts.rows:
        lines += [f"Of {facts.rows} rows {facts.dropped} were dropped; "]
        lines[-1] += (
            "they are the split `rejected`, each with its reason." if "rejected" in facts.configs else "they are not in this format."
        )
    lines += ["", *_usage(facts), *_funnel(facts), *_controls(facts), *_thresholds(facts), *_models(facts), *examples]
    lines += ["## Licence", "", "The pairs inherit what the licences of prompts and models demand; see above.", ""]
    return "\n".join([*_front(facts), *lines])


def _usage(facts: Facts) -> list[str]:
    if facts.layout != "rpo":
        return []
    return [
        "```python",
        "from datasets import load_dataset",
        "",
        'pairs = load_dataset("owner/name", split="train")                   # chosen, rejected, prompt, critique, instruction, scores, …',
        'dropped = load_dataset("owner/name", "rejected", split="rejected")  # dropped candidates, and why',
        'rows = load_dataset("owner/name", "rows", split="rows")             # everything that was measured, of every row',
        "```",
        "",
    ]
