"""The curation as pictures: what was dropped and why, all candidates of an edit, where rewards agree, how wide the gaps are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from scipy import ndimage

from rpo.core.run_folder import STAGE_FOLDER
from rpo.data.images import decode_image
from rpo.engine.layers import Layer, is_whole, read_joined, shard_sizes, stored_layers
from rpo.report.figures import histogram
from rpo.report.format import label, number, percent, reason_words
from rpo.report.sampling import by_hash
from rpo.report.sections import ALREADY_RIGHT
from rpo.report.thumbnails import Thumbnail, thumbnail

CHANGED_LEVELS = 24
BOXES_MAX = 6
PER_REASON = 3
MEASURES = (
    "change",
    "agreement",
    "change_fraction",
    "shift_px",
    "zoom",
    "rotation_deg",
    "distance",
    "followed",
    "pattern_levels",
    "unsafe",
)
SIDES = ("original", "edited", "neutral", "source")


@dataclass(frozen=True)
class Box:
    """A rectangle around something that changed, in fractions of the picture."""

    left: float
    top: float
    width: float
    height: float


def changed_boxes(before: bytes, after: bytes) -> list[Box]:
    """Rectangles around what changed visibly, largest first; none for pictures of two sizes or a change of almost everything."""
    a, b = decode_image(before), decode_image(after)
    if a.shape != b.shape:
        return []
    changed = np.abs(a.astype(np.int16) - b).max(-1) > CHANGED_LEVELS
    if changed.mean() > 0.8:
        return []
    height, width = changed.shape
    reach = max(height, width) // 32 + 1  # what lies so near belongs together; single pixels are noise
    regions: Any = ndimage.label(ndimage.binary_dilation(ndimage.binary_opening(changed), iterations=reach))
    joined, count = regions
    found = [(int((joined[place] == i + 1).sum()), place) for i, place in enumerate(ndimage.find_objects(joined, count)) if place]
    boxes: list[Box] = []
    for _, (rows, columns) in sorted(found, key=lambda one: -one[0])[:BOXES_MAX]:
        size = ((columns.stop - columns.start) / width, (rows.stop - rows.start) / height)
        boxes.append(Box(columns.start / width, rows.start / height, *size))
    return boxes


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with its words, and what in it changed."""

    image: Thumbnail
    words: str
    boxes: list[Box]
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the curation."""

    prompt: str
    instruction: str
    measured: str
    pictures: list[Picture]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A reason for which rows were dropped, with examples."""

    name: str
    count: int
    cases: list[Case]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far edits are from what they are held against, by one reward."""

    reward: str
    figure: Markup
    within: str
    """Share of margins that re-encoding alone would explain."""
    wins: str
    """Share above the floor in favour of the edit."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two rewards name the same winner, of the rows on which both are above their floors; "–" without such rows."""

    rewards: list[str]
    cells: list[list[tuple[str, str]]]
    """(figure, class that colours it)."""


@dataclass(frozen=True, kw_only=True)
class Curated:
    """The sections; each may be empty."""

    reasons: list[Reason]
    attempts: list[Case]
    rounds: list[Case]
    gaps: list[Gap]
    agreement: Agreement | None
    second: str | None
    """What the second encoding of a source consisted of, on which the noise floors rest; `None` in a run that does not say."""


def curated(folder: Path, examples: int) -> Curated:
    """What a finished curation leaves to look at, with at most `examples` rows of a kind; nothing of an unfinished one."""
    nothing = Curated(reasons=[], attempts=[], rounds=[], gaps=[], agreement=None, second=None)
    if not folder.is_dir() or not any(STAGE_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
        return nothing
    layers = stored_layers(folder)
    if not is_whole(layers):
        return nothing
    columns = {name for layer in layers for name in layer.columns}
    label_fields = _label_fields(layers)
    suffix = "_projected" if label_fields.get("projected") else ""
    edited, opponent = f"edited{suffix}", f"{label_fields.get('rejected_side', 'original')}{suffix}"
    sides = (edited, opponent)
    scored = sorted(name.removesuffix(f"_{edited}") for name in columns if name.endswith(f"_{edited}"))
    rewards = [reward for reward in scored if columns >= {f"{reward}_{side}" for side in sides}]
    margins, floors = _margins(layers, rewards, sides), _floors(label_fields, rewards)
    return Curated(
        reasons=_reasons(layers, columns, examples),
        attempts=_tried(layers, columns, "attempts", examples),
        rounds=_tried(layers, columns, "rounds", examples),
        gaps=[_gap(reward, margins[:, i], floors[i]) for i, reward in enumerate(rewards)] if len(margins) else [],
        agreement=_agreement(rewards, margins, floors) if len(rewards) > 1 and len(margins) else None,
        second=_second(layers) if "edited_by" in columns else None,
    )


def _second(layers: Sequence[Layer]) -> str | None:
    made = next((text for text in _rows(layers, ["edited_by"]).column("edited_by").to_pylist() if text), None)
    second = json.loads(made).get("second") if made else None
    return second if isinstance(second, str) else None


def _label_fields(layers: Sequence[Layer]) -> Mapping[str, Any]:
    """What the label stage was told; nothing where there is none."""
    for layer in layers:
        if layer.name == "label" and isinstance(layer.recipe, dict):
            return layer.recipe.get("config", {}).get("fields", {})
    return {}


def _rows(layers: Sequence[Layer], columns: Sequence[str]) -> pa.Table:
    return pa.concat_tables([read_joined(layers, index, columns) for index in range(len(shard_sizes(layers)))])


def _floors(label_fields: Mapping[str, Any], rewards: Sequence[str]) -> np.ndarray:
    """The noise floors that the labels rest on, as the run recorded them; 0 for a reward without one."""
    measured = (label_fields.get("measured") or {}).get("fields", {})
    floors = dict(zip(label_fields.get("rewards", []), measured.get("floors", []), strict=False))
    return np.array([floors[reward] if isinstance(floors.get(reward), int | float) else 0.0 for reward in rewards])


def _margins(layers: Sequence[Layer], rewards: Sequence[str], sides: Sequence[str]) -> np.ndarray:
    """(rows, rewards) margins of the edit over all rows that were scored; `sides` are the columns of the edit and of its opponent."""
    if not rewards:
        return np.zeros((0, 0))
    names = [f"{reward}_{side}" for reward in rewards for side in sides]
    table = _rows(layers, list(dict.fromkeys(names)))
    values = np.array([table.column(name).to_numpy() for name in names], dtype=np.float64)
    edited, held = values[:, np.isfinite(values).all(0)].reshape(len(rewards), 2, -1).transpose(1, 2, 0)
    return edited - held


def _gap(reward: str, margins: np.ndarray, floor: float) -> Gap:
    within, wins = float((np.abs(margins) <= floor).mean()), float((margins > floor).mean())
    said = f"{label(reward)}: {percent(wins, 0)} of edits above the noise floor, {percent(within, 0)} within it"
    figure = histogram(margins.tolist(), said, marks=(-floor, floor))
    return Gap(reward=label(reward), figure=figure, within=percent(within, 0), wins=percent(wins, 0))


def _agreement(rewards: Sequence[str], margins: np.ndarray, floors: np.ndarray) -> Agreement:
    said = np.sign(margins) * (np.abs(margins) > floors)
    cells: list[list[tuple[str, str]]] = []
    for i in range(len(rewards)):
        line: list[tuple[str, str]] = []
        for j in range(len(rewards)):
            both = (said[:, i] != 0) & (said[:, j] != 0)
            share = float((said[both, i] == said[both, j]).mean()) if both.any() else None
            line.append(("–", "") if share is None else (percent(share, 0), f"a{min(int(share * 5), 4)}"))
        cells.append(line)
    return Agreement(rewards=[label(reward) for reward in rewards], cells=cells)


def _picked(layers: Sequence[Layer], wanted: Mapping[str, int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Whole rows by id (id -> shard), images included."""
    found: dict[str, dict[str, Any]] = {}
    for shard in sorted(set(wanted.values())):
        rows = read_joined(layers, shard, columns).to_pylist()
        found |= {row["id"]: row for row in rows if row["id"] in wanted}
    return [found[row] for row in wanted]


def _places(layers: Sequence[Layer], column: str) -> dict[str, list[tuple[str, int]]]:
    """(id, shard) of all rows, by the value of a text column; rows without one are left out."""
    places: dict[str, list[tuple[str, int]]] = {}
    for shard in range(len(shard_sizes(layers))):
        table = read_joined(layers, shard, [] if column == "status" else [column])
        for row, value in zip(table.column("id").to_pylist(), table.column(column).to_pylist(), strict=True):
            if value is not None:
                places.setdefault(value, []).append((row, shard))
    return places


def _reasons(layers: Sequence[Layer], columns: set[str], examples: int) -> list[Reason]:
    """Reasons of rows that had a picture, most frequent first."""
    shown = [name for name in ("prompt", "instruction", *MEASURES, *SIDES) if name in columns]
    reasons: list[Reason] = []
    by_reason = sorted(_places(layers, "status").items(), key=lambda item: (-len(item[1]), item[0]))
    for status, rows in by_reason[:8]:
        chosen = by_hash(rows, lambda row: row[0], min(PER_REASON, examples))
        cases = [case for row in _picked(layers, dict(chosen), shown) if (case := _case(row)).pictures]
        if cases:
            name = "already right" if status == f"drop:{ALREADY_RIGHT}" else reason_words(status.removeprefix("drop:"))
            reasons.append(Reason(name=name, count=len(rows), cases=cases))
    return reasons


def _case(row: Mapping[str, Any]) -> Case:
    before = row.get("original") or row.get("source")
    after = row.get("edited")
    boxes = changed_boxes(before["bytes"], after["bytes"]) if before and after else []
    pictures = [Picture(image=thumbnail(before["bytes"]), words="source", boxes=boxes)] if before else []
    if after:
        pictures.append(Picture(image=thumbnail(after["bytes"]), words="edit", boxes=boxes))
    measured = [f"{name.replace('_', ' ')} {number(row[name])}" for name in MEASURES if row.get(name) is not None]
    return Case(prompt=row["prompt"], instruction=row.get("instruction") or "", measured=" · ".join(measured), pictures=pictures)


def _tried(layers: Sequence[Layer], columns: set[str], kind: str, examples: int) -> list[Case]:
    """Rows with all their attempts (or rounds), and what was told of each."""
    if kind not in columns:
        return []
    stem = "attempt" if kind == "attempts" else "round"
    names = sorted((name for name in columns if re.fullmatch(rf"{stem}_\d+", name)), key=lambda name: int(name.split("_")[1]))
    first = ["first_edited"] if kind == "rounds" else []
    shown = ["prompt", "instruction", "original", *first, *names, kind, *(["attempt"] if kind == "attempts" else [])]
    rows = [place for every in _places(layers, kind).values() for place in every]
    chosen = by_hash(rows, lambda row: row[0], min(examples, 8))
    return [_tried_case(row, [*first, *names], kind) for row in _picked(layers, dict(chosen), shown)]


def _tried_case(row: Mapping[str, Any], names: Sequence[str], kind: str) -> Case:
    source, told = row["original"]["bytes"], json.loads(row[kind])
    pictures = [Picture(image=thumbnail(source), words="source", boxes=[])]
    for place, name in enumerate(names):
        if row[name] is None:
            continue
        image = row[name]["bytes"]
        words = _attempt_words(told[place]) if kind == "attempts" else _round_words(place, told)
        taken = kind == "attempts" and row["attempt"] == place
        pictures.append(Picture(image=thumbnail(image), words=words, boxes=changed_boxes(source, image), chosen=taken))
    stopped = [one["stopped"] for one in told if "stopped" in one] if kind == "rounds" else []
    measured = f"stopped: {stopped[-1]}" if stopped else ""
    return Case(prompt=row["prompt"], instruction=row["instruction"] or "", measured=measured, pictures=pictures)


def _attempt_words(told: Mapping[str, Any]) -> str:
    scores = [f"{reward.replace('_', ' ')} {number(value)}" for reward, value in told["scores"].items() if value is not None]
    guided = [] if told.get("guidance") is None else [f"guidance {told['guidance']:g}"]
    reasons = [] if told.get("status") is None else [reason_words(told["status"].removeprefix("drop:"))]
    return " · ".join([*guided, *scores, *reasons])


def _round_words(place: int, told: Sequence[Mapping[str, Any]]) -> str:
    return "first edit" if place == 0 else str(told[place - 1].get("instruction", ""))
