"""The embedded critic and instructor behind the protocol that vision-language models are served by: a VLM for those who have none.

It reads the package's own templates (`rpo.curation.vlm`) as a model would, by their words; other questions it does not understand.
"""

import json
import math
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from rpo.data.schema import NOT_ASKED_FOR, Critique, Instructions
from rpo.errors import RowError
from rpo.protocols import Critic
from rpo.shapes.critic import ShapesCriticConfig, ShapesInstructor, ShapesInstructorConfig
from rpo.shapes.scenes import parse_caption
from rpo.shapes.weights import checked_weights, weights_folder
from rpo.testing.server import Asked, FakeServer, Faults, Said

_PROMPT = re.compile(r'^Prompt: (".*")$', flags=re.M)
_CRITIQUE = re.compile(r"^Critique: (.*)$", flags=re.M)
_QUOTED = re.compile(r'"([^"]+)"')
_DESCRIPTION = re.compile(r'^Description: (".*")$', flags=re.M)
_FACT = re.compile(r'Is this true of the image: "(.*)"\?')
_SURE = 0.95


def embedded_responder(critic: Critic) -> Callable[[Asked], str | Said]:
    """Answers for `FakeServer`: critiques, instructions, both in one call, free text, whether an image shows a caption (yes or no),
    marks from 1 to 5, the facts of a caption and whether they hold, and which of two images is better. It sees wrong scenes only: for
    looks every image gets a 5.

    `ValueError` for anything else becomes the server's refusal of that request.
    """
    instructor = ShapesInstructor(ShapesInstructorConfig())

    def respond(asked: Asked) -> str | Said:
        text = "\n".join(asked.texts)
        if asked.first_token:
            return _one_word(critic, asked.images, _found(_QUOTED, text), text)
        if (described := _DESCRIPTION.search(text)) and not asked.images:
            return json.dumps({"facts": _facts(json.loads(described[1]))})
        prompt = json.loads(_found(_PROMPT, text))
        if asked.schema_name == "instructions":
            return _instructions(instructor, prompt, _found(_CRITIQUE, text)).model_dump_json(exclude={"adjustments"})
        critique = _looked(critic, asked.images, prompt)
        told = critique.model_dump_json(exclude=set(NOT_ASKED_FOR))
        if asked.schema_name == "critique":
            return told
        if asked.schema_name == "critique_and_instructions":
            instructions = _instructions(instructor, prompt, told).model_dump_json(exclude={"adjustments"})
            return f'{{"critique": {told}, "instructions": {instructions}}}'
        return f"{critique.reasoning}\nOverall: {_mark(critique)}"

    return respond


def _found(pattern: re.Pattern[str], text: str) -> str:
    if (found := pattern.search(text)) is None:
        raise ValueError("the embedded model understands the templates of rpo.curation.vlm only")
    return found[1]


def _looked(critic: Critic, images: Sequence[np.ndarray], prompt: str) -> Critique:
    if len(images) != 1:
        raise ValueError(f"the embedded model looks at one image at a time, got {len(images)}")
    (critique,) = critic.critique(images, [prompt])
    if isinstance(critique, RowError):
        raise ValueError(str(critique))
    return critique


def _one_word(critic: Critic, shown: Sequence[np.ndarray], prompt: str, text: str) -> Said:
    if len(shown) == 2:
        first, second = (_mark(_looked(critic, [image], prompt)) for image in shown)
        return _sure_of("1" if first > second else "2" if second > first else "", ("1", "2"))
    critique = _looked(critic, shown, prompt)
    if "from 1 to 5" in text:
        return _sure_of("5" if "Leave aside" in text else str(_mark(critique)), ("1", "2", "3", "4", "5"))
    asked = _FACT.search(text)
    fine = critique.no_issue if asked is None else _holds(critique, asked[1])
    return _sure_of("Yes" if fine else "No", ("Yes", "No"))


def _facts(prompt: str) -> list[str]:
    scene = parse_caption(prompt)
    things = [f"the {thing.phrase}" for thing in scene.things]
    placed = [f"{things[0]} is {scene.relation} {things[1]}"] if scene.relation else []
    return [*(f"there is a {thing.phrase}" for thing in scene.things), f"there is a {scene.background} background", *placed]


def _holds(critique: Critique, fact: str) -> bool:
    if fact.startswith("the "):
        return not any(issue.aspect == "spatial" for issue in critique.issues)
    return fact.removeprefix("there is a ") in critique.reasoning.partition("Asked for is")[0]


def _mark(critique: Critique) -> int:
    return 5 if critique.no_issue else min(4, critique.overall)


def _sure_of(word: str, words: Sequence[str]) -> Said:
    """The word, with what is left of the probability shared by the others; all alike for none of them."""
    rest = (1 - _SURE) / (len(words) - 1)
    shares = {one: (_SURE if one == word else rest) if word else 1 / len(words) for one in words}
    return Said(text=word or words[0], first_token={one: math.log(share) for one, share in shares.items()})


def _instructions(instructor: ShapesInstructor, prompt: str, told: str) -> Instructions:
    value = json.loads(told)
    if not isinstance(value, str):
        (answer,) = instructor.instruct([prompt], [Critique.model_validate_json(told)])
        assert isinstance(answer, Instructions)
        return answer
    # Free text, as the paper's profile has it: no list of issues that instructions could point to.
    critique = Critique(reasoning=value, aspects=(), issues=(), keep=(), overall=1, no_issue=False)
    try:
        (answer,) = instructor.instruct([prompt], [critique])
    except ValueError:  # what was seen is no scene that has a caption
        return Instructions(instructions=(), skip_reason="no edit of ours can fix this")
    assert isinstance(answer, Instructions)
    return Instructions(instructions=tuple(one.model_copy(update={"addresses": ()}) for one in answer.instructions))


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `rpo shapes serve`."""

    port: int = 8000
    """On the loopback; 0 takes a free one."""
    faults: float = 0.0
    """Share of requests that fail in every way that is known, 0 to 1, for trying out what a client does about it."""
    seed: int = 0
    """Decides the faults."""
    folder: Path | None = None
    """The embedded weights; those of the package if not given."""
    token: bool = False
    """Whether every request must bring a token, which is drawn and printed at the start; clients take it from RPO_API_KEY."""


def serve(options: ServeOptions, console: Console) -> None:
    """Serves until it is stopped."""
    folder = options.folder or checked_weights(weights_folder())
    critic = ShapesCriticConfig(model=str(folder / "critic")).build()
    faults = Faults(rate=options.faults, seed=options.seed)
    key = secrets.token_urlsafe(24) if options.token else ""
    with FakeServer(embedded_responder(critic), faults=faults, port=options.port, key=key) as server:
        console.print(f"the embedded critic and instructor answer at {server.url}; stop with Ctrl-C", highlight=False)
        if key:
            console.print(f"token: RPO_API_KEY={key}", highlight=False)
        try:
            threading.Event().wait()
        finally:
            console.print(f"{server.requests} requests, {sum(server.failed.values())} of them made to fail", highlight=False)
