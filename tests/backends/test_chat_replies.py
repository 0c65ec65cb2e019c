"""What a reply comes to: every oddity that servers are known for, on bodies alone."""

import json
from typing import Any

import pytest

from rpo.backends.chat.replies import (
    NO_LOGPROBS,
    Answer,
    Redactor,
    RefuseRow,
    Reply,
    Retry,
    StopRun,
    Usage,
    hint,
    parsed,
    refused,
    understood,
    unfinished,
)

PAID = {"prompt_tokens": 7, "completion_tokens": 2}
JSON = {"content-type": "application/json"}


def completion(usage: object = PAID, **changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "text"}, "finish_reason": "stop"}
    return {"id": "1", "choices": [choice | changes], "usage": usage}


def says(content: object, **more: object) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content} | more}


def reply(value: object, kind: str = "application/json", first_token: bool = False) -> Any:
    return understood({"content-type": kind}, value if isinstance(value, bytes) else json.dumps(value).encode(), first_token)


def why(found: Reply) -> str:
    """Why an answer that is paid for cannot be used; empty if it can."""
    assert isinstance(found, Answer)
    return unfinished(found.finish, False)


def test_an_answer_is_read_with_its_tokens() -> None:
    found = reply(completion(), "application/json; charset=utf-8")
    assert (found.answer.text, found.answer.input_tokens, found.answer.output_tokens, found.finish) == ("text", 7, 2, "stop")


@pytest.mark.parametrize("kind", ["text/plain", "text/html", "", "application/octet-stream"])
def test_a_json_body_is_json_whatever_its_content_type(kind: str) -> None:
    assert why(reply(completion(), kind)) == "" and reply(completion(), kind).answer.text == "text"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "fine"}], "fine"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}], "fine"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "fine"}], "fine"),
        (["fi", "ne"], "fine"),
        ("", ""),
    ],
)
def test_content_in_parts_is_joined_without_what_the_model_thought(content: object, text: str) -> None:
    found = reply(completion(**says(content)))
    assert found.answer.text == text and why(found) == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (says(None), "the model gave no text"),
        (says([{"type": "thinking", "thinking": "hm"}]), "the model gave no text"),
        (says(None, refusal="I must not"), "the model gave no text: I must not"),
        (says(None) | {"finish_reason": None}, "the model gave no text"),
        (says(None) | {"finish_reason": "length"}, "cut short at max_tokens"),
        (says(None) | {"finish_reason": "content_filter"}, "content_filter"),
        ({"finish_reason": None}, "no reason that was given"),
        (says("x" * 70_000), "70,000 characters, at most 64,000"),
        ({"message": None}, "its choice has no message"),
        (says(5), "is no text"),
        ({"finish_reason": 1}, "is no text"),
        (says([["a"]]), "no text"),
    ],
)
def test_an_answer_that_is_paid_for_and_cannot_be_used_is_final_with_its_usage(changes: dict[str, Any], expected: str) -> None:
    found = reply(completion(**changes))
    assert (expected in why(found) and found.usage == Usage(input_tokens=7, output_tokens=2) and found.answer.text == "") or changes == {
        "finish_reason": None
    }
    assert "is billed" not in why(found)


def test_an_answer_without_a_finish_reason_is_kept_as_one_that_may_be_cut() -> None:
    body = completion()
    del body["choices"][0]["finish_reason"]
    assert "no reason" in why(reply(body)) and reply(body).answer.text == "text"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, (0, 0)),
        ("many", (0, 0)),
        ({"prompt_tokens": "many", "completion_tokens": 1}, (0, 1)),
        ({"prompt_tokens": True}, (0, 0)),
        ({"prompt_tokens": 7.0, "completion_tokens": 2.0}, (7, 2)),
        ({"prompt_tokens": "7", "completion_tokens": "2"}, (7, 2)),
        ({"prompt_tokens": -1, "completion_tokens": 1}, (0, 1)),
        ({"completion_tokens": 5}, (0, 5)),
        ({"input_tokens": 7, "output_tokens": 2}, (7, 2)),
        ({"prompt_tokens": 7, "total_tokens": 9}, (7, 2)),
        ({"prompt_tokens": None, "completion_tokens": None}, (0, 0)),
        ({"total_tokens": 9, "completion_tokens": 2}, (7, 2)),
        ([], (0, 0)),
        ({"prompt_tokens": 1e300}, (0, 0)),
        ({"total_tokens": 9}, (9, 0)),
    ],
)
def test_odd_usage_spoils_no_answer(usage: object, expected: tuple[int, int]) -> None:
    found = reply(completion(usage))
    assert why(found) == "" and (found.usage.input_tokens, found.usage.output_tokens) == expected


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_usage_of_no_number_spoils_no_answer(number: str) -> None:
    body = json.dumps(completion({"prompt_tokens": 0, "completion_tokens": 1})).replace('"prompt_tokens": 0', f'"prompt_tokens": {number}')
    assert reply(body.encode()).answer.output_tokens == 1


@pytest.mark.parametrize("finish", ["stop", "STOP", "eos_token", "eos", "end_turn", "stop_sequence"])
def test_whatever_a_server_calls_it_an_answer_that_ended_is_whole(finish: str) -> None:
    assert unfinished(finish, False) == ""


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_a_cut_answer_is_not_whole(finish: str) -> None:
    assert "cut short at max_tokens" in unfinished(finish, False) and unfinished(finish, True) == ""


def test_half_a_surrogate_pair_spoils_no_answer() -> None:
    found = reply(b'{"choices": [{"message": {"content": "a \\ud83d b"}, "finish_reason": "stop"}]}')
    assert found.answer.text == "a \N{REPLACEMENT CHARACTER} b" and found.answer.text.encode()
    whole = reply(b'{"choices": [{"message": {"content": "\\ud83d\\ude00"}, "finish_reason": "stop"}]}')
    assert whole.answer.text == "\N{GRINNING FACE}"
    assert reply(b"\xef\xbb\xbf" + json.dumps(completion()).encode()).answer.text == "text"


def test_the_first_token_is_read_with_its_alternatives() -> None:
    top = [{"token": "Yes", "logprob": -0.1, "bytes": [1]}, {"token": "No", "logprob": -3.0}, {"token": "Yes", "logprob": -5.0}]
    odd = [{"token": 5, "logprob": -1.0}, {"token": "a", "logprob": float("-inf")}, {"token": "b", "logprob": "c"}, None, {"logprob": -1}]
    found = reply(completion(logprobs={"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top + odd}]}), first_token=True)
    assert found.answer.first_token.keys() == {"Yes", "No"}
    assert found.answer.first_token["No"] == -3.0 and -0.1 < found.answer.first_token["Yes"] < -0.09
    blank = {"token": "**", "logprob": -0.1, "top_logprobs": [{"token": "**", "logprob": -0.1}]}
    word = {"token": "Yes", "logprob": -0.1, "top_logprobs": top}
    assert reply(completion(logprobs={"content": [blank, word]}), first_token=True).answer.first_token == found.answer.first_token
    assert reply(completion(logprobs={"content": [blank]}), first_token=True).answer.first_token == {"**": -0.1}
    silent = reply(completion(), first_token=True)
    assert silent.finish == NO_LOGPROBS and silent.usage == Usage(input_tokens=7, output_tokens=2)
    assert "logprobs" in unfinished(silent.finish, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff",
        b"{}",
        b"[" * 100_000,
        json.dumps({"choices": []}).encode(),
        b"<html>hotel</html>",
        json.dumps(completion(None, message=None)).encode(),
        json.dumps(completion(None, **says(5))).encode(),
        b'{"choices": {"a": 1}}',
        json.dumps(completion(None, finish_reason=1)).encode(),
        b"9" * 5000,
    ],
)
def test_a_body_that_is_no_completion_and_bills_nothing_may_be_asked_for_again(body: bytes) -> None:
    found = reply(body)
    assert isinstance(found, Retry) and found.trouble == "bad" and found.why and len(found.why) < 400


def test_a_body_that_is_no_completion_and_was_paid_for_is_not() -> None:
    assert why(reply({"choices": [], "usage": PAID})) == "the server's body is no chat completion: it has no choices"
    assert reply({"choices": None, "usage": PAID}).usage == Usage(input_tokens=7, output_tokens=2)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"message": "context length exceeded", "code": 400}}, RefuseRow, "HTTP 400: context length exceeded"),
        ({"id": "x", "choices": None, "error": {"message": "overloaded", "code": 502}}, Retry, "HTTP 502: overloaded"),
        ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, Retry, "HTTP 429"),
        ({"error": "broken"}, Retry, "HTTP 500: broken"),
        ({"error": {"message": "no key", "code": 401}}, StopRun, "key_env"),
        ({"error": {"message": "q", "type": "insufficient_quota"}}, StopRun, "credit"),
        ({"choices": [{"error": {"message": "upstream", "code": "503"}, "message": {"content": None}}]}, Retry, "HTTP 503: upstream"),
        ({"error": {"message": "bad schema", "type": "invalid_request_error"}}, RefuseRow, "HTTP 400: bad schema"),
    ],
)
def test_an_error_that_comes_as_200_is_treated_by_its_code(body: dict[str, Any], kind: type, words: str) -> None:
    found = reply(body | {"usage": PAID})
    assert isinstance(found, kind) and words in found.why and found.usage == Usage(input_tokens=7, output_tokens=2)


@pytest.mark.parametrize(
    ("status", "body", "kind", "trouble"),
    [
        (429, {"error": {"message": "slow"}}, Retry, "busy"),
        (503, {}, Retry, "busy"),
        (408, {}, Retry, "busy"),
        (500, {}, Retry, "bad"),
        (502, {}, Retry, "bad"),
        (400, {"error": {"message": "too long"}}, RefuseRow, ""),
        (413, {}, RefuseRow, ""),
        (422, {"detail": "x"}, RefuseRow, ""),
        (401, {}, StopRun, ""),
        (402, {}, StopRun, ""),
        (403, {}, StopRun, ""),
        (404, {}, StopRun, ""),
        (405, {}, StopRun, ""),
        (407, {}, StopRun, ""),
        (429, {"error": {"code": "insufficient_quota"}}, StopRun, ""),
        (429, ["odd"], Retry, "busy"),
        (403, {"error": "input was flagged"}, RefuseRow, ""),
        (429, {"error": {"message": "quota", "type": "insufficient_quota", "code": None}}, StopRun, ""),
        (302, {}, StopRun, ""),
    ],
)
def test_statuses(status: int, body: object, kind: type, trouble: str) -> None:
    found = refused(status, body, {"retry-after": "3"})
    assert isinstance(found, kind) and f"HTTP {status}" in found.why
    if isinstance(found, Retry):
        assert (found.trouble, found.retry_after_s, found.status) == (trouble, 3.0, status)
    if isinstance(found, StopRun):
        assert any(mend in found.why for mend in ("key", "credit", "base_url", "login", "redirects"))


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirect_names_its_target(status: int) -> None:
    found = refused(status, "", {"location": "https://example.invalid/v1/chat/completions"})
    assert isinstance(found, StopRun) and found.why.endswith(
        "redirects to https://example.invalid/v1/chat/completions: set base_url to https://example.invalid/v1"
    )
    assert isinstance(refused(status, "", {}), StopRun)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "b"}, "b"),
        ({"message": "c"}, "c"),
        ({"detail": "Server is pinned to m"}, "Server is pinned to m"),
        ({"detail": [{"loc": ["body", "messages", 0], "msg": "Field required"}]}, "body.messages.0: Field required"),
        ("plain words", "plain words"),
        ({"error": {"detail": "d"}}, "d"),
        ({"errors": [{"message": "e"}]}, "e"),
        ({"object": "error", "message": "f", "code": 1}, "f"),
    ],
)
def test_a_servers_words_are_found_wherever_they_stand(body: object, words: str) -> None:
    assert refused(400, body).why == f"HTTP 400: {words}"


def test_refusals_that_differ_by_the_requests_number_are_alike() -> None:
    ids = ("req_011CabcDEF", "chatcmpl-99aZ", "0f8fad5b-d9cb-469f-a165-70867728950e", "deadbeefdeadbeef")
    assert {refused(400, {"error": f"bad request {number}"}).why for number in ids} == {"HTTP 400: bad request …"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("1 validation error 'json_schema'", "send_schema"),
        ("failed to parse grammar", "send_schema"),
        ("Unsupported parameter: 'max_tokens'", "max_completion_tokens"),
        ("Server is pinned to x", "BASE_URL/models"),
        ('can only concatenate str (not "list") to str', "images"),
        ("The model `m` does not exist", "BASE_URL/models"),
        ("maximum context length of this model is 5", ""),
    ],
)
def test_hints(words: str, told: str) -> None:
    assert (told in hint(words)) if told else hint(words) == ""


KEY = "sk-a/b=c-0123456789"
ESCAPED = [
    KEY,
    KEY.replace("/", "\\/"),
    KEY.replace("=", "\\u003d"),
    "".join(f"\\u{ord(c):04x}" for c in KEY),
    KEY.replace("/", "%2F"),
    KEY.replace("=", "&#61;"),
    KEY.replace("=", "\\\\u003D"),
    KEY.replace("-", "\\u002d"),
]


@pytest.mark.parametrize("echo", ESCAPED)
@pytest.mark.parametrize("where", ["text", "finish", "refusal", "token", "error", "detail", "plain", "type", "location", "cut", "name"])
def test_a_key_that_a_server_repeats_is_taken_out_however_it_is_escaped(echo: str, where: str) -> None:
    redact = Redactor(KEY)
    text, top = json.dumps(completion()), '{"content": [{"top_logprobs": [{"token": "ECHO", "logprob": -1.0}]}]}'
    bodies = {
        "text": text.replace('"text"', '"ECHO"'),
        "finish": text.replace('"stop"', '"ECHO"'),
        "cut": '{"error": {"message": "ECHO',
        "refusal": text.replace('"content": "text"', '"content": null, "refusal": "ECHO"'),
        "token": text.replace('"finish_reason"', f'"logprobs": {top}, "finish_reason"'),
        "error": '{"error": {"message": "ECHO"}}',
        "detail": '{"detail": [{"loc": ["ECHO"], "msg": "ECHO"}]}',
        "plain": "ECHO",
        "type": "x",
        "location": "",
        "name": '{"ECHO": 1}',
    }
    body, headers = (
        bodies[where].replace("ECHO", f"is {echo} it").encode(),
        {"content-type": f"text/{echo}", "location": f"http://h/{echo}"},
    )
    found = repr(
        [understood(headers, body, True, redact), refused(400, parsed(body, redact), headers, redact), refused(308, {}, headers, redact)]
    )
    plain = found.encode().decode("unicode_escape").encode().decode("unicode_escape").replace("%2F", "/").replace("&#61;", "=")
    assert "[key]" in found and KEY not in plain and "0123456789" not in plain
