"""What the rest of the package may know about a model: seven Protocols, all batch in, equal-length list out.

An image is a `uint8` array of shape (height, width, 3), RGB. Backends implement these; only recipes import backends.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.data.schema import Critique, Instructions
from rpo.errors import RowError


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

    def edit(self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]: ...

    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The images as the editor's own resize and autoencoder leave them: what both sides of a pair must have passed."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """A reward model: one number per image, higher is better, comparable within one prompt."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]: ...


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
