"""The best possible times, by hand where that is possible, and held against the fake OpenAI's own buckets."""

import pytest

from bench.ideal import KeyLimits, concurrent_s, limited_s, lognormal_mean_s
from tests.clock import FakeClock
from tests.upstream.limits import Limits
from tests.upstream.rules import KeyRules


@pytest.mark.parametrize(
    ("tasks", "expected_s"),
    [
        pytest.param(0, 0.0, id="nothing to do"),
        pytest.param(10, 0.5, id="what a full bucket holds goes at once"),
        pytest.param(11, 1.5, id="one more waits for its refill"),
        pytest.param(40, 30.5, id="then it goes by the refill"),
    ],
)
def test_one_key_bound_by_requests(tasks: int, expected_s: float) -> None:
    key = KeyLimits(requests_per_minute=60, bucket_s=10.0)

    assert limited_s([key], tasks, tokens=1, latency_s=0.5) == pytest.approx(expected_s)


def test_tokens_bind_where_they_are_scarcer() -> None:
    key = KeyLimits(requests_per_minute=6000, tokens_per_minute=600, bucket_s=10.0)

    assert limited_s([key], 12, tokens=10, latency_s=0.0) == pytest.approx(2.0)


def test_call_larger_than_the_bucket_goes_when_it_is_full_and_owes() -> None:
    key = KeyLimits(tokens_per_minute=600, bucket_s=1.0)

    assert [key.earliest_start_s(number, 50) for number in (1, 2, 3)] == pytest.approx([0.0, 5.0, 10.0])


def test_keys_share_the_work_by_what_they_can_do() -> None:
    fast, slow = KeyLimits(540, bucket_s=0.0), KeyLimits(60, bucket_s=0.0)

    assert limited_s([fast, slow], 102, tokens=1, latency_s=0.0) == pytest.approx(10.0, abs=0.12)


def test_key_without_limits_is_never_waited_for() -> None:
    assert limited_s([KeyLimits(), KeyLimits(1)], 1000, tokens=1, latency_s=0.3) == pytest.approx(0.3)


def test_without_a_key_there_is_no_time() -> None:
    with pytest.raises(ValueError, match="no key"):
        limited_s([], 1, tokens=1, latency_s=0.0)


@pytest.mark.parametrize(
    ("requests", "tokens", "cost", "bucket_s"),
    [(300, None, 50, 15.0), (1500, 50_000, 50, 15.0), (None, 6_000, 150, 1.0), (90, 9_000, 100, 0.0)],
)
def test_fake_openai_lets_in_at_these_times_and_no_sooner(
    requests: int | None, tokens: int | None, cost: int, bucket_s: float
) -> None:
    clock = FakeClock()
    begin_s = clock()
    limits = Limits(KeyRules(rpm=requests, tpm=tokens, bucket_s=bucket_s), clock)
    key = KeyLimits(requests, tokens, bucket_s)

    for number in range(1, 600):
        due_s = begin_s + key.earliest_start_s(number, cost)
        if due_s - clock() > 0.002:
            clock.advance(due_s - clock() - 0.001)
            assert limits.admit(cost) is not None
        clock.advance(max(0.0, due_s - clock()))
        assert limits.admit(cost) is None


def test_ideal_of_an_endpoint_that_fails_takes_the_mean_latency() -> None:
    mean_s = lognormal_mean_s(0.4, 0.4)

    assert mean_s == pytest.approx(0.4333, abs=1e-4)
    assert concurrent_s(2000, mean_s, in_flight=100) == pytest.approx(8.67, abs=0.01)
