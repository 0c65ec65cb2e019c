"""The embedded critic behind the protocol says over the wire what it says in process."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig, hang_up
from rpo.backends.scorers.vision_chat import FactsConfig, PairwiseConfig, RubricConfig, VqaScorerConfig
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import FromCritiqueConfig, VlmInstructorConfig
from rpo.data.chat import ChatRequest, Message
from rpo.data.schema import Critique, Instructions
from rpo.errors import RowError
from rpo.shapes.critic import ShapesCritic, ShapesCriticConfig, ShapesInstructorConfig
from rpo.shapes.render import render_scene
from rpo.shapes.scenes import caption, parse_caption, scenes
from rpo.shapes.serving import embedded_responder
from rpo.shapes.weights import weights_folder
from rpo.testing.server import Asked, FakeServer


@pytest.fixture(scope="module")
def critic() -> ShapesCritic:
    return ShapesCriticConfig(model=str(weights_folder() / "critic")).build()


@pytest.fixture(scope="module")
def chat(critic: ShapesCritic) -> Iterator[OpenAIChatConfig]:
    with FakeServer(embedded_responder(critic)) as server:
        yield OpenAIChatConfig(model="shapes", server=ChatServer(base_url=server.url))
        hang_up()


@pytest.fixture(scope="module")
def seen() -> tuple[list[np.ndarray], list[str]]:
    """Pictures, and captions of which some fit and some do not."""
    source, rng = scenes(np.random.default_rng(5), held_out=False), np.random.default_rng(6)
    shown = [next(source) for _ in range(12)]
    captions = [caption(scene if i % 3 == 0 else next(source)) for i, scene in enumerate(shown)]
    return [render_scene(scene, rng) for scene in shown], captions


def test_over_the_wire_as_in_process(chat: OpenAIChatConfig, critic: ShapesCritic, seen: tuple[list[np.ndarray], list[str]]) -> None:
    images, prompts = seen
    told = critic.critique(images, prompts)
    heard = VlmCriticConfig(chat=chat).build().critique(images, prompts)
    assert heard == told and any(c.no_issue for c in told if isinstance(c, Critique))  # type: ignore[union-attr]
    faulty = [(c, prompt) for c, prompt in zip(told, prompts, strict=True) if isinstance(c, Critique) and not c.no_issue]
    critiques, wanted = [c for c, _ in faulty], [prompt for _, prompt in faulty]
    said = ShapesInstructorConfig().build().instruct(wanted, critiques)
    assert VlmInstructorConfig(chat=chat, max_instructions=2).build().instruct(wanted, critiques) == said


def test_one_call_and_free_text_lead_to_the_same_instructions(
    chat: OpenAIChatConfig, critic: ShapesCritic, seen: tuple[list[np.ndarray], list[str]]
) -> None:
    images, prompts = seen
    told = [c for c in critic.critique(images, prompts) if isinstance(c, Critique)]
    said = ShapesInstructorConfig().build().instruct(prompts, told)
    both = VlmCriticConfig(chat=chat, profile="one_call").build().critique(images, prompts)
    assert FromCritiqueConfig().instruct(prompts, [c for c in both if isinstance(c, Critique)]) == said
    free = [c for c in VlmCriticConfig(chat=chat, profile="paper").build().critique(images, prompts) if isinstance(c, Critique)]
    assert [c.no_issue for c in free] == [c.no_issue for c in told]
    extracted = VlmInstructorConfig(chat=chat).build().instruct(prompts, free)
    assert _words(extracted) == _words(said)


def _words(answers: Sequence[Instructions | RowError]) -> list[list[str]]:
    return [[one.instruction for one in answer.instructions] for answer in answers if isinstance(answer, Instructions)]


def test_one_word_answers(chat: OpenAIChatConfig) -> None:
    source = scenes(np.random.default_rng(9), held_out=False)
    right, wrong = next(source), next(source)
    image, other = (render_scene(scene, np.random.default_rng(1)) for scene in (right, wrong))
    shown, asked = [image, image], [caption(right), caption(wrong)]
    fits, differs = VqaScorerConfig(chat=chat).build().score(shown, asked)
    assert isinstance(fits, float) and fits > 0.9 and isinstance(differs, float) and differs < 0.1
    good, bad = RubricConfig(chat=chat).build().measure(shown, asked)
    assert good["vlm_follows"] > 4.5 > bad["vlm_follows"] and good["vlm_appeal"] == bad["vlm_appeal"] > 4.5
    better, same = PairwiseConfig(chat=chat).build().compare([image, image], [other, image], [caption(right)] * 2)
    assert isinstance(better, float) and better > 0.9 and same == 0.5


def test_facts_of_a_caption(chat: OpenAIChatConfig) -> None:
    right = parse_caption("a small red circle left of a large blue star on a gray background")
    wrong = parse_caption("a small green circle left of a large blue star on a gray background")
    images = [render_scene(scene, np.random.default_rng(1)) for scene in (right, wrong)]
    fits, differs = FactsConfig(chat=chat).build().measure(images, [caption(right)] * 2)
    assert fits["vlm_all_facts"] == 1.0 and fits["vlm_facts"] == pytest.approx(0.95)
    assert differs["vlm_all_facts"] == 0.0 and differs["vlm_facts"] == pytest.approx((3 * 0.95 + 0.05) / 4), "one fact of four"


def test_other_questions_are_refused_in_words(critic: ShapesCritic, chat: OpenAIChatConfig) -> None:
    (answer,) = chat.build().complete([ChatRequest(messages=(Message(role="user", parts=("What is love?",)),))])
    assert isinstance(answer, RowError) and "HTTP 400: the embedded model understands the templates" in str(answer)
    two = Asked(model="m", system="", texts=('Prompt: "a cat"',), images=(np.zeros((8, 8, 3), np.uint8),) * 2, schema_name="critique",
                first_token=0, body={})  # fmt: skip
    with pytest.raises(ValueError, match="one image at a time, got 2"):
        embedded_responder(critic)(two)
