"""Pacing on a fake clock: reading headers, buckets, the limiter from its cold start to a 429."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.rate_limit import (
    Bound,
    Bucket,
    Limit,
    Limiter,
    LimitHeaders,
    Reservation,
    Wait,
    parse_duration_s,
    read_headers,
)
from tests import factories
from tests.clock import FakeClock, unhurried

DAY_S = 86_400.0
SILENT = LimitHeaders()
GENEROUS = factories.headers(requests=(10_000, 9_999, 0.006), tokens=(1_000_000, 999_990, 0.001))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def reserve(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> Reservation:
    reservation = limiter.reserve(tokens, clock())
    assert isinstance(reservation, Reservation)
    return reservation


def wait(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> Wait:
    told = limiter.reserve(tokens, clock())
    assert isinstance(told, Wait)
    return told


def learned(clock: FakeClock, headers: LimitHeaders = GENEROUS, tokens: int = 10) -> Limiter:
    """A limiter after a first reply that told of limits."""
    limiter = Limiter()
    limiter.replied(reserve(limiter, clock, tokens), headers, clock())
    return limiter


def limited(clock: FakeClock, *, rest_s: float | None = None, jitter: float = 0.0) -> Limiter:
    """A limiter whose first call was refused for its rate."""
    limiter = Limiter()
    limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), rest_s, jitter)
    return limiter


# Headers


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6ms", 0.006),
        ("120ms", 0.12),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("8.64s", 8.64),
        ("1d", DAY_S),
        ("20", 20.0),
        (" 0 ", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1s ", 1.0),
        ("1s 2s", None),
        ("1x", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("٣s", None),
        ("1" * 400, None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_durations_are_read_in_openais_form(text: str, seconds: float | None) -> None:
    assert parse_duration_s(text) == seconds


def test_headers_tell_both_limits() -> None:
    told = read_headers(
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "150000",
            "x-ratelimit-remaining-tokens": "149984",
            "x-ratelimit-reset-tokens": "6m0s",
        }
    )

    assert told == LimitHeaders(Limit(60, 59, 1.0), Limit(150_000, 149_984, 360.0), None)


@pytest.mark.parametrize(
    ("limit", "remaining", "read"),
    [
        ("60", "59", Limit(60, 59, None)),
        ("60", "-5", Limit(60, 0, None)),
        ("60", "", None),
        ("", "59", None),
        ("0", "0", None),
        ("-1", "0", None),
        ("60.5", "59", None),
        ("many", "59", None),
        ("60, 60", "59, 59", None),
        ("9" * 13, "1", None),
    ],
)
def test_nonsense_in_headers_counts_as_silence(limit: str, remaining: str, read: Limit | None) -> None:
    told = read_headers({"x-ratelimit-limit-requests": limit, "x-ratelimit-remaining-requests": remaining})

    assert told.requests == read


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_milliseconds_win_over_seconds(headers: dict[str, str], seconds: float | None) -> None:
    assert read_headers(headers).retry_after_s == seconds


# One bucket


def test_bucket_refills_up_to_its_capacity(clock: FakeClock) -> None:
    bucket = Bucket(capacity=60, level=0, per_s=1, updated_s=clock())

    assert bucket.wait_s(1, clock()) == 1.0
    clock.advance(0.75)
    assert bucket.wait_s(1, clock()) == pytest.approx(0.25)
    clock.advance(3600)
    assert bucket.wait_s(60, clock()) == 0.0
    bucket.take(60, clock())
    assert bucket.wait_s(1, clock()) == pytest.approx(1.0)


def test_bucket_never_asks_for_more_than_it_holds(clock: FakeClock) -> None:
    bucket = Bucket(capacity=60, level=60, per_s=1, updated_s=clock())

    assert bucket.wait_s(1_000, clock()) == 0.0
    bucket.take(1_000, clock())
    assert bucket.level == 0


@pytest.mark.parametrize(
    ("limit", "remaining", "reset_s", "window_s"),
    [
        (60, 59, 1.0, 60),  # a minute's window, one request used
        (60, 0, 60.0, 60),
        (200, 199, 432.0, DAY_S),  # a free tier counts a day: 7m12s for one of 200
        (200, 100, 43_200.0, DAY_S),
        (100, 0, 9e9, DAY_S),  # never longer than a day
        (10_000, 9_999, 0.000_001, 1),  # never shorter than a second
        (60, 60, 0.0, 60),  # nothing used tells nothing: a minute is assumed
        (60, 30, None, 60),
    ],
)
def test_window_is_inferred_from_the_reset(
    clock: FakeClock, limit: int, remaining: int, reset_s: float | None, window_s: float
) -> None:
    bucket = Bucket.first(Limit(limit, remaining, reset_s), clock())

    assert bucket.per_s == pytest.approx(limit / window_s)
    assert bucket.level == remaining


def test_small_share_does_not_change_what_a_large_one_told(clock: FakeClock) -> None:
    bucket = Bucket.first(Limit(60, 0, 60.0), clock())

    bucket.learn(Limit(60, 59, 0.001), sent_since=0, took_s=0, now_s=clock())

    assert bucket.per_s == pytest.approx(1.0)


def test_changed_limit_is_learned_anew(clock: FakeClock) -> None:
    bucket = Bucket.first(Limit(60, 30, 30.0), clock())

    bucket.learn(Limit(600, 599, 0.1), sent_since=0, took_s=0, now_s=clock())

    assert (bucket.capacity, bucket.per_s, bucket.level) == pytest.approx((600, 10, 30))


def test_smaller_limit_lowers_the_bucket(clock: FakeClock) -> None:
    bucket = Bucket.first(Limit(600, 600, None), clock())

    bucket.learn(Limit(60, 60, None), sent_since=0, took_s=0, now_s=clock())

    assert (bucket.capacity, bucket.level) == (60, 60)


# The limiter


def test_cold_limiter_lets_one_call_out(clock: FakeClock) -> None:
    limiter = Limiter()

    reserve(limiter, clock)

    assert wait(limiter, clock) == Wait(math.inf, None)


def test_window_doubles_with_each_round_of_replies(clock: FakeClock) -> None:
    limiter, rounds = Limiter(), []

    for _ in range(6):
        sent = []
        while isinstance(reservation := limiter.reserve(10, clock()), Reservation):
            sent.append(reservation)
        rounds.append(len(sent))
        for reservation in sent:
            limiter.replied(reservation, SILENT, clock())

    assert rounds == [1, 2, 4, 8, 16, 32]


def test_failed_call_does_not_widen_the_window(clock: FakeClock) -> None:
    limiter = Limiter()
    limiter.failed(reserve(limiter, clock), SILENT, clock())

    reserve(limiter, clock)

    assert math.isinf(wait(limiter, clock).seconds)


def test_call_that_was_never_sent_makes_room(clock: FakeClock) -> None:
    limiter = Limiter()
    reserve(limiter, clock)

    limiter.released()

    reserve(limiter, clock)


def test_first_reply_sets_the_bucket_and_the_next_call_waits_for_it(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0)))

    told = wait(limiter, clock)
    assert told.bound is Bound.REQUESTS
    assert told.seconds == pytest.approx(1.0)
    clock.advance(1.0)
    reserve(limiter, clock)


def test_tokens_bind_too(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 59, 1.0), tokens=(6_000, 100, 59.0)))

    told = wait(limiter, clock, tokens=200)
    assert told.bound is Bound.TOKENS
    assert told.seconds == pytest.approx(1.0)
    assert limiter.bound_by is Bound.TOKENS


def test_waiting_costs_nothing(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0)))

    for _ in range(100):
        wait(limiter, clock)
    clock.advance(1.0)

    reserve(limiter, clock)


def test_late_header_does_not_raise_the_bucket(clock: FakeClock) -> None:
    limiter = learned(clock)
    first, second = reserve(limiter, clock), reserve(limiter, clock)
    limiter.replied(second, factories.headers(requests=(10_000, 5_000, 30.0)), clock())

    limiter.replied(first, factories.headers(requests=(10_000, 9_998, 0.012)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 5_000


def test_header_counts_less_what_was_sent_since(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, None)))
    limiter.window = 10
    first = reserve(limiter, clock, tokens=100)
    clock.advance(0.3)
    reserve(limiter, clock, tokens=200)
    reserve(limiter, clock, tokens=300)

    limiter.replied(first, factories.headers(tokens=(1_000, 700, None)), clock())

    assert limiter.tokens is not None
    assert limiter.tokens.level == pytest.approx(700 - 200 - 300 + 0.3 * 1_000 / 60)


def test_calls_of_one_moment_are_not_counted_twice(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 60, None)))
    limiter.window = 30
    calls = [reserve(limiter, clock) for _ in range(20)]

    for left, call in zip(range(40, 60), calls, strict=True):  # the server saw them the other way round
        limiter.replied(call, factories.headers(requests=(60, left, None)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 40


def test_limit_held_more_strictly_than_told_is_learned_from_one_refusal(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(600, 600, None)))
    limiter.window = 30
    call = reserve(limiter, clock)

    refusal = factories.headers(requests=(600, 590, None))
    limiter.rate_limited(call, refusal, clock(), 0.1, 0.0, Bound.REQUESTS)
    clock.advance(60.0)

    granted = [limiter.reserve(1, clock()) for _ in range(11)]
    assert [isinstance(grant, Reservation) for grant in granted] == [True] * 10 + [False]


def test_call_older_than_the_bucket_is_no_part_of_it(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    older, other = reserve(limiter, clock, tokens=400), reserve(limiter, clock, tokens=10)
    limiter.replied(other, factories.headers(tokens=(1_000, 900, None)), clock())
    reserve(limiter, clock, tokens=300)

    limiter.replied(older, factories.headers(tokens=(1_000, 500, None)), clock())

    assert limiter.tokens is not None
    assert limiter.tokens.level == 500 - 300


def test_header_is_as_old_as_its_call_at_most(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 59, 1.0)))
    slow = reserve(limiter, clock)
    clock.advance(5.0)

    limiter.replied(slow, factories.headers(requests=(60, 40, 20.0)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == pytest.approx(45)


def test_reservation_is_never_larger_than_the_bucket(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, None)))

    reservation = reserve(limiter, clock, tokens=50_000)

    assert reservation.tokens == 1_000
    assert limiter.tokens is not None
    assert limiter.tokens.level == 0


def test_task_larger_than_the_bucket_does_not_put_later_replies_in_debt(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, 0.0)))
    slow = reserve(limiter, clock, tokens=10)
    clock.advance(60)
    reserve(limiter, clock, tokens=50_000)

    limiter.replied(slow, factories.headers(tokens=(1_000, 990, 0.6)), clock())

    assert limiter.pause_s(clock()) <= 60.0


def test_reply_that_tells_no_usage_stays_spent(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, None)))

    limiter.replied(reserve(limiter, clock, tokens=300), SILENT, clock())

    assert limiter.tokens is not None
    assert limiter.tokens.level == 700


def test_usage_beyond_the_reservation_is_charged(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, None)))

    reservation = reserve(limiter, clock, tokens=300)
    limiter.replied(reservation, SILENT, clock(), estimate=300, prompt_tokens=300, completion_tokens=200)

    assert limiter.tokens is not None
    assert limiter.tokens.level == 500


def test_estimates_are_corrected_by_what_replies_tell(clock: FakeClock) -> None:
    limiter = Limiter()

    for _ in range(100):
        reservation = reserve(limiter, clock)
        limiter.replied(reservation, SILENT, clock(), estimate=100, prompt_tokens=150, completion_tokens=40)

    assert limiter.cost(100, None) == pytest.approx(190, abs=2)
    assert limiter.cost(100, 1_000) == pytest.approx(1_150, abs=2)


@pytest.mark.parametrize("prompt_tokens", [1, 10**9])
def test_absurd_usage_corrects_estimates_within_reason(clock: FakeClock, prompt_tokens: int) -> None:
    limiter = Limiter()

    for _ in range(100):
        reservation = reserve(limiter, clock)
        limiter.replied(reservation, SILENT, clock(), estimate=1_000, prompt_tokens=prompt_tokens)

    assert 125 <= limiter.cost(1_000, 0) <= 8_000


def test_every_call_costs_a_token_at_least() -> None:
    assert Limiter().cost(0, None) == 1


# After a 429


@pytest.mark.parametrize(
    ("rest_s", "jitter", "rests_s"),
    [
        (20.0, 0.5, 20.0),
        (0.05, 0.5, 0.05),
        (None, 0.0, 0.5),
        (None, 0.5, 0.75),
        (0.0, 0.0, 0.5),
        (1e15, 0, DAY_S),
    ],
)
def test_rate_limited_key_rests_as_long_as_the_server_says(
    clock: FakeClock, rest_s: float | None, jitter: float, rests_s: float
) -> None:
    limiter = limited(clock, rest_s=rest_s, jitter=jitter)

    assert wait(limiter, clock).seconds == pytest.approx(rests_s)
    assert limiter.pause_s(clock()) == pytest.approx(rests_s)
    clock.advance(rests_s)
    reserve(limiter, clock)


def test_rests_double_up_to_a_minute_while_nothing_is_told(clock: FakeClock) -> None:
    limiter, rests = Limiter(), []

    for _ in range(9):
        limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), None, 1.0)
        rests.append(wait(limiter, clock).seconds)
        clock.advance(rests[-1])

    assert rests == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


def test_refusals_of_one_burst_count_as_one(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    burst = [reserve(limiter, clock), reserve(limiter, clock)]
    clock.advance(0.1)

    for reservation in burst:
        limiter.rate_limited(reservation, SILENT, clock(), None, 1.0)

    assert wait(limiter, clock).seconds == pytest.approx(1.0)


def test_shorter_rest_does_not_end_a_longer_one(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    first, second = reserve(limiter, clock), reserve(limiter, clock)
    limiter.rate_limited(first, SILENT, clock(), 30.0, 0.0)

    limiter.rate_limited(second, SILENT, clock(), 1.0, 0.0)

    assert wait(limiter, clock).seconds == pytest.approx(30.0)


def test_answer_ends_the_doubling(clock: FakeClock) -> None:
    limiter = limited(clock, jitter=1.0)
    clock.advance(1.0)
    limiter.replied(reserve(limiter, clock), SILENT, clock())

    limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), None, 1.0)

    assert wait(limiter, clock).seconds == pytest.approx(1.0)


def test_silent_server_halves_the_calls_in_flight_and_they_grow_by_one_a_round(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    limiter.window = 16
    sent = [reserve(limiter, clock) for _ in range(16)]

    limiter.rate_limited(sent.pop(), SILENT, clock(), 1.0, 0.0)

    assert limiter.window_limit == 8
    for reservation in sent[:8]:
        limiter.replied(reservation, SILENT, clock())
    assert limiter.window_limit == pytest.approx(9, abs=0.1)


def test_silent_server_is_always_sent_one_call_at_least(clock: FakeClock) -> None:
    limiter = Limiter()

    for _ in range(10):
        limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), 1.0, 0.0)
        clock.advance(1.0)

    reserve(limiter, clock)


def test_server_that_tells_limits_needs_no_halving(clock: FakeClock) -> None:
    limiter = learned(clock)

    limiter.rate_limited(reserve(limiter, clock), GENEROUS, clock(), 1.0, 0.0)

    assert math.isinf(limiter.window_limit)


def test_merging_keeps_the_lowest_level_and_the_longest_rest(clock: FakeClock) -> None:
    ours = learned(clock, factories.headers(requests=(60, 50, None)))
    theirs = learned(clock, factories.headers(requests=(60, 7, None), tokens=(1_000, 400, None)))
    theirs.rate_limited(reserve(theirs, clock), SILENT, clock(), 30.0, 0.0)

    ours.absorb(theirs)

    assert ours.requests is not None
    assert ours.tokens is not None
    assert (ours.requests.level, ours.tokens.level) == (6, 390)
    assert wait(ours, clock).seconds == 30.0


def test_merged_bucket_is_not_shared_with_the_old_one(clock: FakeClock) -> None:
    ours, theirs = Limiter(), learned(clock, factories.headers(requests=(60, 50, None)))

    ours.absorb(theirs)
    reserve(theirs, clock)

    assert ours.requests is not None
    assert (ours.requests.level, ours.requests.sent) == (50, 0)


# Whatever the server says


@dataclass(frozen=True)
class Step:
    """One thing that happens: time passes, then a call goes out or one comes back with these headers."""

    after_s: float
    sends_tokens: int | None
    told_requests: tuple[int, int, float | None] | None
    told_tokens: tuple[int, int, float | None] | None
    refused: bool
    newest: bool


def told(most: int) -> st.SearchStrategy[tuple[int, int, float | None] | None]:
    limits = st.tuples(
        st.integers(1, most), st.integers(0, most), st.none() | st.floats(0, 1e6, allow_nan=False)
    )
    return st.none() | limits


steps = st.lists(
    st.builds(
        Step,
        after_s=st.floats(0, 100, allow_nan=False),
        sends_tokens=st.none() | st.integers(1, 5_000),
        told_requests=told(100),
        told_tokens=told(10_000),
        refused=st.booleans(),
        newest=st.booleans(),
    ),
    max_size=40,
)


@unhurried
@given(steps)
def test_no_sequence_of_headers_raises_a_bucket(sequence: list[Step]) -> None:
    clock, limiter, sent = FakeClock(), Limiter(), list[Reservation]()

    for step in sequence:
        clock.advance(step.after_s)
        if step.sends_tokens is not None:
            reserved = limiter.reserve(step.sends_tokens, clock())
            if isinstance(reserved, Reservation):
                sent.append(reserved)
                assert limiter.tokens is None or reserved.tokens <= limiter.tokens.capacity
            else:
                assert reserved.seconds > 0
        elif sent:
            buckets = [bucket for bucket in (limiter.requests, limiter.tokens) if bucket]
            for bucket in buckets:
                bucket.refill(clock())
            before = [bucket.level for bucket in buckets]
            reservation = sent.pop(-1 if step.newest else 0)
            headers = factories.headers(requests=step.told_requests, tokens=step.told_tokens)
            if step.refused:
                limiter.rate_limited(reservation, headers, clock(), None, 0.5)
            else:
                limiter.replied(reservation, headers, clock(), estimate=10, prompt_tokens=12)
            after = [bucket.level for bucket in buckets]
            assert all(now <= then for now, then in zip(after, before, strict=True))
        for kept in (limiter.requests, limiter.tokens):
            assert kept is None or (kept.per_s > 0 and kept.level <= kept.capacity)
    assert limiter.in_flight == len(sent)


@unhurried
@given(steps)
def test_limiter_always_lets_a_call_out_in_the_end(sequence: list[Step]) -> None:
    clock, limiter = FakeClock(), Limiter()
    for step in sequence:
        clock.advance(step.after_s)
        reserved = limiter.reserve(step.sends_tokens or 1, clock())
        if isinstance(reserved, Reservation):
            headers = factories.headers(requests=step.told_requests, tokens=step.told_tokens)
            limiter.replied(reserved, headers, clock())

    clock.advance(3 * DAY_S)

    reserve(limiter, clock, tokens=5_000)
