"""One question, and one more try with the reason when the answer cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from rpo.curate.prompts.templates import filled, template
from rpo.data.chat import ChatAnswer, ChatRequest, Message
from rpo.errors import RowError
from rpo.protocols import Chat

Read = TypeVar("Read")
_SHOWN = 4000
"""Characters of an unreadable answer that the model sees again."""


def ask(chat: Chat, requests: Sequence[ChatRequest], readers: Sequence[Callable[[str], Read]]) -> list[Read | RowError]:
    """What each request's answer says to its reader, which raises `ValueError` for one it cannot read.

    Such a request is put once more, with the answer and the reason; after that the row's error keeps the raw answer.
    """
    found = [_read(answer, reader) for answer, reader in zip(chat.complete(requests), readers, strict=True)]
    again = [i for i, result in enumerate(found) if isinstance(result, RowError) and result.raw]
    if again:
        repairs = [_repair(requests[i], found[i]) for i in again]  # pyright: ignore[reportArgumentType]
        for i, answer in zip(again, chat.complete(repairs), strict=True):
            found[i] = _read(answer, readers[i])
    return found


def _read(answer: ChatAnswer | RowError, reader: Callable[[str], Read]) -> Read | RowError:
    if isinstance(answer, RowError):
        return answer
    try:
        return reader(answer.text)
    except ValueError as error:
        return RowError(f"answer not understood: {error}", raw=answer.text or "(an empty answer)")


def _repair(request: ChatRequest, error: RowError) -> ChatRequest:
    said = Message(role="assistant", parts=(error.raw[:_SHOWN],))
    again = Message(role="user", parts=(filled(template("repair"), {"error": str(error)}),))
    return replace(request, messages=(*request.messages, said, again))
