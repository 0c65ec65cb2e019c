"""Models over a wire are found wherever a recipe holds them, and keep the run's accounts without changing what results depend on."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rpo.accounting.ledger import Spent, spent
from rpo.accounting.metering import Metered, account_in, connections_closed, metered, served_by, served_models, spent_lines
from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig
from rpo.core.hashing import canonical
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.data.chat import ChatRequest, Message
from rpo.recipes import load
from rpo.testing.server import FakeServer


def test_every_model_over_a_wire_is_found() -> None:
    curate = load("shapes_vlm").curate
    assert [model.models() for model in served_models(curate)] == [("shapes",), ("shapes",)]
    assert served_models(load("shapes").curate) == []
    assert len(served_models((("reward", OpenAIChatConfig(model="m")),))) == 1  # as rewards are held


def test_they_are_moved_and_renamed() -> None:
    moved = served_by(load("shapes_vlm").curate, base_url="http://127.0.0.1:1/v1", model=None)
    assert {(m.server.base_url, m.model) for m in served_models(moved)} == {("http://127.0.0.1:1/v1", "shapes")}  # type: ignore[attr-defined]
    renamed = served_by(moved, base_url=None, model="other")
    assert {(m.server.base_url, m.model) for m in served_models(renamed)} == {("http://127.0.0.1:1/v1", "other")}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="this one asks none"):
        served_by(load("shapes").curate, base_url="http://127.0.0.1:1/v1", model=None)


def test_neither_accounts_nor_the_servers_address_change_a_fingerprint(tmp_path: Path) -> None:
    critic = VlmCriticConfig(chat=OpenAIChatConfig(model="m"))

    def print_of(config: VlmCriticConfig, folder: Path, max_calls: int | None = None) -> object:
        return canonical(metered(config, account_in(folder, None, None, max_calls)))

    before = print_of(critic, tmp_path)
    moved = served_by(critic, base_url="http://127.0.0.1:1/v1", model=None)
    assert print_of(moved, tmp_path / "other", 5) == before
    assert print_of(served_by(critic, base_url=None, model="other"), tmp_path) != before
    assert print_of(replace(critic, max_tokens=9), tmp_path) != before
    assert isinstance(metered(critic, account_in(tmp_path, None, None, None)).chat, Metered)


def test_caps_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_cost must be at least 0"):
        account_in(tmp_path, None, -1.0, None)


def test_what_was_paid_is_told() -> None:
    line = Spent(purpose="critique", model="m", calls=12, answered=10, input_tokens=9000, output_tokens=1000, cost=0.5, seconds=3.0)
    assert [" ".join(told.split()) for told in spent_lines([line], 4)] == [
        "critique 12 calls to m, 10 answered, 9,000 tokens read, 1,000 written, $0.5000", "a kept pair 2,500 tokens, $0.12500",
    ]  # fmt: skip
    assert len(spent_lines([line], 0)) == 1 and spent_lines([], 5) == []
    assert "2 without an answer that the server may bill as well" in spent_lines([replace(line, maybe_billed=2)], 4)[0]


def test_connections_are_closed_at_the_end_of_a_run_also_of_one_that_failed(tmp_path: Path) -> None:
    request = ChatRequest(messages=(Message(role="user", parts=("Hi",)),))
    with FakeServer(lambda asked: "Hello") as server:
        chat = OpenAIChatConfig(model="m", server=ChatServer(base_url=server.url))
        config = metered((("judge", chat), ("other", chat)), account_in(tmp_path, None, None, None))

        def lines() -> int:
            return sum(thread.name == "rpo-chat" for thread in threading.enumerate())

        with pytest.raises(RuntimeError, match="failed"), connections_closed(config):
            for _, model in config:
                assert isinstance(model, Metered) and len(model.build().complete([request])) == 1
            assert lines() == 1, "one for both"
            raise RuntimeError("failed")
        assert lines() == 0
    assert [line.calls for line in spent(tmp_path / "ledger.sqlite")] == [1]
