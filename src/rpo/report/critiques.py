"""The page's critiques and instructions beside their images, and the funnel of words. Chosen by hash, never by eye."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpo.core.run_folder import STAGE_FOLDER
from rpo.data.schema import Critique, Instructions
from rpo.engine.layers import Layer, read_joined, scan_shard, shard_sizes, stored_layers
from rpo.report.format import number, percent, reason_words
from rpo.report.sampling import by_hash, quotas
from rpo.report.sections import ALREADY_RIGHT
from rpo.report.thumbnails import Thumbnail, thumbnail

TEXT_MAX = 1200
ADJUSTMENTS_SHOWN = 4
_TOLD = ("prompt", "critique", "critique_raw", "instructions", "instruction", "instruct_raw")


@dataclass(frozen=True, kw_only=True)
class WordFigure:
    """One number about the words."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class WordCard:
    """One image with what was said about it."""

    prompt: str
    image: Thumbnail
    critique: Critique | None
    instructions: Instructions | None
    request: str
    """What the editor reads."""
    fate: str
    """Why the row was dropped, in words; empty for one that was edited."""
    state: str
    """Class of the fate: fine for an image that is right already, watch for another reason, off for an error."""
    raw: str
    """The answer that could not be read."""
    agreement: str


def word_figures(summary: Mapping[str, Any]) -> list[WordFigure]:
    """The funnel of words, as far as the run counted."""
    words = summary.get("words") or {}
    figures: list[WordFigure] = []
    if words.get("asked"):
        asked, parsed, instructed = words["asked"], words["parsed"], words["instructed"]
        figures.append(WordFigure(name="Parsed", value=percent(parsed / asked), meaning=f"of {asked:,} critiques could be read"))
        if parsed:
            share = percent(words["no_issue"] / parsed)
            figures.append(WordFigure(name="No issue", value=share, meaning="of those find nothing worth changing"))
        if instructed:
            meaning = f"over {instructed:,} images; {words['skipped']:,} got none, because no edit would help"
            figures.append(WordFigure(name="Instructions per image", value=number(words["instructions"] / instructed, 2), meaning=meaning))
        if words.get("agreement") is not None:
            meaning = "of repeated critiques of one image: the share of named aspects that they have in common"
            figures.append(WordFigure(name="Agreement", value=percent(words["agreement"]), meaning=meaning))
        if adjustments := words.get("adjustments"):
            most = ", ".join(f"{kind} {count:,}" for kind, count in list(adjustments.items())[:ADJUSTMENTS_SHOWN])
            value = f"{sum(adjustments.values()):,}"
            figures.append(WordFigure(name="Adjusted", value=value, meaning=f"pieces of metadata that did not fit the form: {most}"))
    return figures + [figure for line in summary.get("wire") or [] for figure in _wire(line)]


def _wire(line: Mapping[str, Any]) -> list[WordFigure]:
    asked = f"{line['calls']:,} calls to {line['model']}, {line['answered']:,} answered"
    if line["tokens_per_pair"] is None:
        return [WordFigure(name=f"Asked for {line['purpose']}", value=f"{line['calls']:,}", meaning=asked)]
    per_pair = number(line["tokens_per_pair"], 0)
    price = f", ${number(line['cost_per_pair'], 5)}" if line["cost"] else ""
    return [WordFigure(name=f"Tokens for {line['purpose']}", value=per_pair, meaning=f"a kept pair{price}; {asked}")]


def _layers(folder: Path) -> tuple[Layer, ...]:
    """The layers up to the instructions; none for a run that has no such stages."""
    if not any(STAGE_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
        return ()
    layers = stored_layers(folder)
    last = max((layer.position for layer in layers if layer.name == "instruct"), default=-1)
    known = {name for layer in layers[: last + 1] for name in layer.columns}
    return layers[: last + 1] if {*_TOLD, "source"} <= known else ()


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "…"


def _card(row: Mapping[str, Any], image: bytes) -> WordCard:
    critique = _validated(Critique, row["critique"])
    status, right = row["status"], row["status"] == f"drop:{ALREADY_RIGHT}"
    return WordCard(
        prompt=_cut(row["prompt"]),
        image=thumbnail(image),
        critique=critique,
        instructions=_validated(Instructions, row["instructions"]),
        request=_cut(row["instruction"]),
        fate="already right" if right else _fate(status or ""),
        state="fine" if right else "off" if (status or "").startswith("error:") else "watch",
        raw=_cut(row["critique_raw"] or row["instruct_raw"]),
        agreement=percent(critique.agreement) if critique is not None and critique.agreement is not None else "",
    )


def _fate(status: str) -> str:
    words = reason_words(status.removeprefix("drop:"))
    return f"dropped: {words}" if status.startswith("drop:") else words


def _validated(model: type[Any], text: str | None) -> Any:
    try:
        return None if text is None else model.model_validate_json(text)
    except ValidationError:  # of another form, by an older version
        return None


def word_cards(folder: Path, count: int) -> list[WordCard]:
    """`count` images of the shards that are done so far, every fate in proportion to how often it came, those that were edited first."""
    layers = _layers(folder)
    found: dict[str, list[tuple[int, str]]] = {}
    sizes = shard_sizes(layers) if layers else []
    for index, size in enumerate(sizes):
        if len(scan_shard(layers, index, size)) < len(layers):
            continue
        table = read_joined(layers, index, [])
        for row, status in zip(table.column("id").to_pylist(), table.column("status").to_pylist(), strict=True):
            fate = ":".join(status.split(":")[:2]) if status else ""
            if fate in ("", "drop:no_issue", "drop:no_instruction", "error:critique", "error:instruct"):
                found.setdefault(fate, []).append((index, row))
    places = quotas({fate: len(rows) for fate, rows in found.items()}, count)
    chosen = [row for fate in sorted(found) for row in by_hash(found[fate], lambda row: row[1], places[fate])]
    return _cards(layers, chosen)


def _cards(layers: Sequence[Layer], chosen: Sequence[tuple[int, str]]) -> list[WordCard]:
    made: dict[str, WordCard] = {}
    for index in sorted({index for index, _ in chosen}):
        wanted = {row for shard, row in chosen if shard == index}
        for row in read_joined(layers, index, [*_TOLD, "source"]).to_pylist():
            if row["id"] in wanted:
                made[row["id"]] = _card(row, row["source"]["bytes"])
    return [made[row] for _, row in chosen]
