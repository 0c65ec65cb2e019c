"""The edit, the source's round trip, a second encoding and the neutral edit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.curation.columns import cells as _cells
from rpo.curation.columns import images as _images
from rpo.curation.columns import seeds as _seeds
from rpo.curation.columns import texts as _texts
from rpo.curation.provenance import made_by
from rpo.data.images import recompressed
from rpo.engine.stage import Batch, StageCall, StageSpec, row_seed
from rpo.protocols import Editor, Model, SampledEditor


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of a row's attempt, in [0, 2^63); the first has the row's own."""
    return seed if attempt == 0 else row_seed(seed, f"attempt {attempt}")


@dataclass(frozen=True, kw_only=True)
class EditStage:
    """The edit, and what it is held against: the source after the editor's round trip (`original`), and a neutral edit (same seed).

    `second` is an independent encoding of the source: how much scores differ between it and `original` is their noise. The source passes a
    codec, then the round trip, with a seeded sample of the autoencoder's posterior where the editor has one.

    With several attempts each has a column `attempt_0`, `attempt_1`, ...; an `AttemptStage` says which goes on.
    """

    editor: Model
    """Builds an `Editor`."""
    neutral_instruction: str = "keep everything as it is"
    """What the neutral edit is asked for."""
    attempts: int = 1
    """Edits of each instruction, each with a seed of its own."""
    guidances: tuple[float, ...] = ()
    """Guidance of the attempts, taken in turn; the editor's own if empty. The neutral edit has the first."""
    second_quality: int | None = 90
    """JPEG quality of the source before it is encoded a second time; none to rest on the sample of the posterior alone, or on a round
    trip that is random by itself. The posterior of most autoencoders is too narrow for that: a sample differs by less than a level."""
    other: bool = False
    """Whether rows bring the prompt's second image in a column `other`; it passes the same round trip, as `other_original`."""
    first: bool = False
    """Whether rounds follow, which make the columns `edited` and `neutral` from `first_edited` and `first_neutral`."""
    batch_size: int = 16
    """Images edited at once."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if self.second_quality is not None and not 1 <= self.second_quality <= 100:
            raise ValueError(f"second_quality must be 1 to 100, or None for no codec, got {self.second_quality}")
        if any(guidance <= 0 for guidance in self.guidances):
            raise ValueError(f"guidances must be above 0, got {self.guidances}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the edits, one for each attempt."""
        prefix = "first_" if self.first else ""
        return (f"{prefix}edited",) if self.attempts == 1 else tuple(f"attempt_{i}" for i in range(self.attempts))

    @property
    def spec(self) -> StageSpec:
        neutral = "first_neutral" if self.first else "neutral"
        images = ("original", "second", neutral, *self.columns, *(["other_original"] if self.other else []))
        return StageSpec(
            name="edit",
            version="4",
            inputs=("source", "instruction", "seed", *(["other"] if self.other else [])),
            outputs=dict.fromkeys(images, IMAGE) | {"edited_by": pa.string()},
            batch_size=self.batch_size,
            models=self.editor.models(),
        )

    def _second(self, editor: Editor, sources: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        """The independent encoding of each source."""
        quality = self.second_quality
        coded = [source if quality is None else recompressed(source, quality) for source in sources]
        if isinstance(editor, SampledEditor):
            return editor.sampled_round_trip(coded, [row_seed(seed, "second") for seed in seeds])
        return editor.round_trip(coded)

    def _second_by(self, editor: Editor) -> str:
        """What the independent encoding consists of."""
        codec = [] if self.second_quality is None else [f"JPEG {self.second_quality}"]
        sampled = isinstance(editor, SampledEditor)
        return ", ".join([*codec, "a sample of the autoencoder's posterior" if sampled else "the editor's round trip"])

    def _guidance(self, attempt: int) -> float | None:
        return self.guidances[attempt % len(self.guidances)] if self.guidances else None

    def build(self) -> StageCall:
        editor: Editor = self.editor.build()
        made = made_by(self.editor, self.editor.models()) | {"second": self._second_by(editor)}
        neutral = "first_neutral" if self.first else "neutral"

        def edit(images: list[np.ndarray], texts: list[str], seeds: list[int], attempt: int) -> list[object]:
            if (guidance := self._guidance(attempt)) is None:
                return _cells(editor.edit(images, texts, seeds))
            return _cells(editor.edit(images, texts, seeds, guidance=guidance))

        def run(batch: Batch) -> Batch:
            sources, seeds, texts = _images(batch["source"]), _seeds(batch["seed"]), _texts(batch["instruction"])
            tried = [[attempt_seed(seed, i) for seed in seeds] for i in range(self.attempts)]
            made_columns: dict[str, Sequence[object]] = {
                "original": _cells(editor.round_trip(sources)),
                "second": _cells(self._second(editor, sources, seeds)),
                **{name: edit(sources, texts, tried[i], i) for i, name in enumerate(self.columns)},
                neutral: edit(sources, [self.neutral_instruction] * len(sources), seeds, 0),
            }
            if self.other:
                made_columns["other_original"] = _cells(editor.round_trip(_images(batch["other"])))
            told = [[{"seed": column[row], "guidance": self._guidance(i)} for i, column in enumerate(tried)] for row in range(len(seeds))]
            return {**made_columns, "edited_by": [json.dumps(made | {"attempts": attempts}) for attempts in told]}

        return run
