"""Pairs from a labeled run: selection, limits per prompt, and mixing with human pairs."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpo.core.run_folder import STAGE_FOLDER
from rpo.curation.columns import score_column
from rpo.curation.stages.label import Combination, Labels, label_columns
from rpo.data.images import EncodedImage
from rpo.data.pairs import Pair, split_of
from rpo.engine.layers import read_shards, stored_layers


def _made_columns(folder: Path) -> set[str]:
    return {column for layer in stored_layers(folder) for column in layer.columns}


def planned_prompts(folder: Path) -> list[str]:
    """Every prompt that the curation of a run folder has seen, kept or not; none if nothing was curated there."""
    if not folder.is_dir() or not any(STAGE_FOLDER.fullmatch(path.name) for path in folder.iterdir()):
        return []
    return sorted({prompt for table in read_shards(folder, ["prompt"]) for prompt in table.column("prompt").to_pylist()})


def _pair(row: Mapping[str, Any], label: Labels, combination: Combination, held_out_share: float, run_fingerprint: str) -> Pair:
    chosen_side, rejected_side, gap, bound = (row[name] for name in label_columns(combination))
    sides = {"chosen": chosen_side, "rejected": rejected_side}
    scores = {reward: {side: row[score_column(reward, column)] for side, column in sides.items()} for reward in label.rewards}
    made = {name: json.loads(row[name]) for name in ("edited_by", "scored_by") if row.get(name)}
    return Pair(
        id=row["id"] if combination == "source" else f"{row['id']}-{combination}",
        prompt=row["prompt"],
        chosen=EncodedImage.of(row[sides["chosen"]]["bytes"]),
        rejected=EncodedImage.of(row[sides["rejected"]]["bytes"]),
        gap=gap,
        weight=min(max(bound, 0.0), 1.0) if label.weighted else 1.0,
        split=split_of(row["prompt"], held_out_share),
        critique=row.get("critique", "null"),
        instruction=row.get("instruction", ""),
        scores=json.dumps(scores),
        provenance=json.dumps({"seed": row["seed"], **sides, "run": run_fingerprint, **made}),
    )


def select_pairs(folder: Path, label: Labels, *, held_out_share: float = 0.1, rows: int | None = None) -> Iterator[Pair]:
    """The pairs of a finished run, in the order of its rows, or of the first `rows` of them; memory is that of one shard."""
    opponents = dict.fromkeys(label.opponent(combination) for combination in label.combinations)
    sides = (label.sides[0], *opponents)
    scores = [score_column(reward, side) for reward in label.rewards for side in sides]
    labels = [name for combination in label.combinations for name in label_columns(combination)]
    told = [column for column in ("critique", "instruction", "edited_by", "scored_by") if column in _made_columns(folder)]
    run_fingerprint = stored_layers(folder)[-1].fingerprint
    seen = 0
    for table in read_shards(folder, ["prompt", "seed", *told, *sides, *labels, *scores]):
        wanted = table if rows is None else table.slice(0, max(0, rows - seen))
        seen += table.num_rows
        for row in wanted.filter(wanted.column("status").is_null()).to_pylist():
            for combination in label.combinations:
                if row[next(iter(label_columns(combination)))] is not None:
                    yield _pair(row, label, combination, held_out_share, run_fingerprint)


def widest(pairs: Iterable[Pair], per_prompt_max: int) -> set[str]:
    """Ids of at most so many pairs of a prompt, those with the widest gap."""
    kept: set[str] = set()
    taken: dict[str, int] = {}
    for _, name, prompt in sorted((-pair.gap, pair.id, pair.prompt) for pair in pairs):
        if taken.get(prompt, 0) < per_prompt_max:
            taken[prompt] = taken.get(prompt, 0) + 1
            kept.add(name)
    return kept


def mixed(pairs: Iterable[Pair], human: Sequence[Pair], share: float, held_out_share: float = 0.1) -> Iterator[Pair]:
    """`pairs` and so many of `human` behind them that these are `share` of all, above 0 and below 1, if there are enough.

    Which ones is decided by hash of their ids; they stay in their order, and pairs that are in both stay once. A prompt has one split in
    the whole mixture: held out where `held_out_share` or the human set holds it out.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    held_out = {pair.prompt for pair in human} - {pair.prompt for pair in human if pair.split == "train"}
    known: set[str] = set()
    for pair in pairs:
        known.add(pair.id)
        yield replace(pair, split="held_out") if pair.prompt in held_out else pair
    fresh = [pair for pair in human if pair.id not in known]
    wanted = round(len(known) * share / (1 - share))
    drawn = {pair.id for pair in sorted(fresh, key=lambda pair: hashlib.sha256(f"mix:{pair.id}".encode()).digest())[:wanted]}
    for pair in fresh:  # in the order of their file, which is read from its beginning for every step back
        if pair.id in drawn:
            yield replace(pair, split="held_out" if pair.prompt in held_out else split_of(pair.prompt, held_out_share))
