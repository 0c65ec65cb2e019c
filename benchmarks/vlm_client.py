"""What the client for vision-language models adds to a request, and how busy it keeps a server whose rate is known.

    python benchmarks/vlm_client.py [--requests 1000] [--slots 32] [--latency-ms 1000] [--side 512] [--format png|webp|jpeg]

The server runs in a process of its own, on the loopback: `slots` answers at a time, each after `latency` (a model's time, in which it
needs no processor). Printed are the client's processor time per request (encoding the image included), what the client adds to the wall
clock of one request after another, and the share of the time in which the server's slots were at work.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import get_args

import numpy as np

from rpo.backends.chat_pace import Pacing
from rpo.backends.chat_wire import ImageFormat, Wire
from rpo.backends.fake_server import Asked, FakeServer
from rpo.backends.openai_chat import ChatServer, OpenAIChat, OpenAIChatConfig, hang_up
from rpo.data.chat import ChatAnswer, ChatRequest, Message


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


def client(url: str, slots: int, image_format: ImageFormat) -> OpenAIChat:
    pacing = Pacing(concurrency_start=min(8, slots), concurrency_max=2 * slots)
    return OpenAIChatConfig(model="m", image_format=image_format, server=ChatServer(base_url=url, pacing=pacing)).build()


def asked(chat: OpenAIChat, given: list[ChatRequest]) -> None:
    assert all(isinstance(answer, ChatAnswer) for answer in chat.complete(given))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=1000.0)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--format", default="png", choices=get_args(ImageFormat))
    options = parser.parse_args()
    latency = options.latency_ms / 1000
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(latency, options.slots, there))
    server.start()
    chat = client(here.recv(), options.slots, options.format)

    asked(chat, requests(8 * options.slots, options.side, "warm up"))
    given = requests(10, options.side, "one by one")
    began = time.perf_counter()
    for request in given:
        asked(chat, [request])
    alone_ms = 1000 * ((time.perf_counter() - began) / len(given) - latency)

    given = requests(options.requests, options.side, "many")
    wire = Wire(model="m", revision="", side_max=1024, image_format=options.format, send_schema=True, extra="{}")
    cpu = time.process_time()
    for request in given[:50]:
        wire.question(request).body()
    encoding_ms = 1000 * (time.process_time() - cpu) / 50
    here.send("so far")
    busy_before = here.recv()[1]
    began, cpu = time.perf_counter(), time.process_time()
    asked(chat, given)
    wall, used = time.perf_counter() - began, time.process_time() - cpu
    here.send("so far")
    busy = (here.recv()[1] - busy_before) / (wall * options.slots)
    print(f"{options.requests} requests, images of {options.side} px, {options.slots} slots of {options.latency_ms:g} ms:")
    print(f"  {options.requests / wall:.1f} requests/s of {options.slots / latency:.1f} possible, server busy {100 * busy:.1f} %")
    client_ms = 1000 * used / options.requests
    print(f"  {client_ms:.2f} ms of the client's processor per request, {encoding_ms:.2f} of them to encode the image ({options.format})")
    print(f"  {alone_ms:.2f} ms beyond the server's own time for a request alone, its way over the loopback included")
    here.send("stop")
    server.join()
    hang_up()


if __name__ == "__main__":
    main()
