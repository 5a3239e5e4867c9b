"""Jobs from end to end: every way to ask, to wait, to read, to stop and to ask again."""

import csv
import gzip
import io
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import pytest
import requests

from tests.service import Service
from tests.upstream import Fault, FaultKind, Upstream

pytestmark = pytest.mark.every_database

Start = Callable[..., tuple[Service, Upstream]]

JOB_MEMBERS = [
    "id",
    "status",
    "run",
    "model",
    "delivery",
    "owner",
    "metadata",
    "waiting",
    "counts",
    "usage",
    "results",
    "errors",
    "finish_reasons",
    "results_url",
    "created_at",
    "started_at",
    "finished_at",
]
WAITING_PLACES = 80  # of them all, for one user


def finished(reply: requests.Response) -> dict[str, Any]:
    """The job of an inline 200."""
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    assert job["finished_at"] is not None
    return job


def accepted(reply: requests.Response) -> str:
    """The id of a 202, which never carries results."""
    assert reply.status_code == 202, reply.text
    job = reply.json()
    assert (job["results"], job["errors"], job["finish_reasons"]) == (None, None, None)
    assert reply.headers["Location"] == f"/jobs/{job['id']}"
    return str(job["id"])


def hang_all(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))


def let_go(upstream: Upstream) -> None:
    """What hangs gets its reply, and nothing hangs from now on."""
    upstream.clear_faults()
    upstream.release()


def wait_landed(service: Service, job_id: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """A cancelled job, once its last call in flight has landed."""
    deadline_s = time.monotonic() + timeout_s
    while (job := service.job(job_id))["finished_at"] is None:
        assert time.monotonic() < deadline_s, job
        time.sleep(0.02)
    return job


def list_ids(service: Service, token: str, query: str = "") -> list[str]:
    reply = service.get(f"/jobs{query}", token)
    assert reply.status_code == 200, reply.text
    return [job["id"] for job in reply.json()["data"]]


@pytest.fixture(scope="module")
def users(shared_service: Service) -> Iterator[Callable[[], str]]:
    """Makes a user without jobs, for tests that look at a whole list."""
    numbers = iter(range(1000))
    return lambda: shared_service.user(f"user{next(numbers)}@example.org")  # type: ignore[return-value]


# Submitting


def test_answers_come_in_the_order_of_the_data(service: Service) -> None:
    job = finished(service.submit({"b": "B", "a": "A", "10": "ten", "9": "nine"}))

    assert list(job["results"].items()) == [
        ("b", "answer to: B"),
        ("a", "answer to: A"),
        ("10", "answer to: ten"),
        ("9", "answer to: nine"),
    ]
    assert list(service.job(job["id"])["results"]) == ["b", "a", "10", "9"]


def test_finished_job_has_every_member(service: Service) -> None:
    job = finished(service.submit({"greet": "good morning", "bye": "good night"}))

    assert list(job) == JOB_MEMBERS
    assert job["status"] == "succeeded"
    assert (job["run"], job["delivery"], job["owner"]) == (1, "inline", "admin@example.org")
    assert (job["metadata"], job["waiting"], job["results_url"]) == ({}, None, None)
    assert job["counts"] == {"total": 2, "answered": 2, "failed": 0, "pending": 0}
    assert (job["errors"], job["finish_reasons"]) == ({}, {})
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert all(job[name].endswith("Z") for name in ("created_at", "started_at", "finished_at"))


def test_usage_is_what_the_replies_told(service: Service, upstream: Upstream) -> None:
    job = finished(service.submit([f"a longer task, number {number}" for number in range(5)]))

    counters = upstream.counters().values()
    assert job["usage"] == {
        "requests": sum(key["calls"] for key in counters),
        "prompt_tokens": sum(key["prompt_tokens"] for key in counters),
        "completion_tokens": sum(key["completion_tokens"] for key in counters),
    }


def test_list_gets_the_ids_0_1_2(service: Service) -> None:
    job = finished(service.submit(["first", "second", "third"]))

    assert list(job["results"].items()) == [
        ("0", "answer to: first"),
        ("1", "answer to: second"),
        ("2", "answer to: third"),
    ]


def test_task_in_a_list_may_have_its_own_id(service: Service) -> None:
    said = [{"role": "user", "content": "second"}]

    job = finished(service.submit([{"id": "x", "text": "first"}, {"id": "y", "messages": said}, "third"]))

    assert list(job["results"].items()) == [
        ("x", "answer to: first"),
        ("y", "answer to: second"),
        ("2", "answer to: third"),
    ]


@pytest.mark.parametrize(
    "id_", ["a", "A", "a ", " a", "é", "e\u0301", "日本", "'", '"', "\\", "x" * 200, "__proto__"]
)
def test_id_comes_back_as_it_was_given(service: Service, id_: str) -> None:
    job = finished(service.submit({id_: "hello", "other": "hello"}))

    assert list(job["results"]) == [id_, "other"]


def test_ids_that_differ_in_case_or_space_alone_are_different(service: Service) -> None:
    job = finished(service.submit({"a": "1", "A": "2", "a ": "3"}))

    assert job["results"] == {"a": "answer to: 1", "A": "answer to: 2", "a ": "answer to: 3"}


def test_messages_are_sent_as_they_are(service: Service, upstream: Upstream) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye", "name": "ada"},
    ]

    finished(service.submit({"talk": {"messages": messages}}))

    assert [call.messages for call in upstream.calls()] == [messages]


def test_template_is_filled_with_each_tasks_variables(service: Service, upstream: Upstream) -> None:
    data = {
        "fr": {"vars": {"lang": "French", "text": "good {night}", "spare": 1}},
        "de": {"vars": {"lang": "German", "text": 7.5}},
    }

    job = finished(service.submit(data, {"template": "{{To}} {lang}: {text}"}))

    assert job["results"] == {
        "fr": "answer to: {To} French: good {night}",
        "de": "answer to: {To} German: 7.5",
    }


def test_old_workers_request_works_under_its_old_name(service: Service, upstream: Upstream) -> None:
    body = {
        "settings": {"maxTokenCount": 4000, "gpt_type": "gpt-old-name", "temperature": 1},
        "data": {"1": "one", "2": "two"},
    }

    job = finished(service.post("/task", service.admin, json=body))

    assert job["results"] == {"1": "answer to: one", "2": "answer to: two"}
    assert job["model"] == "gpt-old-name"
    bodies = [call.body for call in upstream.calls()]
    assert [(body["model"], body["temperature"]) for body in bodies] == [("gpt-old-name", 1)] * 2


def test_settings_go_to_the_provider(service: Service, upstream: Upstream) -> None:
    schema = {
        "type": "json_schema",
        "json_schema": {
            "name": "it",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"text": {"type": "string"}},
                "required": ["text"],
                "additionalProperties": False,
            },
        },
    }
    settings = {
        "model": "gpt-4o-mini",
        "temperature": 0.5,
        "instructions": "Answer in French.",
        "max_output_tokens": 50,
        "response_format": schema,
    }

    job = finished(service.submit({"a": "hello"}, settings))

    (call,) = upstream.calls()
    assert call.body == {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "Answer in French."},
            {"role": "user", "content": "hello"},
        ],
        "temperature": 0.5,
        "max_tokens": 50,
        "response_format": schema,
    }
    assert job["results"] == {"a": '{"text": "answer to: hello"}'}


def test_only_what_the_caller_sets_is_sent(service: Service, upstream: Upstream) -> None:
    settings = {
        "max_chunk_tokens": 10,
        "pack": False,
        "priority": 3,
        "deadline_s": 60,
        "max_total_tokens": 9999,
    }

    finished(service.submit({"a": "hello"}, settings))

    assert [set(call.body) for call in upstream.calls()] == [{"model", "messages"}]


def test_temperature_of_zero_is_sent(service: Service, upstream: Upstream) -> None:
    finished(service.submit({"a": "hello"}, {"temperature": 0}))

    assert [call.body["temperature"] for call in upstream.calls()] == [0]


def test_task_larger_than_a_chunk_is_asked_in_whole(service: Service) -> None:
    text = "word " * 2000

    job = finished(service.submit({"long": text, "short": "x"}, {"max_chunk_tokens": 5}))

    assert job["results"] == {"long": f"answer to: {text}", "short": "answer to: x"}


def test_metadata_is_echoed_in_the_job_and_in_lists(service: Service, users: Callable[[], str]) -> None:
    token = users()
    metadata = {"batch": "42", "b": "", "ключ": "значение"} | {f"m{number}": "x" for number in range(13)}

    job = finished(service.submit(["hello"], token=token, metadata=metadata))

    assert job["metadata"] == metadata
    assert service.get("/jobs", token).json()["data"][0]["metadata"] == metadata


# Waiting


def test_partial_and_failed_jobs_are_a_200_too(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, times=None, contains="bad"))

    partial = finished(service.submit({"a": "good", "b": "bad"}))
    failed = finished(service.submit({"a": "bad", "b": "bad too"}))

    assert partial["status"] == "partial"
    assert partial["counts"] == {"total": 2, "answered": 1, "failed": 1, "pending": 0}
    assert partial["results"] == {"a": "answer to: good", "b": None}
    assert {"code": "bad_request", "attempts": 1}.items() <= partial["errors"]["b"].items()
    assert set(partial["errors"]["b"]) == {"code", "message", "attempts"}
    assert failed["status"] == "failed"
    assert failed["results"] == {"a": None, "b": None}
    assert list(failed["errors"]) == ["a", "b"]


def test_respond_async_is_a_202_at_once(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)

    job_id = accepted(service.submit(["hello"], prefer="respond-async"))

    assert service.job(job_id)["status"] in ("queued", "running")
    let_go(upstream)
    assert service.wait_finished(job_id)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("prefer", "least_s"), [("wait=0", 0.0), ("wait=1", 1.0), ("handling=lenient, wait=1", 1.0)]
)
def test_prefer_wait_ends_in_a_202(service: Service, upstream: Upstream, prefer: str, least_s: float) -> None:
    hang_all(upstream)
    began_s = time.monotonic()

    job_id = accepted(service.submit(["hello"], prefer=prefer))

    assert least_s <= time.monotonic() - began_s < least_s + 1.0
    let_go(upstream)
    service.wait_finished(job_id)


@pytest.mark.parametrize("prefer", ["wait=soon", "wait", "wait=-1", ";;,=", "return=minimal"])
def test_preference_that_makes_no_sense_is_ignored(service: Service, prefer: str) -> None:
    finished(service.submit(["hello"], prefer=prefer))


def test_unfinished_job_shows_what_is_there(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, contains="slow"))
    job_id = accepted(service.submit({"slow": "slow", "quick": "quick"}, prefer="respond-async"))
    wait_answered(service, job_id, 1)

    job = service.job(job_id)

    assert job["status"] == "running"
    assert job["results"] == {"slow": None, "quick": "answer to: quick"}
    assert job["errors"] == {}
    assert job["counts"] == {"total": 2, "answered": 1, "failed": 0, "pending": 1}
    assert job["finished_at"] is None
    let_go(upstream)
    service.wait_finished(job_id)


def wait_answered(service: Service, job_id: str, count: int) -> None:
    deadline_s = time.monotonic() + 10.0
    while service.job(job_id, results=False)["counts"]["answered"] < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_inline_wait_is_bounded_by_its_places_and_its_setting(start: Start) -> None:
    service, upstream = start(env={"INLINE_WAIT_S": "8"})
    assert service.admin
    hang_all(upstream)
    with ExitStack() as stack:
        began_s = time.monotonic()
        held = {stack.enter_context(send_job(service, prefer="wait=60")) for _ in range(WAITING_PLACES + 1)}

        too_many, _, _ = select.select(held, [], [], 7.0)
        told_after_s = time.monotonic() - began_s
        replies = {sock: sock.recv(12) for sock in held}

    assert len(too_many) == 1, "the one place that was not there"
    assert told_after_s < 8.0 <= time.monotonic() - began_s
    assert set(replies.values()) == {b"HTTP/1.1 202"}


def send_job(service: Service, prefer: str = "") -> socket.socket:
    """A client that has submitted a job and waits for it."""
    body = b'{"data": ["wait"]}'
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nPrefer: {prefer}\r\n\r\n"
    )
    sock = socket.create_connection(("127.0.0.1", service.port), timeout=30.0)
    sock.sendall(head.encode() + body)
    return sock


def test_client_that_leaves_does_not_cancel_its_job(service: Service, upstream: Upstream) -> None:
    before = list_ids(service, service.admin)
    hang_all(upstream)
    with send_job(service):
        upstream.wait_for_in_flight(1)

    (job_id,) = [id_ for id_ in list_ids(service, service.admin) if id_ not in before]
    let_go(upstream)

    assert service.wait_finished(job_id)["status"] == "succeeded"


# Lists and results


def test_list_comes_in_pages_newest_first(service: Service, users: Callable[[], str]) -> None:
    token = users()
    jobs = [finished(service.submit([f"task {number}"], token=token)) for number in range(5)]
    newest_first = [job["id"] for job in reversed(jobs)]

    seen: list[str] = []
    query = "?limit=2"
    while query:
        page = service.get(f"/jobs{query}", token).json()
        assert list(page) == ["data", "next_cursor"]
        seen += [job["id"] for job in page["data"]]
        query = f"?limit=2&cursor={page['next_cursor']}" if page["next_cursor"] else ""

    assert seen == newest_first
    assert page["data"][0].keys() == jobs[0].keys()
    assert page["data"][0]["results"] is None
    assert list_ids(service, token, "?limit=5") == newest_first
    assert service.get("/jobs?limit=5", token).json()["next_cursor"] is None


def test_list_can_be_filtered_by_status(
    service: Service, upstream: Upstream, users: Callable[[], str]
) -> None:
    token = users()
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, times=None, contains="bad"))
    succeeded = finished(service.submit(["good"], token=token))["id"]
    failed = finished(service.submit(["bad"], token=token))["id"]
    partial = finished(service.submit(["good", "bad"], token=token))["id"]

    found = {
        status: list_ids(service, token, f"?status={status}")
        for status in ("queued", "running", "succeeded", "partial", "failed", "cancelled")
    }

    assert found == {
        "queued": [],
        "running": [],
        "succeeded": [succeeded],
        "partial": [partial],
        "failed": [failed],
        "cancelled": [],
    }


@pytest.fixture(scope="module")
def told_job(shared_service: Service, shared_upstream: Upstream) -> dict[str, Any]:
    """A finished job with an answer of every kind."""
    said = '=1+1, "quoted"\nand more'
    shared_upstream.add_fault(Fault(kind=FaultKind.ANSWER, contains="formula", content=said))
    shared_upstream.add_fault(Fault(kind=FaultKind.ANSWER, contains="empty", content=""))
    shared_upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))
    shared_upstream.add_fault(Fault(kind=FaultKind.LENGTH, contains="cut"))
    data = {"-id": "formula", "2": "empty", "1": "bad", "@x": "cut off here", "ж": "plain"}
    return finished(shared_service.submit(data))


def get_results(service: Service, job_id: str, form: str) -> requests.Response:
    reply = service.get(f"/jobs/{job_id}/results?format={form}", service.admin)
    assert reply.status_code == 200, reply.text
    reply.encoding = "utf-8"
    return reply


def test_job_tells_answers_errors_and_finish_reasons(told_job: dict[str, Any]) -> None:
    assert told_job["status"] == "partial"
    assert told_job["results"] == {
        "-id": '=1+1, "quoted"\nand more',
        "2": "",
        "1": None,
        "@x": "answer to: cut off here"[:11],
        "ж": "answer to: plain",
    }
    assert list(told_job["errors"]) == ["1"]
    assert told_job["finish_reasons"] == {"@x": "length"}


def test_results_as_json(service: Service, told_job: dict[str, Any]) -> None:
    reply = get_results(service, told_job["id"], "json")

    assert reply.headers["Content-Type"] == "application/json"
    assert reply.json() == {"results": told_job["results"], "errors": told_job["errors"]}
    assert list(reply.json()["results"]) == list(told_job["results"])
    assert service.get(f"/jobs/{told_job['id']}/results", service.admin).json() == reply.json()


def test_results_as_jsonl(service: Service, told_job: dict[str, Any]) -> None:
    reply = get_results(service, told_job["id"], "jsonl")

    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [list(line) for line in lines] == [["id", "result", "error", "finish_reason"]] * 5
    assert {line["id"]: line["result"] for line in lines} == told_job["results"]
    assert [line["id"] for line in lines] == list(told_job["results"])
    assert [line["error"] for line in lines] == [None, None, told_job["errors"]["1"], None, None]
    assert [line["finish_reason"] for line in lines] == ["stop", "stop", None, "length", "stop"]


def test_results_as_csv(service: Service, told_job: dict[str, Any]) -> None:
    reply = get_results(service, told_job["id"], "csv")

    assert reply.headers["Content-Type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(reply.text, newline=""))) == [
        ["id", "result", "error_code", "finish_reason"],
        ["'-id", '\'=1+1, "quoted"\nand more', "", "stop"],
        ["2", "", "", "stop"],
        ["1", "", "bad_request", ""],
        ["'@x", "answer to: ", "", "length"],
        ["ж", "answer to: plain", "", "stop"],
    ]


def test_results_of_a_running_job_are_what_is_decided(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, contains="slow"))
    job_id = accepted(service.submit({"slow": "slow", "quick": "quick"}, prefer="respond-async"))
    wait_answered(service, job_id, 1)

    as_json, as_jsonl, as_csv = (get_results(service, job_id, form) for form in ("json", "jsonl", "csv"))

    assert as_json.json() == {"results": {"slow": None, "quick": "answer to: quick"}, "errors": {}}
    assert [json.loads(line)["id"] for line in as_jsonl.text.splitlines()] == ["quick"]
    assert [row[0] for row in csv.reader(io.StringIO(as_csv.text))] == ["id", "quick"]
    let_go(upstream)
    service.wait_finished(job_id)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_results_are_packed_for_who_takes_gzip(service: Service, upstream: Upstream, form: str) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, contains="slow"))
    data = {**{f"ж{number}": f"quick {number}" for number in range(2000)}, "slow": "slow"}
    job_id = accepted(service.submit(data, prefer="respond-async"))
    wait_answered(service, job_id, 2000)
    path = f"/jobs/{job_id}/results?format={form}"

    plain = service.get(path, service.admin, headers={"Accept-Encoding": "gzip;q=0, br"})
    with service.get(path, service.admin, headers={"Accept-Encoding": "br, gzip"}, stream=True) as packed:
        raw = packed.raw.read(decode_content=False)

    assert (packed.headers["Content-Encoding"], packed.headers["Vary"]) == ("gzip", "Accept-Encoding")
    assert ("Content-Encoding" in plain.headers, plain.headers["Vary"]) == (False, "Accept-Encoding")
    assert gzip.decompress(raw) == plain.content
    assert len(raw) < len(plain.content) / 4
    assert packed.headers["Content-Type"] == plain.headers["Content-Type"]
    let_go(upstream)
    service.wait_finished(job_id)


def test_results_can_be_left_out(service: Service, told_job: dict[str, Any]) -> None:
    job = service.get(f"/jobs/{told_job['id']}?results=false", service.admin).json()

    assert (job["results"], job["errors"], job["finish_reasons"]) == (None, None, None)
    assert job == told_job | {"results": None, "errors": None, "finish_reasons": None}


def test_job_of_10_000_tasks_carries_its_results(service: Service) -> None:
    data = [f"task {number}" for number in range(10_000)]

    job = finished(service.submit(data, {"max_total_tokens": 1}))

    assert len(job["results"]) == 10_000
    assert job["results_url"] is None


def test_job_of_10_001_tasks_points_at_its_results(service: Service) -> None:
    data = [f"task {number}" for number in range(10_001)]

    job = finished(service.submit(data, {"max_total_tokens": 1}))

    assert (job["results"], job["errors"], job["finish_reasons"]) == (None, None, None)
    assert job["counts"]["total"] == 10_001
    reply = service.get(job["results_url"], service.admin)
    assert list(reply.json()["results"]) == [str(number) for number in range(10_001)]


def test_job_with_more_than_8_mib_points_at_its_results(service: Service, upstream: Upstream) -> None:
    long = "x" * (5 << 20)
    upstream.add_fault(Fault(kind=FaultKind.ANSWER, times=2, content=long))

    job = finished(service.submit(["one", "two"]))

    assert (job["status"], job["results"]) == ("succeeded", None)
    assert service.get(job["results_url"], service.admin).json()["results"] == {"0": long, "1": long}


# Stopping


def test_cancelled_job_sends_nothing_more_and_keeps_what_lands(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    data = [f"task {number}" for number in range(50)]
    job_id = accepted(service.submit(data, {"model": "gpt-cancelled"}, prefer="respond-async"))
    upstream.wait_for_in_flight(2)

    reply = service.delete(f"/jobs/{job_id}", service.admin)

    assert reply.status_code == 200
    assert (reply.json()["status"], reply.json()["finished_at"]) == ("cancelled", None)
    sent = {call.user_text for call in upstream.calls()}
    let_go(upstream)
    job = wait_landed(service, job_id)
    assert job["status"] == "cancelled"
    assert {task: f"answer to: {data[int(task)]}" for task in job["results"] if data[int(task)] in sent} == {
        task: answer for task, answer in job["results"].items() if answer is not None
    }
    assert {error["code"] for error in job["errors"].values()} == {"cancelled"}
    assert {error["attempts"] for error in job["errors"].values()} == {0}
    assert job["counts"] == {"total": 50, "answered": len(sent), "failed": 50 - len(sent), "pending": 0}
    assert len(upstream.calls()) == len(sent) == job["usage"]["requests"]


@pytest.mark.parametrize("query", ["", "?purge=true"])
def test_job_behind_a_large_one_goes_on_when_that_is_stopped(
    service: Service, upstream: Upstream, query: str
) -> None:
    hang_all(upstream)
    large = accepted(service.submit(["large"] * 600, prefer="respond-async"))
    upstream.wait_for_in_flight(2)
    small = accepted(service.submit(["small"], prefer="respond-async"))

    service.delete(f"/jobs/{large}{query}", service.admin)
    let_go(upstream)

    assert service.wait_finished(small, 10.0)["status"] == "succeeded"


def test_cancelled_job_without_a_call_in_flight_ends_at_once(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    busy = accepted(service.submit(["a", "b"], {"model": "gpt-busy"}, prefer="respond-async"))
    upstream.wait_for_in_flight(2)
    job_id = accepted(service.submit(["c"], {"model": "gpt-busy"}, prefer="respond-async"))

    job = service.delete(f"/jobs/{job_id}", service.admin).json()

    assert (job["status"], job["counts"]["failed"]) == ("cancelled", 1)
    assert job["finished_at"] is not None
    let_go(upstream)
    service.wait_finished(busy)


def test_whoever_waits_for_a_cancelled_job_gets_it(service: Service, upstream: Upstream) -> None:
    before = list_ids(service, service.admin)
    hang_all(upstream)
    replies: list[requests.Response] = []
    waiter = threading.Thread(target=lambda: replies.append(service.submit(["a"])))
    waiter.start()
    upstream.wait_for_in_flight(1)
    (job_id,) = [id_ for id_ in list_ids(service, service.admin) if id_ not in before]

    service.delete(f"/jobs/{job_id}", service.admin)

    let_go(upstream)
    waiter.join()
    assert (replies[0].status_code, replies[0].json()["status"]) == (200, "cancelled")


def test_cancelling_a_finished_job_changes_nothing(service: Service, told_job: dict[str, Any]) -> None:
    reply = service.delete(f"/jobs/{told_job['id']}", service.admin)

    assert (reply.status_code, reply.json()) == (200, told_job)
    assert service.job(told_job["id"]) == told_job


def test_purged_job_is_gone(service: Service) -> None:
    job_id = finished(service.submit(["hello"]))["id"]

    reply = service.delete(f"/jobs/{job_id}?purge=true", service.admin)

    assert (reply.status_code, reply.content) == (204, b"")
    assert job_id not in list_ids(service, service.admin)
    assert [
        service.request(method, f"/jobs/{job_id}{rest}", service.admin).status_code
        for method, rest in [
            ("GET", ""),
            ("GET", "/results"),
            ("DELETE", ""),
            ("DELETE", "?purge=true"),
            ("POST", "/retry"),
        ]
    ] == [404] * 5


def test_purged_job_lands_nowhere(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    job_id = accepted(service.submit(["a", "b", "c"], {"model": "gpt-purged"}, prefer="respond-async"))
    upstream.wait_for_in_flight(2)

    assert service.delete(f"/jobs/{job_id}?purge=true", service.admin).status_code == 204

    let_go(upstream)
    upstream.wait_until_idle()
    finished(service.submit(["after"], {"model": "gpt-purged"}))
    assert len(upstream.calls()) == 3
    assert service.get(f"/jobs/{job_id}", service.admin).status_code == 404


@pytest.mark.parametrize("form", ["json", "csv"])
def test_purge_cuts_off_who_reads_the_results(service: Service, form: str) -> None:
    lines = "".join(json.dumps({"text": f"{number} {'x' * 20_000}"}) + "\n" for number in range(1200))
    headers = {"Content-Type": "application/jsonl", "Prefer": "respond-async"}
    job_id = service.post("/jobs", service.admin, data=lines, headers=headers).json()["id"]
    service.wait_finished(job_id, 60)

    identity = {"Accept-Encoding": "identity"}
    path = f"/jobs/{job_id}/results?format={form}"
    with service.get(path, service.admin, headers=identity, stream=True) as reply:
        pieces = reply.iter_content(1 << 16)
        next(pieces)
        assert service.delete(f"/jobs/{job_id}?purge=true", service.admin).status_code == 204
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(pieces)
    assert "Traceback" not in service.stderr()


# Asking again


def test_retry_asks_the_tasks_of_the_given_codes_again(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))
    upstream.add_fault(Fault(kind=FaultKind.CONTENT_FILTER, contains="rude"))
    first = finished(service.submit({"good": "good", "bad": "bad", "rude": "rude"}))
    assert {id_: error["code"] for id_, error in first["errors"].items()} == {
        "bad": "bad_request",
        "rude": "content_filter",
    }
    path = f"/jobs/{first['id']}/retry"

    accepted(service.post(path, service.admin, json={"codes": ["bad_request"]}))

    service.wait_finished(first["id"])
    second = service.job(first["id"])
    assert (second["run"], second["status"]) == (2, "partial")
    assert list(second["results"].items()) == [
        ("good", "answer to: good"),
        ("bad", "answer to: bad"),
        ("rude", None),
    ]
    assert second["errors"] == {"rude": first["errors"]["rude"]}
    assert second["counts"] == {"total": 3, "answered": 2, "failed": 1, "pending": 0}
    assert second["usage"]["requests"] == 4

    accepted(service.post(path, service.admin))

    service.wait_finished(first["id"])
    third = service.job(first["id"])
    assert (third["run"], third["status"], third["errors"]) == (3, "succeeded", {})
    assert [call.user_text for call in upstream.calls()].count("good") == 1


def test_retry_of_a_job_with_nothing_to_retry_changes_nothing(
    service: Service, told_job: dict[str, Any]
) -> None:
    whole = finished(service.submit(["hello"]))

    all_answered = service.post(f"/jobs/{whole['id']}/retry", service.admin)
    other_codes = service.post(
        f"/jobs/{told_job['id']}/retry", service.admin, json={"codes": ["timeout", "budget"]}
    )

    assert (all_answered.status_code, all_answered.json()) == (200, whole)
    assert (other_codes.status_code, other_codes.json()) == (200, told_job)


def test_retry_of_an_unfinished_job_is_a_conflict(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    job_id = accepted(service.submit(["hello"], prefer="respond-async"))

    running = service.post(f"/jobs/{job_id}/retry", service.admin)
    upstream.wait_for_in_flight(1)
    service.delete(f"/jobs/{job_id}", service.admin)
    cancelled = service.post(f"/jobs/{job_id}/retry", service.admin)

    assert (running.status_code, cancelled.status_code) == (409, 409)
    assert "cancel it first" in running.json()["detail"]
    assert "calls in flight still land: retry it when finished_at is set" in cancelled.json()["detail"]
    let_go(upstream)
    assert wait_landed(service, job_id)["run"] == 1


def test_cancelled_job_can_be_retried(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    job_id = accepted(service.submit(["a", "b", "c", "d"], {"model": "gpt-again"}, prefer="respond-async"))
    upstream.wait_for_in_flight(2)
    service.delete(f"/jobs/{job_id}", service.admin)
    let_go(upstream)
    wait_landed(service, job_id)

    accepted(service.post(f"/jobs/{job_id}/retry", service.admin, json={"codes": ["cancelled"]}))

    service.wait_finished(job_id)
    job = service.job(job_id)
    assert (job["run"], job["status"], job["errors"]) == (2, "succeeded", {})
    assert len(upstream.calls()) == 4


# Dry runs and idempotency


def test_dry_run_stores_and_asks_nothing(
    service: Service, upstream: Upstream, users: Callable[[], str]
) -> None:
    token = users()

    reply = service.submit(["hello"] * 100, token=token, params={"dry_run": "true"})

    assert reply.status_code == 200
    told = reply.json()
    assert list(told) == ["dry_run", "tasks", "chunks", "estimated_prompt_tokens", "estimated_seconds"]
    assert (told["dry_run"], told["tasks"]) == (True, 100)
    assert 1 <= told["chunks"] <= 100
    assert told["estimated_prompt_tokens"] >= 100
    assert list_ids(service, token) == []
    assert upstream.calls() == []


def test_dry_run_takes_no_idempotency_key(service: Service) -> None:
    service.submit(["hello"], params={"dry_run": "true"}, idempotency_key="dry")

    reply = service.submit(["another"], idempotency_key="dry")

    assert "Idempotency-Replayed" not in reply.headers
    finished(reply)


def test_dry_run_refuses_what_a_submit_refuses(service: Service) -> None:
    assert service.submit([], params={"dry_run": "true"}).status_code == 422


def test_same_key_and_request_give_the_same_job(service: Service, upstream: Upstream) -> None:
    first = service.submit({"a": "once"}, {"temperature": 1}, idempotency_key="one")

    second = service.submit({"a": "once"}, {"temperature": 1}, idempotency_key="one")
    third = service.submit({"a": "once"}, {"temperature": 1}, idempotency_key="one", prefer="respond-async")

    assert "Idempotency-Replayed" not in first.headers
    assert finished(second) == finished(first)
    assert second.headers["Idempotency-Replayed"] == "true"
    assert accepted(third) == first.json()["id"]
    assert len(upstream.calls()) == 1


def test_replay_waits_for_the_same_job(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    job_id = accepted(service.submit(["slow"], idempotency_key="slow", prefer="respond-async"))
    replies: list[requests.Response] = []
    waiter = threading.Thread(target=lambda: replies.append(service.submit(["slow"], idempotency_key="slow")))
    waiter.start()
    upstream.wait_for_in_flight(1)

    let_go(upstream)
    waiter.join()

    assert finished(replies[0])["id"] == job_id


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"data": {"a": "2"}}, id="task"),
        pytest.param({"data": {"b": "1"}}, id="id"),
        pytest.param({"data": {"a": "1"}, "settings": {"temperature": 1}}, id="settings"),
        pytest.param({"data": {"a": "1"}, "metadata": {"x": "y"}}, id="metadata"),
    ],
)
def test_same_key_with_another_request_is_refused(service: Service, other: dict[str, Any]) -> None:
    finished(service.submit({"a": "1"}, idempotency_key="reused"))

    reply = service.post("/jobs", service.admin, json=other, headers={"Idempotency-Key": "reused"})

    assert reply.status_code == 422
    assert reply.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]


def test_key_of_one_user_means_nothing_for_another(service: Service, users: Callable[[], str]) -> None:
    mine = finished(service.submit(["hello"], token=users(), idempotency_key="shared"))

    reply = service.submit(["hello"], token=users(), idempotency_key="shared")

    assert finished(reply)["id"] != mine["id"]
    assert "Idempotency-Replayed" not in reply.headers


def test_refused_submit_frees_its_key(service: Service) -> None:
    refused = service.submit({"a": 1}, idempotency_key="freed")

    reply = service.submit({"a": "1"}, idempotency_key="freed")

    assert refused.status_code == 422
    finished(reply)


def test_many_submits_with_one_key_make_one_job(
    service: Service, upstream: Upstream, users: Callable[[], str]
) -> None:
    token = users()
    replies: list[requests.Response] = []

    def submit() -> None:
        replies.append(service.submit(["hello"] * 200, token=token, idempotency_key="race"))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {reply.status_code for reply in replies} <= {200, 409}
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 200}) == 1
    assert len(list_ids(service, token)) == 1
    assert len(upstream.calls()) == 200


def test_key_of_a_purged_job_is_free_at_once(service: Service) -> None:
    for _ in range(10):
        job_id = accepted(service.submit(["hello"] * 200, idempotency_key="purged", prefer="respond-async"))

        assert service.delete(f"/jobs/{job_id}?purge=true", service.admin).status_code == 204


# Bounds of a job


def test_deadline_gives_up_what_was_not_sent(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    settings = {"model": "gpt-late", "deadline_s": 0.4}
    job_id = accepted(service.submit([f"{number}" for number in range(20)], settings, prefer="respond-async"))
    upstream.wait_for_in_flight(2)
    wait_failed(service, job_id, 18)

    let_go(upstream)

    assert service.wait_finished(job_id)["status"] == "partial"
    job = service.job(job_id)
    assert job["counts"] == {"total": 20, "answered": 2, "failed": 18, "pending": 0}
    assert {error["code"] for error in job["errors"].values()} == {"expired"}
    assert len(upstream.calls()) == 2


def wait_failed(service: Service, job_id: str, count: int) -> None:
    deadline_s = time.monotonic() + 10.0
    while service.job(job_id, results=False)["counts"]["failed"] < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_budget_ends_a_job(service: Service, upstream: Upstream) -> None:
    settings = {"model": "gpt-budget", "max_total_tokens": 30}

    job = finished(service.submit([f"task {number}" for number in range(200)], settings))

    assert job["status"] == "partial"
    assert {error["code"] for error in job["errors"].values()} == {"budget"}
    used = job["usage"]["prompt_tokens"] + job["usage"]["completion_tokens"]
    assert 30 <= used < 300
    assert job["counts"]["answered"] == len(upstream.calls()) < 40


def test_higher_priority_goes_first(service: Service, upstream: Upstream) -> None:
    hang_all(upstream)
    busy = accepted(service.submit(["x", "x"], {"model": "gpt-turns"}, prefer="respond-async"))
    upstream.wait_for_in_flight(2)
    jobs = [
        accepted(
            service.submit([word] * 20, {"model": "gpt-turns", "priority": priority}, prefer="respond-async")
        )
        for word, priority in [("low", -100), ("usual", 0), ("high", 100)]
    ]

    let_go(upstream)

    for job_id in (busy, *jobs):
        service.wait_finished(job_id)
    order = [call.user_text for call in upstream.calls()][2:]
    places = {word: [place for place, other in enumerate(order) if other == word] for word in order}
    assert sorted(places, key=lambda word: median(places[word])) == ["high", "usual", "low"]
    assert order[:10] == ["high"] * 10
