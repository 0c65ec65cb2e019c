"""The funnel of words: how many critiques and instructions could be read, what they held, how far repeated critiques agree."""

from collections import Counter
from pathlib import Path
from typing import TypedDict

from rpo.data.schema import Critique, Instructions
from rpo.engine.layers import read_shards, stored_layers


class Words(TypedDict):
    """Counts over the rows of a run, and means; `None` where there is nothing to count."""

    asked: int
    """Images that were criticised."""
    parsed: int
    """Critiques that could be read."""
    no_issue: int
    """Critiques that find nothing to change."""
    instructed: int
    """Critiques that were turned into an answer of the instructor that could be read."""
    instructions: int
    """Instructions in all of them."""
    skipped: int
    """Answers of the instructor without an instruction."""
    agreement: float | None
    """Of repeated critiques of one image, the mean."""
    adjustments: dict[str, int]
    """Answers with metadata that was dropped, clipped or converted, by what was done."""


def words(folder: Path) -> Words | None:
    """Of a finished run; `None` for one whose stages are others."""
    columns = ["critique", "instructions"]
    if not set(columns) <= {name for layer in stored_layers(folder) for name in layer.columns}:
        return None
    told = Words(asked=0, parsed=0, no_issue=0, instructed=0, instructions=0, skipped=0, agreement=None, adjustments={})
    agreements: list[float] = []
    adjustments: Counter[str] = Counter()
    for table in read_shards(folder, columns):
        for critique, instructions, status in zip(*(table.column(i).to_pylist() for i in (1, 2, 3)), strict=True):
            told["asked"] += critique is not None or (status or "").startswith("error:critique:")
            if critique is not None:
                read = Critique.model_validate_json(critique)
                told["parsed"] += 1
                told["no_issue"] += read.no_issue
                agreements += [read.agreement] if read.agreement is not None else []
                adjustments.update(read.adjustments)
            if instructions is not None:
                answer = Instructions.model_validate_json(instructions)
                adjustments.update(answer.adjustments)
                count = len(answer.instructions)
                told["instructed"] += 1
                told["instructions"] += count
                told["skipped"] += count == 0
    told["agreement"] = sum(agreements) / len(agreements) if agreements else None
    told["adjustments"] = dict(adjustments.most_common())
    return told
