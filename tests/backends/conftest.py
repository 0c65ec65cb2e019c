"""Lines to servers are closed after each test, and nobody waits long for a retry."""

from collections.abc import Iterator

import pytest

from rpo.backends.chat import pacing as chat_pace
from rpo.backends.chat.openai import hang_up


@pytest.fixture(autouse=True)
def hung_up(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if "backoff" not in request.node.name:
        monkeypatch.setattr(chat_pace, "BACKOFF_FIRST_S", 0.02)
    yield
    hang_up()
