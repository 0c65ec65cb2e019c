"""Which side is chosen, by which rule. An edit is not chosen because it is an edit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa

from rpo.curation.columns import score_column
from rpo.curation.label_rules import Measured, Rule, decide, lower_bound, measure, votes
from rpo.engine.layers import SHARD_ROWS, is_whole, lay_out, read_joined, shard_sizes
from rpo.engine.stage import Batch, Stage, StageCall, StageSpec

RejectedSide = Literal["original", "neutral"]
Combination = Literal["source", "other"]
PROJECTED = "_projected"
OTHER = "other_original"
SECOND = "second"
"""The source encoded once more, for the noise floors."""


@runtime_checkable
class Labels(Protocol):
    """A stage that writes the label columns of each of its combinations."""

    @property
    def rewards(self) -> tuple[str, ...]: ...

    @property
    def sides(self) -> tuple[str, str]:
        """The two columns of images that it compares."""
        ...

    @property
    def combinations(self) -> tuple[Combination, ...]: ...

    @property
    def weighted(self) -> bool: ...

    def opponent(self, combination: Combination) -> str:
        """The column of images that the first side is held against."""
        ...


@dataclass(frozen=True, kw_only=True)
class LabelStage:
    """Relabels each edit against its rejected side."""

    rewards: tuple[str, ...]
    """Names of the rewards that vote; none of them may be an evaluation judge."""
    rule: Rule = "vote"
    """vote: `votes_min` rewards above their noise floors and none against; single: the reward `by`, above its floor; mean: the mean margin
    in units of each reward's spread, above its floor; conservative: its lower bound, above the floor; pairwise: a model that was shown
    both; trust_edit: the edit wins; random: a control."""
    votes_min: int = 2
    """Rewards that must agree, for the rule vote."""
    by: str | None = None
    """Reward that the rule single goes by; the first if not given."""
    kappa: float = 1.0
    """How many spreads between the rewards are taken off the mean gap, for the lower bound."""
    margin_min: float = 0.0
    """Least gap, in units of the scores' spread; below it the row is dropped: `drop:low_margin`."""
    weighted: bool = False
    """Whether pairs count in training by the gap's lower bound, cut to 0..1; else all count alike."""
    rejected_side: RejectedSide = "neutral"
    """What the edit is held against: the source after the round trip, or the neutral edit."""
    combinations: tuple[Combination, ...] = ("source",)
    """source: the edit and its rejected side; other: the edit and the other image of a pair that was brought."""
    projected: bool = False
    """Whether both sides are taken after projection through the policy."""
    keep_lost_edits: bool = True
    """Whether an edit that lost becomes a pair with the sides turned round."""
    measured: Measured | None = None
    """The noise floors, once they are measured over the whole run, so that no label depends on what else lies in its shard."""

    def __post_init__(self) -> None:
        if self.rule == "vote" and not 1 <= self.votes_min <= len(self.rewards):
            raise ValueError(f"votes_min must be 1 to the number of rewards ({len(self.rewards)}), got {self.votes_min}")
        if not self.rewards:
            raise ValueError("rewards is empty: name those that label")
        if self.by is not None and self.by not in self.rewards:
            raise ValueError(f"by must be one of the rewards {self.rewards}, got {self.by!r}")
        if self.kappa < 0 or self.margin_min < 0:
            raise ValueError(f"kappa and margin_min must be at least 0, got {self.kappa} and {self.margin_min}")
        if not self.combinations or len(set(self.combinations)) < len(self.combinations):
            raise ValueError(f"combinations must name source, other, or both, once each, got {self.combinations}")
        if self.projected and "other" in self.combinations:
            raise ValueError("combinations with other cannot be projected: the other image of a pair has no projection")
        if self.rule == "pairwise" and "other" in self.combinations:
            raise ValueError("the rule pairwise cannot label combinations with other: the model was shown the edit and its rejected side")

    @property
    def sides(self) -> tuple[str, str]:
        """(edit's column, its opponent's column)."""
        suffix = PROJECTED if self.projected else ""
        return f"edited{suffix}", f"{self.rejected_side}{suffix}"

    def opponent(self, combination: Combination) -> str:
        return OTHER if combination == "other" else self.sides[1]

    @property
    def spec(self) -> StageSpec:
        others = [OTHER] if "other" in self.combinations else []
        sides = dict.fromkeys(("source", "original", SECOND, "neutral", *self.sides, *others))
        asked = ["prefers_edit"] if self.rule == "pairwise" else []
        labels = {name: kind for c in self.combinations for name, kind in label_columns(c).items()}
        return StageSpec(
            name="label",
            version="3",
            inputs=("id", *(score_column(reward, side) for reward in self.rewards for side in sides), *asked),
            outputs=labels,
            batch_size=1_000_000,  # a shard at once
        )

    def _labels(self, batch: Batch, combination: Combination, measured: Measured) -> tuple[dict[str, list[Any]], list[str | None]]:
        """(one combination's columns, why rows have no label by it)."""
        edited, opponent = self.sides[0], self.opponent(combination)
        margins = scores_of(batch, self.rewards, edited) - scores_of(batch, self.rewards, opponent)
        units = margins / np.array(measured.spreads)
        asked = np.array(batch["prefers_edit"], dtype=np.float64) if self.rule == "pairwise" else None
        wins = decide(
            self.rule, cast(list[str], list(batch["id"])), margins, measured, votes_min=self.votes_min,
            by=self.rewards.index(self.by) if self.by else 0, kappa=self.kappa, preferences=asked,
        )  # fmt: skip
        gaps, cast_votes = np.abs(units.mean(1)), votes(margins, np.array(measured.floors))
        why = [self._why(float(win), float(gap), row) for win, gap, row in zip(wins, gaps, cast_votes, strict=True)]
        kept = [reason is None for reason in why]
        names = list(label_columns(combination))
        sides = [(edited, opponent) if win > 0 else (opponent, edited) for win in wins]
        columns: list[list[Any]] = [
            [side[0] if keep else None for side, keep in zip(sides, kept, strict=True)],
            [side[1] if keep else None for side, keep in zip(sides, kept, strict=True)],
            gaps.tolist(),
            lower_bound(units, self.kappa).tolist(),
        ]
        return dict(zip(names, columns, strict=True)), why

    def _why(self, win: float, gap: float, row_votes: np.ndarray) -> str | None:
        """Why a row makes no pair."""
        if win == 0:
            if self.rule == "pairwise":
                return "drop:undecided"
            disputed = self.rule == "vote" and (row_votes > 0).any() and (row_votes < 0).any()
            return "drop:rewards_disagree" if disputed else "drop:low_margin"
        if gap < self.margin_min:
            return "drop:low_margin"
        return None if win > 0 or self.keep_lost_edits else "drop:edit_lost"

    def build(self) -> StageCall:
        measured = self.measured
        if measured is None:
            raise ValueError("noise floors are measured over the run before it is labelled; see with_noise_floors")

        def run(batch: Batch) -> Batch:
            columns: dict[str, Sequence[Any]] = {}
            reasons: list[list[str | None]] = []
            for combination in self.combinations:
                made, why = self._labels(batch, combination, measured)
                columns |= made
                reasons.append(why)
            return {
                **columns,
                "status": [None if None in row else row[0] for row in zip(*reasons, strict=True)],
            }

        return run


def label_columns(combination: Combination) -> dict[str, pa.DataType]:
    """A combination's columns, in this order: chosen and rejected side, gap and its lower bound; those of the first kind have no suffix."""
    suffix = "" if combination == "source" else f"_{combination}"
    kinds = {"chosen_side": pa.string(), "rejected_side": pa.string(), "gap": pa.float64(), "lower_bound": pa.float64()}
    return {f"{name}{suffix}": kind for name, kind in kinds.items()}


def scores_of(batch: Mapping[str, Sequence[object]], rewards: Sequence[str], side: str) -> np.ndarray:
    """(rows, rewards) scores of one side."""
    return np.array([batch[score_column(reward, side)] for reward in rewards], dtype=np.float64).T.reshape(-1, len(rewards))


def with_noise_floors(stages: Sequence[Stage], folder: Path, rows: pa.Table, *, shard_rows: int = SHARD_ROWS) -> tuple[Stage, ...] | None:
    """The stages with the noise floors of the run filled into the label, if it needs any; `None` while not all that they are
    measured on is there. Without rows to measure, nothing is above a floor.
    """
    *before, label = stages
    if not (isinstance(label, LabelStage) and label.measured is None):
        return tuple(stages)
    layers = lay_out(folder, rows, before, shard_rows=shard_rows)
    if not is_whole(layers):
        return None
    sides = ("original", SECOND, "neutral", label.sides[1])
    names = list(dict.fromkeys(score_column(reward, side) for reward in label.rewards for side in sides))
    table = pa.concat_tables([read_joined(layers, index, names) for index in range(len(shard_sizes(layers)))])
    live = table.filter(table.column("status").is_null()).to_pydict()
    endless = (math.inf,) * len(label.rewards)
    measured = Measured(floors=endless, spreads=(1.0,) * len(label.rewards), mean_floor=math.inf)
    if live["id"]:
        measured = measure(*(scores_of(live, label.rewards, side) for side in sides))
    return (*before, replace(label, measured=measured))
