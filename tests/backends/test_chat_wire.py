"""What is sent, what makes two questions the same, and what a reply comes to."""

import base64
import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rpo.backends.chat_wire import ImageFormat, Wire, encoded_image, redacted, refused, understood, unfinished
from rpo.data.chat import ChatRequest, Message, Sampling

WIRE = Wire(model="m", revision="", side_max=64, image_format="png", send_schema=True, extra="{}")
IMAGE = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
OTHER = IMAGE.copy()
OTHER[0, 0, 0] += 1
JSON = "application/json"


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


def completion(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "text"}, "finish_reason": "stop"}
    return {"id": "1", "choices": [choice | changes], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def reply(value: object, kind: str = JSON, first_token: bool = False) -> Any:
    return understood(kind, value if isinstance(value, bytes) else json.dumps(value).encode(), first_token)


def test_an_answer_is_read_with_its_tokens() -> None:
    found = reply(completion(), "application/json; charset=utf-8")
    assert (found.answer.text, found.answer.input_tokens, found.answer.output_tokens, found.finish) == ("text", 7, 2, "stop")
    assert reply(completion() | {"usage": None}).answer.input_tokens == 0


def test_the_first_token_is_read_with_its_alternatives() -> None:
    top = [{"token": "Yes", "logprob": -0.1, "bytes": [1]}, {"token": "No", "logprob": -3.0}, {"token": "Yes", "logprob": -5.0}]
    found = reply(completion(logprobs={"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}), first_token=True)
    assert found.answer.first_token["No"] == -3.0 and -0.1 < found.answer.first_token["Yes"] < -0.09
    blank = {"token": "**", "logprob": -0.1, "top_logprobs": [{"token": "**", "logprob": -0.1}]}
    word = {"token": "Yes", "logprob": -0.1, "top_logprobs": top}
    assert reply(completion(logprobs={"content": [blank, word]}), first_token=True).answer.first_token == found.answer.first_token
    assert reply(completion(logprobs={"content": [blank]}), first_token=True).answer.first_token == {"**": -0.1}
    silent = reply(completion(), first_token=True)
    assert (silent.answer, silent.final) == (None, "row") and "logprobs" in silent.why


@pytest.mark.parametrize("body", [
    b"", b"{", b"null", b"[]", b'"text"', b"\xff", b"{}", json.dumps(completion(message=None)).encode(), b"[" * 100_000,
    json.dumps(completion(message={"content": 5})).encode(), json.dumps({"choices": []}).encode(),
    json.dumps(completion(finish_reason=1)).encode(),
    json.dumps(completion() | {"usage": {"prompt_tokens": -1, "completion_tokens": 1}}).encode(),
    json.dumps(completion() | {"usage": {"prompt_tokens": True, "completion_tokens": 1}}).encode(),
    json.dumps(completion(message={"content": "x" * 64_001})).encode(), b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    json.dumps(completion(logprobs={"content": [{"top_logprobs": [{"token": "a", "logprob": float("nan")}]}]})).encode(),
])  # fmt: skip
def test_a_body_that_is_no_completion_is_no_answer_and_may_be_asked_for_again(body: bytes) -> None:
    found = reply(body, first_token=True)
    assert found.answer is None and found.outcome == "bad" and found.why and len(found.why) < 400


def test_html_is_no_answer_even_if_it_were_json_inside() -> None:
    assert reply(completion(), "text/html").why == "the server sent text/html in place of JSON"
    assert reply(completion(), "").why == "the server sent no content type in place of JSON"


def test_a_model_that_gives_no_text_is_the_rows_error() -> None:
    found = reply(completion(message={"content": None, "refusal": "I must not"}))
    assert (found.answer, found.final, found.why) == (None, "row", "the model gave no text (I must not)")


def test_answers_that_did_not_end_by_themselves_are_not_whole() -> None:
    assert unfinished("stop", False) == "" and unfinished("length", True) == ""
    assert "max_tokens" in unfinished("length", False) and "content_filter" in unfinished("content_filter", False)
    assert "no reason" in unfinished("", False)


@pytest.mark.parametrize(("status", "body", "outcome", "final"), [
    (429, {"error": {"message": "slow"}}, "busy", ""), (503, {}, "busy", ""), (408, {}, "busy", ""), (500, {}, "bad", ""),
    (400, {"error": {"message": "too long"}}, "good", "row"), (413, {}, "good", "row"), (422, {"detail": "x"}, "good", "row"),
    (302, {}, "good", "row"), (502, {}, "bad", ""),
    (401, {}, "good", "run"), (402, {}, "good", "run"), (403, {}, "good", "run"), (404, {}, "good", "run"),
    (429, {"error": {"code": "insufficient_quota"}}, "good", "run"), (429, ["odd"], "busy", ""),
])  # fmt: skip
def test_statuses(status: int, body: object, outcome: str, final: str) -> None:
    found = refused(status, json.dumps(body).encode(), 3.0)
    assert (found.outcome, found.final, found.answer) == (outcome, final, None) and f"HTTP {status}" in found.why
    if final == "run":
        assert any(mend in found.why for mend in ("key", "credit", "base_url"))


def test_a_key_that_a_server_repeats_is_taken_out() -> None:
    assert redacted(b"wrong key sk-1 given: sk-1", "sk-1") == b"wrong key [key] given: [key]" and redacted(b"any", "") == b"any"
