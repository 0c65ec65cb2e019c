"""What is sent, and what makes two questions the same."""

import base64
import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rpo.backends.chat.wire import ImageFormat, Wire, encoded_image
from rpo.data.chat import ChatRequest, Message, Sampling

WIRE = Wire(model="m", revision="", side_max=64, image_format="png", send_schema=True, extra="{}")
IMAGE = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
OTHER = IMAGE.copy()
OTHER[0, 0, 0] += 1


def request(**changes: Any) -> ChatRequest:
    messages = (Message(role="system", parts=("be fair",)), Message(role="user", parts=("before", IMAGE, "after")))
    return ChatRequest(**{"messages": messages, **changes})


def test_the_body_is_what_an_openai_server_reads() -> None:
    question = WIRE.question(request(schema={"type": "object"}, schema_name="critique", purpose="critique"))
    body = json.loads(question.body())
    assert body["messages"][0] == {"role": "system", "content": "be fair"}
    before, image, after = body["messages"][1]["content"]
    assert (before["text"], after["text"]) == ("before", "after")
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert (np.array(Image.open(io.BytesIO(base64.b64decode(data)))) == IMAGE).all()
    assert body["response_format"]["json_schema"] == {"name": "critique", "strict": True, "schema": {"type": "object"}}
    assert (body["temperature"], body["max_tokens"]) == (0.0, 1024) and "seed" not in body and "logprobs" not in body
    drawn = json.loads(WIRE.question(request(sampling=Sampling(temperature=0.7), sample=3, first_token=5)).body())
    assert (drawn["seed"], drawn["top_p"], drawn["logprobs"], drawn["top_logprobs"]) == (3, 1.0, True, 5)
    free = replace(WIRE, send_schema=False, extra='{"top_k": 1}')
    assert json.loads(free.question(request(schema={})).body()) | {"messages": 0} == {
        "model": "m", "messages": 0, "temperature": 0.0, "max_tokens": 1024, "top_k": 1,
    }  # fmt: skip


def test_every_image_stands_at_its_own_place_whatever_the_texts_say() -> None:
    texts = ("0", hashlib.sha256(b"0").hexdigest() + "0", "\ud800 lone")
    parts = (texts[0], IMAGE, texts[1], OTHER, *[IMAGE] * 9, texts[2])
    content = json.loads(WIRE.question(request(messages=(Message(role="user", parts=parts),))).body())["messages"][0]["content"]
    assert [part["text"] for part in content if part["type"] == "text"][:2] == list(texts[:2])
    sent = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in content if part["type"] == "image_url"]
    assert sent == [encoded_image(image, 64, "png") for image in (IMAGE, OTHER, *[IMAGE] * 9)]


def test_large_images_are_made_smaller_and_equal_ones_are_equal_bytes() -> None:
    large = np.zeros((100, 400, 3), dtype=np.uint8)
    png = encoded_image(large, 64, "png")
    assert Image.open(io.BytesIO(png)).size == (64, 16) and png == encoded_image(large.copy(), 64, "png")
    assert encoded_image(large, 64, "jpeg").startswith(b"\xff\xd8\xff")
    assert (np.array(Image.open(io.BytesIO(encoded_image(IMAGE, 64, "webp")))) == IMAGE).all()
    assert Image.open(io.BytesIO(encoded_image(IMAGE, 64, "png"))).size == (48, 32)


@pytest.mark.parametrize("lossless", ["png", "webp"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (37, 53)])
def test_lossless_formats_are_exact_whatever_the_pixels(size: tuple[int, int], lossless: ImageFormat) -> None:
    grain = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for image in (grain, np.zeros_like(grain), grain[::-1, ::-1]):
        with Image.open(io.BytesIO(encoded_image(image, 64, lossless)), formats=[lossless.upper()]) as read:
            assert read.mode == "RGB" and (np.array(read) == image).all()


DIFFERENT = {
    "model": lambda: replace(WIRE, model="n").question(request()),
    "revision": lambda: replace(WIRE, revision="2").question(request()),
    "side_max": lambda: replace(WIRE, side_max=16).question(request()),
    "format": lambda: replace(WIRE, image_format="jpeg").question(request()),
    "extra": lambda: replace(WIRE, extra='{"top_k": 1}').question(request()),
    "schema": lambda: WIRE.question(request(schema={"type": "object"})),
    "temperature": lambda: WIRE.question(request(sampling=Sampling(temperature=0.5))),
    "max_tokens": lambda: WIRE.question(request(sampling=Sampling(max_tokens=5))),
    "sample": lambda: WIRE.question(request(sample=1)),
    "first_token": lambda: WIRE.question(request(first_token=2)),
    "image": lambda: WIRE.question(request(messages=(request().messages[0], Message(role="user", parts=("before", OTHER, "after"))))),
    "text": lambda: WIRE.question(request(messages=(request().messages[0], Message(role="user", parts=("before!", IMAGE, "after"))))),
    "order": lambda: WIRE.question(request(messages=(request().messages[0], Message(role="user", parts=(IMAGE, "before", "after"))))),
    "role": lambda: WIRE.question(request(messages=(Message(role="user", parts=("be fair",)), request().messages[1]))),
    "system": lambda: WIRE.question(request(messages=request().messages[1:])),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_all_that_can_change_the_answer_changes_the_key(name: str) -> None:
    assert DIFFERENT[name]().key != WIRE.question(request()).key


def test_what_cannot_change_the_answer_does_not_change_the_key() -> None:
    assert WIRE.question(request(purpose="critique")).key == WIRE.question(request(purpose="other")).key
    assert WIRE.question(request()).key == WIRE.question(request()).key
    assert replace(WIRE, send_schema=False).question(request()).key == WIRE.question(request()).key


def test_a_null_in_extra_leaves_a_field_out() -> None:
    wire = replace(WIRE, extra='{"max_tokens": null, "max_completion_tokens": 7}')
    body = json.loads(wire.question(request()).body())
    assert "max_tokens" not in body and body["max_completion_tokens"] == 7


def test_a_template_without_a_system_role_gets_the_system_text_first_from_the_user() -> None:
    plain, merged = WIRE.question(request()), replace(WIRE, system_as_user=True).question(request())
    (message,) = json.loads(merged.body())["messages"]
    assert message["role"] == "user"
    assert [part.get("text", "image") for part in message["content"]] == ["be fair", "before", "image", "after"]
    assert plain.key != merged.key, "another question: its answer may differ"
    texts = (Message(role="system", parts=("be fair",)), Message(role="user", parts=("hi",)), Message(role="assistant", parts=("a",)))
    body = json.loads(replace(WIRE, system_as_user=True).question(request(messages=texts)).body())
    assert body["messages"] == [{"role": "user", "content": "be fair\nhi"}, {"role": "assistant", "content": "a"}]
