"""Controls of a finished curation: biases of the rewards, and the artifact pattern of the editor. Each of them can fail."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo.curation.columns import score_column
from rpo.curation.image_metrics import PATTERN_ROWS, Pattern, artifact_pattern
from rpo.curation.label_rules import Measured
from rpo.curation.stages.label import LabelStage, scores_of
from rpo.data.images import decode_cell
from rpo.engine.layers import read_run, read_shards, stored_layers

PATTERN_CROP = 256
"""Pixels of the center in which a pattern is looked for."""


@dataclass(frozen=True, kw_only=True)
class Bias:
    """What a reward says of an image that only passed the editor: 95 % intervals over rows."""

    rows: int
    sign_rate: float
    """Share of rows in which the score rises, a tie as half; 0.5 without bias."""
    sign_low: float
    sign_high: float
    shift: float
    """Mean change of the score in units of the noise floor; 0 without bias."""
    shift_low: float
    shift_high: float


def bias(before: np.ndarray, after: np.ndarray, unit: float) -> Bias:
    """The bias of one reward from scores of the same rows, (n,) each; `unit` is its noise floor."""
    change = (after - before) / unit
    n, rate = len(change), float(((np.sign(change) + 1) / 2).mean())
    middle, width = (rate + 1.92 / n) / (1 + 3.84 / n), 1.96 * math.sqrt(rate * (1 - rate) / n + 0.96 / n**2) / (1 + 3.84 / n)  # Wilson
    mean, error = float(change.mean()), 1.96 * float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Bias(
        rows=n, sign_rate=rate, sign_low=middle - width, sign_high=middle + width,
        shift=mean, shift_low=mean - error, shift_high=mean + error,
    )  # fmt: skip


def biases(scores: dict[str, np.ndarray], rewards: Sequence[str], measured: Measured) -> dict[str, dict[str, dict[str, Any]] | None]:
    """By control and reward, from (rows, rewards) scores of `source`, `original` and `neutral`.

    roundtrip: the source after the editor's autoencoder against itself. neutral: an edit that was asked to change nothing against the
    source after the round trip; `None` for a deterministic editor, whose neutral edit is that round trip.
    """
    found: dict[str, dict[str, dict[str, Any]] | None] = {}
    for name, before, after in (("roundtrip", "source", "original"), ("neutral", "original", "neutral")):
        if len(scores[after]) < 2 or (name == "neutral" and np.array_equal(scores[before], scores[after])):
            found[name] = None
            continue
        units = [floor if 0 < floor < math.inf else spread for floor, spread in zip(measured.floors, measured.spreads, strict=True)]
        found[name] = {reward: asdict(bias(scores[before][:, i], scores[after][:, i], units[i])) for i, reward in enumerate(rewards)}
    return found


def reward_biases(folder: Path, label: LabelStage) -> dict[str, dict[str, dict[str, Any]] | None]:
    """The biases of a finished run, over all rows that were scored."""
    sides = ("source", "original", "neutral")
    names = [score_column(reward, side) for reward in label.rewards for side in sides]
    table = read_run(folder, list(dict.fromkeys(names)))
    columns = {name: table.column(name).to_numpy() for name in names}
    whole = np.isfinite(np.array([columns[name].astype(np.float64) for name in names])).all(0)
    rows = {name: column[whole].tolist() for name, column in columns.items()}
    assert label.measured is not None, "a finished run has noise floors"
    return biases({side: scores_of(rows, label.rewards, side) for side in sides}, label.rewards, label.measured)


def _center(image: np.ndarray) -> np.ndarray:
    top, left = (max(length - PATTERN_CROP, 0) // 2 for length in image.shape[:2])
    return image[top : top + PATTERN_CROP, left : left + PATTERN_CROP]


def editor_patterns(folder: Path) -> dict[str, dict[str, Any] | None]:
    """The artifact pattern of neutral edits and of edits against `original`, over the first rows of a run; `None` for too few."""
    made = {column for layer in stored_layers(folder) for column in layer.columns}
    found: dict[str, dict[str, Any] | None] = {}
    for side in ("neutral", "edited"):
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        told: dict[str, list[object]] = {"prompt": [], **({"instruction": []} if side == "edited" else {})}
        if made >= {"original", side, "instruction"}:
            for table in read_shards(folder, ["original", side, "prompt", "instruction"]):
                for row in table.to_pylist():
                    if row["original"] and row[side] and len(before) < PATTERN_ROWS[1]:
                        before.append(_center(decode_cell(row["original"])))
                        after.append(_center(decode_cell(row[side])))
                        for name, values in told.items():
                            values.append(row[name])
                if len(before) >= PATTERN_ROWS[1]:
                    break
        pattern: Pattern | None = artifact_pattern(before, after, told)
        found[side] = pattern and asdict(pattern)
    return found


BIAS_MAX = 0.25
"""A reward is biased where the interval of its shift lies beyond so many noise floors from 0."""
PATTERN_LEVELS_MAX = 1.0
"""An editor leaves a pattern where the interval of its strength lies above this, in levels of 255."""


def biased(found: dict[str, Any]) -> bool:
    """Whether a control's interval shows a bias that counts."""
    return found["shift_low"] > BIAS_MAX or found["shift_high"] < -BIAS_MAX


def control_lines(controls: dict[str, Any]) -> list[str]:
    """What of the controls needs attention, a line each."""
    said = {"roundtrip": "the editor's autoencoder alone", "neutral": "an edit that was asked to change nothing"}
    lines: list[str] = []
    for name, words in said.items():
        for reward, found in (controls.get(name) or {}).items():
            if biased(found):
                way = "raises" if found["shift"] > 0 else "lowers"
                lines.append(
                    f"warning: {words} {way} {reward} by {abs(found['shift']):.2f} noise floors ({found['shift_low']:+.2f} to "
                    f"{found['shift_high']:+.2f}), in {found['sign_rate']:.0%} of {found['rows']} rows"
                )
    for side, found in (controls.get("pattern") or {}).items():
        if found and found["low"] > PATTERN_LEVELS_MAX:
            lines.append(
                f"warning: every {'neutral edit' if side == 'neutral' else 'edit'} carries the same pattern of {found['levels']:.1f} "
                f"levels ({found['low']:.1f} to {found['high']:.1f}, {found['rows']} rows); use another editor, or project both sides"
            )
    return lines
