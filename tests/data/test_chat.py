"""Questions as data, and what a first token says of yes and no."""

import math

import pytest

from rpo.data.chat import ChatRequest, Sampling, yes_probability
from rpo.errors import RowError


def test_yes_probability_counts_every_spelling() -> None:
    alternatives = {"Yes": math.log(0.5), " yes": math.log(0.1), "No": math.log(0.2), "Maybe": math.log(0.2)}
    assert yes_probability(alternatives) == pytest.approx(0.6 / 0.8)
    assert yes_probability({"NO.": -0.1}) == 0.0


def test_neither_yes_nor_no_is_the_rows_error() -> None:
    with pytest.raises(RowError, match="neither yes nor no, but with .'The'"):
        yes_probability({"The": -0.1, "I": -3.0})
    with pytest.raises(RowError):
        yes_probability({})


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_token"):
        ChatRequest(messages=(), first_token=21)
