"""The fake OpenAI's limits: refill arithmetic on a fake clock, and the words of its headers."""

import pytest

from tests.upstream.limits import DAY_S, MINUTE_S, Bucket, Counted, Limits, format_duration
from tests.upstream.rules import KeyRules, check_groups, set_rules


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_bucket_starts_full(clock: FakeClock) -> None:
    bucket = Bucket(60, MINUTE_S, 60.0, clock)

    assert (bucket.remaining(), bucket.wait_s(60), bucket.reset_s()) == (60, 0.0, 0.0)


def test_bucket_refills_continuously(clock: FakeClock) -> None:
    bucket = Bucket(60, MINUTE_S, 60.0, clock)
    bucket.take(60)

    clock.advance(0.25)

    assert bucket.wait_s(1) == pytest.approx(0.75)
    assert bucket.reset_s() == pytest.approx(59.75)


def test_bucket_never_holds_more_than_its_capacity(clock: FakeClock) -> None:
    bucket = Bucket(600, MINUTE_S, 1.0, clock)

    clock.advance(3600)

    bucket.take(10)
    assert bucket.wait_s(1) == pytest.approx(0.1)


def test_small_bucket_lets_in_a_large_cost_when_full_and_owes_the_rest(clock: FakeClock) -> None:
    bucket = Bucket(60_000, MINUTE_S, 1.0, clock)

    assert bucket.wait_s(3000) == 0.0
    bucket.take(3000)

    assert bucket.wait_s(1000) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("limit", "window_s", "bucket_s"),
    [(500, MINUTE_S, 60.0), (500, MINUTE_S, 10.0), (200, DAY_S, DAY_S)],
)
def test_headers_tell_the_window(clock: FakeClock, limit: int, window_s: float, bucket_s: float) -> None:
    bucket = Bucket(limit, window_s, bucket_s, clock)

    bucket.take(7)

    told_window_s = bucket.reset_s() * bucket.limit / (bucket.limit - bucket.remaining())
    assert told_window_s == pytest.approx(window_s)


def test_changed_limit_keeps_what_was_used(clock: FakeClock) -> None:
    bucket = Bucket(60, MINUTE_S, 60.0, clock)
    bucket.take(50)

    bucket.change(100, MINUTE_S, 60.0)

    assert bucket.remaining() == 50


def test_denied_call_takes_nothing_from_any_bucket(clock: FakeClock) -> None:
    limits = Limits(KeyRules(rpm=10, tpm=100), clock)
    limits.admit(90)

    denied = limits.admit(20)

    assert denied is not None
    assert (denied.counted, denied.limit, denied.used, denied.requested) == (Counted.TOKENS, 100, 90, 20)
    assert denied.retry_after_s == pytest.approx(6.0)
    assert limits.headers()["x-ratelimit-remaining-requests"] == "9"


def test_call_is_let_in_after_exactly_the_time_told(clock: FakeClock) -> None:
    limits = Limits(KeyRules(rpm=7), clock)
    for _ in range(7):
        assert limits.admit(1) is None
    denied = limits.admit(1)
    assert denied is not None

    clock.advance(denied.retry_after_s - 0.001)
    assert limits.admit(1) is not None
    clock.advance(0.001)
    assert limits.admit(1) is None


def test_call_larger_than_the_whole_limit_is_too_large(clock: FakeClock) -> None:
    denied = Limits(KeyRules(tpm=100), clock).admit(101)

    assert denied is not None
    assert denied.too_large


def test_limit_of_a_day_refills_over_the_day(clock: FakeClock) -> None:
    limits = Limits(KeyRules(rpm=60, rpd=200), clock)

    limits.admit(1)

    assert limits.headers() == {
        "x-ratelimit-limit-requests": "200",
        "x-ratelimit-remaining-requests": "199",
        "x-ratelimit-reset-requests": "7m12s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.006, "6ms"),
        (0.12, "120ms"),
        (0.9999, "1s"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360.0, "6m0s"),
        (3723.0, "1h2m3s"),
        (86_400.0, "24h0m0s"),
    ],
)
def test_duration_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_keys_that_share_a_bucket_must_agree_about_it() -> None:
    with pytest.raises(ValueError, match="share their limits"):
        check_groups({"a": KeyRules(organization="org-1", rpm=1), "b": KeyRules(organization="org-1", rpm=2)})


def test_new_limit_of_one_key_is_that_of_its_group() -> None:
    keys = {"a": KeyRules(organization="org-1", rpm=1), "b": KeyRules(organization="org-1", rpm=1)}

    set_rules(keys, "a", KeyRules(organization="org-1", rpm=5))

    assert keys["b"].rpm == 5
