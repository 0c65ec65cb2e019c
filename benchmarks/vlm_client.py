"""What the client for vision-language models adds to a request, and how busy it keeps a server whose rate is known.

    python benchmarks/vlm_client.py [--requests 1024] [--slots 32] [--latency-ms 1000] [--side 512] [--format png|webp|jpeg]

The server runs in a process of its own, on the loopback: `slots` answers at a time, each after `latency` (a model's time, in which it
needs no processor). Answers and ledger are files, as in a run. Printed are the client's processor time per request, that of encoding
the image (measured in the threads that do it, in the same run) apart from everything else, what the client adds to the wall clock of each
request while the slots are full and of one request after another, and the share of the time in which the slots were at work. Requests that
are no whole number of rounds of the slots leave slots empty in the last round.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import get_args

import numpy as np

from rpo.accounting.ledger import Account
from rpo.backends.chat import wire as chat_wire
from rpo.backends.chat.openai import ChatServer, OpenAIChat, OpenAIChatConfig, hang_up
from rpo.backends.chat.pacing import Pacing
from rpo.backends.chat.wire import ImageFormat
from rpo.data.chat import ChatAnswer, ChatRequest, Message
from rpo.testing.server import Asked, FakeServer


def answer(asked: Asked) -> str:
    return "I see a red star."


def serve(latency_s: float, slots: int, pipe: Connection) -> None:
    with FakeServer(answer, latency_s=latency_s, slots=slots) as server:
        pipe.send(server.url)
        while pipe.recv() != "stop":
            pipe.send((server.requests, server.busy_s))


def requests(count: int, side: int, text: str) -> list[ChatRequest]:
    """Pictures as hard to encode as a photograph: soft waves of colour under a little grain."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:side, :side] / side
    waves = np.stack([127 + 90 * np.sin(5 * a * x + 4 * b * y + c) for a, b, c in rng.random((8 * 3, 3)) * 3], -1)
    images = np.clip(np.moveaxis(waves.reshape(side, side, 8, 3), 2, 0) + rng.normal(0, 2, (8, side, side, 3)), 0, 255).astype(np.uint8)
    return [ChatRequest(messages=(Message(role="user", parts=(f"{text} {i}", images[i % 8])),)) for i in range(count)]


class Encoding:
    """Stands in for `encoded_image` and adds up the processor's time that it takes."""

    def __init__(self) -> None:
        self.seconds, self._lock, self._encoded_image = 0.0, threading.Lock(), chat_wire.encoded_image

    def __call__(self, image: np.ndarray, side_max: int, image_format: ImageFormat) -> bytes:
        began = time.thread_time()
        encoded = self._encoded_image(image, side_max, image_format)
        with self._lock:
            self.seconds += time.thread_time() - began
        return encoded


def client(url: str, slots: int, image_format: ImageFormat, folder: Path) -> OpenAIChat:
    pacing = Pacing(concurrency_start=min(8, slots), concurrency_max=2 * slots)
    account = Account(ledger=folder / "ledger.sqlite", answers=folder / "answers.sqlite")
    return OpenAIChatConfig(model="m", image_format=image_format, server=ChatServer(base_url=url, pacing=pacing)).build_metered(account)


def asked(chat: OpenAIChat, given: list[ChatRequest]) -> None:
    assert all(isinstance(answer, ChatAnswer) for answer in chat.complete(given))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=1000.0)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--format", default="png", choices=get_args(ImageFormat))
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(options.latency_ms / 1000, options.slots, there))
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, here, client(here.recv(), options.slots, options.format, Path(folder)))
        hang_up()
    here.send("stop")
    server.join()


def measure(options: argparse.Namespace, server: Connection, chat: OpenAIChat) -> None:
    latency = options.latency_ms / 1000
    asked(chat, requests(8 * options.slots, options.side, "warm up"))
    given = requests(10, options.side, "one by one")
    began = time.perf_counter()
    for request in given:
        asked(chat, [request])
    alone_ms = 1000 * ((time.perf_counter() - began) / len(given) - latency)

    given = requests(options.requests, options.side, "many")
    encoding = chat_wire.encoded_image = Encoding()
    server.send("so far")
    busy_before = server.recv()[1]
    began, cpu = time.perf_counter(), time.process_time()
    asked(chat, given)
    wall, used = time.perf_counter() - began, time.process_time() - cpu
    server.send("so far")
    busy = (server.recv()[1] - busy_before) / (wall * options.slots)
    print(f"{options.requests} requests, images of {options.side} px, {options.slots} slots of {options.latency_ms:g} ms:")
    print(f"  {options.requests / wall:.1f} requests/s of {options.slots / latency:.1f} possible, server busy {100 * busy:.1f} %")
    added_ms = 1000 * (wall / options.requests - latency / options.slots)
    print(f"  {added_ms:.2f} ms of the wall clock added to each request, with all slots in use")
    encoding_ms, client_ms = 1000 * encoding.seconds / options.requests, 1000 * used / options.requests
    print(f"  client's processor per request: {encoding_ms:.2f} ms to encode the image ({options.format}),", end=" ")
    print(f"{client_ms - encoding_ms:.2f} ms for everything else")
    print(f"  {alone_ms:.2f} ms beyond the server's own time for a request alone, encoding and the way over the loopback included")


if __name__ == "__main__":
    main()
