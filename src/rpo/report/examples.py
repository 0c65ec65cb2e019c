"""The page's pictures: pairs with their reasons, and base against tuned. Chosen by hash, never by eye."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from rpo.data.pairs import Pair
from rpo.data.schema import Critique
from rpo.evaluate.rows import Row, read_images
from rpo.report.choosing import by_hash, quotas
from rpo.report.curated import Box, changed_boxes
from rpo.report.run_data import RunData
from rpo.report.sections import MAIN_METRIC
from rpo.report.thumbnails import Thumbnail, thumbnail
from rpo.report.wording import label, number, percent, signed

PROMPT_CHARACTERS_MAX = 600
DISTINCT_MAX = 8


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """What one reward model thinks of both sides."""

    reward: str
    rejected: str
    chosen: str
    difference: str
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class PairCard:
    """One pair as it is shown."""

    prompt: str
    rejected: Thumbnail
    chosen: Thumbnail
    sides: tuple[str, str]
    """What the rejected and the chosen side are, such as "source" and "edit"; empty where it is not told."""
    instruction: str
    boxes: list[Box]
    """Around what differs."""
    critique: Critique | None
    scores: list[ScoreLine]
    gap: str


def _cut(text: str) -> str:
    return text if len(text) <= PROMPT_CHARACTERS_MAX else text[:PROMPT_CHARACTERS_MAX] + "…"


def _critique(text: str) -> Critique | None:
    try:
        return Critique.model_validate_json(text)
    except ValidationError:  # pairs of another origin have none, or one of another form
        return None


def _scores(text: str) -> list[ScoreLine]:
    lines = []
    for reward, sides in json.loads(text).items():
        rejected, chosen = float(sides["rejected"]), float(sides["chosen"])
        lines.append(
            ScoreLine(
                reward=reward, rejected=number(rejected), chosen=number(chosen),
                difference=signed(chosen - rejected, 3), agrees=chosen > rejected,
            )
        )  # fmt: skip
    return lines


def _side(provenance: Mapping[str, object], side: str) -> str:
    """Where a side comes from, if the provenance says so in a word."""
    told = provenance.get(side)
    return told if isinstance(told, str) else ""


def pair_cards(pairs: Sequence[Pair], count: int) -> list[PairCard]:
    """`count` pairs by hash of their id, widest gap first."""
    cards = []
    for pair in sorted(by_hash(pairs, lambda pair: pair.id, count), key=lambda pair: (-pair.gap, pair.id)):
        provenance = json.loads(pair.provenance)
        cards.append(
            PairCard(
                prompt=_cut(pair.prompt), rejected=thumbnail(pair.rejected), chosen=thumbnail(pair.chosen),
                sides=(_side(provenance, "rejected"), _side(provenance, "chosen")), instruction=_cut(pair.instruction),
                boxes=changed_boxes(pair.rejected, pair.chosen), critique=_critique(pair.critique),
                scores=_scores(pair.scores), gap=number(pair.gap),
            )
        )  # fmt: skip
    return cards


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image of one model and what the judge said of it."""

    image: Thumbnail
    verdict: str
    good: bool | None
    """Whether the verdict is a yes; `None` where it is a number."""
    short: str
    """What falls short, in words."""


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Base and tuned on the same prompt and the same initial noise."""

    prompt: str
    seed_index: int
    base: Shot
    tuned: Shot


@dataclass(frozen=True, kw_only=True)
class DuelGroup:
    """Duels that ended alike."""

    title: str
    total: int
    """How many of all image pairs ended so."""
    share: str
    duels: list[Duel]


OUTCOMES = {
    "won": "Tuned wins",
    "lost": "Tuned loses",
    "both_good": "Tie, both right",
    "both_bad": "Tie, both wrong",
    "tie": "Tie",
}


def _outcome(base: float, tuned: float, binary: bool) -> str:
    if tuned != base:
        return "won" if tuned > base else "lost"
    return ("both_good" if base else "both_bad") if binary else "tie"


def _attributes(rows: Sequence[Row], main: str) -> list[str]:
    """Metrics that take few values, such as 0, 1/2 and 1: what an image has or lacks, unlike a grade."""
    names = dict.fromkeys(name for row in rows for name in row.metrics if name != main)
    return [name for name in names if len({row.metrics[name] for row in rows if name in row.metrics}) <= DISTINCT_MAX]


def _shot(row: Row, main: str, binary: bool, attributes: Sequence[str], encoded: bytes) -> Shot:
    value = row.metrics[main]
    said = ("correct" if value else "not correct") if binary else number(value)
    short = [f"{label(name).lower()} {_share_right(row.metrics[name])}" for name in attributes if row.metrics.get(name, 1) < 1]
    return Shot(image=thumbnail(encoded), verdict=said, good=bool(value) if binary else None, short=", ".join(short[:4]))


def _share_right(value: float) -> str:
    return f"{percent(value, 0)} right" if value > 0 else "wrong"


def duel_groups(run: RunData, count: int) -> list[DuelGroup]:
    """`count` duels by hash of their place, every outcome in proportion to how often it came; empty without an evaluation."""
    if not {"base", "tuned"} <= run.rows.keys():
        return []
    base, tuned = ({row.key: row for row in run.rows[model]} for model in ("base", "tuned"))
    every = [*base.values(), *tuned.values()]
    main = MAIN_METRIC if any(MAIN_METRIC in row.metrics for row in every) else next(iter(every[0].metrics), "")
    keys = [key for key, row in base.items() if main in row.metrics and main in tuned[key].metrics]
    binary = all(row.metrics.get(main, 0) in (0, 1) for row in every)
    ended: dict[str, list[tuple[str, int]]] = {outcome: [] for outcome in OUTCOMES}
    for key in keys:
        ended[_outcome(base[key].metrics[main], tuned[key].metrics[main], binary)].append(key)
    places = quotas({outcome: len(group) for outcome, group in ended.items()}, count)
    shown = {outcome: by_hash(group, lambda key: f"{key[0]}:{key[1]}", places[outcome]) for outcome, group in ended.items()}
    wanted = [key for group in shown.values() for key in group]
    attributes = _attributes(every, main)
    images = {model: read_images(run.evaluation, model, wanted) for model in ("base", "tuned")}

    def duel(key: tuple[str, int]) -> Duel:
        before = _shot(base[key], main, binary, attributes, images["base"][key])
        after = _shot(tuned[key], main, binary, attributes, images["tuned"][key])
        return Duel(prompt=_cut(base[key].prompt), seed_index=key[1], base=before, tuned=after)

    return [
        DuelGroup(
            title=OUTCOMES[outcome], total=len(group), share=percent(len(group) / len(keys), 0), duels=[duel(key) for key in shown[outcome]]
        )
        for outcome, group in ended.items()
        if group
    ]
