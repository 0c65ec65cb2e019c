"""What is evaluated: a named set of prompts, how many seeds each, and the noise that every model starts from."""

import difflib
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


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A public set of prompts, and how papers use it; its prompts come from a file or the Hub."""

    prompts: int
    """How many it has."""
    images_per_prompt: int
    """How many images of each are usual."""
    settings: str
    """What is usual beside 512 px, 50 steps, guidance 7.5 for Stable Diffusion 1 and 1024 px, 50 steps, guidance 5 for SDXL."""


PROMPT_SETS = {
    "pickapic": PromptSet(prompts=500, images_per_prompt=5, settings="test split of Pick-a-Pic v2, unique prompts"),
    "partiprompts": PromptSet(prompts=1632, images_per_prompt=1, settings="12 categories, 11 challenges"),
    "hpsv2": PromptSet(prompts=3200, images_per_prompt=1, settings="4 styles of 800"),
    "drawbench": PromptSet(prompts=200, images_per_prompt=5, settings="too few prompts for win rates near one half"),
    "geneval": PromptSet(prompts=553, images_per_prompt=4, settings="its own default is guidance 9; 6 kinds of task"),
    "t2i_compbench": PromptSet(prompts=2400, images_per_prompt=10, settings="8 categories of 300"),
    "dpg": PromptSet(prompts=1065, images_per_prompt=4, settings="two thirds are longer than CLIP's text encoders read"),
}
"""By the name that `--task` takes; the counts are those of the published files."""


def prompt_set(name: str, found: int) -> tuple[PromptSet, str]:
    """The set called `name`, and what is to be said if `found` prompts are not all of it. Raises `ValueError` for an unknown name."""
    if name not in PROMPT_SETS:
        close = difflib.get_close_matches(name, PROMPT_SETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no task {name!r}.{hint} Known are {', '.join(PROMPT_SETS)}.")
    known = PROMPT_SETS[name]
    if found == known.prompts:
        return known, ""
    return known, f"warning: {name} has {known.prompts} prompts, these are {found}: numbers are not comparable with published ones"


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
