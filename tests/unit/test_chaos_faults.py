"""What must become of a task after the calls that the endpoint saw, and which faults a task draws."""

from random import Random

import pytest

from chaos.scenarios.faults import OTHER_ANSWER, SHARE, TROUBLES, Fate, fates, plan
from tests.upstream import Call, FaultKind

RIGHT = Fate("answer to: hello", "stop")


def call(*, fault: FaultKind | None = None, status: int | None = 200, code: str | None = None) -> Call:
    return Call(1, "key 0", "gpt-test", "hello", [], {}, {}, status, code, fault, 0.0, 1.0)


def failed(status: int = 500) -> Call:
    return call(fault=FaultKind.STATUS, status=status)


CLOSED = call(fault=FaultKind.CLOSE, status=None)
SILENT = call(fault=FaultKind.HANG, status=None)


@pytest.mark.parametrize(
    ("calls", "may_be"),
    [
        pytest.param([call()], {RIGHT}, id="answer"),
        pytest.param([], set(), id="never asked"),
        pytest.param([call(), call()], set(), id="asked again after its answer"),
        pytest.param([failed()], set(), id="given up too early"),
        pytest.param([failed(), call()], {RIGHT}, id="second try"),
        pytest.param([failed()] * 5, {Fate(code="upstream_error", attempts=5)}, id="five tries"),
        pytest.param([failed(429)] * 4 + [failed()] * 4 + [call()], {RIGHT}, id="rate limits cost nothing"),
        pytest.param([failed(), failed(400)], {Fate(code="bad_request", attempts=2)}, id="final"),
        pytest.param([SILENT] * 3, {Fate(code="timeout", attempts=3)}, id="three deadlines"),
        pytest.param([CLOSED] * 5, {Fate(code="connection", attempts=5)}, id="closed five times"),
        pytest.param([CLOSED] * 6, {Fate(code="connection", attempts=5)}, id="closed, and once stale"),
        pytest.param([CLOSED] * 7, set(), id="stale twice"),
        pytest.param([call(fault=FaultKind.ANSWER)], {Fate(OTHER_ANSWER, "stop")}, id="another answer"),
        pytest.param([call(fault=FaultKind.LENGTH)], {Fate("answer t", "length")}, id="cut answer"),
        pytest.param([call(status=None)] * 3, {Fate(code="timeout", attempts=3)}, id="a slow machine"),
    ],
)
def test_fate_follows_from_the_calls(calls: list[Call], may_be: set[Fate]) -> None:
    assert fates("hello", calls) == may_be


def test_so_many_calls_meet_a_fault_and_each_kind_comes() -> None:
    texts = [f"task {number}" for number in range(5_000)]

    faults = list(plan(Random(1), texts, SHARE, TROUBLES))

    assert len(faults) / (len(texts) + len(faults)) == pytest.approx(SHARE, abs=0.02)
    assert {fault.kind for fault in faults} == {fault.kind for fault, _ in TROUBLES}
