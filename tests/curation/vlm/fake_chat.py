"""A chat that answers from a list, and remembers what it was asked."""

from collections.abc import Callable, Sequence

from rpo.data.chat import ChatAnswer, ChatRequest
from rpo.errors import RowError


class FakeChat:
    def __init__(self, answer: Callable[[ChatRequest], str | RowError]) -> None:
        self.answer = answer
        self.asked: list[ChatRequest] = []

    def models(self) -> tuple[str, ...]:
        return ("fake",)

    def build(self) -> "FakeChat":
        return self

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer | RowError]:
        self.asked += requests
        said = [self.answer(request) for request in requests]
        return [text if isinstance(text, RowError) else ChatAnswer(text=text) for text in said]


def texts(request: ChatRequest) -> str:
    """All words of a request."""
    return "\n".join(part for message in request.messages for part in message.parts if isinstance(part, str))
