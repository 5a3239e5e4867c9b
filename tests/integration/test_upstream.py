"""The fakes themselves: the fake OpenAI, met by OpenAI's own SDK and on raw sockets; receiver and harness."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from standardwebhooks import Webhook, WebhookVerificationError

from tests.receiver import Cut, Hang, Receiver, redirect, verified
from tests.service import Service, ServiceExited
from tests.upstream import Accepts, Fault, FaultKind, KeyRules, Upstream

ROOT = Path(__file__).parents[2]
KEY = "sk-a"
PACKED_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answers",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "answers": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"n": {"type": "integer"}, "text": {"type": "string"}},
                        "required": ["n", "text"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["answers"],
            "additionalProperties": False,
        },
    },
}
PACKED = json.dumps({"tasks": [{"n": n, "text": f"t{n}"} for n in (1, 2, 3)]})


@pytest.fixture(scope="module")
def shared() -> Iterator[Upstream]:
    with Upstream({KEY: KeyRules()}) as upstream:
        yield upstream


@pytest.fixture
def upstream(shared: Upstream) -> Upstream:
    """One server for all tests, without a past; `add_key` gives a test a key of its own."""
    shared.release()
    shared.wait_until_idle()
    shared.reset()
    return shared


@pytest.fixture
def add_key(upstream: Upstream) -> Callable[..., str]:
    """Adds a key that no other test uses, with the rules that it is given; says its name."""
    numbers = iter(range(100))

    def add(**rules: Any) -> str:
        key = f"sk-own-{time.monotonic_ns()}-{next(numbers)}"
        upstream.set_key(key, **rules)
        return key

    return add


def sdk(upstream: Upstream, key: str = KEY) -> openai.OpenAI:
    """OpenAI's own client. No TLS on loopback, so no certificates: loading them takes most of a test."""
    return openai.OpenAI(
        api_key=key,
        base_url=upstream.base_url,
        max_retries=0,
        timeout=10.0,
        http_client=openai.DefaultHttpxClient(verify=False),
    )


def ask(
    upstream: Upstream, text: str = "hi", key: str = KEY, model: str = "gpt-4o-mini", **options: Any
) -> Any:
    with sdk(upstream, key) as client:
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], **options
        )


def refusal(upstream: Upstream, text: str = "hi", key: str = KEY, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as raised:
        ask(upstream, text, key, **options)
    return raised.value


def connect(upstream: Upstream) -> socket.socket:
    port = int(upstream.base_url.split(":")[2].removesuffix("/v1"))
    return socket.create_connection(("127.0.0.1", port), timeout=10.0)


def raw_request(text: str = "hi", key: str = KEY, keep_alive: bool = False, **options: Any) -> bytes:
    body = json.dumps(
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **options}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return head.encode() + body


def read_all(client: socket.socket) -> bytes:
    pieces = []
    while piece := client.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def exchange(upstream: Upstream, text: str = "hi") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one reply, byte for byte."""
    with connect(upstream) as client:
        client.sendall(raw_request(text))
        return parse(read_all(client))


def parse(reply: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), headers, body


# Ordinary replies


def test_sdk_parses_an_answer(upstream: Upstream) -> None:
    answer = ask(upstream, "good morning")

    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "answer to: good morning"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.refusal is None
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        6,
        9,
    )


def test_reply_names_the_snapshot_of_the_model_asked_for(upstream: Upstream) -> None:
    answer = ask(upstream, model="gpt-4o-mini")

    assert answer.model.startswith("gpt-4o-mini-20")


def test_two_keys_without_an_organization_are_two_groups(
    upstream: Upstream, add_key: Callable[..., str]
) -> None:
    headers = []
    for key in (KEY, add_key()):
        with sdk(upstream, key) as client:
            raw = client.chat.completions.with_raw_response.create(
                model="m", messages=[{"role": "user", "content": "hi"}]
            )
            headers.append(dict(raw.headers))

    assert headers[0]["openai-organization"] != headers[1]["openai-organization"]
    assert headers[0]["x-request-id"] != headers[1]["x-request-id"]
    assert headers[0]["openai-project"]
    assert headers[0]["openai-processing-ms"]


def test_sdk_lists_the_models_that_the_key_may_use(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(missing_models=("gpt-4o-mini",))

    with sdk(upstream, key) as client:
        names = [model.id for model in client.models.list()]

    assert names == ["gpt-4.1-nano", "gpt-5-nano"]
    assert upstream.counters()[key]["listed_models"] == 1


def test_packed_tasks_are_answered_by_number(upstream: Upstream) -> None:
    content = ask(upstream, PACKED, response_format=PACKED_SCHEMA).choices[0].message.content

    assert json.loads(content) == {"answers": [{"n": n, "text": f"answer to: t{n}"} for n in (1, 2, 3)]}


def test_json_schema_is_answered_with_an_instance_of_it(upstream: Upstream) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "size": {"type": "integer"}}}

    content = (
        ask(
            upstream,
            "Paris",
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        .choices[0]
        .message.content
    )

    assert json.loads(content) == {"city": "answer to: Paris", "size": 1}


def test_answer_is_cut_at_its_output_limit(upstream: Upstream) -> None:
    answer = ask(upstream, "good morning", max_completion_tokens=2)

    assert answer.choices[0].message.content == "answer t"
    assert answer.choices[0].finish_reason == "length"


def test_connection_serves_pipelined_requests_in_order(upstream: Upstream) -> None:
    with connect(upstream) as client:
        client.sendall(raw_request("one", keep_alive=True) + raw_request("two"))
        replies = read_all(client)

    assert replies.index(b"answer to: one") < replies.index(b"answer to: two")


def test_request_may_arrive_byte_by_byte(upstream: Upstream) -> None:
    with connect(upstream) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in raw_request("slow"):
            client.sendall(bytes([byte]))
        status, _, body = parse(read_all(client))

    assert status == 200
    assert b"answer to: slow" in body


# Errors


def test_unknown_key_is_an_authentication_error(upstream: Upstream) -> None:
    error = refusal(upstream, key="sk-nobody")

    assert isinstance(error, openai.AuthenticationError)
    assert error.code == "invalid_api_key"
    assert "sk-nobody" not in error.message


def test_refused_key_is_an_authentication_error(upstream: Upstream, add_key: Callable[..., str]) -> None:
    error = refusal(upstream, key=add_key(refused=True))

    assert isinstance(error, openai.AuthenticationError)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, openai.NotFoundError), (403, openai.PermissionDeniedError)]
)
def test_missing_model_is_told(
    upstream: Upstream, add_key: Callable[..., str], status: int, kind: type[openai.APIStatusError]
) -> None:
    error = refusal(upstream, key=add_key(missing_models=("gpt-4o-mini",), missing_model_status=status))

    assert isinstance(error, kind)
    assert error.code == "model_not_found"


def test_quota_is_exhausted_after_so_many_answers(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(exhausted_after=2)
    ask(upstream, key=key)
    ask(upstream, key=key)

    error = refusal(upstream, key=key)

    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert "retry-after" not in error.response.headers


def test_quota_that_is_topped_up_is_good_again(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(exhausted_after=0)
    refusal(upstream, key=key)

    upstream.set_key(key, exhausted_after=None)

    assert ask(upstream, key=key)


def test_rate_limit_tells_when_to_come_again(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(rpm=2)
    ask(upstream, key=key)
    ask(upstream, key=key)

    error = refusal(upstream, key=key)

    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert "(RPM): Limit 2, Used 2, Requested 1. Please try again in " in error.message
    headers = error.response.headers
    assert 29_000 <= int(headers["retry-after-ms"]) <= 30_000
    assert headers["retry-after"] == "30"
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")


def test_token_limit_counts_the_output_asked_for(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(tpm=100)
    ask(upstream, "x" * 40, key=key, max_completion_tokens=80)

    error = refusal(upstream, "x" * 40, key=key, max_completion_tokens=80)

    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "(TPM): Limit 100, Used 90, Requested 90." in error.message
    assert upstream.counters()[key]["charged_tokens"] == 90


def test_request_over_the_whole_limit_is_too_large(upstream: Upstream, add_key: Callable[..., str]) -> None:
    error = refusal(upstream, "x" * 800, key=add_key(tpm=100))

    assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "tokens")
    assert error.message.count("Request too large") == 1
    assert "Limit 100, Requested 200" in error.message
    assert "retry-after" not in error.response.headers


def test_keys_of_one_organization_and_project_share_a_limit(
    upstream: Upstream, add_key: Callable[..., str]
) -> None:
    first, second = (add_key(rpm=1, organization="org-shared", project="proj_1") for _ in range(2))
    other = add_key(rpm=1, organization="org-shared", project="proj_2")
    ask(upstream, key=first)

    assert refusal(upstream, key=second).code == "rate_limit_exceeded"
    assert ask(upstream, key=other)


def test_each_model_has_its_own_limit(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(rpm=1)

    ask(upstream, key=key, model="gpt-4o-mini")

    assert ask(upstream, key=key, model="gpt-5-nano")


def test_limits_may_go_untold(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(rpm=1, send_limit_headers=False, send_retry_after=False, send_organization=False)
    ask(upstream, key=key)

    headers = refusal(upstream, key=key).response.headers

    assert not [name for name in headers if name.startswith(("x-ratelimit", "retry-after", "openai-org"))]


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
                }
            },
            None,
            "response_format",
        ),
    ],
)
def test_bad_parameter_is_named(
    upstream: Upstream, options: dict[str, Any], code: str | None, param: str
) -> None:
    error = refusal(upstream, **options)

    assert isinstance(error, openai.BadRequestError)
    assert (error.code, error.param) == (code, param)


def test_server_refuses_the_other_name_of_the_output_limit_and_a_long_prompt() -> None:
    with Upstream({KEY: KeyRules()}, accepts=Accepts.MAX_COMPLETION_TOKENS, context_tokens=10) as upstream:
        name = refusal(upstream, max_tokens=5)
        length = refusal(upstream, "x" * 44)

        assert ask(upstream, max_completion_tokens=5)
    assert (name.status_code, name.code, name.param) == (400, "unsupported_parameter", "max_tokens")
    assert "'max_completion_tokens'" in name.message
    assert (length.status_code, length.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("status", [400, 408, 409, 429, 500, 503])
def test_any_status_can_be_scripted(upstream: Upstream, status: int) -> None:
    upstream.add_fault(
        Fault(
            kind=FaultKind.STATUS, status=status, code="some_code", message="Some words.", retry_after_s=1.5
        )
    )

    error = refusal(upstream)

    assert (error.status_code, error.code) == (status, "some_code")
    assert "Some words." in error.message
    assert error.response.headers["retry-after-ms"] == "1500"
    assert ask(upstream)


# Faults of the delivery


def test_reset_cuts_the_reply_in_the_middle(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.RESET))

    with connect(upstream) as client:
        client.sendall(raw_request())
        with pytest.raises(ConnectionResetError):
            read_all(client)

    assert upstream.counters()[KEY]["broken"] == 1


def test_closed_connection_has_no_reply(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.CLOSE))

    with connect(upstream) as client:
        client.sendall(raw_request(keep_alive=True))
        assert read_all(client) == b""


def test_hang_lasts_until_it_is_released(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=2))

    with connect(upstream) as one, connect(upstream) as two:
        one.sendall(raw_request())
        two.sendall(raw_request())
        upstream.wait_for_in_flight(2)
        assert upstream.release() == 2

        assert parse(read_all(one))[0] == parse(read_all(two))[0] == 200
    assert upstream.counters()[KEY]["max_in_flight"] == 2


def test_hang_lasts_so_many_seconds(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, seconds=0.1))

    exchange(upstream)

    (call,) = upstream.calls()
    assert call.ended_at is not None
    assert call.ended_at - call.started_at >= 0.1


def test_client_that_leaves_is_counted(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG))
    with connect(upstream) as client:
        client.sendall(raw_request())
        upstream.wait_for_in_flight(1)

    upstream.wait_until_idle()

    assert upstream.counters()[KEY]["left"] == 1
    assert upstream.calls()[0].status is None


def test_cut_body_is_shorter_than_its_length_says(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.CUT_BODY))

    _, headers, body = exchange(upstream)

    assert 0 < len(body) < int(headers["content-length"])


@pytest.mark.parametrize("kind", [FaultKind.DRIP_BODY, FaultKind.DRIP_HEADERS])
def test_dripping_reply_comes_whole_and_late(upstream: Upstream, kind: FaultKind) -> None:
    upstream.add_fault(Fault(kind=kind, seconds=0.0002))

    status, headers, body = exchange(upstream)

    (call,) = upstream.calls()
    assert (status, len(body)) == (200, int(headers["content-length"]))
    assert call.ended_at is not None
    assert call.ended_at - call.started_at >= 0.0002 * 200


def test_huge_body_holds_what_it_says(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HUGE_BODY, size_bytes=5_000_000))

    _, headers, body = exchange(upstream)

    assert len(body) == int(headers["content-length"])
    assert json.loads(body)["choices"][0]["message"]["content"] == "a" * 5_000_000


def test_gzip_bomb_unpacks_to_what_it_says(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.GZIP_BOMB, size_bytes=5_000_000))

    _, headers, body = exchange(upstream)

    assert headers["content-encoding"] == "gzip"
    assert len(body) < 50_000
    assert json.loads(gzip.decompress(body))["choices"][0]["message"]["content"] == "a" * 5_000_000


def test_redirect_points_elsewhere(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.REDIRECT, location="http://127.0.0.1:1/x"))

    status, headers, _ = exchange(upstream)

    assert (status, headers["location"]) == (307, "http://127.0.0.1:1/x")


# Faults of the content


def test_html_comes_with_status_200(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HTML))

    status, headers, body = exchange(upstream)

    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert body.startswith(b"<!doctype html>")


def test_broken_json_has_its_true_length(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.BROKEN_JSON))

    _, headers, body = exchange(upstream)

    assert len(body) == int(headers["content-length"])
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)


def test_empty_object_is_all_there_is(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.EMPTY_OBJECT))

    assert ask(upstream).choices is None


@pytest.mark.parametrize(
    ("kind", "content", "refused", "finish_reason"),
    [
        (FaultKind.NULL_CONTENT, None, False, "stop"),
        (FaultKind.REFUSAL, None, True, "stop"),
        (FaultKind.CONTENT_FILTER, None, False, "content_filter"),
        (FaultKind.LENGTH, "answer", False, "length"),
        (FaultKind.ANSWER, "scripted", False, "stop"),
    ],
)
def test_content_is_bent(
    upstream: Upstream, kind: FaultKind, content: str | None, refused: bool, finish_reason: str
) -> None:
    upstream.add_fault(Fault(kind=kind, content="scripted"))

    (choice,) = ask(upstream, "h").choices

    assert choice.message.content == content
    assert bool(choice.message.refusal) is refused
    assert choice.finish_reason == finish_reason


def test_usage_may_be_missing(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.NO_USAGE))

    assert ask(upstream).usage is None


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (FaultKind.PACKED_DROP, [1, 2]),
        (FaultKind.PACKED_DUPLICATE, [1, 2, 3, 1]),
        (FaultKind.PACKED_CONFLICT, [1, 2, 3, 1]),
        (FaultKind.PACKED_EXTRA, [1, 2, 3, 4]),
        (FaultKind.PACKED_WRONG_NUMBERS, [1001, 1002, 1003]),
    ],
)
def test_packed_reply_lies(upstream: Upstream, kind: FaultKind, numbers: list[int]) -> None:
    upstream.add_fault(Fault(kind=kind))

    content = ask(upstream, PACKED, response_format=PACKED_SCHEMA).choices[0].message.content

    answers = json.loads(content)["answers"]
    assert [answer["n"] for answer in answers] == numbers
    texts = {answer["text"] for answer in answers if answer["n"] == 1}
    assert len(texts) == (
        2 if kind is FaultKind.PACKED_CONFLICT else kind is not FaultKind.PACKED_WRONG_NUMBERS
    )


# Which calls a fault happens to


def test_fault_happens_only_to_the_calls_it_names(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key()
    upstream.add_fault(Fault(kind=FaultKind.STATUS, key=key, contains="bad", times=None))

    assert ask(upstream, "bad", key=KEY)
    assert ask(upstream, "good", key=key)
    assert refusal(upstream, "bad", key=key).status_code == 500
    assert refusal(upstream, "so bad", key=key).status_code == 500


def test_fault_ends_after_its_times_and_the_next_one_follows(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=503, times=2))
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=500))

    statuses = [exchange(upstream)[0] for _ in range(4)]

    assert statuses == [503, 503, 500, 200]


def test_random_faults_are_the_same_for_the_same_seed(
    upstream: Upstream, add_key: Callable[..., str]
) -> None:
    key = add_key(p_500=0.4)

    def statuses() -> list[int]:
        with connect(upstream) as client:
            client.sendall(raw_request(key=key, keep_alive=True) * 29 + raw_request(key=key))
            read_all(client)
        return [call.status or 0 for call in upstream.calls()]

    first = statuses()
    upstream.reset()

    assert statuses() == first
    assert set(first) == {200, 500}


# The control channel and the process


def test_log_tells_what_was_asked(upstream: Upstream) -> None:
    with sdk(upstream) as client:
        client.chat.completions.create(
            model="gpt-4o-mini",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            temperature=0.5,
            extra_headers={"X-Own": "1"},
        )

    (call,) = upstream.calls()

    assert (call.key, call.model, call.user_text, call.status) == (KEY, "gpt-4o-mini", "hi", 200)
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    assert call.body["temperature"] == 0.5
    assert call.headers["x-own"] == "1"
    assert "authorization" not in call.headers


def test_counters_add_up(upstream: Upstream, add_key: Callable[..., str]) -> None:
    key = add_key(rpm=2)
    for _ in range(3):
        with connect(upstream) as client:
            client.sendall(raw_request("eight by", key=key))
            read_all(client)

    counters = upstream.counters()[key]

    assert counters["calls"] == 3
    assert counters["by_status"] == {200: 2, 429: 1}
    assert counters["by_code"] == {"rate_limit_exceeded": 1}
    assert (counters["prompt_tokens"], counters["completion_tokens"]) == (4, 10)
    assert counters["in_flight"] == 0


def test_waiting_for_calls_that_do_not_come_times_out(upstream: Upstream) -> None:
    with pytest.raises(TimeoutError, match="no calls 1 within"):
        upstream.wait_for_calls(1, timeout_s=0.05)


def test_log_switched_off_leaves_the_counters() -> None:
    with Upstream({KEY: KeyRules(latency_s=0.02, latency_sigma=0.3)}, log_calls=False) as upstream:
        ask(upstream)

        assert upstream.calls() == []
        assert upstream.counters()[KEY]["by_status"] == {200: 1}


def test_started_again_it_has_the_same_address() -> None:
    upstream = Upstream({KEY: KeyRules()})
    upstream.start()
    base_url = upstream.base_url
    upstream.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(upstream)

    upstream.start()

    try:
        assert upstream.base_url == base_url
        assert ask(upstream)
    finally:
        upstream.stop()


def test_it_dies_with_its_parent() -> None:
    code = (
        "import time\nfrom tests.upstream import Upstream\n"
        "upstream = Upstream()\nupstream.start()\nprint(upstream.base_url, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        base_url = parent.stdout.readline().decode().strip()
        port = int(base_url.split(":")[2].removesuffix("/v1"))
        with socket.create_connection(("127.0.0.1", port), timeout=10.0) as client:
            os.kill(parent.pid, signal.SIGKILL)

            with suppress(ConnectionResetError):
                assert client.recv(1) == b""


# The webhook receiver


def test_receiver_records_and_answers_by_its_script() -> None:
    with Receiver([500, redirect("/elsewhere"), 204]) as receiver:
        statuses = [
            requests.post(receiver.url, data=b"body", allow_redirects=False, timeout=10).status_code
            for _ in range(4)
        ]
        received = receiver.wait_for(4)

    assert statuses == [500, 307, 204, 200]
    assert [request.body for request in received] == [b"body"] * 4
    assert (received[0].method, received[0].path) == ("POST", "/hook")
    assert received[0].headers["content-length"] == "4"


def test_receiver_hangs_until_it_is_released() -> None:
    with Receiver([Hang()]) as receiver:
        statuses: list[int] = []
        sender = threading.Thread(
            target=lambda: statuses.append(requests.post(receiver.url, timeout=10).status_code)
        )
        sender.start()
        receiver.wait_for(1)
        assert statuses == []

        receiver.release()
        sender.join()

    assert statuses == [200]


@pytest.mark.parametrize(("cut", "ends"), [(Cut.RESET, ConnectionResetError), (Cut.CLOSE, None)])
def test_receiver_leaves_a_request_without_a_reply(cut: Cut, ends: type[Exception] | None) -> None:
    with (
        Receiver([cut]) as receiver,
        socket.create_connection(("127.0.0.1", int(receiver.url.split(":")[2].split("/")[0]))) as client,
    ):
        client.sendall(b"POST /hook HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        if ends is None:
            assert client.recv(1) == b""
        else:
            with pytest.raises(ends):
                client.recv(1)


def test_receiver_waits_no_longer_than_it_is_told() -> None:
    with Receiver() as receiver, pytest.raises(TimeoutError, match="0 of 1 webhooks"):
        receiver.wait_for(1, timeout_s=0.05)


def test_signed_webhook_is_verified_and_a_changed_one_is_not() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    now = datetime.now(UTC)
    body = '{"type": "job.finished"}'
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", now, body),
    }

    with Receiver() as receiver:
        requests.post(receiver.url, data=body, headers=headers, timeout=10)
        requests.post(receiver.url, data=body + " ", headers=headers, timeout=10)
        good, bad = receiver.wait_for(2)

    assert verified(good, secret) == {"type": "job.finished"}
    with pytest.raises(WebhookVerificationError):
        verified(bad, secret)


# The harness of the service: what needs no service


def test_harness_shows_why_the_service_did_not_start(tmp_path: Path) -> None:
    service = Service(tmp_path, {"GPT_KEY_0": "sk-only-one-key"})

    with pytest.raises(ServiceExited) as raised:
        service.start()

    assert raised.value.status != 0
    assert raised.value.stderr
    assert service.run_once()[0] == raised.value.status


def test_harness_has_a_clean_environment(tmp_path: Path, upstream: Upstream) -> None:
    service = Service(tmp_path, {"HOME": None, "INLINE_WAIT_S": "5"}, upstream)

    assert service.env["GPT_BASE_URL"] == upstream.base_url
    assert service.env["GPT_KEY_0"] == KEY
    assert set(service.env) - {f"GPT_KEY_{n}" for n in range(len(upstream.keys))} == {
        "PATH",
        "LANG",
        "NODE_ENV",
        "HOST",
        "PORT",
        "DATA_DIR",
        "APP_KEY",
        "GPT_BASE_URL",
        "INLINE_WAIT_S",
    }
