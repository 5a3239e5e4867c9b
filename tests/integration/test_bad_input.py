"""Bad input on every route: an exact problem, never a 5xx, no value repeated, nothing half stored."""

import contextlib
import gzip
import json
import socket
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.service import ADMIN_EMAIL, PASSWORD, Env, Service
from tests.upstream import Upstream

MARK = "s3cr3t-v4lue"
"""Stands in the values of bad requests, and must not come back."""
MAX_JSON_BYTES = 64 << 10
MAX_TASKS = 50
JSON = {"Content-Type": "application/json"}
NOBODY = "0" * 32

BODY_ROUTES = [
    ("POST", "/register"),
    ("POST", "/login"),
    ("POST", "/tokens"),
    ("POST", "/me/password"),
    ("PATCH", f"/users/{NOBODY}"),
    ("PATCH", "/settings"),
    ("POST", "/jobs"),
    ("POST", "/task"),
    ("POST", f"/jobs/{NOBODY}/retry"),
]

JOB_ROUTES = ("/jobs", "/task")


@pytest.fixture(scope="module")
def shared_env() -> Env:
    return {"MAX_JSON_BYTES": str(MAX_JSON_BYTES), "MAX_TASKS": str(MAX_TASKS)}


def stored(service: Service) -> dict[str, int]:
    """How many rows each table holds."""
    (path,) = service.data_dir.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


@pytest.fixture(autouse=True)
def _nothing_is_stored(service: Service, upstream: Upstream) -> Iterator[None]:
    """Every test here is refused, so none may leave a row or make a call."""
    before = stored(service)
    yield
    assert stored(service) == before
    assert upstream.calls() == []


def assert_problem(reply: requests.Response, status: int) -> dict[str, Any]:
    """The problem, which has every member and repeats no value."""
    assert reply.status_code == status, reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = reply.json()
    members = {"type", "title", "status", "detail", "request_id"}
    assert problem.keys() - {"errors"} == members
    assert problem["status"] == status
    assert all(problem[name] for name in members)
    assert problem["request_id"] == reply.headers["X-Request-Id"]
    assert MARK not in reply.text
    if status == 422:
        assert problem["errors"]
        assert all(set(error) == {"loc", "msg"} and error["msg"] for error in problem["errors"])
    if status == 401:
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    return problem


def places(problem: dict[str, Any]) -> list[list[str | int]]:
    return [error["loc"] for error in problem["errors"]]


# Bodies that are none, on every route that takes one

NO_BODIES: dict[str, tuple[bytes, dict[str, str], int]] = {
    "empty": (b"", JSON, 400),
    "blank": (b" \n ", JSON, 400),
    "word": (MARK.encode(), JSON, 400),
    "cut": (b'{"data": {"a": "s3cr3t-v4lue', JSON, 400),
    "trailing comma": (b'{"data": ["s3cr3t-v4lue"],}', JSON, 400),
    "two documents": (b'{"data": ["a"]} {"data": ["b"]}', JSON, 400),
    "single quotes": (b"{'data': ['s3cr3t-v4lue']}", JSON, 400),
    "comment": (b'{"data": ["a"]} // s3cr3t-v4lue', JSON, 400),
    "NaN": (b'{"data": ["a"], "settings": {"temperature": NaN}}', JSON, 400),
    "Infinity": (b'{"data": ["a"], "settings": {"temperature": -Infinity}}', JSON, 400),
    "float beyond a double": (b'{"data": ["a"], "settings": {"temperature": 1e999}}', JSON, 400),
    "integer of 5,000 digits": (
        b'{"data": ["a"], "settings": {"priority": ' + b"9" * 5000 + b"}}",
        JSON,
        400,
    ),
    "integer beyond a double": (b'{"data": ["a"], "settings": {"priority": ' + b"9" * 320 + b"}}", JSON, 400),
    "nested too deep": (b'{"data": ' + b"[" * 5000 + b"]" * 5000 + b"}", JSON, 400),
    "objects too deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, JSON, 400),
    "Latin-1": ('{"data": ["é s3cr3t-v4lue"]}'.encode("latin-1"), JSON, 400),
    "UTF-16": ('{"data": ["s3cr3t-v4lue"]}'.encode("utf-16"), JSON, 400),
    "overlong UTF-8": (b'{"data": ["\xc0\xaf s3cr3t-v4lue"]}', JSON, 400),
    "surrogate in UTF-8": (b'{"data": ["\xed\xa0\x80 s3cr3t-v4lue"]}', JSON, 400),
    "lone surrogate": (rb'{"data": ["\ud800 s3cr3t-v4lue"]}', JSON, 400),
    "lone surrogate in a name": (rb'{"data": {"\udc00": "s3cr3t-v4lue"}}', JSON, 400),
    "NUL, escaped": (rb'{"data": ["\u0000 s3cr3t-v4lue"]}', JSON, 400),
    "NUL in a name": (rb'{"data": {"\u0000": "s3cr3t-v4lue"}}', JSON, 400),
    "NUL, raw": (b'{"data": ["\0 s3cr3t-v4lue"]}', JSON, 400),
    "newline in a text": (b'{"data": ["\n s3cr3t-v4lue"]}', JSON, 400),
    "a list": (b'["s3cr3t-v4lue"]', JSON, 422),
    "a text": (b'"s3cr3t-v4lue"', JSON, 422),
    "a number": (b"17", JSON, 422),
    "null": (b"null", JSON, 422),
    "true": (b"true", JSON, 422),
    "name given twice": (b'{"data": ["a"], "data": ["s3cr3t-v4lue"]}', JSON, 422),
    "no content type": (b'{"data": ["s3cr3t-v4lue"]}', {}, 415),
    "text": (b'{"data": ["s3cr3t-v4lue"]}', {"Content-Type": "text/plain"}, 415),
    "form": (b"data=s3cr3t-v4lue", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "XML": (b"<data/>", {"Content-Type": "application/xml"}, 415),
    "nonsense type": (b'{"data": ["a"]}', {"Content-Type": ";;;"}, 415),
    "other charset": (b'{"data": ["a"]}', {"Content-Type": "application/json; charset=latin-1"}, 415),
    "gzip": (gzip.compress(b'{"data": ["a"]}'), JSON | {"Content-Encoding": "gzip"}, 415),
    "said to be gzip": (b'{"data": ["a"]}', JSON | {"Content-Encoding": "gzip"}, 415),
    "unknown coding": (b'{"data": ["a"]}', JSON | {"Content-Encoding": MARK}, 415),
    "too large": (b'{"data": ["' + b"x" * MAX_JSON_BYTES + b'"]}', JSON, 413),
}


@pytest.mark.parametrize(
    ("method", "path"), BODY_ROUTES, ids=[f"{method} {path}" for method, path in BODY_ROUTES]
)
def test_body_that_is_no_object_is_refused(service: Service, method: str, path: str) -> None:
    for name, (body, headers, status) in NO_BODIES.items():
        if name == "empty" and path.endswith("/retry"):
            continue  # a retry needs no body
        if "gzip" in name and path in JOB_ROUTES:
            continue  # these unpack it: see below
        reply = service.request(method, path, service.admin, data=body, headers=headers)
        assert reply.status_code == status, f"{name}: {reply.status_code} {reply.text}"
        assert_problem(reply, status)


@pytest.mark.parametrize("path", JOB_ROUTES)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"data": ["s3cr3t-v4lue"]}', 400, id="no gzip"),
        pytest.param(gzip.compress(b'{"data": ["s3cr3t-v4lue"]}')[:-6], 400, id="cut"),
        pytest.param(gzip.compress(b"s3cr3t-v4lue"), 400, id="gzip of no JSON"),
        pytest.param(gzip.compress(b'{"data": ["' + b"x" * (50 << 20) + b'"]}'), 413, id="bomb"),
    ],
)
def test_bad_gzip_is_refused(service: Service, path: str, body: bytes, status: int) -> None:
    headers = JSON | {"Content-Encoding": "gzip"}

    reply = service.post(path, service.admin, data=body, headers=headers)

    assert_problem(reply, status)


def test_syntax_error_is_placed(service: Service) -> None:
    reply = service.post("/jobs", service.admin, data=b'{\n  "data": oops}', headers=JSON)

    assert "line 2" in assert_problem(reply, 400)["detail"]


def test_413_says_which_limit_and_what_takes_more(service: Service) -> None:
    reply = service.submit(["x" * MAX_JSON_BYTES], connection="close")

    detail = assert_problem(reply, 413)["detail"]
    assert "MAX_JSON_BYTES" in detail
    assert "JSONL" in detail


def test_chunked_body_is_bounded_too(service: Service) -> None:
    pieces = iter([b'{"data": ["', *[b"x" * 8192] * 12, b'"]}'])

    reply = service.post("/jobs", service.admin, data=pieces, headers=JSON)

    assert_problem(reply, 413)


def test_too_many_tasks_are_a_413(service: Service) -> None:
    as_list = service.submit(["x"] * (MAX_TASKS + 1))
    as_object = service.submit({str(number): "x" for number in range(MAX_TASKS + 1)})

    for reply in (as_list, as_object):
        assert "MAX_TASKS" in assert_problem(reply, 413)["detail"]


def test_415_says_which_header_to_send(service: Service) -> None:
    reply = service.post("/jobs", service.admin, data=b"{}", headers={"Content-Type": "text/plain"})

    assert "Content-Type: application/json" in assert_problem(reply, 415)["detail"]


# Jobs that are none

BAD_JOBS: list[tuple[str, dict[str, Any], list[str | int]]] = [
    ("no data", {}, ["data"]),
    ("only settings", {"settings": {}}, ["data"]),
    ("unknown member", {"data": ["a"], "Data": MARK}, ["Data"]),
    ("setting at the top", {"data": ["a"], "temperature": 1}, ["temperature"]),
    ("data is null", {"data": None}, ["data"]),
    ("data is a text", {"data": MARK}, ["data"]),
    ("data is a number", {"data": 7}, ["data"]),
    ("no task in an object", {"data": {}}, ["data"]),
    ("no task in a list", {"data": []}, ["data"]),
    ("task is null", {"data": {"a": None}}, ["data", "a"]),
    ("task is a number", {"data": {"a": 12345678}}, ["data", "a"]),
    ("task is true", {"data": {"a": True}}, ["data", "a"]),
    ("task is a list", {"data": {"a": [MARK]}}, ["data", "a"]),
    ("task is an empty object", {"data": {"a": {}}}, ["data", "a"]),
    ("task has an unknown member", {"data": {"a": {"prompt": MARK}}}, ["data", "a", "prompt"]),
    ("task has two forms", {"data": {"a": {"messages": [{"role": "user"}], "vars": {}}}}, ["data", "a"]),
    ("id in an object's task", {"data": {"a": {"id": "b", "text": MARK}}}, ["data", "a", "id"]),
    ("messages is a text", {"data": {"a": {"messages": MARK}}}, ["data", "a", "messages"]),
    ("messages is empty", {"data": {"a": {"messages": []}}}, ["data", "a", "messages"]),
    ("message is a text", {"data": {"a": {"messages": [MARK]}}}, ["data", "a", "messages", 0]),
    (
        "message without a role",
        {"data": {"a": {"messages": [{"content": MARK}]}}},
        ["data", "a", "messages", 0],
    ),
    ("role is a number", {"data": {"a": {"messages": [{"role": 1}]}}}, ["data", "a", "messages", 0]),
    ("vars without a template", {"data": {"a": {"vars": {"x": MARK}}}}, ["data", "a", "vars"]),
    (
        "vars is a list",
        {"data": {"a": {"vars": [MARK]}}, "settings": {"template": "{x}"}},
        ["data", "a", "vars"],
    ),
    (
        "variable is an object",
        {"data": {"a": {"vars": {"x": {"y": MARK}}}}, "settings": {"template": "{x}"}},
        ["data", "a", "vars", "x"],
    ),
    (
        "variable is missing",
        {"data": {"a": {"vars": {"y": MARK}}}, "settings": {"template": "{x}"}},
        ["data", "a", "vars"],
    ),
    (
        "text for a template of variables",
        {"data": {"a": MARK}, "settings": {"template": "{x}"}},
        ["data", "a"],
    ),
    ("empty id", {"data": {"": "a"}}, ["data", ""]),
    ("id of 201 characters", {"data": {"i" * 201: "a"}}, ["data", "i" * 200 + "…"]),
    ("empty id in a list", {"data": [{"id": "", "text": "a"}]}, ["data", 0, "id"]),
    ("long id in a list", {"data": [{"id": "i" * 201, "text": "a"}]}, ["data", 0, "id"]),
    ("id is a number", {"data": ["a", {"id": 1, "text": "a"}]}, ["data", 1, "id"]),
    ("id is null", {"data": [{"id": None, "text": "a"}]}, ["data", 0, "id"]),
    ("id without a task", {"data": [{"id": "a"}]}, ["data", 0]),
    ("metadata is a list", {"data": ["a"], "metadata": [MARK]}, ["metadata"]),
    ("metadata is null", {"data": ["a"], "metadata": None}, ["metadata"]),
    ("metadata holds a number", {"data": ["a"], "metadata": {"x": 12345678}}, ["metadata", "x"]),
    ("metadata holds an object", {"data": ["a"], "metadata": {"x": {"y": MARK}}}, ["metadata", "x"]),
    (
        "metadata of 17",
        {"data": ["a"], "metadata": {str(number): MARK for number in range(17)}},
        ["metadata"],
    ),
    ("settings is null", {"data": ["a"], "settings": None}, ["settings"]),
    ("settings is a list", {"data": ["a"], "settings": [MARK]}, ["settings"]),
]


@pytest.mark.parametrize(("body", "place"), [row[1:] for row in BAD_JOBS], ids=[row[0] for row in BAD_JOBS])
def test_job_that_is_none_is_refused_at_its_place(
    service: Service, body: dict[str, Any], place: list[str | int]
) -> None:
    for path in ("/jobs", "/task", "/jobs?dry_run=true"):
        reply = service.post(path, service.admin, json=body)

        assert places(assert_problem(reply, 422)) == [place]


BAD_SETTINGS: list[tuple[str, Any]] = [
    ("Temperature", 1),
    ("top_p", 1),
    ("n", 2),
    ("stream", True),
    ("api_key", MARK),
    ("base_url", f"http://{MARK}"),
    ("model", ""),
    ("model", 7),
    ("model", None),
    ("model", "m" * 201),
    ("model", f"{MARK} two words"),
    ("model", f"{MARK}é"),
    ("gpt_type", [MARK]),
    ("temperature", MARK),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", None),
    ("max_chunk_tokens", 0),
    ("max_chunk_tokens", -1),
    ("max_chunk_tokens", 1.5),
    ("max_chunk_tokens", "4000"),
    ("max_chunk_tokens", 10**300),
    ("maxTokenCount", 0),
    ("maxTokenCount", MARK),
    ("instructions", 7),
    ("instructions", [MARK]),
    ("template", ""),
    ("template", 7),
    ("template", "{"),
    ("template", "}"),
    ("template", "{}"),
    ("template", "{x!r}"),
    ("template", "{x:>1000000000}"),
    ("template", "{x[0]}"),
    ("max_output_tokens", 0),
    ("max_output_tokens", True),
    ("max_output_tokens", 10**300),
    ("response_format", MARK),
    ("response_format", None),
    ("pack", "yes"),
    ("pack", 1),
    ("priority", 101),
    ("priority", -101),
    ("priority", 0.5),
    ("deadline_s", 0),
    ("deadline_s", -1),
    ("deadline_s", 10**300),
    ("deadline_s", "60"),
    ("max_total_tokens", 0),
    ("max_total_tokens", -1),
    ("max_total_tokens", "many"),
    ("delivery", "mail"),
    ("delivery", MARK),
    ("delivery", None),
    ("delivery", ["webhook"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_bad_setting_is_refused_and_named(service: Service, name: str, value: Any) -> None:
    reply = service.submit(["a"], {name: value})

    assert places(assert_problem(reply, 422)) == [["settings", name]]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", ": did you mean max_output_tokens?"),
        ("system", ": did you mean instructions?"),
        ("temprature", ": did you mean temperature?"),
        ("tempo", ""),
    ],
)
def test_unknown_setting_is_told_what_may_be_meant(service: Service, name: str, hint: str) -> None:
    in_body = service.submit(["a"], {name: MARK})
    in_query = service.post(
        f"/jobs?{name}={MARK}", service.admin, data=b"a", headers={"Content-Type": "text/csv"}
    )

    assert [error["msg"] for error in assert_problem(in_body, 422)["errors"]] == [f"is not known here{hint}"]
    assert [error["msg"] for error in assert_problem(in_query, 422)["errors"]] == [f"is not known here{hint}"]


def test_unknown_member_elsewhere_is_taken_for_no_setting(service: Service) -> None:
    reply = service.post("/login", json={"email": "a@example.org", "password": MARK, "system": MARK})

    assert [error["msg"] for error in assert_problem(reply, 422)["errors"]] == ["is not known here"]


def test_response_format_without_a_type_is_refused(service: Service) -> None:
    reply = service.submit(["a"], {"response_format": {"json_schema": {"name": MARK}}})

    assert places(assert_problem(reply, 422)) == [["settings", "response_format", "type"]]


def test_every_bad_setting_is_named(service: Service) -> None:
    reply = service.submit(["a"], {"temperature": 9, "tempo": MARK, "priority": "high"})

    assert sorted(places(assert_problem(reply, 422))) == [
        ["settings", "priority"],
        ["settings", "temperature"],
        ["settings", "tempo"],
    ]


def test_old_and_new_name_that_disagree_are_refused(service: Service) -> None:
    reply = service.submit(["a"], {"model": "gpt-a", "gpt_type": "gpt-b"})

    assert "gpt_type" in assert_problem(reply, 422)["detail"]


def test_pack_is_refused_with_messages_and_response_format(service: Service) -> None:
    messages = {"messages": [{"role": "user", "content": MARK}]}

    assert_problem(service.submit([messages], {"pack": True}), 422)
    assert_problem(service.submit(["a"], {"pack": True, "response_format": {"type": "json_object"}}), 422)


@pytest.mark.parametrize(
    ("body", "id_"),
    [
        (b'{"data": {"twin": "a", "other": "b", "twin": "s3cr3t-v4lue"}}', "twin"),
        (rb'{"data": {"twin": "a", "\u0074win": "s3cr3t-v4lue"}}', "twin"),
        (b'{"data": [{"id": "twin", "text": "a"}, {"id": "twin", "text": "s3cr3t-v4lue"}]}', "twin"),
        (b'{"data": ["a", "b", {"id": "1", "text": "s3cr3t-v4lue"}]}', "1"),
        (b'{"data": [{"id": "1", "text": "s3cr3t-v4lue"}, "b"]}', "1"),
        (b'{"data": {"": "a", "": "s3cr3t-v4lue"}}', ""),
    ],
)
def test_id_given_twice_is_refused_and_named(service: Service, body: bytes, id_: str) -> None:
    reply = service.post("/jobs", service.admin, data=body, headers=JSON)

    assert id_ in assert_problem(reply, 422)["detail"]


def test_last_bad_task_of_many_stores_none(service: Service) -> None:
    reply = service.submit(["a"] * (MAX_TASKS - 1) + [7])

    assert places(assert_problem(reply, 422)) == [["data", MAX_TASKS - 1]]


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_idempotency_key_of_a_bad_length_is_refused(service: Service, key: str) -> None:
    reply = service.submit(["a"], idempotency_key=key)

    assert places(assert_problem(reply, 422)) == [["header", "Idempotency-Key"]]


# Other bodies

BAD_BODIES: list[tuple[str, str, Any, list[str | int]]] = [
    ("POST", "/register", {}, ["email"]),
    ("POST", "/register", {"email": MARK, "password": PASSWORD}, ["email"]),
    ("POST", "/register", {"email": "x@example.org", "password": "short"}, ["password"]),
    ("POST", "/register", {"email": "x@example.org", "password": "p" * 257}, ["password"]),
    ("POST", "/register", {"email": "x@example.org", "password": 123456789012}, ["password"]),
    ("POST", "/register", {"email": "x@example.org", "password": PASSWORD, "role": "admin"}, ["role"]),
    ("POST", "/login", {"email": ADMIN_EMAIL}, ["password"]),
    ("POST", "/login", {"email": [MARK], "password": MARK}, ["email"]),
    ("POST", "/login", {"email": ADMIN_EMAIL, "password": None}, ["password"]),
    ("POST", "/tokens", {}, ["name"]),
    ("POST", "/tokens", {"name": ""}, ["name"]),
    ("POST", "/tokens", {"name": "n" * 201}, ["name"]),
    ("POST", "/tokens", {"name": "x", "expires_in_days": 0}, ["expires_in_days"]),
    ("POST", "/tokens", {"name": "x", "expires_in_days": "7"}, ["expires_in_days"]),
    ("POST", "/tokens", {"name": "x", "scope": MARK}, ["scope"]),
    ("POST", "/me/password", {"old": PASSWORD}, ["new"]),
    ("POST", "/me/password", {"old": PASSWORD, "new": "short"}, ["new"]),
    ("PATCH", f"/users/{NOBODY}", {"role": "root"}, ["role"]),
    ("PATCH", f"/users/{NOBODY}", {"disabled": "true"}, ["disabled"]),
    ("PATCH", f"/users/{NOBODY}", {"email": MARK}, ["email"]),
    ("PATCH", "/settings", {"delivery": "mail"}, ["delivery"]),
    ("PATCH", "/settings", {"auth": "false"}, ["auth"]),
    ("PATCH", "/settings", {"auth": 0}, ["auth"]),
    ("PATCH", "/settings", {"auth": None}, ["auth"]),
    ("PATCH", "/settings", {"registration": 1}, ["registration"]),
    ("PATCH", "/settings", {"registraton": True}, ["registraton"]),
    ("PATCH", "/settings", {"auth": True, "delivery": MARK}, ["delivery"]),
    ("POST", f"/jobs/{NOBODY}/retry", {"codes": []}, ["codes"]),
    ("POST", f"/jobs/{NOBODY}/retry", {"codes": "timeout"}, ["codes"]),
    ("POST", f"/jobs/{NOBODY}/retry", {"codes": [MARK]}, ["codes", 0]),
    ("POST", f"/jobs/{NOBODY}/retry", {"codes": [7]}, ["codes", 0]),
    ("POST", f"/jobs/{NOBODY}/retry", {"code": "timeout"}, ["code"]),
]


@pytest.mark.parametrize(("method", "path", "body", "place"), BAD_BODIES)
def test_bad_member_is_refused_and_named(
    service: Service, method: str, path: str, body: Any, place: list[str | int]
) -> None:
    before = service.get("/settings", service.admin).json()

    reply = service.request(method, path, service.admin, json=body)

    assert place in places(assert_problem(reply, 422))
    assert service.get("/settings", service.admin).json() == before


# Paths, queries, methods, headers

FOREIGN_IDS = [
    NOBODY,
    "nope",
    "0",
    "-1",
    "i" * 4000,
    "%00",
    "%ff%fe",
    "%F0%9F%92%A9",
    "' OR 1=1 --",
    "..%2F..%2Fetc%2Fpasswd",
    "%25s",
    "null",
    "ABCDEF",
]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs/{}"),
        ("GET", "/jobs/{}/results"),
        ("DELETE", "/jobs/{}"),
        ("DELETE", "/jobs/{}?purge=true"),
        ("POST", "/jobs/{}/retry"),
        ("GET", "/deliveries/{}"),
        ("POST", "/deliveries/{}/redeliver"),
        ("DELETE", "/tokens/{}"),
        ("DELETE", "/users/{}"),
    ],
)
def test_id_that_nobody_gave_is_a_404(service: Service, method: str, path: str) -> None:
    for id_ in FOREIGN_IDS:
        reply = service.request(method, path.format(id_), service.admin)

        assert_problem(reply, 404)


def test_browser_at_the_top_is_told_of_the_docs(service: Service) -> None:
    assert "/docs" in assert_problem(service.get("/"), 405)["detail"]
    assert "/docs" not in assert_problem(service.request("PUT", "/"), 405)["detail"]


@pytest.mark.parametrize("number", ["99", "-1", "1.0", "9" * 400, "nope", "%00", "0x0"])
def test_key_that_is_not_there_is_a_404(service: Service, number: str) -> None:
    assert_problem(service.post(f"/keys/{number}/check", service.admin), 404)


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/jobs/", "/jobs/a/b/c", "/JOBS", "/jobs/%2e%2e/keys", "/%00"]
)
def test_unknown_path_is_a_404(service: Service, path: str) -> None:
    assert_problem(service.get(path, service.admin), 405 if path == "/" else 404)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *[
            (f"/jobs?limit={value}", "limit")
            for value in ("0", "101", "-1", "1.5", "", MARK, "9" * 400, "%00")
        ],
        *[
            (f"/jobs?status={value}", "status")
            for value in (MARK, "", "receiving", "discarded", "QUEUED", "%00")
        ],
        *[
            (f"/jobs?cursor={value}", "cursor")
            for value in (MARK, "", "%00", "'", NOBODY + "0", NOBODY + "%0A")
        ],
        *[(f"/jobs?all={value}", "all") for value in (MARK, "", "TRUE")],
        ("/jobs?page=2", "page"),
        (f"/jobs?limt={MARK}", "limt"),
        (f"/jobs/{NOBODY}?results=maybe", "results"),
        (f"/jobs/{NOBODY}?result=false", "result"),
        (f"/jobs/{NOBODY}/results?format=xml", "format"),
        (f"/jobs/{NOBODY}/results?format=", "format"),
        ("/deliveries?status=lost", "status"),
        (f"/deliveries?job_id={MARK}", "job_id"),
        ("/deliveries?limit=0", "limit"),
        (f"/deliveries?cursor={MARK}", "cursor"),
        (f"/deliveries?foo={MARK}", "foo"),
        ("/tokens?limit=0", "limit"),
        (f"/tokens?cursor={MARK}", "cursor"),
        ("/users?limit=101", "limit"),
        (f"/users?cursor={MARK}", "cursor"),
    ],
)
def test_bad_query_value_is_refused_and_named(service: Service, path: str, name: str) -> None:
    assert places(assert_problem(service.get(path, service.admin), 422)) == [[name]]


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("POST", "/jobs?dry_run=yes", "dry_run"),
        ("POST", "/jobs?dryrun=true", "dryrun"),
        ("POST", "/task?dry_run=1", "dry_run"),
        ("DELETE", f"/jobs/{NOBODY}?purge=yes", "purge"),
        ("DELETE", f"/jobs/{NOBODY}?Purge=true", "Purge"),
    ],
)
def test_bad_query_value_of_a_change_is_refused(service: Service, method: str, path: str, name: str) -> None:
    body = {"data": ["a"]} if method == "POST" else None

    reply = service.request(method, path, service.admin, json=body)

    assert places(assert_problem(reply, 422)) == [[name]]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"POST"}),
        ("/register", {"POST"}),
        ("/login", {"POST"}),
        ("/logout", {"POST"}),
        ("/tokens", {"GET", "POST"}),
        (f"/tokens/{NOBODY}", {"DELETE"}),
        ("/me", {"GET"}),
        ("/me/password", {"POST"}),
        ("/users", {"GET"}),
        (f"/users/{NOBODY}", {"PATCH", "DELETE"}),
        ("/settings", {"GET", "PATCH"}),
        ("/jobs", {"GET", "POST"}),
        ("/task", {"POST"}),
        (f"/jobs/{NOBODY}", {"GET", "DELETE"}),
        (f"/jobs/{NOBODY}/results", {"GET"}),
        (f"/jobs/{NOBODY}/retry", {"POST"}),
        ("/deliveries", {"GET"}),
        (f"/deliveries/{NOBODY}", {"GET"}),
        (f"/deliveries/{NOBODY}/redeliver", {"POST"}),
        ("/webhooks/secret", {"GET"}),
        ("/webhooks/test", {"POST"}),
        ("/keys", {"GET"}),
        ("/keys/0/check", {"POST"}),
        ("/healthz", {"GET"}),
        ("/readyz", {"GET"}),
    ],
)
def test_wrong_method_is_a_405_that_names_the_right_ones(
    service: Service, path: str, allowed: set[str]
) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"} - allowed:
        reply = service.request(method, path, service.admin)

        assert_problem(reply, 405)
        assert set(reply.headers["Allow"].replace(" ", "").split(",")) - {"HEAD"} == allowed


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {MARK}",
        f"Basic {MARK}",
        f"Bearer a.{MARK}.c",
        "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJzM2NyM3QtdjRsdWUifQ.",
        "Bearer two tokens",
        "Bearer \xe9\xff",
        MARK,
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/me"), ("GET", "/keys")]
)
def test_bad_token_is_a_401_before_the_body_is_judged(
    service: Service, method: str, path: str, authorization: str
) -> None:
    body = b"{nonsense" if method == "POST" else None
    headers = {**JSON, "Authorization": authorization.encode("latin-1")}

    reply = service.request(method, path, data=body, headers=headers)

    assert_problem(reply, 401)


# Below Flask: what gunicorn itself refuses

RAW = [
    pytest.param(b"NONSENSE\r\n\r\n", id="no request line"),
    pytest.param(b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", id="unknown version"),
    pytest.param(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", id="length of letters"),
    pytest.param(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", id="negative length"),
    pytest.param(
        b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        id="two lengths",
    ),
    pytest.param(
        b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        id="length and chunks",
    ),
    pytest.param(b"POST /jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", id="unknown transfer"),
    pytest.param(b"GET /jobs HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", id="header without a colon"),
    pytest.param(b"GET /jobs HTTP/1.1\r\nHost: x\r\nX-\x00: 1\r\n\r\n", id="NUL in a header"),
    pytest.param(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", id="long path"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", id="long header"),
    pytest.param(
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(500)) + b"\r\n",
        id="many headers",
    ),
]


def exchange(service: Service, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10.0) as sock:
        sock.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # it closes with our bytes unread
            while piece := sock.recv(65536):
                received += piece
        return received


@pytest.mark.parametrize("sent", RAW)
def test_request_that_is_no_http_is_a_problem(service: Service, sent: bytes) -> None:
    head, _, body = exchange(service, sent).partition(b"\r\n\r\n")

    status = int(head.split()[1])
    assert 400 <= status < 500 or status == 505
    assert b"application/problem+json" in head.lower()
    problem = json.loads(body)
    assert {"type", "title", "status", "detail", "request_id"} <= problem.keys()
    assert problem["status"] == status


def test_body_that_breaks_off_stores_nothing(service: Service) -> None:
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=10.0) as sock:
        sock.sendall(head.encode() + b'{"data": ["a"')
        sock.shutdown(socket.SHUT_WR)
        received = sock.recv(65536)

    assert received[:12] in (b"HTTP/1.1 400", b"")
