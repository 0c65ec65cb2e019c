"""What is evaluated: a named set of prompts, how many seeds each, and the noise that every model starts from."""

import hashlib
import string
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rpo.errors import RpoError


def prompt_id(text: str) -> str:
    """Content hash of a prompt: 16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def noise_seed(task: str, prompt: str, index: int) -> int:
    """Seed (63 bits) of the initial noise of image `index` of prompt id `prompt`.

    The same for every model, whatever the batch and the order; never one seed for all prompts.
    """
    digest = hashlib.sha256(f"{task}\x00{prompt}\x00{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """One image to make: where it stands in the task and what it starts from. Every model makes the same places."""

    prompt_id: str
    prompt: str
    seed_index: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of prompts to evaluate on; a pure value, see `Task.of`."""

    name: str
    """Part of every noise seed: two tasks with the same prompts start from different noise."""
    prompts: tuple[tuple[str, str], ...]
    """(prompt id, text), the id being `prompt_id(text)`."""
    seeds_per_prompt: int = 1
    """Images per prompt and model."""
    categories: Mapping[str, str] = field(default_factory=dict[str, str])
    """Prompt id -> what kind of prompt it is, where that is known."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty; it is part of every noise seed")
        if not self.prompts:
            raise ValueError(f"prompts of task {self.name!r} must not be empty; give at least one (id, text)")
        if self.seeds_per_prompt < 1:
            raise ValueError(f"seeds_per_prompt must be at least 1, got {self.seeds_per_prompt}")
        seen: set[str] = set()
        for identifier, text in self.prompts:
            if not text.strip():
                raise ValueError(f"prompts of task {self.name!r} hold an empty text; leave it out")
            if identifier != prompt_id(text):
                raise ValueError(f"prompts hold id {identifier!r} for {text!r}, whose content hash is {prompt_id(text)!r}; use Task.of")
            if identifier in seen:
                raise ValueError(f"prompts hold {text!r} twice; raise seeds_per_prompt to see a prompt more often")
            seen.add(identifier)

    @classmethod
    def of(cls, name: str, texts: Iterable[str], *, seeds_per_prompt: int = 1, categories: Mapping[str, str] | None = None) -> "Task":
        """A task from texts, in their order; a text that comes again is kept once. `categories` go by text."""
        unique = dict.fromkeys(texts)
        return cls(
            name=name,
            prompts=tuple((prompt_id(text), text) for text in unique),
            seeds_per_prompt=seeds_per_prompt,
            categories={prompt_id(text): kind for text, kind in (categories or {}).items()},
        )

    def described(self) -> dict[str, str | int]:
        """Its name and sizes, for tables."""
        return {"name": self.name, "prompts": len(self.prompts), "seeds_per_prompt": self.seeds_per_prompt}

    def places(self) -> list[Place]:
        """All images of the task: every prompt once, then every prompt with its second seed, so that more seeds only add to the end."""
        return [
            Place(prompt_id=identifier, prompt=text, seed_index=index, seed=noise_seed(self.name, identifier, index))
            for index in range(self.seeds_per_prompt)
            for identifier, text in self.prompts
        ]


_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "“”‘’«»–—…·", " "))


def normalised(text: str) -> str:
    """The text without case, punctuation, compatibility forms (NFKC) and surplus white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION).split())


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Evaluation prompts that also occur among the curation prompts."""

    exact: tuple[str, ...]
    """Letter by letter."""
    near: tuple[str, ...]
    """Only once case, punctuation and white space are taken away."""

    def __len__(self) -> int:
        return len(self.exact) + len(self.near)


def overlap(task: Task, curation_prompts: Iterable[str]) -> Overlap:
    """Which prompts of the task the curation has seen."""
    seen = set(curation_prompts)
    seen_normalised = {normalised(text) for text in seen}
    texts = [text for _, text in task.prompts]
    exact = tuple(text for text in texts if text in seen)
    near = tuple(text for text in texts if text not in seen and normalised(text) in seen_normalised)
    return Overlap(exact=exact, near=near)


def checked_overlap(task: Task, curation_prompts: Iterable[str], *, allowed: bool) -> Overlap:
    """Raises `RpoError` with counts and examples if the task's prompts are not new to the curation, unless that is `allowed`."""
    found = overlap(task, curation_prompts)
    if len(found) and not allowed:
        examples = "; ".join(repr(text) for text in (found.exact + found.near)[:3])
        raise RpoError(
            f"task {task.name!r}: {len(found)} of {len(task.prompts)} evaluation prompts were used in curation "
            f"({len(found.exact)} word for word, {len(found.near)} apart from case, punctuation or spacing), for example {examples}. "
            "Take them out of one of the two lists: on prompts it was tuned on, a model looks better than it is. "
            "--allow-overlap evaluates all the same and reports it."
        )
    return found
