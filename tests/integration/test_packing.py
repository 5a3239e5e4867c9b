"""Packed jobs against an endpoint that leaves answers out, doubles them, cuts them, and refuses packs."""

from collections import Counter
from typing import Any

import pytest

from tests.service import Service
from tests.upstream import Fault, FaultKind, Upstream

PACKED = '"tasks"'  # stands in the user message of packed requests alone
INSTRUCTIONS = "Answer in one word. " * 20


def run(service: Service, data: Any, **settings: Any) -> dict[str, Any]:
    reply = service.submit(data, {"pack": True, "instructions": INSTRUCTIONS, **settings})
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    return job


def texts(count: int) -> dict[str, str]:
    return {f"id {number * 7919 % count}": f"task number {number}" for number in range(count)}


def answered(data: dict[str, str]) -> list[tuple[str, str]]:
    return [(id_, f"answer to: {text}") for id_, text in data.items()]


def pack_sizes(upstream: Upstream) -> list[int]:
    """Tasks of each call: more than one in a packed one."""
    return [max(1, call.user_text.count('"n":')) for call in upstream.calls()]


def test_packs_grow_and_every_answer_finds_its_id(service: Service, upstream: Upstream) -> None:
    data = texts(1000)

    job = run(service, data)

    assert (job["status"], list(job["results"].items())) == ("succeeded", answered(data))
    sizes = pack_sizes(upstream)
    assert sum(sizes) == 1000
    assert sizes[0] == 10
    assert max(sizes) == 50
    assert len(sizes) <= 60
    counters = upstream.counters().values()
    assert job["usage"] == {
        "requests": len(sizes),
        "prompt_tokens": sum(key["prompt_tokens"] for key in counters),
        "completion_tokens": sum(key["completion_tokens"] for key in counters),
    }


@pytest.mark.parametrize(
    "kind",
    [
        FaultKind.PACKED_DROP,
        FaultKind.PACKED_DUPLICATE,
        FaultKind.PACKED_CONFLICT,
        FaultKind.PACKED_EXTRA,
        FaultKind.PACKED_WRONG_NUMBERS,
        FaultKind.LENGTH,
        FaultKind.NULL_CONTENT,
        FaultKind.REFUSAL,
        FaultKind.CONTENT_FILTER,
        FaultKind.EMPTY_OBJECT,
        FaultKind.BROKEN_JSON,
    ],
)
def test_endpoint_that_always_lies_gets_every_answer_asked_for_until_it_is_certain(
    service: Service, upstream: Upstream, kind: FaultKind
) -> None:
    upstream.add_fault(Fault(kind=kind, times=None, contains=PACKED))
    data = texts(40)

    job = run(service, data)

    assert (job["status"], list(job["results"].items())) == ("succeeded", answered(data))
    assert job["usage"]["requests"] == len(upstream.calls())
    asked = Counter(
        text for call in upstream.calls() for text in data.values() if f'{text}"' in call.user_text
    )
    assert max(asked.values(), default=0) <= 5  # 10, 5, 3, 2 at most, and singly


def test_only_what_is_missing_is_asked_again(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.PACKED_DROP, contains=PACKED))
    data = texts(10)

    job = run(service, data)

    assert job["status"] == "succeeded"
    assert pack_sizes(upstream) == [10, 1]
    assert upstream.calls()[1].user_text == "task number 9"
    assert job["usage"]["requests"] == 2


def test_endpoint_that_takes_no_packs_is_asked_singly_from_then_on(
    service: Service, upstream: Upstream
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, times=None, contains=PACKED))
    data = texts(30)

    job = run(service, data, model="takes-no-packs")
    packed = sum(size > 1 for size in pack_sizes(upstream))
    again = run(service, data, model="takes-no-packs")

    assert (job["status"], again["status"]) == ("succeeded", "succeeded")
    assert 1 <= packed <= 2  # what was in flight when the first was refused
    assert sum(size > 1 for size in pack_sizes(upstream)) == packed
    assert list(job["results"].items()) == answered(data)


def test_pack_that_is_too_long_is_halved(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(
        Fault(kind=FaultKind.STATUS, status=400, code="context_length_exceeded", times=2, contains='"n": 6')
    )
    data = texts(40)

    job = run(service, data, model="short-context")

    assert (job["status"], list(job["results"].items())) == ("succeeded", answered(data))
    assert max(pack_sizes(upstream)[2:]) > 1


def test_text_that_offends_fails_alone(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(
        Fault(kind=FaultKind.STATUS, status=400, code="content_filter", times=None, contains="offence")
    )
    data = {**texts(20), "bad": "an offence"}

    job = run(service, data, model="filtered")

    assert (job["status"], job["counts"]["failed"]) == ("partial", 1)
    assert job["errors"]["bad"]["code"] == "content_filter"
    assert job["errors"]["bad"]["attempts"] == 1


def test_packed_call_that_fails_is_charged_to_each_of_its_tasks(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=500, contains=PACKED))
    data = texts(10)

    job = run(service, data)

    assert job["status"] == "succeeded"
    assert job["usage"]["requests"] == len(upstream.calls()) >= 2


def test_variables_go_through_the_template(service: Service, upstream: Upstream) -> None:
    data = {str(number): {"vars": {"word": f"word {number}"}} for number in range(12)}

    job = run(service, data, template="Translate {word}")

    assert job["results"] == {str(number): f"answer to: Translate word {number}" for number in range(12)}
    assert len(upstream.calls()) < 12


def test_output_limit_of_a_task_is_raised_for_a_pack(service: Service, upstream: Upstream) -> None:
    job = run(service, texts(10), max_output_tokens=50)

    [call] = upstream.calls()
    assert job["status"] == "succeeded"
    assert (call.body.get("max_tokens") or call.body["max_completion_tokens"]) >= 10 * 50


def test_one_task_is_asked_in_the_ordinary_form(service: Service, upstream: Upstream) -> None:
    job = run(service, ["Say hello"])

    [call] = upstream.calls()
    assert job["results"] == {"0": "answer to: Say hello"}
    assert "response_format" not in call.body
