"""One question, and one more try with the reason when the answer cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from rpo.curation.vlm.templates import filled, template
from rpo.data.chat import ChatAnswer, ChatRequest, Message
from rpo.data.model_text import without_thought
from rpo.errors import RowError
from rpo.protocols import Chat

Read = TypeVar("Read")
REPAIRS = ("repair", "repair_cut")
"""Templates of the second try."""
_SHOWN = 4000
"""Characters of an unreadable answer that the model sees again."""
_UNREADABLE = "answer not understood: "
_CUT = "cut short at max_tokens"


def ask(chat: Chat, requests: Sequence[ChatRequest], readers: Sequence[Callable[[str], Read]]) -> list[Read | RowError]:
    """What each request's answer says to its reader, which raises `ValueError` for one it cannot read.

    Such a request is sent once more, with the answer and the reason; after that the row's error keeps the raw answer.
    """
    found = [_read(answer, reader) for answer, reader in zip(chat.complete(requests), readers, strict=True)]
    again = [(i, result) for i, result in enumerate(found) if isinstance(result, RowError) and result.raw]
    if again:
        repairs = [_repair(requests[i], error) for i, error in again]
        for (i, _), answer in zip(again, chat.complete(repairs), strict=True):
            found[i] = _read(answer, readers[i])
    return found


def _read(answer: ChatAnswer | RowError, reader: Callable[[str], Read]) -> Read | RowError:
    if isinstance(answer, RowError):
        return answer
    try:
        return reader(answer.text)
    except ValueError as error:
        return RowError(f"{_UNREADABLE}{error}", raw=answer.text or "(an empty answer)")


def _repair(request: ChatRequest, error: RowError) -> ChatRequest:
    """The question with what was wrong. An answer that was cut off often loops: it is left out, and a shorter one is asked for."""
    *before, last = request.messages
    if _CUT in str(error):
        return replace(request, messages=(*before, replace(last, parts=(*last.parts, template("repair_cut")))))
    shown = without_thought(error.raw)[:_SHOWN] or "(no answer beside a thought)"
    again = filled(template("repair"), {"error": str(error).removeprefix(_UNREADABLE)})
    answer = Message(role="assistant", parts=(shown,))
    return replace(request, messages=(*request.messages, answer, Message(role="user", parts=(again,))))
