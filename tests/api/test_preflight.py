"""What a run needs is looked for before its first image."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rpo.accounting.ledger import Account
from rpo.accounting.metering import local_models, metered
from rpo.api.curation import Caps
from rpo.api.preflight import check_models
from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig
from rpo.cli import main
from rpo.errors import RpoError
from rpo.recipes import load


@dataclass(frozen=True, kw_only=True)
class Part:
    model: str

    def models(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    chat: OpenAIChatConfig
    others: tuple[Part, ...] = ()
    nothing: Part | None = None
    limits: dict[str, int] = field(default_factory=dict)

    def models(self) -> tuple[str, ...]:
        return self.chat.models()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def chat(port: int) -> OpenAIChatConfig:
    return OpenAIChatConfig(model="owner/vlm", server=ChatServer(base_url=f"http://127.0.0.1:{port}/v1"))


def test_every_missing_part_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parts = (Part(model=str(tmp_path)), Part(model="models/image_reward"), Part(model="./nowhere"), Part(model="/absent/a/b"))
    config = Wrapped(chat=chat(closed_port()), others=parts)
    with pytest.raises(RpoError) as refused:
        check_models(config)
    words = str(refused.value)
    assert "models/image_reward is no folder here" in words or "models/image_reward is neither" in words
    assert "there is no model folder ./nowhere" in words and "there is no model folder /absent/a/b" in words
    assert "no server takes connections at http://127.0.0.1:" in words and str(tmp_path) not in words and "owner/vlm" not in words


def test_what_is_there_passes(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        config = Wrapped(chat=chat(server.getsockname()[1]), others=(Part(model=str(tmp_path)),))
        check_models(config)
        check_models(metered(config, Account(ledger=tmp_path / "l", answers=tmp_path / "a")))
    check_models(Wrapped(chat=chat(closed_port())), servers=False)


def test_remote_models_are_no_folders() -> None:
    assert local_models(Wrapped(chat=chat(1), others=(Part(model="x"),))) == ["x"]
    shapes = load("shapes")
    assert local_models(shapes.curate) and all(Path(name).exists() for name in local_models(shapes.curate))


@pytest.mark.parametrize("command", ["curate", "run"])
def test_a_cap_on_cost_without_a_price_ends_the_run_before_the_first_image(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([command, "shapes_vlm", "--curate.prompts.count", "2", "--out", str(out), "--max-cost", "1"]) == 2
    assert "--max-cost needs the price of 'shapes'; add it to server.prices" in capsys.readouterr().err
    assert not list(out.glob("*_source-*"))


def test_a_key_too_short_ends_the_run_before_the_first_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPO_API_KEY", "abc123")
    out = tmp_path / "run"
    assert main(["curate", "shapes_vlm", "--curate.prompts.count", "2", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "RPO_API_KEY holds a key of 6 characters" in told and "abc123" not in told and not list(out.glob("*_source-*"))


def test_judges_without_a_price_are_found_before_the_pairs_are_made(tmp_path: Path) -> None:
    config = (("judge", chat(closed_port())),)
    with pytest.raises(ValueError, match="--max-cost needs the price of 'owner/vlm'"):
        Caps(max_cost=1.0).metered(config, tmp_path)


def test_a_vlm_that_is_down_ends_the_run_before_the_first_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["curate", "shapes_vlm", "--curate.prompts.count", "2", "--out", str(out)]
    assert main([*arguments, "--vlm-url", f"http://127.0.0.1:{closed_port()}/v1"]) == 1
    assert "no server takes connections" in capsys.readouterr().err
    assert not list(out.glob("*_source-*"))
