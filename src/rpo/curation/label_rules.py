"""Who wins: pure functions from scores to labels. Arrays are (rows, rewards) unless said otherwise; +1 is for the edit."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["vote", "single", "mean", "conservative", "pairwise", "trust_edit", "random"]


def _exact_mean(values: np.ndarray) -> np.ndarray:
    """Mean over rows, rounded once: the same whatever the order of the rows."""
    return np.array([math.fsum(column) / len(values) for column in values.T]) if len(values) else np.full(values.shape[1], math.nan)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What margins are held against. One number per reward, in their order."""

    floors: tuple[float, ...]
    """Noise floor: the margin between two encodings of one image that is exceeded in one case of twenty."""
    spreads: tuple[float, ...]
    """Standard deviation of the score over the opponents: the unit in which margins of several rewards are compared."""
    mean_floor: float
    """Noise floor of the mean margin in such units."""


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over rows with exact sums; of a single row its size, since nothing else is known."""
    if len(values) < 2:
        return np.abs(values).sum(0)
    return np.sqrt(_exact_mean((values - _exact_mean(values)) ** 2) * len(values) / (len(values) - 1))


def measure(once: np.ndarray, again: np.ndarray, neutral: np.ndarray, opponent: np.ndarray) -> Measured:
    """From scores of two independent encodings of the source, of the neutral edit, and of what edits are held against.

    A floor is noise: the larger spread of a second encoding and of a neutral edit about the first encoding. What either adds to every
    row alike is no part of it. The neutral edit of a deterministic editor is the first encoding, and adds nothing. Sums are exact, so
    the order of the rows does not matter.
    """
    spreads = np.maximum(np.sqrt(_exact_mean((opponent - _exact_mean(opponent)) ** 2)), 1e-9)
    noises = (again - once, neutral - once)
    floors = 1.96 * np.max([_spread(noise) for noise in noises], axis=0)
    mean_floor = 1.96 * max(_spread((noise / spreads).mean(1)[:, None])[0] for noise in noises)
    return Measured(floors=tuple(floors.tolist()), spreads=tuple(spreads.tolist()), mean_floor=float(mean_floor))


def votes(margins: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """+1, 0 or -1 per row and reward: whether a margin is above its reward's floor (rewards,), within, or below."""
    return np.sign(margins) * (np.abs(margins) > floors)


def lower_bound(units: np.ndarray, kappa: float) -> np.ndarray:
    """How sure the gap is: absolute mean over rewards minus `kappa` times their spread, (rows,), of margins in units of their spreads.

    Rewards that agree leave the mean as it is; rewards that contradict each other take it below zero.
    """
    return np.abs(units.mean(1)) - kappa * units.std(1)


def coin(row: str) -> bool:
    """Fair, and always the same for one row."""
    return hashlib.sha256(f"label:{row}".encode()).digest()[0] % 2 == 0


def _majority(cast_votes: np.ndarray, votes_min: int) -> np.ndarray:
    """+1 or -1 where enough rewards agree and none contradicts, else 0."""
    ahead, behind = (cast_votes > 0).sum(1), (cast_votes < 0).sum(1)
    return np.where(behind == 0, ahead >= votes_min, 0) - np.where(ahead == 0, behind >= votes_min, 0)


def decide(
    rule: Rule, ids: Sequence[str], margins: np.ndarray, measured: Measured, *, votes_min: int, by: int, kappa: float,
    preferences: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """+1 where the edit wins, -1 where it loses, 0 where the rule cannot say.

    `by` is the place of the reward that the rule single goes by; `preferences` (rows,) what the rule pairwise goes by, 0 to 1.
    """
    units = margins / np.array(measured.spreads)
    mean = units.mean(1)
    if rule == "trust_edit":
        return np.ones(len(ids))
    if rule == "random":
        return np.array([1 if coin(row) else -1 for row in ids])
    if rule == "pairwise":
        assert preferences is not None, "the rule pairwise is given preferences"
        return np.sign(preferences - 0.5)
    if rule == "single":
        return votes(margins, np.array(measured.floors))[:, by]
    if rule == "mean":
        return np.sign(mean) * (np.abs(mean) > measured.mean_floor)
    if rule == "conservative":
        return np.sign(mean) * (lower_bound(units, kappa) > measured.mean_floor)
    return _majority(votes(margins, np.array(measured.floors)), votes_min)
