"""Questions as data."""

import pytest

from rpo.data.chat import ChatRequest, Sampling


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_token"):
        ChatRequest(messages=(), first_token=21)
