"""Jobs from files: JSONL, CSV and forms, packed or not, and files that are none, of which nothing stays."""

import contextlib
import gzip
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from gpt_worker.places import Places
from tests.service import Env, Service
from tests.upstream import Upstream

MARK = "s3cr3t-v4lue"
"""Stands in the values of bad files, and must not come back."""
MAX_JSON_BYTES = 1 << 20
MAX_UPLOAD_BYTES = 64 << 20
MAX_TASKS = 50_000
JSONL = "application/jsonl"
CSV = "text/csv"
GZIP = {"Content-Encoding": "gzip"}
DRY_RUN = {"dry_run": "true"}
TWO = b'{"id": "a", "text": "one"}\n{"text": "two"}\n'
ANSWERS = {"a": "answer to: one", "1": "answer to: two"}


@pytest.fixture(scope="module")
def shared_env() -> Env:
    return {
        "MAX_JSON_BYTES": str(MAX_JSON_BYTES),
        "MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES),
        "MAX_TASKS": str(MAX_TASKS),
    }


def upload(
    service: Service,
    body: Any,
    kind: str = JSONL,
    path: str = "/jobs",
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
) -> requests.Response:
    """On a connection of its own, which the service may close before it has read all of a bad body."""
    headers = {"Connection": "close", "Content-Type": kind, **(headers or {})}
    return service.post(path, service.admin, data=body, headers=headers, params=params)


def send_form(service: Service, *parts: tuple[str, Any], **options: Any) -> requests.Response:
    """A part is its content, or (filename, content, type, headers)."""
    whole = [(name, part if isinstance(part, tuple) else (None, part)) for name, part in parts]
    headers = {"Connection": "close", **options.pop("headers", {})}
    return service.post("/jobs", service.admin, files=whole, headers=headers, **options)


def rows(service: Service) -> dict[str, int]:
    """What is stored of jobs, seen or not."""
    (path,) = service.data_dir.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return {
            name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in ("jobs", "tasks", "idempotency_keys")
        }


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def nothing_stays(service: Service, upstream: Upstream) -> Iterator[None]:
    """What the test sends is refused: nothing is seen, asked or, once the janitor was there, stored of it."""
    before = rows(service)
    seen = service.get("/jobs", service.admin).json()
    yield
    assert service.get("/jobs", service.admin).json() == seen
    assert upstream.calls() == []
    wait_until(lambda: rows(service) == before)
    assert not [*service.data_dir.glob("tmp*")]


def assert_problem(reply: requests.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert MARK not in reply.text
    problem: dict[str, Any] = reply.json()
    assert problem["status"] == status
    return problem


# Good ones

GOOD: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "JSONL": (JSONL, TWO, {}),
    "NDJSON": ("application/x-ndjson; charset=utf-8", TWO, {}),
    "JSONL, packed": (JSONL, gzip.compress(TWO), GZIP),
    "CSV": (CSV, b"id;text\r\na;one\r\n1;two\r\n", {}),
    "CSV, packed": (
        CSV,
        gzip.compress(b"\xef\xbb\xbfid,text\na,one\n1,two\n"),
        {"Content-Encoding": "x-gzip"},
    ),
    "JSON, packed": ("application/json", gzip.compress(b'{"data": {"a": "one", "1": "two"}}'), GZIP),
}


@pytest.mark.parametrize(("kind", "body", "headers"), GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("path", ["/jobs", "/task"])
def test_file_is_a_job(service: Service, kind: str, body: bytes, headers: dict[str, str], path: str) -> None:
    reply = upload(service, body, kind, path, headers)

    assert reply.status_code == 200, reply.text
    assert reply.json()["results"] == ANSWERS
    assert list(reply.json()["results"]) == ["a", "1"]


def test_rows_without_an_id_are_numbered_like_a_list(service: Service) -> None:
    reply = upload(service, b'text\n"one\n1"\ntwo\n', CSV)

    assert reply.json()["results"] == {"0": "answer to: one\n1", "1": "answer to: two"}


def test_body_in_chunks_is_a_job(service: Service) -> None:
    reply = upload(service, (bytes([byte]) for byte in TWO))

    assert reply.json()["results"] == ANSWERS


def test_settings_stand_in_the_query(service: Service, upstream: Upstream) -> None:
    params = {
        "model": "gpt-other",
        "temperature": "0.5",
        "max_output_tokens": "7",
        "template": "To {lang}: {text}",
        "instructions": "Be brief.",
        "response_format": '{"type": "json_object"}',
        "metadata": '{"batch": "42"}',
        "priority": "5",
    }

    reply = upload(service, b"lang,text\nFrench,good night\n", CSV, params=params)

    assert reply.status_code == 200, reply.text
    assert (reply.json()["model"], reply.json()["metadata"]) == ("gpt-other", {"batch": "42"})
    (call,) = upstream.calls()
    assert call.body["model"] == "gpt-other"
    assert call.body["temperature"] == 0.5
    assert call.body["response_format"] == {"type": "json_object"}
    assert [message["content"] for message in call.body["messages"]] == ["Be brief.", "To French: good night"]


def test_delivery_stands_in_the_query(service: Service) -> None:
    reply = upload(service, TWO, params={"delivery": "webhook"})

    assert (reply.status_code, reply.json()["delivery"]) == (202, "webhook")
    service.wait_finished(reply.json()["id"])


FORM_FILES: dict[str, tuple[str, bytes, str | None, dict[str, str]]] = {
    "by type": ("data", TWO, JSONL, {}),
    "by name": ("a.jsonl", TWO, None, {}),
    "by name, with some type": ("A.NDJSON", TWO, "application/octet-stream", {}),
    "named as JSON": ("a.json", TWO, "application/json", {}),
    "CSV as some browsers say": ("a.csv", b"id,text\na,one\n1,two\n", "application/vnd.ms-excel", {}),
    "packed by name": ("a.jsonl.gz", gzip.compress(TWO), "application/gzip", {}),
    "packed by header": ("a", gzip.compress(TWO), JSONL, GZIP),
}


@pytest.mark.parametrize("file", FORM_FILES.values(), ids=FORM_FILES)
def test_form_with_a_file_is_a_job(service: Service, file: tuple[Any, ...]) -> None:
    reply = send_form(service, ("file", file), ("settings", '{"temperature": 0}'), ("metadata", '{"a": "b"}'))

    assert reply.status_code == 200, reply.text
    assert reply.json()["results"] == ANSWERS
    assert reply.json()["metadata"] == {"a": "b"}


def test_form_needs_no_settings(service: Service) -> None:
    assert send_form(service, ("file", ("a.jsonl", TWO))).json()["results"] == ANSWERS


@pytest.mark.usefixtures("nothing_stays")
def test_dry_run_takes_every_form(service: Service) -> None:
    replies = [
        upload(service, body, kind, headers=more, params=DRY_RUN) for kind, body, more in GOOD.values()
    ]
    replies.append(send_form(service, ("file", ("a.jsonl", TWO)), params=DRY_RUN))

    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert (reply.json()["dry_run"], reply.json()["tasks"]) == (True, 2)


def test_fifty_thousand_lines_are_a_job(service: Service) -> None:
    lines = (b'{"id": "row %d", "text": "text %d"}\n' % (number, number) for number in range(50_000))

    reply = upload(service, b"".join(lines), headers={"Prefer": "respond-async"})

    assert reply.status_code == 202, reply.text
    assert reply.json()["counts"]["total"] == 50_000
    assert service.delete(f"/jobs/{reply.json()['id']}", service.admin).json()["status"] == "cancelled"
    wait_until(lambda: service.job(reply.json()["id"], results=False)["counts"]["pending"] == 0)


# The same again


def test_same_file_with_the_same_key_is_the_same_job(service: Service, upstream: Upstream) -> None:
    key = {"Idempotency-Key": "file"}
    first = upload(service, TWO, headers=key)

    again = upload(service, iter([TWO[:10], TWO[10:]]), headers=key)

    assert again.json()["id"] == first.json()["id"]
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(upstream.calls()) == 2


@pytest.mark.parametrize(
    "change", [{"body": TWO + b"\n"}, {"kind": "application/x-ndjson"}, {"params": {"temperature": "0"}}]
)
def test_key_of_another_upload_is_refused(service: Service, change: dict[str, Any]) -> None:
    key = f"changed {next(iter(change))}"
    assert upload(service, TWO, headers={"Idempotency-Key": key}).status_code == 200

    reply = upload(service, **{"body": TWO, **change}, headers={"Idempotency-Key": key})

    assert assert_problem(reply, 422)["errors"][0]["loc"] == ["header", "Idempotency-Key"]


def test_same_form_is_the_same_job_though_its_boundary_differs(service: Service) -> None:
    parts = [("file", ("a.jsonl", TWO)), ("settings", "{}")]
    key = {"Idempotency-Key": "form"}
    first = send_form(service, *parts, headers=key)

    again = send_form(service, *reversed(parts), headers=key)
    other = send_form(service, ("file", ("a.jsonl", TWO + b"\n")), ("settings", "{}"), headers=key)

    assert first.request.headers["Content-Type"] != again.request.headers["Content-Type"]
    assert again.json()["id"] == first.json()["id"]
    assert_problem(other, 422)


def test_refused_file_frees_its_key(service: Service) -> None:
    key = {"Idempotency-Key": "freed"}
    assert_problem(upload(service, TWO + b"oops", headers=key), 400)

    assert upload(service, TWO, headers=key).status_code == 200


# Bad ones

BAD_FILES: dict[str, tuple[str, bytes, dict[str, str], int, str]] = {
    "empty": (JSONL, b"", {}, 422, "at least one task"),
    "empty CSV": (CSV, b"", {}, 422, "at least one task"),
    "unclosed quote": (CSV, b'id,text\na,b\nc,"s3cr3t-v4lue\n', {}, 400, "line 3"),
    "quote in a cell": (CSV, b'id,text\na,"b" s3cr3t-v4lue\n', {}, 400, "line 2"),
    "missing variable": (
        CSV,
        b"id,text\na,s3cr3t-v4lue\n",
        {"template": "{lang}: {text}"},
        422,
        "line.1.lang",
    ),
    "missing column": (CSV, b"id,prompt\na,s3cr3t-v4lue\n", {}, 422, "line.1.text"),
    "too many cells": (CSV, b"id,text\na,b,s3cr3t-v4lue\n", {}, 422, "line.2"),
    "equal ids": (CSV, b"id,text\na,b\na,s3cr3t-v4lue\n", {}, 422, "line.3.id: the id 'a' is given twice"),
    "CP1251": (CSV, "id,text\nа,Привіт\n".encode("cp1251"), {}, 400, "Line 2 is not UTF-8"),
    "CP1251 JSONL": (JSONL, '{"text": "Привіт"}'.encode("cp1251"), {}, 400, "Line 1 is not UTF-8"),
    "no line end": (CSV, b"id,texta,s3cr3t-v4lue", {}, 422, "curl send it by --data-binary"),
    "NUL": (CSV, b"text\na\0b\n", {}, 400, "Line 2"),
    "line 7001": (JSONL, b'{"text": "a"}\n' * 7000 + b'{"text": s3cr3t-v4lue}', {}, 400, "Line 7001"),
    "task on line 7001": (JSONL, b'{"text": "a"}\n' * 7000 + b'{"text": ""}', {}, 422, "line.7001.text"),
    "line 17001": (JSONL, b'{"text": "a"}\n' * 17_000 + b"oops", {}, 400, "Line 17001"),
    "too many tasks": (CSV, b"text\n" + b"a\n" * (MAX_TASKS + 1), {}, 413, "MAX_TASKS"),
    "long line": (JSONL, b'{"text": "%s"}' % (b"x" * MAX_JSON_BYTES), {}, 413, "MAX_JSON_BYTES"),
    "bad setting": (JSONL, TWO, {"temperature": MARK}, 422, "temperature"),
    "unknown setting": (JSONL, TWO, {"temprature": MARK}, 422, "temprature"),
    "bad template": (JSONL, TWO, {"template": "{" + MARK}, 422, "template"),
    "bad metadata": (JSONL, TWO, {"metadata": '{"a": 1}'}, 422, "metadata.a"),
    "two names": (JSONL, TWO, {"model": "x", "gpt_type": "y"}, 422, "gpt_type"),
}


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(("kind", "body", "params", "status", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_and_nothing_stays(
    service: Service, kind: str, body: bytes, params: dict[str, str], status: int, says: str
) -> None:
    plain = upload(service, body, kind, params=params)
    packed = upload(service, gzip.compress(body), kind, headers=GZIP, params=params)

    assert says in assert_problem(plain, status)["detail"]
    assert says in assert_problem(packed, status)["detail"]


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (gzip.compress(TWO, mtime=0)[:-1], GZIP, 400),
        (gzip.compress(TWO, mtime=0)[:-20], GZIP, 400),
        (gzip.compress(TWO, mtime=0) + b"tail", GZIP, 400),
        (TWO, GZIP, 400),
        (b"", GZIP, 400),
        (TWO, {"Content-Encoding": "br"}, 415),
        (TWO, {"Content-Encoding": "gzip, gzip"}, 415),
        (TWO, {"Content-Type": "application/jsonl; charset=windows-1251"}, 415),
    ],
    ids=["no end", "cut", "tail", "plain", "empty", "br", "twice", "charset"],
)
def test_bad_packing_is_refused(service: Service, body: bytes, headers: dict[str, str], status: int) -> None:
    assert_problem(upload(service, body, headers=headers), status)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "gzip"}], ids=["no key", "key"])
@pytest.mark.parametrize("kind", [JSONL, CSV, "application/json"])
def test_gzip_that_is_not_said_is_told_with_the_header_to_add(
    service: Service, kind: str, key: dict[str, str]
) -> None:
    reply = upload(service, gzip.compress(TWO), kind, headers=key)

    assert "is gzip: add the header Content-Encoding: gzip" in assert_problem(reply, 400)["detail"]


@pytest.mark.usefixtures("nothing_stays")
def test_415_says_what_is_taken(service: Service) -> None:
    detail = assert_problem(upload(service, TWO, "application/xml"), 415)["detail"]

    assert all(
        kind in detail for kind in ("application/json", JSONL, "application/x-ndjson", CSV, "multipart")
    )


@pytest.mark.usefixtures("nothing_stays")
def test_settings_of_a_body_that_has_its_own_are_refused_in_the_query(service: Service) -> None:
    as_json = service.post("/jobs?model=x&metadata={}", service.admin, json={"data": ["a"]})
    as_form = send_form(service, ("file", ("a.jsonl", TWO)), params={"model": "x"})

    assert [error["loc"] for error in assert_problem(as_json, 422)["errors"]] == [["metadata"], ["model"]]
    assert [error["loc"] for error in assert_problem(as_form, 422)["errors"]] == [["model"]]


@pytest.mark.usefixtures("nothing_stays")
def test_parameter_given_twice_is_refused(service: Service) -> None:
    reply = upload(service, TWO, path=f"/jobs?model=x&model={MARK}")

    assert [error["loc"] for error in assert_problem(reply, 422)["errors"]] == [["model"]]


FILE = ("file", ("a.jsonl", TWO))
BAD_FORMS: dict[str, tuple[list[tuple[str, Any]], int, str]] = {
    "no file": ([("settings", "{}")], 422, "file"),
    "two files": ([FILE, FILE], 422, "file"),
    "unknown part": ([FILE, ("model", MARK)], 422, "model"),
    "settings that are no JSON": ([FILE, ("settings", MARK)], 400, "The part settings"),
    "settings that are a list": ([FILE, ("settings", "[]")], 422, "settings"),
    "bad setting": ([FILE, ("settings", '{"temperature": "1"}')], 422, "settings.temperature"),
    "unknown setting": ([FILE, ("settings", '{"metadata": {}}')], 422, "settings.metadata"),
    "bad template": ([FILE, ("settings", '{"template": "{"}')], 422, "settings.template"),
    "bad metadata": ([FILE, ("metadata", '{"a": 1}')], 422, "metadata.a"),
    "long settings": ([FILE, ("settings", " " * (MAX_JSON_BYTES + 1))], 413, "MAX_JSON_BYTES"),
    "no kind of file": ([("file", ("a.xlsx", TWO))], 415, "part file"),
    "file with a bad line": ([("file", ("a.csv", b"id,text\na,b\na,c\n"))], 422, "line.3.id"),
    "file that is no gzip": ([("file", ("a.csv.gz", TWO))], 400, "gzip"),
    "gzip that is not said": ([("file", ("a.jsonl", gzip.compress(TWO)))], 400, "its name must end in .gz"),
    "file in CP1251": ([("file", ("a.csv", TWO, "text/csv; charset=cp1251"))], 415, "UTF-8"),
}


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(("parts", "status", "says"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_bad_form_is_refused_and_nothing_stays(
    service: Service, parts: list[tuple[str, Any]], status: int, says: str
) -> None:
    assert says in assert_problem(send_form(service, *parts), status)["detail"]


# Too much of it


def repeated(member: bytes, times: int) -> Iterator[bytes]:
    for _ in range(times):
        yield member


def worker_proc(service: Service) -> Path:
    """Of the worker, which is the arbiter's only child."""
    (worker,) = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    return Path("/proc", worker)


def memory_kib(proc: Path, name: str) -> int:
    return int((proc / "status").read_text().partition(f"{name}:")[2].split()[0])


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("as_form", [False, True], ids=["body", "form"])
@pytest.mark.parametrize("kind", [JSONL, CSV])
@pytest.mark.parametrize(
    ("head", "block", "limit"),
    [
        (b"", b"\0", "MAX_JSON_BYTES"),
        (b"", b"\n", "MAX_UPLOAD_BYTES"),
        (b'text\n"', b"\n", ""),
        (b"", b'{"text": "a"}\n' * 4, ""),
    ],
    ids=["zeros", "blank lines", "open quote", "many lines"],
)
def test_bomb_is_refused_quickly_and_in_little_memory(
    service: Service, head: bytes, block: bytes, limit: str, kind: str, as_form: bool
) -> None:
    # Members of 16 MiB each, 8 GiB in all.
    member = gzip.compress(block * ((16 << 20) // len(block)), 9)
    bomb = gzip.compress(head) + member * 512
    proc = worker_proc(service)
    (proc / "clear_refs").write_text("5")  # the peak is counted from here
    before_kib = memory_kib(proc, "VmRSS")
    began_s = time.monotonic()

    if as_form:
        reply = send_form(service, ("file", ("bomb.gz", bomb, kind)))
    else:
        reply = upload(service, bomb, kind, headers=GZIP)

    assert reply.status_code in ((413,) if limit else (400, 413, 422)), reply.text
    assert limit in reply.json()["detail"]
    assert time.monotonic() - began_s < 10
    assert memory_kib(proc, "VmHWM") - before_kib < 100 << 10


@pytest.mark.usefixtures("nothing_stays")
def test_packed_json_is_bounded_too(service: Service) -> None:
    bomb = gzip.compress(b" " * (64 << 20), 9)

    detail = assert_problem(upload(service, bomb, "application/json", headers=GZIP), 413)["detail"]

    assert "MAX_JSON_BYTES" in detail


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "large"}])
def test_upload_over_the_limit_is_refused(service: Service, headers: dict[str, str]) -> None:
    line = b'{"text": "%s"}\n' % (b"x" * (1 << 19))
    pieces = repeated(line, MAX_UPLOAD_BYTES // len(line) + 1)

    reply = upload(service, pieces, headers=headers)

    assert "MAX_UPLOAD_BYTES" in assert_problem(reply, 413)["detail"]


@pytest.mark.usefixtures("nothing_stays")
def test_length_over_the_limit_is_refused_before_the_body_comes(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(request_head(service, MAX_UPLOAD_BYTES + 1))
        reply = client.makefile("rb").readline()

    assert reply.startswith(b"HTTP/1.1 413")


# Clients that leave


def request_head(service: Service, length: int, *headers: str) -> bytes:
    lines = [
        "POST /jobs HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {service.admin}",
        f"Content-Type: {JSONL}",
        f"Content-Length: {length}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_client_that_leaves_in_the_middle_leaves_nothing(service: Service, reset: bool) -> None:
    before = rows(service)
    body = b'{"text": "a"}\n' * 20_000
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(request_head(service, len(body) + 14) + body)
        wait_until(lambda: rows(service)["tasks"] > before["tasks"])
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    wait_until(lambda: rows(service) == before)


@pytest.mark.usefixtures("nothing_stays")
def test_upload_that_ends_at_a_line_but_too_early_is_no_job(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(request_head(service, len(TWO) + 1) + TWO)
        client.shutdown(socket.SHUT_WR)
        reply = client.makefile("rb").readline()

    assert reply.startswith(b"HTTP/1.1 400")


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("kind", [JSONL, "application/json"])
def test_uploads_over_the_budget_are_told_to_come_back(service: Service, kind: str) -> None:
    wait_until(lambda: service.free_places() == Places().total)
    head = request_head(service, 100_000).replace(JSONL.encode(), kind.encode())
    with contextlib.ExitStack() as held:
        clients = [
            held.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=10))
            for _ in range(Places().most_each)
        ]
        with ThreadPoolExecutor(8) as pool:
            [*pool.map(lambda client: client.sendall(head), clients)]
        wait_until(lambda: service.free_places() == Places().total - Places().most_each)

        reply = upload(service, TWO, params=DRY_RUN)

        assert_problem(reply, 503)
        assert int(reply.headers["Retry-After"]) > 0
        assert service.get("/healthz").status_code == 200
    wait_until(lambda: service.free_places() == Places().total)
    assert upload(service, TWO, params=DRY_RUN).status_code == 200
