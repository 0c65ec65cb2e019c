"""What one request carries, and how many connections there are."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rpo.backends.chat_connections import Connections

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
        connections = Connections(url, "sk-1", 60.0)
        for count in at_once:
            await asyncio.gather(*[connections.post(b"{}") for _ in range(count)])
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
