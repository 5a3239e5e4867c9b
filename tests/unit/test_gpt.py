"""The wire: what is sent for a task, and what every kind of reply means."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.domain import Answer, ErrorCode, JobSettings, Prompt, Usage
from gpt_worker.gpt import (
    CHECK_TIMEOUT_S,
    Answers,
    Endpoint,
    KeyCheck,
    Reply,
    fill_template,
    read_reply,
    request_body,
    template_parts,
)
from gpt_worker.marks import Marks
from gpt_worker.packing import INSTRUCTION, RESPONSE_FORMAT
from gpt_worker.reply_body import Budget
from gpt_worker.transport import (
    ConnectionStale,
    DeadlinePassed,
    RawReply,
    ReplyTooLarge,
    Transport,
    TransportError,
)
from tests import factories
from tests.clock import unhurried
from tests.factories import MODEL

SECRET = "local-0123456789-secret"


def completion(*, content: Any = "Bonjour", **choice: Any) -> dict[str, Any]:
    """A good reply, of which a test breaks one thing."""
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }


def read(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Reply[Answer]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_reply(factories.raw_reply(status=status, body=data, headers=headers), SECRET)


def refusal(*, status: int, headers: dict[str, str] | None = None, **error: Any) -> Problem:
    """What an error reply means."""
    result = read({"error": {"message": "", **error}}, status=status, headers=headers).result
    assert isinstance(result, Problem)
    return result


def sent(prompt: Prompt = "Say hello", *, name: str = "max_tokens", **settings: Any) -> Any:
    return json.loads(request_body(MODEL, JobSettings(**settings), prompt, name))


# What is sent


def test_only_what_the_caller_set_is_sent() -> None:
    assert sent() == {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}]}


def test_everything_the_caller_set_is_sent() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}

    body = sent(
        temperature=0.0, max_output_tokens=7, response_format=json.dumps(form), name="max_completion_tokens"
    )

    assert (body["temperature"], body["max_completion_tokens"], body["response_format"]) == (0.0, 7, form)


def test_our_own_settings_stay_at_home() -> None:
    body = sent(max_chunk_tokens=5, priority=3, deadline_s=9.0, max_total_tokens=100, template="{text}!")

    assert body.keys() == {"model", "messages"}


def test_instructions_are_the_first_message() -> None:
    assert sent(instructions="Be brief")["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Say hello"},
    ]


def test_messages_go_as_they_are_behind_the_instructions() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:…"}}]}

    assert sent([image], instructions="Be brief", template="{x}")["messages"][1:] == [image]


@pytest.mark.parametrize("prompt", ["good night", {"text": "good night"}])
def test_template_is_filled_by_a_text_or_by_variables(prompt: Prompt) -> None:
    assert sent(prompt, template="Translate: {text}")["messages"][0]["content"] == "Translate: good night"


def test_any_text_survives() -> None:
    text = 'à \x00 "quoted" 👋 \u2028 {braces}'

    assert sent(text)["messages"][0]["content"] == text


# Templates


@pytest.mark.parametrize(
    ("template", "variables", "text"),
    [
        ("{a}", {"a": "x"}, "x"),
        ("{a} {a}{b}", {"a": 1, "b": 2.5}, "1 12.5"),
        ("{{a}}", {}, "{a}"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a}", {"a": "{b}"}, "{b}"),
        ("{a}", {"a": "{{"}, "{{"),
        ("{first name}", {"first name": "Ada"}, "Ada"),
        ("{a.b}", {"a.b": "dotted"}, "dotted"),
        ("{größe}", {"größe": 3}, "3"),
        ("no variable", {}, "no variable"),
    ],
)
def test_template_is_filled(template: str, variables: dict[str, Any], text: str) -> None:
    assert fill_template(template, variables) == text


@pytest.mark.parametrize(
    "template",
    ["{", "}", "{}", "{a!r}", "{a:>10}", "{a[0]}", "{a:{b}}", "{ a}", "{a", "{a}}", "{__class__!s}"],
)
def test_broken_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        template_parts(template)


def test_template_is_parsed_once_for_many_tasks() -> None:
    assert template_parts("Translate to {lang}: {text}") is template_parts("Translate to {lang}: {text}")


def test_variables_reach_no_attributes() -> None:
    with pytest.raises(KeyError):
        fill_template("{a.__class__}", {"a": "x"})


names = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,8}\Z")


@unhurried
@given(
    parts=st.lists(st.tuples(st.text(), names), max_size=8),
    values=st.dictionaries(names, st.text() | st.integers(), max_size=8),
)
def test_any_text_can_be_said_in_a_template(
    parts: list[tuple[str, str]], values: dict[str, str | int]
) -> None:
    filled = values | {name: values.get(name, name) for _, name in parts}
    template = "".join(
        literal.replace("{", "{{").replace("}", "}}") + "{" + name + "}" for literal, name in parts
    )

    text = fill_template(template, filled)

    assert text == "".join(f"{literal}{filled[name]}" for literal, name in parts)


@unhurried
@given(st.text(alphabet="{}a!:[] .", max_size=12))
def test_template_is_refused_by_its_form_alone(template: str) -> None:
    try:
        variables = {name: "x" for _, name in template_parts(template) if name is not None}
    except ValueError:
        return
    fill_template(template, variables)


# Good replies


def test_answer_is_read_with_its_usage() -> None:
    reply = read(completion())

    assert reply == Reply(Answer("Bonjour"), Usage(12, 3))


def test_headers_tell_whose_quota_it_was() -> None:
    reply = read(completion(), headers={"openai-organization": "acme", "openai-project": "proj_1"})

    assert (reply.organization, reply.project) == ("acme", "proj_1")


def test_quota_that_has_no_possible_name_is_nobodys() -> None:
    reply = read(completion(), headers={"openai-organization": "x" * 100_000, "openai-project": "proj_1"})

    assert (reply.organization, reply.project) == (None, "proj_1")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (completion(content=""), Answer("")),
        (completion(finish_reason="length"), Answer("Bonjour", "length")),
        (completion(content=None, finish_reason="length"), Answer("", "length")),
        (completion(content="", finish_reason="length"), Answer("", "length")),
        (completion(finish_reason=None), Answer("Bonjour")),
        (completion(finish_reason="x" * 99), Answer("Bonjour", "x" * 50)),
        (completion(finish_reason="st\0p"), Answer("Bonjour", "st\ufffdp")),  # PostgreSQL stores no NUL
        (completion(finish_reason="content_filter"), Answer("Bonjour", "content_filter")),
        (completion(content=None, message={"refusal": "I won't"}), Answer("I won't", "refusal")),
        (completion(content="a\x00b"), Answer("a\ufffdb")),
    ],
)
def test_odd_answers_are_answers(body: Any, answer: Answer) -> None:
    assert read(body).result == answer


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {},
        {"prompt_tokens": 1},
        {"prompt_tokens": "1", "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": 1 << 50, "completion_tokens": 1},
    ],
)
def test_odd_usage_counts_as_none(usage: Any) -> None:
    reply = read(completion() | {"usage": usage})

    assert (reply.result, reply.usage) == (Answer("Bonjour"), Usage())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"<html>busy</html>",
        b'{"choices": [',
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": {}}',
        b'{"choices": ["text"]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": "Bonjour"}]}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"9" * 10_000,
    ],
)
def test_good_status_with_nonsense_is_a_bad_response(body: bytes) -> None:
    result = read(body).result

    assert isinstance(result, Problem)
    assert (result.kind, result.code) == (ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE)


def test_nonsense_that_cost_tokens_tells_so() -> None:
    reply = read(completion(content=None))

    assert isinstance(reply.result, Problem)
    assert reply.usage == Usage(12, 3)


def test_withheld_answer_is_final() -> None:
    result = read(completion(content=None, finish_reason="content_filter")).result

    assert isinstance(result, Problem)
    assert (result.kind, result.code) == (ProblemKind.FINAL, ErrorCode.CONTENT_FILTER)


# Bad replies


@pytest.mark.parametrize(
    ("status", "error", "kind", "code"),
    [
        (401, {"code": "invalid_api_key"}, ProblemKind.KEY_REFUSED, ErrorCode.KEY_REFUSED),
        (402, {}, ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED),
        (429, {"code": "insufficient_quota"}, ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED),
        (429, {"type": "insufficient_quota"}, ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED),
        (429, {"code": "billing_hard_limit_reached"}, ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED),
        (403, {"code": "billing_not_active"}, ProblemKind.QUOTA_EXHAUSTED, ErrorCode.QUOTA_EXHAUSTED),
        (429, {"code": "rate_limit_exceeded"}, ProblemKind.RATE_LIMITED, ErrorCode.RATE_LIMITED),
        (429, {"code": {"odd": 1}, "type": ["odd"]}, ProblemKind.RATE_LIMITED, ErrorCode.RATE_LIMITED),
        (429, {"code": 429}, ProblemKind.RATE_LIMITED, ErrorCode.RATE_LIMITED),
        (403, {}, ProblemKind.MODEL_UNAVAILABLE, ErrorCode.MODEL_UNAVAILABLE),
        (404, {"code": "model_not_found"}, ProblemKind.MODEL_UNAVAILABLE, ErrorCode.MODEL_UNAVAILABLE),
        (403, {"code": ["odd"]}, ProblemKind.MODEL_UNAVAILABLE, ErrorCode.MODEL_UNAVAILABLE),
        (408, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
        (409, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
        (500, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
        (503, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
        (599, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
        (204, {}, ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE),
        (302, {}, ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE),
        (400, {"code": "context_length_exceeded"}, ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH),
        (400, {"type": "exceed_context_size_error"}, ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH),
        (413, {}, ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH),
        (400, {"code": "content_policy_violation"}, ProblemKind.FINAL, ErrorCode.CONTENT_FILTER),
        (400, {}, ProblemKind.FINAL, ErrorCode.BAD_REQUEST),
        (400, {"code": {"odd": 1}, "type": {}}, ProblemKind.FINAL, ErrorCode.BAD_REQUEST),
        (422, {}, ProblemKind.FINAL, ErrorCode.BAD_REQUEST),
        (418, {}, ProblemKind.FINAL, ErrorCode.BAD_REQUEST),
    ],
)
def test_error_replies_are_classified(
    status: int, error: dict[str, Any], kind: ProblemKind, code: ErrorCode
) -> None:
    result = refusal(status=status, **error)

    assert (result.kind, result.code) == (kind, code)


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after-ms": "1500"}, "", 1.5),
        ({"retry-after": "20"}, "Please try again in 1s.", 20.0),
        ({}, "Please try again in 20s. Visit our site to learn more.", 20.0),
        ({}, "Please try again in 6m0s.", 360.0),
        ({}, "Please try again in 120ms.", 0.12),
        ({}, "Please try again in 1.5s", 1.5),
        ({}, "Please try again in a while.", None),
        ({}, "", None),
        ({"retry-after": "later"}, "", None),
    ],
)
def test_rate_limit_tells_its_rest(headers: dict[str, str], message: str, seconds: float | None) -> None:
    assert refusal(status=429, headers=headers, message=message).retry_after_s == seconds


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000.",
            ProblemKind.TOO_LARGE,
        ),
        ("Rate limit reached on TPM: Limit 30000, Used 0, Requested 30001.", ProblemKind.TOO_LARGE),
        ("Rate limit reached on TPM: Limit 30000, Used 29000, Requested 2000.", ProblemKind.RATE_LIMITED),
        ("Rate limit reached on TPM: Limit: 30000, Used 0, Requested: 30000.", ProblemKind.RATE_LIMITED),
        ("Rate limit reached for requests. Limit: 3 / min.", ProblemKind.RATE_LIMITED),
    ],
)
def test_request_larger_than_the_limit_is_told_from_a_rate_limit(message: str, kind: ProblemKind) -> None:
    assert refusal(status=429, message=message, code="rate_limit_exceeded").kind is kind


@pytest.mark.parametrize(
    ("param", "about_settings"),
    [
        ("temperature", True),
        ("model", True),
        ("messages", False),
        ("messages[0].content", False),
        (None, False),
        (3, False),
    ],
)
def test_refusal_of_the_settings_is_told_from_that_of_a_prompt(param: Any, about_settings: bool) -> None:
    assert refusal(status=400, param=param).about_settings is about_settings


def test_what_the_provider_says_holds_no_key_and_has_an_end() -> None:
    said = f"Bad {SECRET} and sk-proj-abc*def.ghi-jkl! " + "x" * 5_000

    message = refusal(status=400, message=said).message

    assert message.startswith("Bad *** and ***!")
    assert len(message) == 500


@pytest.mark.parametrize("body", [b"", b"{", b'{"error": "text"}', b'{"error": {"message": 7}}', b"<html>"])
@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 429, 500])
def test_every_error_reply_has_a_message(status: int, body: bytes) -> None:
    result = read(body, status=status).result

    assert isinstance(result, Problem)
    assert result.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "code", "type", "message", "param", "choices", "usage", "content"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@unhurried
@given(body=json_values | st.binary(max_size=50), status=st.integers(200, 599))
def test_no_reply_is_too_odd_to_read(body: Any, status: int) -> None:
    assert isinstance(read(body, status=status).result, Answer | Problem)


# One call


class Wire(Transport):
    """A transport whose replies are given, in turn; the last one stays."""

    def __init__(self, *replies: RawReply | TransportError, base_url: str = "http://127.0.0.1:9/v1") -> None:
        super().__init__(base_url, 1, loopback_only=True)
        self.replies = list(replies)
        self.bodies: list[Any] = []

    def post(self, path: str, headers: Any, body: bytes, deadline_s: float) -> RawReply:
        assert (path, headers["authorization"]) == ("/chat/completions", f"Bearer {SECRET}")
        self.bodies.append(json.loads(body))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, TransportError):
            raise reply
        return reply


GOOD = factories.raw_reply(body=json.dumps(completion()).encode())


def refuses(name: str) -> RawReply:
    """OpenAI's refusal of one name of the token limit."""
    error = {
        "message": f"Unsupported parameter: '{name}' is not supported with this model.",
        "param": name,
        "code": "unsupported_parameter",
    }
    return factories.raw_reply(status=400, body=json.dumps({"error": error}).encode())


def ask(endpoint: Endpoint, **settings: Any) -> Reply[Answer]:
    return endpoint.ask(MODEL, JobSettings(**settings), "Say hello", 5.0)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (DeadlinePassed("late"), ProblemKind.TRANSIENT, ErrorCode.TIMEOUT),
        (ReplyTooLarge("large"), ProblemKind.TRANSIENT, ErrorCode.BAD_RESPONSE),
        (ConnectionStale("stale"), ProblemKind.STALE, ErrorCode.CONNECTION),
        (TransportError("cut"), ProblemKind.TRANSIENT, ErrorCode.CONNECTION),
    ],
)
def test_trouble_on_the_way_is_a_problem(error: TransportError, kind: ProblemKind, code: ErrorCode) -> None:
    result = ask(Endpoint(Wire(error), SECRET, Marks())).result

    assert isinstance(result, Problem)
    assert (result.kind, result.code) == (kind, code)


@pytest.mark.parametrize(
    ("base_url", "name"),
    [("https://api.openai.com/v1", "max_completion_tokens"), ("http://127.0.0.1:9/v1", "max_tokens")],
)
def test_token_limit_has_the_name_that_its_host_takes(base_url: str, name: str) -> None:
    wire = Wire(GOOD, base_url=base_url)

    ask(Endpoint(wire, SECRET, Marks()), max_output_tokens=7)

    assert wire.bodies[0][name] == 7


def test_token_limit_is_renamed_once_and_that_is_remembered_for_every_key() -> None:
    names: Marks[tuple[str, str], str] = Marks()
    first, second = Wire(refuses("max_tokens"), GOOD), Wire(GOOD)

    refused = ask(Endpoint(first, SECRET, names), max_output_tokens=7).result
    ask(Endpoint(second, SECRET, names), max_output_tokens=7)

    assert isinstance(refused, Problem)
    assert refused.kind is ProblemKind.RESENT
    assert second.bodies[0]["max_completion_tokens"] == 7


def test_token_limits_names_of_models_that_callers_made_up_are_forgotten() -> None:
    names: Marks[tuple[str, str], str] = Marks(most=10)

    for number in range(100):
        endpoint = Endpoint(Wire(refuses("max_tokens")), SECRET, names)
        endpoint.ask(f"made up {number}", JobSettings(max_output_tokens=7), "Say hello", 5.0)

    assert len(names) == 10


def test_calls_in_flight_while_the_name_is_learned_go_again_too() -> None:
    names: Marks[tuple[str, str], str] = Marks()

    class Meanwhile(Wire):
        def post(self, path: str, headers: Any, body: bytes, deadline_s: float) -> RawReply:
            ask(Endpoint(Wire(refuses("max_tokens")), SECRET, names), max_output_tokens=7)
            return super().post(path, headers, body, deadline_s)

    result = ask(Endpoint(Meanwhile(refuses("max_tokens")), SECRET, names), max_output_tokens=7).result

    assert isinstance(result, Problem)
    assert result.kind is ProblemKind.RESENT


def test_endpoint_that_refuses_both_names_is_not_asked_for_ever() -> None:
    endpoint = Endpoint(Wire(refuses("max_tokens"), refuses("max_completion_tokens")), SECRET, Marks())

    kinds = []
    for _ in range(3):
        result = ask(endpoint, max_output_tokens=7).result
        assert isinstance(result, Problem)
        kinds.append(result.kind)

    assert kinds == [ProblemKind.RESENT, ProblemKind.FINAL, ProblemKind.FINAL]


def test_two_endpoints_of_one_host_learn_apart() -> None:
    names: Marks[tuple[str, str], str] = Marks()
    ask(
        Endpoint(Wire(refuses("max_tokens"), base_url="http://127.0.0.1:9/v1"), SECRET, names),
        max_output_tokens=7,
    )
    wire = Wire(GOOD, base_url="http://127.0.0.1:10/v1")

    ask(Endpoint(wire, SECRET, names), max_output_tokens=7)

    assert "max_tokens" in wire.bodies[0]


def test_other_refusals_do_not_rename_the_token_limit() -> None:
    body = b'{"error": {"message": "bad temperature", "param": "temperature", "code": "invalid_value"}}'
    names: Marks[tuple[str, str], str] = Marks()

    result = ask(
        Endpoint(Wire(factories.raw_reply(status=400, body=body)), SECRET, names), max_output_tokens=7
    ).result

    assert isinstance(result, Problem)
    assert (result.kind, names) == (ProblemKind.FINAL, {})


# Whether a key works


class Models(Transport):
    """Says to each request for the models what it is told."""

    def __init__(self, *says: RawReply | TransportError) -> None:
        self.base_url, self.host, self.says = "http://127.0.0.1/v1", "127.0.0.1", list(says)

    def get(self, path: str, headers: Mapping[str, str], deadline_s: float) -> RawReply:
        assert path == "/models"
        assert headers["authorization"] == f"Bearer {SECRET}"
        assert CHECK_TIMEOUT_S - 1 < deadline_s <= CHECK_TIMEOUT_S
        said = self.says.pop(0)
        if isinstance(said, TransportError):
            raise said
        return said


def check(*says: RawReply | TransportError) -> KeyCheck:
    return Endpoint(Models(*says), SECRET, Marks()).check()


MODELS = factories.raw_reply(body=b'{"object": "list", "data": [{"id": "gpt-4o-mini", "object": "model"}]}')


@pytest.mark.parametrize("body", [MODELS.body, b'{"data": []}', b'{"data": null}', b"[]"])
def test_key_that_is_told_its_models_works(body: bytes) -> None:
    assert check(factories.raw_reply(body=body)) is KeyCheck.WORKS


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (401, KeyCheck.REFUSED),
        (403, KeyCheck.WORKS),
        (404, KeyCheck.WORKS),
        (429, KeyCheck.WORKS),
        (307, KeyCheck.UNREACHABLE),
        (400, KeyCheck.UNREACHABLE),
        (402, KeyCheck.UNREACHABLE),
        (500, KeyCheck.UNREACHABLE),
        (503, KeyCheck.UNREACHABLE),
    ],
)
def test_status_tells_whether_a_key_is_known(status: int, found: KeyCheck) -> None:
    assert check(factories.raw_reply(status=status, body=b"<html")) is found


@pytest.mark.parametrize("body", [b"", b"<html", b'{"dat', b"null", b"7", b'"data"', b"{}", b'{"error": {}}'])
def test_list_of_models_that_can_not_be_read_shows_nothing(body: bytes) -> None:
    assert check(factories.raw_reply(body=body)) is KeyCheck.UNREACHABLE


@pytest.mark.parametrize(
    "error", [TransportError("no"), DeadlinePassed("late"), ReplyTooLarge("large"), ConnectionStale("old")]
)
def test_trouble_on_the_way_to_the_models_is_told(error: TransportError) -> None:
    assert check(error, error) is KeyCheck.UNREACHABLE


def test_stale_connection_does_not_fail_a_check() -> None:
    assert check(ConnectionStale("old"), MODELS) is KeyCheck.WORKS


# One call for several tasks


def packed(*answers: Any) -> dict[str, Any]:
    """A good reply to a pack."""
    return completion(content=json.dumps({"answers": answers}))


def ask_pack(reply: Any, *prompts: Prompt, status: int = 200, **settings: Any) -> Reply[Answers]:
    """What becomes of two tasks, where none are given, that get this reply."""
    wire = Wire(factories.raw_reply(status=status, body=json.dumps(reply).encode()))
    return Endpoint(wire, SECRET, Marks()).ask_pack(
        MODEL, JobSettings(**settings), prompts or ("one", "two"), 5.0
    )


ONE, TWO = {"n": 1, "text": "uno"}, {"n": 2, "text": "dos"}


def test_pack_is_one_request_of_numbered_tasks() -> None:
    wire = Wire(GOOD)
    settings = JobSettings(
        temperature=0.5, instructions="Be brief", template="{text}!", max_output_tokens=7, pack=True
    )

    Endpoint(wire, SECRET, Marks()).ask_pack(MODEL, settings, ["one", {"text": "дві"}], 5.0)

    (body,) = wire.bodies
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": f"Be brief\n\n{INSTRUCTION}"}
    assert user["role"] == "user"
    assert json.loads(user["content"]) == {"tasks": [{"n": 1, "text": "one!"}, {"n": 2, "text": "дві!"}]}
    assert body == {
        "model": MODEL,
        "temperature": 0.5,
        "max_tokens": 2 * (7 + 16),
        "response_format": json.loads(RESPONSE_FORMAT),
    }


def test_pack_sends_only_what_the_caller_set() -> None:
    wire = Wire(GOOD)

    Endpoint(wire, SECRET, Marks()).ask_pack(MODEL, JobSettings(pack=True), ["one", "two"], 5.0)

    assert wire.bodies[0].keys() == {"model", "messages", "response_format"}


def test_answers_of_a_pack_are_in_the_order_of_its_tasks() -> None:
    reply = ask_pack(packed(TWO, ONE))

    assert reply == Reply(["uno", "dos"], Usage(12, 3))


def test_headers_of_a_pack_tell_whose_quota_it_was() -> None:
    headers = {"openai-organization": "acme", "openai-project": "proj_1", "retry-after": "3"}
    wire = Wire(factories.raw_reply(body=json.dumps(packed(ONE)).encode(), headers=headers))

    reply = Endpoint(wire, SECRET, Marks()).ask_pack(MODEL, JobSettings(), ["one"], 5.0)

    assert (reply.organization, reply.project, reply.limits.retry_after_s) == ("acme", "proj_1", 3.0)


def cut_short(reply: dict[str, Any]) -> dict[str, Any]:
    reply["choices"][0]["finish_reason"] = "length"
    return reply


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        (packed(ONE), ["uno", None]),
        (packed(ONE, TWO, {"n": 2, "text": "tres"}), ["uno", None]),
        (packed({"n": 1, "text": "a\x00b"}, TWO), ["a\ufffdb", "dos"]),
        (cut_short(packed(ONE, TWO)), ["uno", None]),
        (completion(content='{"answers": [{"n": 1, "text": "uno"}, {"n": 2'), ["uno", None]),
        (completion(), [None, None]),
        (completion(content=""), [None, None]),
        (completion(content=None), [None, None]),
        (completion(content=None, finish_reason="length"), [None, None]),
        (completion(content=7), [None, None]),
        (completion(content=None, finish_reason="content_filter"), [None, None]),
        (packed(ONE, TWO) | {"choices": []}, None),
    ],
)
def test_only_what_is_certain_answers_a_pack(reply: Any, answers: list[str | None] | None) -> None:
    read_pack = ask_pack(reply)

    assert read_pack.usage == Usage(12, 3)
    if answers is None:
        assert isinstance(read_pack.result, Problem)
        assert (read_pack.result.kind, read_pack.result.code) == (
            ProblemKind.TRANSIENT,
            ErrorCode.BAD_RESPONSE,
        )
    else:
        assert read_pack.result == answers


def test_nothing_of_a_withheld_pack_is_taken() -> None:
    content = json.dumps({"answers": [ONE, TWO]})

    filtered = ask_pack(completion(content=content, finish_reason="content_filter"))
    refused = ask_pack(completion(content=None, message={"refusal": content}))

    assert filtered.result == [None, None]
    assert refused.result == [None, None]


@pytest.mark.parametrize(
    ("status", "error", "kind", "code"),
    [
        (400, {}, ProblemKind.PACK_REFUSED, ErrorCode.BAD_REQUEST),
        (400, {"param": "response_format"}, ProblemKind.PACK_REFUSED, ErrorCode.BAD_REQUEST),
        (422, {}, ProblemKind.PACK_REFUSED, ErrorCode.BAD_REQUEST),
        (400, {"code": "context_length_exceeded"}, ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH),
        (413, {}, ProblemKind.FINAL, ErrorCode.CONTEXT_LENGTH),
        (400, {"code": "content_filter"}, ProblemKind.FINAL, ErrorCode.CONTENT_FILTER),
        (401, {}, ProblemKind.KEY_REFUSED, ErrorCode.KEY_REFUSED),
        (429, {}, ProblemKind.RATE_LIMITED, ErrorCode.RATE_LIMITED),
        (500, {}, ProblemKind.TRANSIENT, ErrorCode.UPSTREAM_ERROR),
    ],
)
def test_refusal_of_the_form_is_told_from_that_of_a_prompt(
    status: int, error: dict[str, Any], kind: ProblemKind, code: ErrorCode
) -> None:
    result = ask_pack({"error": {"message": "no", **error}}, status=status).result

    assert isinstance(result, Problem)
    assert (result.kind, result.code) == (kind, code)


def test_trouble_on_the_way_of_a_pack_is_a_problem() -> None:
    result = (
        Endpoint(Wire(DeadlinePassed("late")), SECRET, Marks())
        .ask_pack(MODEL, JobSettings(), ["one"], 5.0)
        .result
    )

    assert isinstance(result, Problem)
    assert (result.kind, result.code) == (ProblemKind.TRANSIENT, ErrorCode.TIMEOUT)


def test_reply_holds_its_part_of_the_budget_until_it_is_gone() -> None:
    budget = Budget(10)
    body = json.dumps(packed(ONE, TWO)).encode()
    wire = Wire(RawReply(200, {}, body, budget.reserve(10, lambda: None)))

    reply = Endpoint(wire, SECRET, Marks()).ask_pack(MODEL, JobSettings(), ["one", "two"], 5.0)
    wire.replies.clear()

    assert reply.result == ["uno", "dos"]
    assert budget.free_bytes == 0
    del reply
    assert budget.free_bytes == 10


def test_pack_learns_the_name_of_the_token_limit_too() -> None:
    wire = Wire(refuses("max_tokens"), GOOD)
    endpoint = Endpoint(wire, SECRET, Marks())

    refused = endpoint.ask_pack(MODEL, JobSettings(max_output_tokens=7), ["one", "two"], 5.0).result
    ask(endpoint, max_output_tokens=7)

    assert isinstance(refused, Problem)
    assert refused.kind is ProblemKind.RESENT
    assert wire.bodies[1]["max_completion_tokens"] == 7


@unhurried
@given(body=json_values | st.binary(max_size=50), status=st.integers(200, 599), content=json_values)
def test_no_reply_to_a_pack_is_too_odd_to_read(body: Any, status: int, content: Any) -> None:
    for raw in (body, completion(content=content), completion(content=json.dumps({"answers": content}))):
        data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        wire = Wire(factories.raw_reply(status=status, body=data))

        result = Endpoint(wire, SECRET, Marks()).ask_pack(MODEL, JobSettings(), ["one", "two"], 5.0).result

        assert isinstance(result, Problem) or len(result) == 2
