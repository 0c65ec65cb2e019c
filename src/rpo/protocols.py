"""Protocols of models, all batch in, equal-length list out, and the declaration of metrics.

An image is a `uint8` array of shape (height, width, 3), RGB. Backends implement these; only recipes import backends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.data.images import Frame
from rpo.data.schema import Critique, Instructions
from rpo.errors import RowError

MetricKind = Literal["fraction", "probability", "score", "distance"]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric reads; what nobody declares is a score of which more is better."""

    kind: MetricKind = "score"
    """fraction: a share of what was asked, 0 to 1, shown in per cent and percentage points; probability: 0 to 1; score: any unit;
    distance: 0 and above."""
    better: Better = "higher"
    """Which direction is an improvement; `neither` for a plain measurement."""
    says: str = ""
    """For a share of images, what those images do: the page writes "Of 100 images, 62 SAYS"."""

    @property
    def bounded(self) -> bool:
        """Whether every value lies between 0 and 1."""
        return self.kind in ("fraction", "probability")


@runtime_checkable
class DeclaresMetrics(Protocol):
    """A judge's configuration that names what the judge measures, so that a wrong name is refused before any work."""

    def metrics(self) -> Mapping[str, Metric]: ...


@runtime_checkable
class DeclaresMetric(Protocol):
    """A scorer's configuration that says how its one score reads."""

    def metric(self) -> Metric: ...


@runtime_checkable
class Preflight(Protocol):
    """A judge that depends on a server and can find out in advance whether the server's answers are of use."""

    def check(self, prompt: str) -> None:
        """Asks about a plain image and this prompt. Raises `RpoError` if the answer is of no use."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Text to image."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        """One image per prompt; its initial noise depends on its own seed alone."""
        ...


@runtime_checkable
class Critic(Protocol):
    """Says what is wrong with an image."""

    def critique(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Critique | RowError]: ...


@runtime_checkable
class Instructor(Protocol):
    """Turns critiques into edit instructions."""

    def instruct(self, prompts: Sequence[str], critiques: Sequence[Critique]) -> list[Instructions | RowError]: ...


@runtime_checkable
class Editor(Protocol):
    """Carries out instructions on images."""

    def edit(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int], *, guidance: float | None = None
    ) -> list[np.ndarray]:
        """One edit per row, decided by its own seed; `guidance` takes the place of the configured scale."""
        ...

    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The images as the editor's own resize and autoencoder leave them: what both sides of a pair must have passed."""
        ...


@runtime_checkable
class SampledEditor(Protocol):
    """An `Editor` whose autoencoder encodes to a distribution."""

    def sampled_round_trip(self, images: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        """The round trip with latents drawn from the autoencoder's posterior by each row's seed, in place of its mode."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """A reward model: one number per image, higher is better, comparable within one prompt."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float | RowError]: ...


@runtime_checkable
class Embedder(Protocol):
    """Sees what pictures have in common: the cosine of two embeddings is how alike they look."""

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, d) embeddings of length 1."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Says whether an edit did what was expected of it."""

    def verify(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], changes: Sequence[str]) -> Sequence[float | RowError]:
        """Probability, 0 to 1, that each change can be seen."""
        ...


@runtime_checkable
class Comparer(Protocol):
    """Says which of two images of one prompt is better."""

    def compare(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float | RowError]:
        """0 to 1 for the first; 0.5 when it cannot say, or says another thing once they change places."""
        ...


@runtime_checkable
class SafetyChecker(Protocol):
    """Says how probable it is that a picture should not be kept."""

    def unsafe(self, images: Sequence[np.ndarray]) -> Sequence[float]: ...


@runtime_checkable
class Judge(Protocol):
    """A scorer of several named metrics that is never used to label."""

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]: ...

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, d) features for a Fréchet distance."""
        ...


@runtime_checkable
class Chat(Protocol):
    """A vision-language model that answers questions, whatever they are about."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        """Asks all at once, as many at a time as the model bears; safe to call from several threads.

        A question that stays without a whole answer (refused, cut short, never answered in time) is its row's `RowError`.
        Raises `RpoError` when no question can be answered: no such server, no right to it, no such model, a cap reached.
        """
        ...


@runtime_checkable
class Model(Protocol):
    """A frozen configuration that builds one of the package's five kinds of model."""

    def models(self) -> tuple[str, ...]:
        """Folders or hub ids whose content decides what it answers."""
        ...

    def build(self) -> Any: ...


@runtime_checkable
class Framed(Protocol):
    """A configuration of an editor that knows the geometry of its input. Sources of any other editor stay as they come."""

    def frame(self) -> Frame: ...
