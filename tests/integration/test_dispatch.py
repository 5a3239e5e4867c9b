"""Many tasks over many keys, and everything that can go wrong on the way to an answer."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.receiver import Receiver
from tests.service import Env, Service
from tests.upstream import Accepts, Fault, FaultKind, KeyRules, Upstream

KEYS = [f"sk-dispatch-secret-{number}" for number in range(5)]
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[Upstream]:
    with Upstream({key: KeyRules() for key in KEYS}, accepts=Accepts.MAX_COMPLETION_TOKENS) as upstream:
        yield upstream


def restore(upstream: Upstream) -> None:
    """Every key obeys the rules of a new one again."""
    for key in KEYS:
        upstream.set_key(key, **KeyRules().to_json())


@pytest.fixture
def mended(service: Service, upstream: Upstream) -> Iterator[None]:
    """After the test every key is as good as new, and the service is told so."""
    yield
    restore(upstream)
    for number in range(len(KEYS)):
        checked = service.post(f"/keys/{number}/check", service.admin)
        assert (checked.status_code, checked.json()["state"]) == (200, "ready")


def run(service: Service, data: Any, timeout_s: float = 30.0, **settings: Any) -> dict[str, Any]:
    """The finished job, with its results."""
    reply = service.submit(data, settings, prefer="respond-async")
    assert reply.status_code == 202, reply.text
    service.wait_finished(reply.json()["id"], timeout_s)
    return service.job(reply.json()["id"])


def get_keys(service: Service) -> list[dict[str, Any]]:
    keys: list[dict[str, Any]] = service.get("/keys", service.admin).json()["data"]
    return keys


def wait_until(look: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What `look` gives once that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return found


def codes(job: dict[str, Any]) -> set[str]:
    return {error["code"] for error in job["errors"].values()}


@pytest.fixture(scope="module")
def shared_env() -> Env:
    return {"GPT_THREADS_PER_KEY": "16"}


# Many tasks


def test_2000_tasks_over_5_keys_lose_and_mix_up_nothing(service: Service, upstream: Upstream) -> None:
    data = {f"id {number * 7919 % 2000}": f"task number {number}" for number in range(2000)}

    job = run(service, data)

    assert job["status"] == "succeeded"
    assert list(job["results"].items()) == [(id_, f"answer to: {text}") for id_, text in data.items()]
    counters = upstream.counters()
    assert sorted(counters) == KEYS
    assert all(key["calls"] >= 100 for key in counters.values())
    assert sum(key["calls"] for key in counters.values()) == 2000
    assert job["counts"] == {"total": 2000, "answered": 2000, "failed": 0, "pending": 0}
    assert job["usage"] == {
        "requests": 2000,
        "prompt_tokens": sum(key["prompt_tokens"] for key in counters.values()),
        "completion_tokens": sum(key["completion_tokens"] for key in counters.values()),
    }


def test_keys_report_what_they_did(service: Service, upstream: Upstream) -> None:
    before = get_keys(service)

    run(service, [f"task {number}" for number in range(50)])

    counters = upstream.counters()
    after = get_keys(service)
    assert [key["name"] for key in after] == [f"key {number}" for number in range(5)]
    assert [key["tail"] for key in after] == [key[-4:] for key in KEYS]
    assert {key["state"] for key in after} == {"ready"}
    assert {key["in_flight"] for key in after} == {0}
    done = [new["requests"] - old["requests"] for new, old in zip(after, before, strict=True)]
    assert done == [counters[key]["calls"] for key in KEYS]


def test_small_job_does_not_wait_behind_a_large_one(service: Service, upstream: Upstream) -> None:
    other = service.user("small@example.org")
    for key in KEYS:
        upstream.set_key(key, latency_s=0.05)
    large = service.submit(["large"] * 5000, {"model": "gpt-shared"}, prefer="respond-async").json()["id"]
    upstream.wait_for_calls(200)

    small = service.submit(["small"] * 3, {"model": "gpt-shared"}, other)

    assert small.json()["status"] == "succeeded"
    progress = service.job(large, results=False)
    assert (progress["status"], progress["counts"]["pending"] > 0) == ("running", True)
    cancelled = service.delete(f"/jobs/{large}", service.admin)
    assert cancelled.json()["status"] == "cancelled"
    assert len(upstream.calls()) < 5000
    upstream.wait_until_idle()
    restore(upstream)


# Limits


def test_tasks_beyond_the_limits_wait_visibly_and_are_seldom_refused(
    service: Service, upstream: Upstream
) -> None:
    for key in KEYS:
        upstream.set_key(key, rpm=60)
    settings = {"model": "gpt-limited"}

    job_id = service.submit(["task"] * 600, settings, prefer="respond-async").json()["id"]

    waiting = wait_until(lambda: service.job(job_id, results=False)["waiting"])
    assert waiting["reason"] == "every key is at its rate limit"
    assert waiting["until"] is not None
    asked = len(upstream.wait_for_calls(200))
    upstream.wait_for_calls(asked + 5)
    assert sum_statuses(upstream)[429] <= 10
    service.delete(f"/jobs/{job_id}", service.admin)
    restore(upstream)


def test_limits_stricter_than_told_lose_no_task(service: Service, upstream: Upstream) -> None:
    for key in KEYS:
        upstream.set_key(key, rpm=600, bucket_s=1.0)

    job = run(service, [f"task {number}" for number in range(120)], model="gpt-stricter")

    restore(upstream)
    assert job["status"] == "succeeded"
    statuses = sum_statuses(upstream)
    assert statuses[200] == 120
    assert job["usage"]["requests"] == statuses.total()


def sum_statuses(upstream: Upstream) -> Counter[int]:
    return sum((Counter(key["by_status"]) for key in upstream.counters().values()), Counter())


def test_rate_limit_costs_a_task_no_attempt(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(
        Fault(
            kind=FaultKind.STATUS,
            status=429,
            code="rate_limit_exceeded",
            retry_after_s=0.05,
            times=8,
            contains="refused",
        )
    )

    job = run(service, ["refused", "other"], model="gpt-429")

    assert job["results"] == {"0": "answer to: refused", "1": "answer to: other"}
    assert job["usage"]["requests"] == len(upstream.calls()) == 10


def test_rate_limited_key_is_left_alone_for_as_long_as_it_said(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(
        Fault(kind=FaultKind.STATUS, status=429, code="rate_limit_exceeded", retry_after_s=1.0, key=KEYS[0])
    )

    run(service, [f"task {number}" for number in range(300)], model="gpt-rest")

    calls = [call for call in upstream.calls() if call.key == KEYS[0]]
    (refused,) = [call for call in calls if call.status == 429]
    later = [call for call in calls if call.started_at > (refused.ended_at or 0.0) + 0.05]
    assert all(call.started_at >= (refused.ended_at or 0.0) + 0.9 for call in later)


# Keys that fail


def test_refused_key_gets_a_single_call(service: Service, upstream: Upstream, mended: None) -> None:
    upstream.set_key(KEYS[0], refused=True)

    job = run(service, [f"task {number}" for number in range(200)], model="gpt-refused")

    assert job["status"] == "succeeded"
    assert upstream.counters()[KEYS[0]]["by_status"] == {401: 1}
    refused = get_keys(service)[0]
    assert (refused["state"], refused["last_error"]["code"]) == ("refused", "key_refused")
    assert refused["until"] is not None
    assert {key["state"] for key in get_keys(service)[1:]} == {"ready"}


def test_key_out_of_quota_is_left_alone(service: Service, upstream: Upstream, mended: None) -> None:
    upstream.set_key(KEYS[1], exhausted_after=0)

    job = run(service, [f"task {number}" for number in range(200)], model="gpt-exhausted")

    assert job["status"] == "succeeded"
    assert upstream.counters()[KEYS[1]]["by_code"] == {"insufficient_quota": 1}
    key = get_keys(service)[1]
    assert (key["state"], key["last_error"]["code"]) == ("out of quota", "quota_exhausted")
    assert service.get("/readyz").json()["degraded"] == []


def test_failing_key_hands_its_tasks_to_another(service: Service, upstream: Upstream, mended: None) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=500, key=KEYS[2], times=3))
    upstream.add_fault(Fault(kind=FaultKind.RESET, key=KEYS[3], times=3))
    upstream.add_fault(Fault(kind=FaultKind.CLOSE, key=KEYS[4], times=1))

    job = run(service, [f"task {number}" for number in range(100)], model="gpt-failing")

    assert job["status"] == "succeeded"
    tries: dict[str, list[tuple[str, int | None]]] = {}
    for call in upstream.calls():
        tries.setdefault(call.user_text, []).append((call.key, call.status))
    again = [calls for calls in tries.values() if len(calls) > 1 and calls[0][0] in KEYS[2:4]]
    assert again
    assert all(calls[1][0] != calls[0][0] for calls in again)


def test_model_that_one_key_lacks_is_answered_by_the_others(
    service: Service, upstream: Upstream, mended: None
) -> None:
    upstream.set_key(KEYS[0], missing_models=("gpt-rare",), missing_model_status=403)

    job = run(service, [f"task {number}" for number in range(100)], model="gpt-rare")

    assert job["status"] == "succeeded"
    assert upstream.counters()[KEYS[0]]["by_status"] == {403: 1}


def test_model_that_no_key_has_fails_the_job_without_further_calls(
    service: Service, upstream: Upstream, mended: None
) -> None:
    for key in KEYS:
        upstream.set_key(key, missing_models=("gpt-none",))

    first = run(service, [f"task {number}" for number in range(300)], model="gpt-none")
    asked = len(upstream.calls())
    second = run(service, [f"task {number}" for number in range(300)], model="gpt-none")
    other = run(service, ["hello"], model="gpt-other")

    assert (first["status"], codes(first)) == ("failed", {"model_unavailable"})
    assert asked == len(KEYS) == first["usage"]["requests"]
    assert (second["status"], codes(second)) == ("failed", {"model_unavailable"})
    assert second["usage"]["requests"] == 0
    assert other["status"] == "succeeded"


def test_job_that_cannot_go_on_holds_back_no_later_one(
    service: Service, upstream: Upstream, mended: None
) -> None:
    for key in KEYS[:4]:
        upstream.set_key(key, missing_models=("gpt-stuck",))
    upstream.set_key(KEYS[4], exhausted_after=0)
    stuck = service.submit(["stuck"] * 600, {"model": "gpt-stuck"}, prefer="respond-async").json()["id"]
    waiting = wait_until(lambda: service.job(stuck)["waiting"])

    job = run(service, ["a", "b", "c"], model="gpt-free")

    assert job["status"] == "succeeded"
    assert waiting["reason"] == "no usable key"
    assert waiting["until"] is not None
    service.delete(f"/jobs/{stuck}", service.admin)


def test_job_waits_visibly_while_every_key_is_refused_and_goes_on_when_one_is_mended(
    service: Service, upstream: Upstream, mended: None
) -> None:
    for key in KEYS:
        upstream.set_key(key, refused=True)
    data = [f"task {number}" for number in range(30)]
    job_id = service.submit(data, {"model": "gpt-waits"}, prefer="respond-async").json()["id"]

    waiting = wait_until(lambda: service.job(job_id)["waiting"])

    assert waiting["reason"] == "no usable key"
    ready = service.get("/readyz")
    assert (ready.status_code, ready.json()["degraded"]) == (200, ["no usable key"])
    assert len(upstream.calls()) == len(KEYS)
    upstream.set_key(KEYS[3], refused=False)
    assert service.post("/keys/3/check", service.admin).json()["state"] == "ready"
    assert service.wait_finished(job_id)["status"] == "succeeded"
    assert service.job(job_id)["waiting"] is None
    assert service.get("/readyz").json()["degraded"] == []


def test_job_without_a_usable_key_ends_at_its_deadline(
    service: Service, upstream: Upstream, mended: None
) -> None:
    for key in KEYS:
        upstream.set_key(key, refused=True)

    job = run(service, ["a", "b", "c"], model="gpt-deadline", deadline_s=0.5)

    assert (job["status"], codes(job)) == ("failed", {"key_refused"})
    assert len(upstream.calls()) <= len(KEYS)


def test_job_without_quota_ends_at_its_deadline(service: Service, upstream: Upstream, mended: None) -> None:
    for key in KEYS:
        upstream.set_key(key, exhausted_after=0)

    job = run(service, ["a", "b", "c"], model="gpt-deadline", deadline_s=0.5)

    assert (job["status"], codes(job)) == ("failed", {"quota_exhausted"})


# Tasks that fail


def test_bad_request_is_final(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, message="No such thing.", contains="bad"))
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=422, message="Nor this.", contains="odd"))

    job = run(service, {"a": "bad", "b": "odd", "c": "good"})

    assert job["errors"] == {
        "a": {"code": "bad_request", "message": "No such thing.", "attempts": 1},
        "b": {"code": "bad_request", "message": "Nor this.", "attempts": 1},
    }
    assert len(upstream.calls()) == 3


def test_refusal_of_the_settings_ends_the_job_after_a_few_calls(service: Service, upstream: Upstream) -> None:
    settings: dict[str, Any] = {"model": "gpt-odd", "response_format": {"type": "poem"}}

    job = run(service, [f"task {number}" for number in range(300)], **settings)

    assert (job["status"], codes(job)) == ("failed", {"bad_request"})
    assert job["counts"]["failed"] == 300
    assert 10 <= len(upstream.calls()) <= 60  # ten, and those in flight beside the tenth


def test_prompt_that_is_too_long_is_told_apart(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(
        Fault(kind=FaultKind.STATUS, status=400, code="context_length_exceeded", contains="long")
    )

    job = run(service, {"a": "long", "b": "short"})

    assert job["errors"]["a"]["code"] == "context_length"


def test_withheld_answer_is_a_content_filter_error(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.CONTENT_FILTER, contains="withheld"))

    job = run(service, {"a": "withheld", "b": "fine"})

    assert {id_: error["code"] for id_, error in job["errors"].items()} == {"a": "content_filter"}
    assert (job["results"], job["finish_reasons"]) == ({"a": None, "b": "answer to: fine"}, {})


def test_cut_answer_is_an_answer(service: Service, upstream: Upstream) -> None:
    job = run(service, {"a": "a long story, please", "b": "x"}, max_output_tokens=4)

    assert job["status"] == "succeeded"
    assert job["results"] == {"a": "answer to: a lon", "b": "answer to: x"}
    assert job["finish_reasons"] == {"a": "length"}


def test_other_name_of_the_output_limit_is_found_once_and_kept(service: Service, upstream: Upstream) -> None:
    run(service, ["a"], max_output_tokens=50, model="gpt-new-name")
    asked = len(upstream.calls())

    job = run(service, [f"task {number}" for number in range(20)], max_output_tokens=50, model="gpt-new-name")

    assert asked == 2
    assert job["status"] == "succeeded"
    assert len(upstream.calls()) == 22


def test_reply_without_usage_is_an_answer(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.NO_USAGE))

    job = run(service, ["hello"])

    assert job["status"] == "succeeded"
    assert job["usage"] == {"requests": 1, "prompt_tokens": 0, "completion_tokens": 0}


# Replies that never become good

TROUBLES = {
    "page": (Fault(kind=FaultKind.HTML), "bad_response", 5),
    "half": (Fault(kind=FaultKind.BROKEN_JSON), "bad_response", 5),
    "nothing": (Fault(kind=FaultKind.EMPTY_OBJECT), "bad_response", 5),
    "null": (Fault(kind=FaultKind.NULL_CONTENT), "bad_response", 5),
    "elsewhere": (Fault(kind=FaultKind.REDIRECT, status=307), "bad_response", 5),
    "error": (Fault(kind=FaultKind.STATUS, status=500, message="Oops"), "upstream_error", 5),
    "silence": (Fault(kind=FaultKind.HANG), "timeout", 3),
    "drip": (Fault(kind=FaultKind.DRIP_BODY, seconds=0.05), "timeout", 3),
    "reset": (Fault(kind=FaultKind.RESET), "connection", 5),
    "cut": (Fault(kind=FaultKind.CUT_BODY), "connection", 5),
}


Troubled = tuple[dict[str, Any], Upstream, Service, Receiver]


@pytest.fixture(scope="module", autouse=True)
def troubled_job(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Upstream, Service, Receiver]]:
    """A job, each of whose tasks meets its own trouble on every try, but for the good ones.

    It begins with the module, since its tasks wait between their tries, and has a service of its own.
    """
    keys = {f"sk-troubled-secret-{number}": KeyRules() for number in range(8)}
    with (
        Receiver() as receiver,
        Upstream(keys) as upstream,
        Service(tmp_path_factory.mktemp("troubled"), {"GPT_DEADLINE_S": "1"}, upstream) as service,
    ):
        for name, (fault, _, _) in TROUBLES.items():
            upstream.add_fault(replace(fault, times=None, contains=name, location=receiver.url))
        data = {name: name for name in TROUBLES} | {f"good {number}": "fine" for number in range(200)}
        reply = service.submit(data, prefer="respond-async")
        yield reply.json()["id"], upstream, service, receiver


@pytest.fixture
def troubled(troubled_job: tuple[str, Upstream, Service, Receiver]) -> Troubled:
    """The same, once it is finished."""
    job_id, upstream, service, receiver = troubled_job
    service.wait_finished(job_id, 90.0)
    return service.job(job_id), upstream, service, receiver


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_is_retried_and_then_told(troubled: Troubled, name: str) -> None:
    job, upstream, _, _ = troubled
    _, code, attempts = TROUBLES[name]

    error = job["errors"][name]

    assert (error["code"], error["attempts"]) == (code, attempts)
    assert error["message"]
    calls = [call for call in upstream.calls() if call.user_text == name]
    assert attempts <= len(calls) <= attempts + 1  # a connection that breaks at once may be a stale one
    assert job["results"][name] is None


def test_trouble_goes_from_key_to_key(troubled: Troubled) -> None:
    _, upstream, _, _ = troubled

    tried = Counter((call.user_text, call.key) for call in upstream.calls() if call.user_text in TROUBLES)

    assert max(count for (name, _), count in tried.items() if name != "reset") == 1


def test_trouble_of_some_tasks_spares_the_others(troubled: Troubled) -> None:
    job, upstream, _, _ = troubled

    assert job["status"] == "partial"
    assert list(job["errors"]) == list(TROUBLES)
    assert [answer for id_, answer in job["results"].items() if id_.startswith("good")] == [
        "answer to: fine"
    ] * 200
    assert job["usage"]["requests"] == len(upstream.calls())


def test_redirect_is_not_followed(troubled: Troubled) -> None:
    _, _, _, receiver = troubled

    assert receiver.received() == []


def test_no_key_stands_in_logs_or_replies(troubled: Troubled) -> None:
    job, upstream, service, _ = troubled
    replies = [
        str(job),
        *(service.get(path, service.admin).text for path in ("/keys", "/healthz", "/readyz", "/jobs")),
        *(
            service.get(f"/jobs/{job['id']}/results?format={form}", service.admin).text
            for form in ("json", "jsonl", "csv")
        ),
        service.stderr(),
    ]

    for text in replies:
        assert not any(key in text for key in upstream.keys)
    assert "fine" not in service.stderr()


def test_message_that_repeats_the_key_is_cleaned(service: Service, upstream: Upstream) -> None:
    for key in KEYS:
        said = f"The key {key} may not do this."
        upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, message=said, key=key, times=None))

    job = run(service, ["hello"] * 20)

    assert codes(job) == {"bad_request"}
    assert not any(key in str(job) + str(get_keys(service)) + service.stderr() for key in KEYS)
