"""The limiter on a fake clock: from its cold start to a 429, with limits that are told and without."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.bucket import Burst
from gpt_worker.limit_headers import Limit, LimitHeaders
from gpt_worker.rate_limit import UNTOLD, Bound, Bursts, Limiter, NamedLimit, RateRefusal, Reservation, Wait
from tests import factories
from tests.clock import FakeClock, unhurried

DAY_S = 86_400.0
SILENT = LimitHeaders()
GENEROUS = factories.headers(requests=(10_000, 9_999, 0.006), tokens=(1_000_000, 999_990, 0.001))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def proven() -> Bursts:
    """Of an endpoint that is known to let a whole limit go at once."""
    return Bursts(Burst(proven=1.0), Burst(proven=1.0))


def reserve(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> Reservation:
    reservation = limiter.reserve(tokens, clock())
    assert isinstance(reservation, Reservation)
    return reservation


def reserve_all(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> list[Reservation]:
    """As many as go out now, but no more than a thousand."""
    granted = list[Reservation]()
    while len(granted) < 1_000 and isinstance(reservation := limiter.reserve(tokens, clock()), Reservation):
        granted.append(reservation)
    return granted


def wait(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> Wait:
    told = limiter.reserve(tokens, clock())
    assert isinstance(told, Wait)
    return told


def bound_s(limiter: Limiter, clock: FakeClock, tokens: int = 10) -> tuple[Bound | None, float]:
    """What holds a call back, and for how long, to a millisecond."""
    told = wait(limiter, clock, tokens)
    return told.bound, round(told.seconds, 3)


def learned(clock: FakeClock, headers: LimitHeaders = GENEROUS, tokens: int = 10) -> Limiter:
    """A limiter after a first reply, at an endpoint that lets a whole limit go at once."""
    limiter = Limiter(proven())
    limiter.replied(reserve(limiter, clock, tokens), headers, clock())
    return limiter


def limited(clock: FakeClock, *, rest_s: float | None = None, jitter: float = 0.0) -> Limiter:
    """A limiter whose first call was refused for its rate."""
    limiter = Limiter()
    limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), rest_s, jitter, UNTOLD)
    return limiter


# The cold start


def test_cold_limiter_lets_one_call_out(clock: FakeClock) -> None:
    limiter = Limiter()

    reserve(limiter, clock)

    assert wait(limiter, clock) == Wait(math.inf, None)
    assert limiter.blocked


def test_window_grows_fast_and_then_doubles_with_each_round_of_replies(clock: FakeClock) -> None:
    limiter, rounds = Limiter(), []

    for _ in range(6):
        sent = reserve_all(limiter, clock)
        rounds.append(len(sent))
        for reservation in sent:
            limiter.replied(reservation, SILENT, clock())

    assert rounds == [1, 4, 16, 32, 64, 128]


def test_every_answer_makes_room_for_more(clock: FakeClock) -> None:
    limiter, windows = Limiter(), [1.0]

    for _ in range(7):
        limiter.replied(reserve(limiter, clock), SILENT, clock())
        windows.append(limiter.window)

    assert windows == [1, 4, 7, 10, 13, 16, 17, 18]


@pytest.mark.parametrize(
    "headers", [factories.headers(requests=(600, 599, 0.1)), factories.headers(tokens=(6_000, 5_990, 0.1))]
)
def test_window_opens_wholly_once_a_limit_is_told(clock: FakeClock, headers: LimitHeaders) -> None:
    limiter = learned(clock, headers)

    granted = reserve_all(limiter, clock)

    assert len(granted) == 598  # all that is left, but a part of one
    assert math.isfinite(wait(limiter, clock).seconds)


def test_window_stays_open_when_later_replies_are_silent(clock: FakeClock) -> None:
    limiter = learned(clock)

    limiter.replied(reserve(limiter, clock), SILENT, clock())

    assert len(reserve_all(limiter, clock)) == 1_000


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


# With limits that are told


def test_first_reply_sets_the_bucket_and_the_next_call_waits_for_it(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0)))

    assert bound_s(limiter, clock) == (Bound.REQUESTS, 1.3)
    clock.advance(wait(limiter, clock).seconds)
    reserve(limiter, clock)


def test_tokens_bind_too(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 59, 1.0), tokens=(6_000, 100, 59.0)))

    assert bound_s(limiter, clock, tokens=200) == (Bound.TOKENS, 1.6)
    assert limiter.bound_by(clock()) is Bound.TOKENS


def test_what_binds_is_forgotten_when_a_call_goes(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0)))
    wait(limiter, clock)
    assert limiter.bound_by(clock()) is Bound.REQUESTS

    clock.advance(2.0)
    reserve(limiter, clock)

    assert limiter.bound_by(clock()) is None


def test_limiter_waits_for_the_later_of_both(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0), tokens=(6_000, 100, 59.0)))

    assert bound_s(limiter, clock, tokens=100) == (Bound.REQUESTS, 1.3)
    assert bound_s(limiter, clock, tokens=500) == (Bound.TOKENS, 5.5)
    assert limiter.pause_s(clock()) == pytest.approx(1.3)


def test_waiting_costs_nothing(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 0, 60.0)))

    for _ in range(100):
        wait(limiter, clock)
    clock.advance(1.3)

    reserve(limiter, clock)


def test_late_header_does_not_raise_the_bucket(clock: FakeClock) -> None:
    limiter = learned(clock)
    first = reserve(limiter, clock)
    clock.advance(0.3)
    second = reserve(limiter, clock)
    limiter.replied(second, factories.headers(requests=(10_000, 5_000, 30.0)), clock())

    limiter.replied(first, factories.headers(requests=(10_000, 9_998, 0.012)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 5_000


def test_newer_header_raises_the_bucket(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 10, 50.0)))
    clock.advance(0.3)

    limiter.replied(reserve(limiter, clock), factories.headers(requests=(60, 50, 10.0)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 49


def test_header_counts_less_what_was_sent_since(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(600, 600, None)))
    first = reserve(limiter, clock)
    clock.advance(0.3)
    reserve(limiter, clock)
    reserve(limiter, clock)

    limiter.replied(first, factories.headers(requests=(600, 400, None)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == pytest.approx(400 - 2 + 0.3 * 600 / 60)


def test_calls_of_one_moment_are_not_counted_twice(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 60, None)))
    calls = [reserve(limiter, clock) for _ in range(20)]

    for left, call in zip(range(40, 60), calls, strict=True):  # the server saw them the other way round
        limiter.replied(call, factories.headers(requests=(60, left, None)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 40


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


def test_header_of_a_failed_call_tells_as_much(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 59, 1.0)))

    limiter.failed(reserve(limiter, clock), factories.headers(requests=(60, 20, 40.0)), clock())

    assert limiter.requests is not None
    assert limiter.requests.level == 20


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


def test_reply_that_tells_nothing_stays_spent(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(1_000, 1_000, None)))

    limiter.replied(reserve(limiter, clock, tokens=300), SILENT, clock())

    assert limiter.tokens is not None
    assert limiter.tokens.level == 700


def test_tokens_are_reserved_as_the_server_takes_them(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(tokens=(100_000, 90_000, 6.0)))
    used = 10_000

    for _ in range(400):
        reservation = reserve(limiter, clock, tokens=100)
        used += 25
        limiter.replied(reservation, factories.headers(tokens=(100_000, 100_000 - used, None)), clock())

    assert limiter.tokens is not None
    before = limiter.tokens.level
    reserve(limiter, clock, tokens=100)
    assert before - limiter.tokens.level == pytest.approx(25, abs=1)


# What a call costs


@pytest.mark.parametrize(
    ("prompt_tokens", "max_output_tokens", "tasks", "cost"),
    [
        (0, None, 1, 1),  # a token at least
        (100, None, 1, 100),
        (100, 0, 1, 100),
        (100, 50, 1, 150),
        (100, 50, 3, 250),
        (100, None, 3, 100),
    ],
)
def test_call_costs_its_prompt_and_what_each_answer_may_take(
    prompt_tokens: int, max_output_tokens: int | None, tasks: int, cost: int
) -> None:
    assert Limiter().cost(prompt_tokens, max_output_tokens, tasks) == cost


def test_estimates_are_corrected_by_what_replies_tell(clock: FakeClock) -> None:
    limiter = Limiter()

    for _ in range(100):
        limiter.replied(reserve(limiter, clock), SILENT, clock(), estimate=100, prompt_tokens=150)

    assert limiter.cost(100, None) == pytest.approx(150, abs=2)
    assert limiter.cost(100, 1_000) == pytest.approx(1_150, abs=2)


def test_reply_that_tells_no_usage_corrects_nothing(clock: FakeClock) -> None:
    limiter = Limiter()

    limiter.replied(reserve(limiter, clock), SILENT, clock(), estimate=100, prompt_tokens=0)

    assert limiter.cost(100, None) == 100


@pytest.mark.parametrize("prompt_tokens", [1, 10**9])
def test_absurd_usage_corrects_estimates_within_reason(clock: FakeClock, prompt_tokens: int) -> None:
    limiter = Limiter()

    for _ in range(100):
        reservation = reserve(limiter, clock)
        limiter.replied(reservation, SILENT, clock(), estimate=1_000, prompt_tokens=prompt_tokens)

    assert 125 <= limiter.cost(1_000, 0) <= 8_000


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

    assert bound_s(limiter, clock) == (Bound.REQUESTS, rests_s)
    assert limiter.pause_s(clock()) == pytest.approx(rests_s)
    clock.advance(rests_s)
    reserve(limiter, clock)


def test_rests_double_up_to_a_minute_while_nothing_is_told(clock: FakeClock) -> None:
    limiter, rests = Limiter(), []

    for _ in range(9):
        limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), None, 1.0, UNTOLD)
        rests.append(wait(limiter, clock).seconds)
        clock.advance(rests[-1])

    assert rests == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


def test_refusals_of_one_burst_count_as_one(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    burst = [reserve(limiter, clock), reserve(limiter, clock)]
    clock.advance(0.1)

    for reservation in burst:
        limiter.rate_limited(reservation, SILENT, clock(), None, 1.0, UNTOLD)

    assert wait(limiter, clock).seconds == pytest.approx(1.0)


def test_shorter_rest_does_not_end_a_longer_one(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    first, second = reserve(limiter, clock), reserve(limiter, clock)
    limiter.rate_limited(first, SILENT, clock(), 30.0, 0.0, UNTOLD)

    limiter.rate_limited(second, SILENT, clock(), 1.0, 0.0, UNTOLD)

    assert wait(limiter, clock).seconds == pytest.approx(30.0)


def test_answer_ends_the_doubling(clock: FakeClock) -> None:
    limiter = limited(clock, jitter=1.0)
    clock.advance(1.0)
    limiter.replied(reserve(limiter, clock), SILENT, clock())

    limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), None, 1.0, UNTOLD)

    assert wait(limiter, clock).seconds == pytest.approx(1.0)


def test_silent_server_halves_the_calls_in_flight_and_they_grow_by_one_a_round(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    limiter.window = 16
    sent = [reserve(limiter, clock) for _ in range(16)]

    limiter.rate_limited(sent.pop(), SILENT, clock(), 1.0, 0.0, UNTOLD)

    assert limiter.window_limit == 8
    for reservation in sent[:8]:
        limiter.replied(reservation, SILENT, clock())
    assert limiter.window_limit == pytest.approx(9, abs=0.1)


def test_call_that_waits_behind_the_halved_window_is_bound_by_requests(clock: FakeClock) -> None:
    limiter = limited(clock, rest_s=1.0)
    clock.advance(1.0)

    reserve(limiter, clock)

    assert wait(limiter, clock) == Wait(math.inf, Bound.REQUESTS)


def test_silent_server_is_always_sent_one_call_at_least(clock: FakeClock) -> None:
    limiter = Limiter()

    for _ in range(10):
        limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), 1.0, 0.0, UNTOLD)
        clock.advance(1.0)

    reserve(limiter, clock)


def test_server_that_names_a_told_limit_needs_no_halving(clock: FakeClock) -> None:
    limiter = learned(clock)

    limiter.rate_limited(reserve(limiter, clock), GENEROUS, clock(), 1.0, 0.0, RateRefusal(Bound.REQUESTS))

    assert math.isinf(limiter.window_limit)


def test_refusal_that_names_no_limit_halves_the_calls_in_flight_whatever_the_headers_tell(
    clock: FakeClock,
) -> None:
    limiter = learned(clock)
    sent = [limiter.reserve(1, clock())]
    while isinstance(sent[-1], Reservation):
        clock.advance(0.1)
        sent.append(limiter.reserve(1, clock())) if len(sent) < 16 else sent.append(Wait(0, None))
    first, *others = [each for each in sent if isinstance(each, Reservation)]

    limiter.rate_limited(first, GENEROUS, clock(), 1.0, 0.0, UNTOLD)

    assert limiter.window_limit == 8
    for other in others[:8]:
        limiter.replied(other, GENEROUS, clock())
    assert limiter.window_limit == pytest.approx(9, abs=0.1)
    clock.advance(601)
    limiter.replied(others[8], GENEROUS, clock())
    assert math.isinf(limiter.window_limit)


def test_limit_that_only_a_refusal_names_is_kept_beside_those_that_are_told(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(10_000, 9_999, 8.64)))

    limiter.rate_limited(
        reserve(limiter, clock),
        factories.headers(requests=(10_000, 9_998, 17.28)),
        clock(),
        0.1,
        0.0,
        RateRefusal(Bound.REQUESTS, NamedLimit(60, 60.0)),
    )

    clock.advance(1.0)
    assert wait(limiter, clock).seconds == pytest.approx(0.3)
    clock.advance(0.3)
    reserve(limiter, clock)
    assert wait(limiter, clock).bound is Bound.REQUESTS
    clock.advance(3601)
    reserve(limiter, clock)
    reserve(limiter, clock)


def test_limit_held_more_strictly_than_told_is_learned_from_one_refusal(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(600, 600, None)))
    call = reserve(limiter, clock)

    refusal = factories.headers(requests=(600, 580, None))
    limiter.rate_limited(call, refusal, clock(), 0.1, 0.0, RateRefusal(Bound.REQUESTS))
    clock.advance(60.0)

    assert len(reserve_all(limiter, clock)) == 19


def test_refusal_of_one_key_is_known_to_the_others_of_its_endpoint(clock: FakeClock) -> None:
    told, bursts = factories.headers(requests=(600, 600, None)), proven()
    refused, other = Limiter(bursts), Limiter(bursts)
    for limiter in (refused, other):
        limiter.replied(reserve(limiter, clock), told, clock())

    refusal = factories.headers(requests=(600, 450, None))
    refused.rate_limited(reserve(refused, clock), refusal, clock(), 0.1, 0.0, RateRefusal(Bound.REQUESTS))

    assert len(reserve_all(other, clock)) == 149


def test_refusal_that_names_no_limit_says_nothing_of_the_burst(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(600, 600, None), tokens=(60_000, 60_000, None)))
    both = factories.headers(requests=(600, 450, None), tokens=(60_000, 45_000, None))

    limiter.rate_limited(reserve(limiter, clock), both, clock(), 0.1, 0.0, UNTOLD)

    assert limiter.requests is not None
    assert limiter.tokens is not None
    assert (limiter.requests.capacity, limiter.tokens.capacity) == (600, 60_000)


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [
        (100, 15_000),  # there was room for so small a call, and it was refused
        (50_000, 60_000),  # there was none for so large a one
    ],
)
def test_refused_tokens_tell_of_the_burst_if_there_should_have_been_room(
    clock: FakeClock, tokens: int, capacity: int
) -> None:
    limiter = learned(clock, factories.headers(requests=(600, 600, None), tokens=(60_000, 60_000, None)))
    both = factories.headers(requests=(600, 450, None), tokens=(60_000, 45_000, None))

    call = reserve(limiter, clock, tokens)
    limiter.rate_limited(call, both, clock(), 0.1, 0.0, RateRefusal(Bound.TOKENS))

    assert limiter.requests is not None
    assert limiter.tokens is not None
    assert (limiter.requests.capacity, limiter.tokens.capacity) == (600, capacity)


def test_refusal_that_says_what_it_was_asked_for_teaches_the_charge(clock: FakeClock) -> None:
    told = factories.headers(tokens=(60_000, 200, None))
    limiter = learned(clock, told)

    call = reserve(limiter, clock, tokens=100)
    limiter.rate_limited(call, told, clock(), 0.1, 0.0, RateRefusal(Bound.TOKENS, requested_tokens=250))
    clock.advance(1.0)

    assert limiter.tokens is not None
    limiter.tokens.refill(clock())
    before = limiter.tokens.level
    reserve(limiter, clock, tokens=100)
    assert before - limiter.tokens.level == 250


def test_refused_calls_do_not_look_as_if_they_had_cost_nothing(clock: FakeClock) -> None:
    limiter, remaining = learned(clock, factories.headers(tokens=(6_000_000, 5_000_000, None))), 5_000_000

    for _ in range(200):
        answered = reserve(limiter, clock, tokens=100)
        remaining -= 100
        told = factories.headers(tokens=(6_000_000, remaining, None))
        limiter.replied(answered, told, clock())
        limiter.rate_limited(reserve(limiter, clock, tokens=100), told, clock(), 1e-6, 0.0, UNTOLD)
        clock.advance(1e-6)

    assert limiter.tokens is not None
    assert limiter.tokens.charge == pytest.approx(1.0, abs=0.05)


# Bursts, as far as answers prove them


def test_answers_prove_what_may_go_at_once(clock: FakeClock) -> None:
    bursts = Bursts()
    limiter = Limiter(bursts)

    headers = factories.headers(requests=(600, 300, None), tokens=(60_000, 45_000, None))
    limiter.replied(reserve(limiter, clock), headers, clock())

    assert (bursts.requests.proven, bursts.tokens.proven) == (0.5, 0.25)


def test_calls_without_an_answer_prove_nothing(clock: FakeClock) -> None:
    bursts = Bursts()
    limiter = Limiter(bursts)

    headers = factories.headers(requests=(600, 300, None), tokens=(60_000, 45_000, None))
    limiter.failed(reserve(limiter, clock), headers, clock())
    limiter.rate_limited(reserve(limiter, clock), headers, clock(), 1.0, 0.0, UNTOLD)

    assert (bursts.requests.proven, bursts.tokens.proven) == (0.0, 0.0)


def test_key_that_scouts_holds_back_the_others_of_its_endpoint(clock: FakeClock) -> None:
    bursts = Bursts()
    scout, other = Limiter(bursts), Limiter(bursts)
    for limiter in (scout, other):
        limiter.replied(reserve(limiter, clock), factories.headers(requests=(600, 599, 0.1)), clock())

    reserve(scout, clock)

    assert bound_s(scout, clock) == (Bound.REQUESTS, 0.025)
    assert bound_s(other, clock) == (Bound.REQUESTS, 0.1)


# Limiters of one limit


def test_merging_keeps_the_lowest_level_and_the_longest_rest(clock: FakeClock) -> None:
    ours = learned(clock, factories.headers(requests=(60, 50, None)))
    theirs = learned(clock, factories.headers(requests=(60, 7, None), tokens=(1_000, 400, None)))
    theirs.rate_limited(reserve(theirs, clock), SILENT, clock(), 30.0, 0.0, UNTOLD)

    ours.absorb(theirs)

    assert ours.requests is not None
    assert ours.tokens is not None
    assert (ours.requests.level, ours.tokens.level) == (6, 390)
    assert wait(ours, clock).seconds == 30.0


def test_merging_keeps_the_fewest_calls_in_flight(clock: FakeClock) -> None:
    ours, theirs = learned(clock, SILENT), limited(clock)

    ours.absorb(theirs)
    clock.advance(1.0)

    assert len(reserve_all(ours, clock)) == 1


def test_limiter_that_absorbs_itself_stays_as_it_is(clock: FakeClock) -> None:
    limiter = learned(clock, factories.headers(requests=(60, 50, None)))

    limiter.absorb(limiter)

    assert len(reserve_all(limiter, clock)) == 49


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
    call: int
    comes_back: str
    headers: LimitHeaders
    rest_s: float | None
    bound: Bound | None
    requested_tokens: int | None


def told(most: int) -> st.SearchStrategy[Limit | None]:
    """Mostly one limit and a minute, as servers do; sometimes anything."""
    usual = st.builds(
        Limit, st.just(most), st.integers(0, most), st.none() | st.floats(0, 60, allow_nan=False)
    )
    unusual = st.integers(1, most * 2).flatmap(
        lambda limit: st.builds(
            Limit, st.just(limit), st.integers(0, limit), st.none() | st.floats(0, 1e6, allow_nan=False)
        )
    )
    return st.none() | usual | usual | unusual


steps = st.lists(
    st.builds(
        Step,
        after_s=st.sampled_from([0.0, 0.1, 0.3]) | st.floats(0, 100, allow_nan=False),
        sends_tokens=st.none() | st.integers(1, 20_000),
        call=st.integers(0, 30),
        comes_back=st.sampled_from(["answered", "answered", "failed", "rate limited", "never sent"]),
        headers=st.builds(LimitHeaders, told(100), told(10_000)),
        rest_s=st.none() | st.floats(0, 1e5, allow_nan=False),
        bound=st.sampled_from([None, Bound.REQUESTS, Bound.TOKENS]),
        requested_tokens=st.none() | st.integers(1, 10**6),
    ),
    max_size=40,
)


def settle(limiter: Limiter, call: Reservation, step: Step, now_s: float) -> None:
    match step.comes_back:
        case "answered":
            limiter.replied(call, step.headers, now_s, estimate=10, prompt_tokens=12)
        case "failed":
            limiter.failed(call, step.headers, now_s)
        case "rate limited":
            limiter.rate_limited(
                call,
                step.headers,
                now_s,
                step.rest_s,
                0.5,
                RateRefusal(step.bound, None, step.requested_tokens),
            )
        case _:
            limiter.released()


def remains(limiter: Limiter, now_s: float) -> list[float]:
    """What remains of each limit, as the server would tell it."""
    buckets = [limiter.requests, limiter.tokens]
    for bucket in buckets:
        if bucket:
            bucket.refill(now_s)
    return [bucket.remaining if bucket else math.inf for bucket in buckets]


def certified(limiter: Limiter, call: Reservation, step: Step, now_s: float) -> list[float]:
    """What its reply says that remains of each limit at most, if all has come back since the call was sent."""
    return [
        told.remaining + (now_s - call.sent_at_s) * bucket.per_s if told and bucket else -math.inf
        for told, bucket in (
            (step.headers.requests, limiter.requests),
            (step.headers.tokens, limiter.tokens),
        )
    ]


@unhurried
@given(steps)
def test_no_sequence_of_replies_raises_a_bucket_above_what_they_tell(sequence: list[Step]) -> None:
    clock, limiter, sent = FakeClock(), Limiter(), list[Reservation]()

    for step in sequence:
        clock.advance(step.after_s)
        before = remains(limiter, clock())
        if step.sends_tokens is not None:
            reserved = limiter.reserve(step.sends_tokens, clock())
            if isinstance(reserved, Reservation):
                sent.append(reserved)
                assert 1 <= reserved.tokens <= step.sends_tokens
                assert limiter.tokens is None or reserved.tokens <= limiter.tokens.capacity
            else:
                assert reserved.seconds > 0
        elif sent:
            call = sent.pop(step.call % len(sent))
            settle(limiter, call, step, clock())
            after = remains(limiter, clock())
            most = [max(both) for both in zip(before, certified(limiter, call, step, clock()), strict=True)]
            assert all(now <= then + 1e-6 for now, then in zip(after, most, strict=True))
        for kept in (limiter.requests, limiter.tokens):
            assert kept is None or (kept.per_s > 0 and kept.level <= kept.capacity <= kept.limit)
        assert limiter.in_flight == len(sent)


@unhurried
@given(steps, st.integers(1, 20_000))
def test_limiter_always_lets_a_call_out_in_the_end(sequence: list[Step], tokens: int) -> None:
    clock, limiter, sent = FakeClock(), Limiter(), list[Reservation]()
    for step in sequence:
        clock.advance(step.after_s)
        if step.sends_tokens is None and sent:
            settle(limiter, sent.pop(step.call % len(sent)), step, clock())
        elif isinstance(reserved := limiter.reserve(step.sends_tokens or 1, clock()), Reservation):
            sent.append(reserved)
    for call in sent:
        limiter.failed(call, SILENT, clock())

    for _ in range(10):
        reserved = limiter.reserve(tokens, clock())
        if isinstance(reserved, Reservation):
            return
        assert 0 < reserved.seconds < math.inf
        clock.advance(reserved.seconds + 0.001)
    pytest.fail("it waits for ever")


# What replies of different times tell


def test_limit_told_to_a_call_older_than_the_bucket_does_not_undo_a_newer_one(clock: FakeClock) -> None:
    limiter = learned(clock, SILENT)
    oldest, older = reserve(limiter, clock), reserve(limiter, clock)
    limiter.replied(older, factories.headers(requests=(600, 599, None)), clock())
    clock.advance(10.0)
    limiter.replied(reserve(limiter, clock), factories.headers(requests=(6000, 5999, None)), clock())

    limiter.replied(oldest, factories.headers(requests=(600, 598, None)), clock())

    assert limiter.requests is not None
    assert (limiter.requests.limit, limiter.requests.remaining >= 5998) == (6000, True)


def test_halved_window_opens_when_limits_are_told(clock: FakeClock) -> None:
    limiter = Limiter()
    limiter.rate_limited(reserve(limiter, clock), SILENT, clock(), 1.0, 0.0, UNTOLD)
    clock.advance(1.0)

    limiter.replied(reserve(limiter, clock), factories.headers(requests=(600, 0, None)), clock())

    assert math.isinf(limiter.window_limit)


def test_levels_of_different_times_are_compared_at_one(clock: FakeClock) -> None:
    ours = learned(clock, factories.headers(requests=(600, 600, None)))
    clock.advance(30.0)
    theirs = learned(clock, factories.headers(requests=(600, 0, None)))

    ours.absorb(theirs)

    assert ours.requests is not None
    assert (ours.requests.level, ours.requests.updated_s) == (0, clock())
