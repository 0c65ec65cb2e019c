"""The page's pictures: pairs with their reasons, and base against tuned. Chosen by hash, never by eye."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from rpo.data.pairs import Pair
from rpo.data.schema import Critique
from rpo.evaluation.judges import metric_of
from rpo.evaluation.rows import Key, Row, read_images
from rpo.report.curation import Box, changed_boxes
from rpo.report.format import label, number, percent, signed
from rpo.report.run_data import RunData
from rpo.report.sampling import by_hash, quotas
from rpo.report.thumbnails import Thumbnail, thumbnail

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
        provenance, rejected, chosen = json.loads(pair.provenance), pair.rejected.read(), pair.chosen.read()
        cards.append(
            PairCard(
                prompt=_cut(pair.prompt), rejected=thumbnail(rejected), chosen=thumbnail(chosen),
                sides=(_side(provenance, "rejected"), _side(provenance, "chosen")), instruction=_cut(pair.instruction),
                boxes=changed_boxes(rejected, chosen), critique=_critique(pair.critique),
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
    """Two models on the same prompt and the same initial noise."""

    prompt: str
    seed_index: int
    before: Shot
    """Of the model that the other is compared with."""
    after: Shot


@dataclass(frozen=True, kw_only=True)
class DuelGroup:
    """Duels that ended alike."""

    title: str
    total: int
    """How many of all image pairs ended so."""
    share: str
    duels: list[Duel]


OUTCOMES = {
    "won": "{} wins",
    "lost": "{} loses",
    "both_good": "Tie, both right",
    "both_bad": "Tie, both wrong",
    "tie": "Tie",
}


def _outcome(gain: float, tuned: float, binary: bool) -> str:
    if gain:
        return "won" if gain > 0 else "lost"
    return ("both_good" if tuned else "both_bad") if binary else "tie"


def _attributes(before: Collection[Row], after: Collection[Row], fractions: Collection[str]) -> list[str]:
    """Fractions of both that take few values, such as 0, 1/2 and 1: what an image has or lacks, unlike a grade."""
    theirs = {name for row in after for name in row.metrics if name in fractions}
    names, rows = dict.fromkeys(name for row in before for name in row.metrics if name in theirs), (*before, *after)
    return [name for name in names if len({row.metrics[name] for row in rows if name in row.metrics}) <= DISTINCT_MAX]


def _shot(row: Row, main: str, binary: bool, attributes: Sequence[str], encoded: bytes) -> Shot:
    value = row.metrics[main]
    said = f"{'' if value else 'not '}{label(main).lower()}" if binary else number(value)
    short = [f"{label(name).lower()} {_share_right(row.metrics[name])}" for name in attributes if row.metrics.get(name, 1) < 1]
    return Shot(image=thumbnail(encoded), verdict=said, good=bool(value) if binary else None, short=", ".join(short[:4]))


def _share_right(value: float) -> str:
    return f"{percent(value, 0)} right" if value > 0 else "wrong"


@dataclass(frozen=True, kw_only=True)
class Duels:
    """Two models' images of the same places, ready to be shown."""

    run: RunData
    names: tuple[str, str]
    """The model that is compared with, and the one that is shown beside it."""
    before: Mapping[Key, Row]
    after: Mapping[Key, Row]
    main: str
    """The metric that decides."""

    @classmethod
    def of(cls, run: RunData) -> "Duels | None":
        """`None` without an evaluation of two models."""
        if run.compared is None:
            return None
        before, after = ({row.key: row for row in run.rows[model]} for model in run.compared)
        main = run.headline
        if "of_pairs" in run.numbers.get(main, {}):  # rows of the first model lack it: theirs is what the other's leaves
            before = {
                key: replace(row, metrics={**row.metrics, main: 1 - after[key].metrics[main]}) if main in after[key].metrics else row
                for key, row in before.items()
            }
        if not any(main in row.metrics for row in before.values()):
            main = next((name for row in before.values() for name in row.metrics), "")
        return cls(run=run, names=run.compared, before=before, after=after, main=main)

    @property
    def keys(self) -> list[Key]:
        """Places that both were measured at."""
        return [key for key, row in self.before.items() if self.main in row.metrics and self.main in self.after[key].metrics]

    @property
    def binary(self) -> bool:
        """Whether the headline says yes or no of an image."""
        is_fraction = metric_of(self.run.numbers.get(self.main, {})).kind == "fraction"
        return is_fraction and all(row.metrics.get(self.main, 0) in (0, 1) for row in (*self.before.values(), *self.after.values()))

    def gain(self, key: Key) -> float:
        """By how much the second model's image is better."""
        lower = metric_of(self.run.numbers.get(self.main, {})).better == "lower"
        before, after = (rows[key].metrics[self.main] for rows in (self.before, self.after))
        return before - after if lower else after - before

    def shown(self, keys: Sequence[Key]) -> list[Duel]:
        fractions = [name for name, own in self.run.numbers.items() if metric_of(own).kind == "fraction" and name != self.main]
        attributes = _attributes(self.before.values(), self.after.values(), fractions)
        images = [read_images(self.run.evaluation, model, keys) for model in self.names]
        return [
            Duel(
                prompt=_cut(self.before[key].prompt),
                seed_index=key[1],
                before=_shot(self.before[key], self.main, self.binary, attributes, images[0][key]),
                after=_shot(self.after[key], self.main, self.binary, attributes, images[1][key]),
            )
            for key in keys
        ]


def duel_groups(duels: Duels, count: int) -> list[DuelGroup]:
    """`count` duels by hash of their place, every outcome in proportion to how often it came."""
    keys, binary = duels.keys, duels.binary
    ended: dict[str, list[Key]] = {outcome: [] for outcome in OUTCOMES}
    for key in keys:
        ended[_outcome(duels.gain(key), duels.after[key].metrics[duels.main], binary)].append(key)
    places = quotas({outcome: len(group) for outcome, group in ended.items()}, count)
    shown = {outcome: by_hash(group, lambda key: f"{key[0]}:{key[1]}", places[outcome]) for outcome, group in ended.items()}
    return [
        DuelGroup(
            title=OUTCOMES[outcome].format(label(duels.names[1])), total=len(group), share=percent(len(group) / len(keys), 0),
            duels=duels.shown(shown[outcome]),
        )
        for outcome, group in ended.items()
        if group
    ]  # fmt: skip


def extremes(duels: Duels, count: int) -> list[tuple[str, list[Duel]]]:
    """The prompts that gained and lost most; equal ones by hash. None for a metric that only says yes or no: the groups show those."""
    if duels.binary or count < 1:
        return []
    order = sorted(by_hash(duels.keys, lambda key: f"{key[0]}:{key[1]}", len(duels.keys)), key=duels.gain)
    most = min(count, len(order) // 2)
    return [("Gained most", duels.shown(order[::-1][:most])), ("Lost most", duels.shown(order[:most]))]
