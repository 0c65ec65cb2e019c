"""What one request carries, and how many connections there are."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rpo.backends.chat.connections import Connections, Response, is_loopback, proxy_for
from rpo.backends.chat.replies import Retry, StopRun

seen: list[tuple[int, str, dict[str, str]]] = []
"""Of every request: the client's port, the path, the headers."""


class Recorder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        seen.append((self.client_address[1], self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def post(url: str, *at_once: int) -> None:
    async def run() -> None:
        connections = Connections(url, "sk-1")
        for count in at_once:
            await asyncio.gather(*[connections.post(b"{}", 60.0) for _ in range(count)])
        await connections.close()

    asyncio.run(run())


@pytest.mark.parametrize("end", ["", "/"])
def test_a_server_is_told_the_key_and_nothing_of_this_machine(url: str, end: str) -> None:
    post(url + end, 1)
    [(_, path, headers)] = seen
    assert path == "/v1/chat/completions"
    assert (headers["authorization"], headers["content-type"], headers["accept-encoding"]) == (
        "Bearer sk-1",
        "application/json",
        "identity",
    )
    assert not [name for name in headers if name.startswith("x-stainless")]


def test_connections_are_as_many_as_requests_at_once_and_are_used_again(url: str) -> None:
    post(url, 3, 1, 3, 2)
    assert len(seen) == 9 and len({port for port, _, _ in seen}) == 3


LOOPBACK = ["localhost", "LOCALHOST", "a.localhost", "localhost.", "127.0.0.1", "127.1", "127.8.9.10", "::1", "0.0.0.0", "::ffff:127.0.0.1"]
ELSEWHERE = ["example.invalid", "10.0.0.1", "128.0.0.1", "localhost.example.invalid", "::2", "127.0.0.1.example.invalid"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_is_known_by_every_name_and_never_asked_through_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert is_loopback(host)
    assert proxy_for(f"http://{f'[{host}]' if ':' in host else host}:8000/v1") is None


@pytest.mark.parametrize("host", ELSEWHERE)
def test_other_machines_are_asked_through_the_proxy_of_the_environment(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "127.0.0.1:9")
    monkeypatch.delenv("http_proxy", raising=False)
    address = f"http://{f'[{host}]' if ':' in host else host}:8000/v1"
    assert not is_loopback(host) and proxy_for(address) == "http://127.0.0.1:9"
    monkeypatch.setenv("NO_PROXY", host)
    monkeypatch.setenv("no_proxy", host)
    assert proxy_for(address) is None


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "http_proxy"])
def test_a_question_for_this_machine_arrives_there_whatever_proxies_there_are(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    post(url.replace("127.0.0.1", "localhost"), 1)
    assert len(seen) == 1


def answer_of(url: str, key: str = "sk-1") -> Response | Retry | StopRun:
    async def run() -> Response | Retry | StopRun:
        connections = Connections(url, key)
        try:
            return await connections.post(b"{}", 10.0)
        finally:
            await connections.close()

    return asyncio.run(run())


def test_what_a_proxy_refuses_names_the_proxy_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://me:secret@127.0.0.1:9")
    for address in ("http://example.invalid/v1", "https://example.invalid/v1"):
        found = answer_of(address)
        assert isinstance(found, Retry) and found.trouble == "unreachable"
        assert "(through the proxy http://127.0.0.1:9; NO_PROXY lists hosts that need none)" in found.why and "secret" not in found.why


def test_a_request_that_cannot_be_formed_ends_the_run(url: str) -> None:
    found = answer_of(url, "sk-1\nX-Injected: 1")
    assert isinstance(found, StopRun) and "cannot be formed" in found.why and not seen


def test_nobody_there_is_told_from_a_broken_connection() -> None:
    found = answer_of("http://127.0.0.1:9/v1")
    assert isinstance(found, Retry) and found.trouble == "unreachable" and "billed" not in found.why
