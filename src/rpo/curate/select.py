"""Which side of an edit is chosen, by which rule, and the pairs that come of it. An edited image does not win by right."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from rpo.curate.pipeline import Batch, StageCall, StageSpec
from rpo.curate.sidecars import read_run, read_shards, stored_layers
from rpo.curate.stages import score_column
from rpo.data.pairs import Pair, split_of
from rpo.data.run_folder import STAGE_FOLDER

Rule = Literal["vote", "trust_edit", "random"]
RejectedSide = Literal["original", "neutral"]
PROJECTED = "_projected"


def noise_floor(repeated: np.ndarray, once: np.ndarray) -> float:
    """The margin that re-encoding alone exceeds in about one case of twenty: 1.96 root mean squares of the difference.

    Both are scores of the same images, (n,), before and after the editor's round trip.
    """
    return float(1.96 * np.sqrt(np.mean((repeated - once) ** 2)))


def votes(margins: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """+1, 0 or -1 per row and reward: whether a margin (n, rewards) is above its reward's floor (rewards,), within, or below."""
    return np.sign(margins) * (np.abs(margins) > floors)


def win_share(cast_votes: np.ndarray) -> np.ndarray:
    """Share of votes won per row, a tie as half, of votes (n, rewards)."""
    return (1 + cast_votes).mean(1) / 2


@dataclass(frozen=True, kw_only=True)
class LabelStage:
    """Relabels each edit against its rejected side, and puts the two controls to the same vote."""

    rewards: tuple[str, ...]
    """Names of the rewards that vote; none of them may be an evaluation judge."""
    rule: Rule = "vote"
    """vote: `votes_min` rewards above their noise floors and none against; trust_edit: the edit wins; random: a control."""
    votes_min: int = 2
    """Rewards that must agree."""
    rejected_side: RejectedSide = "neutral"
    """What the edit is held against: the source after the round trip, or the neutral edit."""
    projected: bool = False
    """Whether both sides are taken after projection through the policy."""
    keep_lost_edits: bool = True
    """Whether an edit that lost becomes a pair with the sides turned round."""

    def __post_init__(self) -> None:
        if not 1 <= self.votes_min <= len(self.rewards):
            raise ValueError(f"votes_min must be 1 to the number of rewards ({len(self.rewards)}), got {self.votes_min}")

    @property
    def sides(self) -> tuple[str, str]:
        """(edit's column, its opponent's column)."""
        suffix = PROJECTED if self.projected else ""
        return f"edited{suffix}", f"{self.rejected_side}{suffix}"

    @property
    def spec(self) -> StageSpec:
        sides = dict.fromkeys(("source", "original", "neutral", *self.sides))
        return StageSpec(
            name="label",
            version="1",
            inputs=("id", *(score_column(reward, side) for reward in self.rewards for side in sides)),
            outputs={
                "chosen_side": pa.string(),
                "rejected_side": pa.string(),
                "gap": pa.float64(),
                "round_trip_win": pa.float64(),
                "neutral_win": pa.float64(),
            },
            batch_size=1_000_000,  # a shard at once: the noise floor is measured over it
        )

    def _edit_wins(self, ids: Sequence[str], cast_votes: np.ndarray) -> list[bool | None]:
        if self.rule == "trust_edit":
            return [True] * len(ids)
        if self.rule == "random":
            return [hashlib.sha256(f"label:{row}".encode()).digest()[0] % 2 == 0 for row in ids]
        won = (cast_votes > 0).sum(1) >= self.votes_min
        lost = (cast_votes < 0).sum(1) >= self.votes_min
        disputed = np.logical_and((cast_votes > 0).any(1), (cast_votes < 0).any(1))
        return [None if d or not (w or o) else bool(w) for w, o, d in zip(won, lost, disputed, strict=True)]

    def _status(self, wins: bool | None, row_votes: np.ndarray) -> str | None:
        if wins is None:
            return "drop:rewards_disagree" if (row_votes > 0).any() and (row_votes < 0).any() else "drop:low_margin"
        return None if wins or self.keep_lost_edits else "drop:edit_lost"

    def build(self) -> StageCall:
        edited, opponent = self.sides

        def run(batch: Batch) -> Batch:
            def scores(side: str) -> np.ndarray:
                return np.array([batch[score_column(reward, side)] for reward in self.rewards], dtype=np.float64).T

            floors = np.array([noise_floor(a, b) for a, b in zip(scores("original").T, scores("source").T, strict=True)])
            margins = scores(edited) - scores(opponent)
            cast_votes = votes(margins, floors)
            wins = self._edit_wins(cast(list[str], list(batch["id"])), cast_votes)
            spread = np.maximum(scores(opponent).std(0), 1e-9)
            gaps = np.abs((margins / spread).mean(1))
            return {
                "chosen_side": [None if w is None else (edited if w else opponent) for w in wins],
                "rejected_side": [None if w is None else (opponent if w else edited) for w in wins],
                "gap": gaps.tolist(),
                "round_trip_win": win_share(votes(scores("original") - scores("source"), floors)).tolist(),
                "neutral_win": win_share(votes(scores("neutral") - scores("original"), floors)).tolist(),
                "status": [self._status(w, row) for w, row in zip(wins, cast_votes, strict=True)],
            }

        return run


def controls(folder: Path) -> dict[str, float | None]:
    """Win rates of the two controls over all labelled rows: 0.5 means that re-encoding, or a neutral edit, decides nothing."""
    table = read_run(folder, ["round_trip_win", "neutral_win"])
    rates: dict[str, float | None] = {}
    for name, column in (("roundtrip_win_rate", "round_trip_win"), ("neutral_edit_win_rate", "neutral_win")):
        values = [value for value in table.column(column).to_pylist() if value is not None]
        rates[name] = float(np.mean(values)) if values else None
    return rates


def planned_prompts(folder: Path) -> list[str]:
    """Every prompt that the curation of a run folder has seen, kept or not; none if nothing was curated there."""
    if not folder.is_dir() or not any(STAGE_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
        return []
    return sorted({prompt for table in read_shards(folder, ["prompt"]) for prompt in table.column("prompt").to_pylist()})


def _pair(row: Mapping[str, Any], label: LabelStage, held_out_share: float, run_fingerprint: str) -> Pair:
    sides = {"chosen": row["chosen_side"], "rejected": row["rejected_side"]}
    scores = {reward: {side: row[score_column(reward, column)] for side, column in sides.items()} for reward in label.rewards}
    return Pair(
        id=row["id"],
        prompt=row["prompt"],
        chosen=row[sides["chosen"]]["bytes"],
        rejected=row[sides["rejected"]]["bytes"],
        gap=row["gap"],
        split=split_of(row["prompt"], held_out_share),
        critique=row["critique"],
        instruction=row["instruction"],
        scores=json.dumps(scores),
        provenance=json.dumps({"seed": row["seed"], **sides, "run": run_fingerprint}),
    )


def select_pairs(folder: Path, label: LabelStage, *, held_out_share: float = 0.1) -> Iterator[Pair]:
    """The pairs of a finished run, in the order of its rows; memory is that of one shard."""
    scores = [score_column(reward, side) for reward in label.rewards for side in label.sides]
    columns = ["prompt", "seed", "critique", "instruction", *label.sides, "chosen_side", "rejected_side", "gap", *scores]
    run_fingerprint = stored_layers(folder)[-1].fingerprint
    for table in read_shards(folder, columns):
        live = table.filter(table.column("status").is_null())
        yield from (_pair(row, label, held_out_share, run_fingerprint) for row in live.to_pylist())
