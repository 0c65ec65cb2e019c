"""A few questions that show what a model behind a server can do before a run depends on it.

Is the model listed, does it see images, are JSON schemas honored, are log probabilities given, is the temperature honored? Each
question has an answer that a model without the ability does not give by chance.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rpo.backends.chat.connections import Connections, Response, secret_of
from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig, hang_up
from rpo.backends.chat.replies import Redactor, Retry, StopRun, parsed
from rpo.data.chat import FIRST_TOKEN_MAX, ChatAnswer, ChatRequest, Message, Sampling
from rpo.data.model_text import clean, read_json, without_thought
from rpo.errors import RowError, RpoError
from rpo.protocols import Chat

COLORS = {"red": (220, 20, 20), "blue": (20, 40, 220), "green": (20, 160, 40)}
SIDE = 256
IMAGE_TOKENS_MIN = 4
"""Tokens by which an image must lengthen a question: a part that is dropped adds none, a word in its place one or two."""
SAMPLES = 3
TOKENS_MAX = 1024
"""Of an answer: enough for a model that thinks first."""
LIST_TIMEOUT_S = 10.0
ENDLESS = f"the model thinks long or loops: no answer within {TOKENS_MAX} tokens; turn its thinking off (docs/vlm.md)"
COLOR_QUESTION = f"Which color fills this image: {', '.join(COLORS)}, or none of them? Answer with one word."
COLOR_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"animal": {"type": "string", "enum": ["heron", "otter"]}, "legs": {"type": "integer", "enum": [2, 4]}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one question showed."""

    what: str
    found: str
    fix: str | None = None
    """What to do about it; `None` when all is well."""


def check_server(base_url: str, model: str | None, schemas: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """Every check in order; `schemas` are those that runs send. Ends at the first without which the others mean nothing."""
    try:
        server = ChatServer(base_url=base_url, attempts=2, timeout_s=120, deadline_s=240)
        names, listed = _listed(server, model)
    except (ValueError, RpoError) as error:
        yield Check(what="VLM address", found=str(error), fix="give the address that the server prints, up to and with /v1")
        return
    yield listed
    if not (name := model or next(iter(names), None)):
        return
    config = OpenAIChatConfig(model=name, server=server)
    try:
        yield from check_chat(config.build(), schemas)
    except RpoError as error:
        yield Check(what="VLM answers", found=str(error), fix="see the server's log; address and model name are --vlm-url and --vlm-model")
    finally:
        hang_up()


def check_chat(chat: Chat, schemas: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """The checks that ask the model."""
    yield _image_seen(chat)
    yield _schema_honored(chat)
    yield _schemas_accepted(chat, schemas)
    yield _temperature_honored(chat)
    yield _log_probabilities(chat)  # last: a server without them ends what asks for them


def _listed(server: ChatServer, model: str | None) -> tuple[list[str], Check]:
    """The names of `/models`, and whether the model is among them."""
    url, redact = f"{server.base_url.rstrip('/')}/models", Redactor(secret_of(server.key()))
    reply = asyncio.run(_models(server))
    if not isinstance(reply, Response):
        why = clean(redact.text(reply.why))[:200]
        fix = f"start the server, or correct --vlm-url; a key is taken from the environment variable {server.key_env}"
        return [], Check(what="VLM listed", found=f"{url}: no list of models ({why})", fix=fix)
    if reply.status != 200:
        return [], Check(what="VLM listed", found=f"{url}: HTTP {reply.status}", fix=_list_fix(reply.status, server, model))
    given = parsed(reply.body, redact)
    entries = given.get("data") if isinstance(given, dict) else None
    if not isinstance(entries, list):
        fix = "the address usually ends in /v1; this one answers with something else than a list of models"
        return [], Check(what="VLM listed", found=f"{url}: no list of models ({clean(str(given)[:400])[:100]})", fix=fix)
    names = [name for one in entries if isinstance(one, dict) and isinstance(name := one.get("id"), str) and name]
    return names, _among(names, model)


async def _models(server: ChatServer) -> Response | Retry | StopRun:
    connections = Connections(server.base_url, server.key())
    try:
        return await connections.models(LIST_TIMEOUT_S)
    finally:
        await connections.close()


def _list_fix(status: int, server: ChatServer, model: str | None) -> str:
    if status in (401, 403):
        return f"put the key into the environment variable {server.key_env}"
    if 300 <= status < 400:
        return "the address redirects: give the one that it leads to, with https:// where the server wants it"
    return "the address usually ends in /v1" + ("" if model else "; name the model with --vlm-model")


def _among(names: Sequence[str], model: str | None) -> Check:
    shown = ", ".join(clean(name)[:80] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if model is None:
        fix = None if len(names) == 1 else "name one with --vlm-model" if names else "name the model with --vlm-model"
        return Check(what="VLM listed", found=shown or "no model", fix=fix)
    if model in names:
        return Check(what="VLM listed", found=model)
    return Check(what="VLM listed", found=f"{model} is not among: {shown or 'no model'}", fix="give --vlm-model a name of the list")


def _request(*parts: str | np.ndarray, **settings: Any) -> ChatRequest:
    sampling = Sampling(max_tokens=TOKENS_MAX)
    return ChatRequest(**{"messages": (Message(role="user", parts=parts),), "sampling": sampling, "purpose": "doctor"} | settings)


def _text(answer: ChatAnswer | RowError) -> str:
    """What the answer says, or what was wrong, on one line."""
    return clean(str(answer) if isinstance(answer, RowError) else without_thought(answer.text))[:120]


def _image_seen(chat: Chat) -> Check:
    """Two images of one color each: a model that does not see them cannot name both, and its question is no longer than without."""
    names = list(COLORS)[:2]
    images = [np.full((SIDE, SIDE, 3), COLORS[name], dtype=np.uint8) for name in names]
    *answers, blind = chat.complete([*(_request(image, COLOR_QUESTION) for image in images), _request(COLOR_QUESTION)])
    failed = next((answer for answer in answers if isinstance(answer, RowError)), None)
    if failed is not None:
        fix = ENDLESS if failed.raw else "serve a vision-language model; see the server's log"
        return Check(what="image seen", found=f"no answer: {_text(failed)}", fix=fix)
    with_image = [answer.input_tokens for answer in answers if isinstance(answer, ChatAnswer)]
    without = blind.input_tokens if isinstance(blind, ChatAnswer) else 0
    tokens = f"{with_image[0]} prompt tokens with the image, {without} without" if without and min(with_image) else "tokens not told"
    said = ", ".join(f"{name}: {_text(answer)!r}" for name, answer in zip(names, answers, strict=True))
    if without and 0 < min(with_image) < without + IMAGE_TOKENS_MIN:
        fix = "the server drops images in silence: serve a vision-language model, with its image processor"
        return Check(what="image seen", found=f"no ({tokens}; {said})", fix=fix)
    if all(name in _text(answer).lower() for name, answer in zip(names, answers, strict=True)):
        return Check(what="image seen", found=f"yes ({tokens})")
    fix = "the model does not name the color of a one-color image: serve a vision-language model, or a better one"
    return Check(what="image seen", found=f"not understood ({tokens}; {said})", fix=fix)


def _schema_honored(chat: Chat) -> Check:
    """A question whose plain answer is no JSON."""
    (answer,) = chat.complete([_request("Write a short greeting.", schema=COLOR_SCHEMA, schema_name="animal")])
    if isinstance(answer, RowError):
        fix = ENDLESS if answer.raw else "set send_schema to False in the recipe's chat"
        return Check(what="schema honored", found=f"no answer: {_text(answer)}", fix=fix)
    try:
        value = read_json(answer.text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.keys() == COLOR_SCHEMA["properties"].keys():
        return Check(what="schema honored", found="yes")
    fix = "answers are validated all the same, but more of them are lost; vLLM, SGLang and llama.cpp hold a model to a schema"
    return Check(what="schema honored", found=f"no: {_text(answer)!r}", fix=fix)


def _schemas_accepted(chat: Chat, schemas: Mapping[str, Mapping[str, Any]]) -> Check:
    """Every schema of a run, with an answer of one token: what counts is that the server can compile it."""
    short = Sampling(max_tokens=1)
    requests = [_request("Hi.", schema=schema, schema_name=name, sampling=short) for name, schema in schemas.items()]
    answers = zip(schemas, chat.complete(requests), strict=True)
    refused = {
        name: _text(answer)
        for name, answer in answers
        if isinstance(answer, RowError) and not answer.raw and "max_tokens" not in str(answer)
    }
    if not refused:
        return Check(what="schemas accepted", found=", ".join(schemas))
    name, why = next(iter(refused.items()))
    return Check(what="schemas accepted", found=f"{name} is refused: {why}", fix="update the server, or set send_schema to False")


def _log_probabilities(chat: Chat) -> Check:
    question = "Is snow white? Please answer Yes or No."
    try:
        (answer,) = chat.complete([_request(question, sampling=Sampling(max_tokens=4), first_token=FIRST_TOKEN_MAX)])
    except RpoError as error:
        answer = RowError(str(error))
    if isinstance(answer, ChatAnswer) and answer.first_token:
        return Check(what="logprobs given", found=f"yes, {len(answer.first_token)} alternatives")
    fix = "yes/no scorers and judges cannot be asked there; vLLM, SGLang and llama.cpp give log probabilities"
    return Check(what="logprobs given", found=f"no: {_text(answer)!r}", fix=fix)


def _temperature_honored(chat: Chat) -> Check:
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS_MAX)
    base = _request("Invent a story of two sentences about any animal.", sampling=sampling)
    answers = chat.complete([replace(base, sample=sample) for sample in range(SAMPLES)])
    texts = {answer.raw if isinstance(answer, RowError) else answer.text for answer in answers} - {""}  # one that was cut off counts
    if len(texts) > 1:
        return Check(what="temperature", found=f"honored: {len(texts)} different answers of {SAMPLES}")
    found = "no answer: " + _text(answers[0]) if not texts else f"ignored: {SAMPLES} equal answers at 1.0"
    return Check(what="temperature", found=found, fix="several samples per image (samples=3) cost more and say nothing there; ask for one")
