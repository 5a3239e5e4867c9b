"""One limit as a bucket, on a fake clock: its level, its window, what a call takes of it, and its endpoint's burst."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.bucket import Bucket, Burst, Mark
from gpt_worker.limit_headers import Limit
from tests.clock import FakeClock, unhurried

HOUR_S = 3_600.0
DAY_S = 86_400.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make_bucket(
    clock: FakeClock,
    *,
    limit: int = 60,
    used: float = 0,
    window_s: float = 60.0,
    burst: Burst | None = None,
    learns_charge: bool = False,
    charge: float = 1.0,
) -> Bucket:
    """A bucket of a minute's window; if no burst is given, all of it may go at once."""
    burst = burst or Burst(proven=1.0)
    return Bucket(limit, limit - used, limit / window_s, clock(), burst, learns_charge, charge)


# The level


def test_bucket_refills_up_to_its_limit(clock: FakeClock) -> None:
    bucket = make_bucket(clock, used=60)

    clock.advance(0.75)
    bucket.refill(clock())
    assert bucket.level == pytest.approx(0.75)
    clock.advance(3600)
    bucket.refill(clock())
    assert bucket.level == 60


@pytest.mark.parametrize(
    ("used", "amount", "charge", "wait_s"),
    [
        (0, 1, 1.0, 0.0),
        (60, 1, 1.0, 1.3),  # three tenths of a call are left beside it
        (59, 1, 1.0, 0.3),
        (58, 1, 1.0, 0.0),
        (60, 10, 1.0, 13.0),
        (60, 10, 2.0, 26.0),
        (60, 10, 0.5, 6.5),
        (0, 1_000, 1.0, 0.0),  # never asks for more than the bucket holds
        (30, 1_000, 1.0, 30.0),
        (0, 60, 1.0, 0.0),
        (90, 1, 1.0, 31.3),  # in debt
    ],
)
def test_wait_is_as_long_as_the_refill_of_what_is_missing(
    clock: FakeClock, used: int, amount: int, charge: float, wait_s: float
) -> None:
    bucket = make_bucket(clock, used=used, charge=charge)

    assert bucket.wait_s(amount, clock()) == pytest.approx(wait_s)


def test_call_goes_after_the_wait_that_was_told(clock: FakeClock) -> None:
    bucket = make_bucket(clock, limit=7_001, used=7_001, charge=1.7)

    clock.advance(bucket.wait_s(13, clock()))

    assert bucket.wait_s(13, clock()) == 0.0


@pytest.mark.parametrize(
    ("amount", "charge", "taken"),
    [(10, 1.0, 10), (10, 2.5, 25), (10, 0.5, 5), (1_000, 1.0, 60), (50, 2.0, 60)],
)
def test_call_takes_what_the_server_will_take_but_no_more_than_the_bucket_holds(
    clock: FakeClock, amount: int, charge: float, taken: float
) -> None:
    bucket = make_bucket(clock, charge=charge)

    bucket.take(amount, clock())

    assert bucket.level == 60 - taken


@dataclass(frozen=True)
class Send:
    """A call goes out."""

    amount: int = 1
    after_s: float = 0.0


@dataclass(frozen=True)
class Tell:
    """The reply to the call of that index comes in."""

    call: int
    remaining: int
    limit: int = 60
    after_s: float = 0.0


@pytest.mark.parametrize(
    ("steps", "remaining"),
    [
        pytest.param([Send(), Tell(0, 40)], 40, id="a reply lowers the level"),
        pytest.param(
            [Send(10), Tell(0, 60)], 50, id="but does not give back what its own call may have cost"
        ),
        pytest.param(
            [Send(10), Send(20, after_s=0.3), Send(5), Tell(0, 40)],
            40 + 0.3 - 25,
            id="what was sent since counts less",
        ),
        pytest.param(
            [Send(10), Send(20, after_s=0.3), Send(25), Tell(0, 40)],
            40 + 0.3 - 45,
            id="even if that is a debt",
        ),
        pytest.param(
            [Send(), Send(after_s=0.3), Tell(1, 20), Tell(0, 59)],
            20,
            id="a reply that was overtaken does not raise it",
        ),
        pytest.param(
            [Send(), Send(after_s=0.3), Tell(1, 20), Tell(0, 10)],
            10 + 0.3 - 1,
            id="a reply that was overtaken may lower it",
        ),
        pytest.param(
            [Send(), Send(after_s=0.3), Send(after_s=0.1), Tell(1, 20), Tell(0, 15), Tell(2, 59)],
            15 + 0.4 - 2,
            id="nor does it make others newer than they are",
        ),
        pytest.param(
            [Send(), Tell(0, 10), Send(after_s=0.3), Tell(1, 50)],
            50 - 1,
            id="a newer reply raises it, as if its call had not been counted yet",
        ),
        pytest.param(
            [Send(), Tell(0, 10), Send(2, after_s=0.3), Send(3, after_s=0.1), Tell(1, 50)],
            50 + 0.1 - 5,
            id="nor any other of its moment",
        ),
        pytest.param(
            [Send(), Tell(0, 10), Send(2, after_s=0.3), Send(3, after_s=0.3), Tell(1, 50)],
            50 + 0.3 - 5,
            id="nor any that was sent later",
        ),
        pytest.param(
            [Send(), Send(), Tell(0, 10), Tell(1, 50)],
            10,
            id="a reply of the same moment does not raise it",
        ),
        pytest.param(
            [Send(), Tell(0, 10), Send(after_s=0.2), Tell(1, 50)],
            10 + 0.2 - 1,
            id="nor one of nearly the same",
        ),
        pytest.param(
            [Send(2), Send(3), Send(4), Tell(2, 51), Tell(1, 55), Tell(0, 58)],
            51,
            id="calls of one moment are not counted twice",
        ),
        pytest.param(
            [Send(), Tell(0, 59), Send(), Tell(1, 40, after_s=5.0)],
            45,
            id="a reply is as old as its call at most",
        ),
        pytest.param([Send(), Tell(0, 59, after_s=100.0)], 60, id="the limit is the most there is"),
        pytest.param([Send(), Tell(0, 599, limit=600)], 598, id="a larger limit is there at once"),
        pytest.param([Send(), Tell(0, 6, limit=6)], 6, id="a smaller one too"),
        pytest.param(
            [Send(), Send(after_s=0.3), Tell(1, 599, limit=600), Tell(0, 1)],
            598,
            id="a limit that an overtaken reply tells is an old one",
        ),
        pytest.param(
            [Send(), Send(after_s=0.3), Tell(0, 59), Tell(1, 599, limit=600)],
            598,
            id="one that a newer reply tells is a new one",
        ),
        pytest.param(
            [Send(), Send(), Tell(0, 59), Tell(1, 599, limit=600)],
            600 - 1 - 2,
            id="so is one that a call of the same moment tells",
        ),
        pytest.param(
            [Send(), Send(40, after_s=0.3), Tell(0, 5, limit=6)],
            -6,
            id="more is used than a smaller limit holds, and a debt is a window's at most",
        ),
    ],
)
def test_level_is_between_what_replies_tell_and_what_was_sent(
    clock: FakeClock, steps: list[Send | Tell], remaining: float
) -> None:
    bucket, sent = make_bucket(clock), list[Mark]()

    for step in steps:
        clock.advance(step.after_s)
        bucket.refill(clock())
        if isinstance(step, Send):
            sent.append(bucket.take(step.amount, clock()))
        else:
            bucket.learn(Limit(step.limit, step.remaining, None), sent[step.call], clock())

    assert bucket.remaining == pytest.approx(remaining)


def test_call_older_than_the_bucket_lowers_it_and_does_not_raise_it(clock: FakeClock) -> None:
    bucket = make_bucket(clock, used=10)
    bucket.take(5, clock())

    bucket.learn(Limit(60, 60, None), None, clock())
    assert bucket.remaining == 45
    bucket.learn(Limit(60, 30, None), None, clock())
    assert bucket.remaining == 25


def test_what_was_sent_since_counts_as_much_as_the_server_takes(clock: FakeClock) -> None:
    bucket = make_bucket(clock, charge=2.0)
    first = bucket.take(1, clock())
    clock.advance(0.3)
    bucket.take(10, clock())

    bucket.learn(Limit(60, 30, None), first, clock())

    assert bucket.remaining == pytest.approx(30 + 0.3 - 2 * 10)


def test_copy_stands_as_its_original_and_goes_its_own_way(clock: FakeClock) -> None:
    original = make_bucket(clock, used=10)
    original.take(5, clock())

    copy = original.copy()
    original.take(5, clock())

    assert (copy.remaining, copy.sent, copy.calls) == (45, 0, 0)
    assert copy.burst is original.burst
    copy.learn(Limit(60, 40, None), copy.take(1, clock()), clock())
    assert (copy.remaining, original.remaining) == (40, 40)


# The window


@pytest.mark.parametrize(
    ("limit", "remaining", "reset_s", "window_s"),
    [
        (60, 59, 1.0, 60),  # a minute's window, one request used
        (60, 59, 0.4, 60),  # and partly there again
        (60, 0, 60.0, 60),
        (10_000, 9_998, 0.012, 60),
        (1_000, 0, 1.0, 1),
        (1_000, 500, 1_800.0, HOUR_S),
        (200, 199, 432.0, DAY_S),  # a free tier counts a day: 7m12s for one of 200
        (200, 100, 43_200.0, DAY_S),
        (1_000, 0, 10.0, 10),
        (1_000, 500, 150.0, 300),
        (100, 0, 9e9, DAY_S),  # never longer than a day
        (10_000, 0, 0.01, 1),  # never shorter than a second
        (60, 60, 0.0, 60),  # nothing used tells nothing: a minute is assumed
        (60, 60, 5.0, 60),
        (60, 30, None, 60),
        (60, 30, 0.0, 60),
    ],
)
def test_window_is_inferred_from_the_reset(
    clock: FakeClock, limit: int, remaining: int, reset_s: float | None, window_s: float
) -> None:
    bucket = Bucket.first(Limit(limit, remaining, reset_s), clock())

    assert limit / bucket.per_s == pytest.approx(window_s, rel=0.002)
    assert bucket.level == remaining


@pytest.mark.parametrize(
    ("known_s", "told", "window_s"),
    [
        (60.0, Limit(60, 59, 0.001), 60.0),  # one used, most of it there again
        (60.0, Limit(60, 58, 1.1), 60.0),  # between 33 and 66 seconds
        (60.0, Limit(60, 58, 2.1), 84.0),  # between 63 and 126
        (60.0, Limit(60, 50, 1.02), 1.02 * 60 / 9.5),  # between 6 and 6.9
        (60.0, Limit(60, 50, 1.0), 60.0 / 9.5),  # whole seconds: between 0 and 13.3
        (60.0, Limit(500, 499, 1.0), 60.0),  # rounded up from 0.12
        (60.0, Limit(60, 59, 1.002), 60.0),
        (120.0, Limit(60, 58, 1.1), 60.0),
        (120.0, Limit(60, 59, 0.5), 120.0),
        (DAY_S, Limit(200, 199, 100.0), DAY_S),
        (DAY_S, Limit(200, 100, 30.0), 60.0),
        (60.0, Limit(200, 100, 43_200.0), DAY_S),
        (60.0, Limit(30_000, 29_999, 0.002), 60.0),  # the reset is rounded to a millisecond
        (60.0, Limit(30_000, 29_997, 0.007), 60.0),
        (90.0, Limit(60, 60, 0.0), 90.0),
        (90.0, Limit(60, 30, None), 90.0),
    ],
)
def test_window_is_kept_as_long_as_the_headers_may_mean_it(
    clock: FakeClock, known_s: float, told: Limit, window_s: float
) -> None:
    bucket = make_bucket(clock, limit=told.limit, window_s=known_s)

    bucket.learn(told, bucket.take(1, clock()), clock())

    assert bucket.limit / bucket.per_s == pytest.approx(window_s)


def test_changed_limit_keeps_the_window(clock: FakeClock) -> None:
    bucket = make_bucket(clock, window_s=HOUR_S)

    bucket.learn(Limit(600, 599, None), bucket.take(1, clock()), clock())

    assert (bucket.limit, bucket.capacity) == (600, 600)
    assert bucket.per_s == pytest.approx(600 / HOUR_S)


# What the server takes for a call


@dataclass
class Server:
    """It takes so much of its limit for a call, and tells at once what is left."""

    clock: FakeClock
    limit: int = 60_000
    used: float = 0.0

    def __post_init__(self) -> None:
        self.asked_s = self.clock()

    def admit(self, taken: float) -> Limit:
        gone = (self.clock() - self.asked_s) * self.limit / 60.0
        self.used = min(self.limit, max(0.0, self.used - gone) + taken)
        self.asked_s = self.clock()
        return Limit(self.limit, self.limit - round(self.used), None)


def answer(bucket: Bucket, server: Server, calls: int, taken: float, amount: int = 100) -> None:
    """So many calls, one after another."""
    for _ in range(calls):
        mark = bucket.take(amount, server.clock())
        bucket.learn(server.admit(taken), mark, server.clock())
        server.clock.advance(0.01)


@pytest.mark.parametrize("taken", [40, 100, 110, 250, 1_500])
@pytest.mark.parametrize("used", [0, 10_000])
def test_charge_is_learned_from_what_is_left_after_many_calls(
    clock: FakeClock, taken: int, used: int
) -> None:
    server = Server(clock, limit=6_000_000, used=used)
    bucket = make_bucket(clock, limit=server.limit, used=used, learns_charge=True)

    # More goes out than comes back meanwhile, so that the bucket is never full.
    for _ in range(20):
        for _ in range(20):
            bucket.learn(server.admit(taken), bucket.take(100, clock()), clock())
        clock.advance(0.0001)

    assert bucket.charge == pytest.approx(taken / 100, rel=0.05)


def test_charge_follows_when_the_server_changes_its_ways(clock: FakeClock) -> None:
    server = Server(clock, used=10_000)
    bucket = make_bucket(clock, limit=server.limit, used=10_000, learns_charge=True)

    answer(bucket, server, 200, taken=50)
    assert bucket.charge == pytest.approx(0.5, abs=0.05)
    answer(bucket, server, 200, taken=150)
    assert bucket.charge == pytest.approx(1.5, abs=0.05)


def test_few_calls_tell_nothing_of_the_charge(clock: FakeClock) -> None:
    server = Server(clock, used=10_000)
    bucket = make_bucket(clock, limit=server.limit, used=10_000, learns_charge=True)

    answer(bucket, server, 20, taken=300)
    assert bucket.charge == 1.0
    answer(bucket, server, 1, taken=300)
    assert bucket.charge > 1.0


@pytest.mark.parametrize(
    ("remaining", "charge"),
    [(59_970, 0.3), (59_900, 1.0), (59_000, 1.0), (59_999, 0.05), (60_000, 0.05)],
)
def test_one_call_has_cost_no_more_than_all_that_is_used(
    clock: FakeClock, remaining: int, charge: float
) -> None:
    bucket = make_bucket(clock, limit=60_000, learns_charge=True)

    bucket.learn(Limit(60_000, remaining, None), bucket.take(100, clock()), clock())

    assert bucket.charge == pytest.approx(charge)


@pytest.mark.parametrize(
    ("requested", "charge"), [(250, 2.5), (60, 0.6), (100, 1.0), (1, 0.05), (10**9, 20.0)]
)
def test_charge_is_told_by_a_refusal(clock: FakeClock, requested: int, charge: float) -> None:
    bucket = make_bucket(clock, limit=60_000, learns_charge=True)

    bucket.told_charge(requested, 100)

    assert bucket.charge == charge


@pytest.mark.parametrize(("taken", "charge"), [(0, 0.05), (10_000, 20.0)])
def test_charge_stays_within_reason(clock: FakeClock, taken: int, charge: float) -> None:
    server = Server(clock, limit=60_000_000, used=30_000_000)
    bucket = make_bucket(clock, limit=server.limit, used=30_000_000, learns_charge=True)

    for _ in range(1_000):
        bucket.learn(server.admit(taken), bucket.take(100, clock()), clock())

    assert bucket.charge == pytest.approx(charge, abs=0.001)


def test_refused_calls_were_not_charged(clock: FakeClock) -> None:
    server = Server(clock, used=10_000)
    bucket = make_bucket(clock, limit=server.limit, used=10_000, learns_charge=True)

    for number in range(400):
        refused = number % 2 == 1
        mark = bucket.take(100, clock())
        bucket.learn(server.admit(0 if refused else 100), mark, clock(), taken=not refused)
        clock.advance(0.01)

    assert bucket.charge == pytest.approx(1.0, abs=0.05)


def test_changed_limit_starts_a_new_count_of_what_was_charged(clock: FakeClock) -> None:
    server = Server(clock, used=10_000)
    bucket = make_bucket(clock, limit=server.limit, used=10_000, learns_charge=True)
    answer(bucket, server, 15, taken=100)

    server.limit = 120_000
    server.used += 20_000
    answer(bucket, server, 15, taken=100)

    assert bucket.charge == 1.0


def test_requests_are_charged_as_they_are(clock: FakeClock) -> None:
    server = Server(clock, limit=600, used=100)
    bucket = make_bucket(clock, limit=600, used=100)

    answer(bucket, server, 100, taken=3, amount=1)

    assert bucket.charge == 1.0


# The burst that an endpoint allows


def scouting(burst: Burst, clock: FakeClock, limit: int = 600) -> Bucket:
    """A bucket in whose limit as much is used as was proven, and a call has just gone beyond."""
    bucket = make_bucket(clock, limit=limit, used=limit * burst.proven, burst=burst)
    assert bucket.wait_s(1, clock()) == 0.0
    bucket.take(1, clock())
    return bucket


def test_call_within_what_was_proven_needs_no_scout(clock: FakeClock) -> None:
    burst = Burst(proven=0.5)
    bucket = make_bucket(clock, limit=600, burst=burst)

    for _ in range(300):
        assert bucket.wait_s(1, clock()) == 0.0
        bucket.take(1, clock())

    assert burst.scout is None
    bucket.take(1, clock())
    assert burst.scout is bucket


@pytest.mark.parametrize(
    ("limit", "proven", "pause_s"),
    [
        (600, 0.0, 1 / 40),  # four times as fast as it refills
        (600, 0.2, 1 / 40),
        (600, 0.5, 1 / 100),  # all that was proven in three seconds
        (60_000, 0.5, 1 / 10_000),
        (60, 0.0, 0.1),  # ten calls a second at least
    ],
)
def test_scout_goes_ahead_at_an_even_pace(
    clock: FakeClock, limit: int, proven: float, pause_s: float
) -> None:
    scout = scouting(Burst(proven=proven), clock, limit)

    pauses_s = []
    for _ in range(5):
        pauses_s.append(scout.wait_s(1, clock()))
        clock.advance(pauses_s[-1])
        assert scout.wait_s(1, clock()) == pytest.approx(0.0, abs=1e-9)
        scout.take(1, clock())

    assert pauses_s == pytest.approx([pause_s] * 5)


def test_pace_is_by_what_a_call_takes(clock: FakeClock) -> None:
    bucket = make_bucket(clock, limit=60_000, burst=Burst(), charge=2.0)

    bucket.take(100, clock())

    assert bucket.wait_s(1, clock()) == pytest.approx(2.0 * 100 / (4 * 1_000))


def test_scout_that_was_late_does_not_catch_up(clock: FakeClock) -> None:
    scout = scouting(Burst(proven=0.1), clock)
    scout.take(200, clock())  # far beyond, lest it be back where nothing holds it

    clock.advance(0.9)
    assert scout.wait_s(1, clock()) == 0.0
    scout.take(1, clock())

    assert scout.wait_s(1, clock()) == pytest.approx(1 / 40)


def test_scout_speeds_up_as_more_is_proven(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scout = scouting(burst, clock)
    scout.take(450, clock())
    clock.advance(0.2)

    burst.went_well(0.8)
    scout.take(1, clock())

    assert scout.wait_s(1, clock()) == pytest.approx(1 / 160)


def test_one_bucket_at_a_time_goes_ahead(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scouting(burst, clock)
    other = make_bucket(clock, limit=600, used=60, burst=burst)

    assert other.wait_s(1, clock()) == pytest.approx(0.1)  # when so much has come back by itself
    assert other.wait_s(3, clock()) == pytest.approx(0.25)  # or soon, since the scout may have got further


def test_others_follow_as_far_as_the_scout_has_proven(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scouting(burst, clock)
    other = make_bucket(clock, limit=60, used=6, burst=burst)

    burst.went_well(0.25)

    granted = 0
    while other.wait_s(1, clock()) == 0.0:
        other.take(1, clock())
        granted += 1
    assert granted == 0.25 * 60 - 6


def test_scout_that_does_not_go_on_is_relieved(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scout = scouting(burst, clock)
    scout.take(200, clock())  # it is nowhere near what was proven
    other = make_bucket(clock, limit=600, used=300, burst=burst)

    clock.advance(0.99)
    assert other.wait_s(1, clock()) > 0.0
    clock.advance(0.02)
    assert other.wait_s(1, clock()) == 0.0
    other.take(1, clock())

    assert burst.scout is other
    assert scout.wait_s(1, clock()) > 0.0


def test_scout_that_goes_on_is_not_relieved(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scout = scouting(burst, clock)
    scout.take(200, clock())
    other = make_bucket(clock, limit=600, used=300, burst=burst)

    for _ in range(10):
        clock.advance(0.9)
        scout.take(10, clock())
        assert other.wait_s(1, clock()) > 0.0


def test_refusal_is_known_to_all_keys_at_once(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    refused, large, small = (
        make_bucket(clock, limit=600, used=160, burst=burst),
        make_bucket(clock, limit=6_000, used=500, burst=burst),
        make_bucket(clock, limit=60, used=20, burst=burst),
    )

    refused.refused(Limit(600, 450, None), clock())

    assert [bucket.capacity for bucket in (refused, large, small)] == [150, 1_500, 15]
    assert [bucket.level for bucket in (refused, large, small)] == [-10, 1_000, -5]


def test_refused_bucket_is_empty_whatever_it_thought(clock: FakeClock) -> None:
    bucket = make_bucket(clock, limit=600, used=50, burst=Burst(proven=0.1))

    bucket.refused(Limit(600, 500, None), clock())

    assert bucket.level == 0
    assert bucket.wait_s(1, clock()) == pytest.approx(0.13)


def test_refused_scout_holds_nobody_back(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    scout = scouting(burst, clock)
    other = make_bucket(clock, limit=600, used=60, burst=burst)
    assert other.wait_s(1, clock()) > 0.0

    scout.refused(Limit(600, 450, None), clock())

    assert other.wait_s(1, clock()) == 0.0


def test_found_burst_is_drawn_at_once(clock: FakeClock) -> None:
    burst = Burst(proven=0.1)
    burst.refused(0.25, clock())
    bucket = make_bucket(clock, limit=600, burst=burst)

    granted = 0
    while bucket.wait_s(1, clock()) == 0.0:
        bucket.take(1, clock())
        granted += 1

    assert granted == 149  # three tenths of a call stay
    assert bucket.wait_s(1, clock()) == pytest.approx(0.03)
    assert burst.scout is None


def test_smallest_burst_counts(clock: FakeClock) -> None:
    burst = Burst(proven=0.6)

    for share in (0.5, 0.25, 0.75):
        burst.refused(share, clock())

    assert (burst.most, burst.proven) == (0.25, 0.25)
    burst.went_well(0.9)
    assert burst.proven == 0.25


@pytest.mark.parametrize(
    ("limit", "window_s", "capacity"), [(600, 60.0, 10), (60, 60.0, 1), (200, DAY_S, 1), (600, 1.0, 600)]
)
def test_no_server_is_taken_to_hold_to_less_than_a_second(
    clock: FakeClock, limit: int, window_s: float, capacity: int
) -> None:
    bucket = make_bucket(clock, limit=limit, window_s=window_s)

    bucket.refused(Limit(limit, limit, None), clock())

    assert bucket.capacity == capacity
    clock.advance(window_s)
    assert bucket.wait_s(1, clock()) == 0.0


def test_endpoint_is_believed_again_after_ten_minutes(clock: FakeClock) -> None:
    burst = Burst(proven=1.0)
    bucket = make_bucket(clock, limit=600, burst=burst)
    bucket.refused(Limit(600, 450, None), clock())

    clock.advance(600.0)
    bucket.refill(clock())
    assert bucket.capacity == 150
    clock.advance(0.1)
    bucket.refill(clock())

    assert (bucket.capacity, bucket.level) == (600, 600)
    assert burst.proven == 0.25  # with care


def test_every_refusal_starts_the_ten_minutes_anew(clock: FakeClock) -> None:
    bucket = make_bucket(clock, limit=600)
    bucket.refused(Limit(600, 450, None), clock())
    clock.advance(500.0)
    bucket.refused(Limit(600, 450, None), clock())

    clock.advance(500.0)
    bucket.refill(clock())

    assert bucket.capacity == 150


# Whatever the server says


@dataclass(frozen=True)
class Event:
    """Time passes, then a call goes out (`amount`), or one comes back and tells (limit, remaining, reset)."""

    after_s: float
    amount: int | None
    told: Limit
    call: int
    taken: bool
    refused: bool


limits = st.sampled_from([60, 600]) | st.integers(1, 10**6)
tellings = limits.flatmap(
    lambda limit: st.builds(
        Limit,
        st.just(limit),
        st.integers(0, limit),
        st.none() | st.floats(0, 1e6, allow_nan=False) | st.sampled_from([0.001, 1.0, 60.0, 43_200.0]),
    )
)
events = st.lists(
    st.builds(
        Event,
        after_s=st.sampled_from([0.0, 0.1, 0.3, 1.0]) | st.floats(0, 1e5, allow_nan=False),
        amount=st.none() | st.integers(1, 10**4),
        told=tellings,
        call=st.integers(0, 30),
        taken=st.booleans(),
        refused=st.sampled_from([False, False, True]),
    ),
    max_size=40,
)


@unhurried
@given(tellings, events)
def test_level_never_rises_above_what_a_reply_certifies(first: Limit, sequence: list[Event]) -> None:
    clock, sent = FakeClock(), list[Mark]()
    bucket = Bucket.first(first, clock(), learns_charge=True)

    for event in sequence:
        clock.advance(event.after_s)
        bucket.refill(clock())
        before = bucket.remaining
        if event.amount is not None:
            amount = min(event.amount, bucket.capacity)
            assert 0.0 <= bucket.wait_s(amount, clock()) < math.inf
            sent.append(bucket.take(amount, clock()))
            assert bucket.remaining <= before
        elif sent:
            mark = sent.pop(event.call % len(sent))
            bucket.learn(event.told, mark, clock(), taken=event.taken)
            certified = event.told.remaining + (clock() - mark.sent_s) * bucket.per_s
            assert bucket.remaining <= max(before, certified) + 1e-6
            if event.refused:
                bucket.refused(event.told, clock())
                assert bucket.level <= 0
        assert bucket.level <= bucket.capacity <= bucket.limit
        assert bucket.capacity >= 1
        assert 0 < bucket.per_s <= bucket.limit * (1 + 1e-9)
        assert 0.05 <= bucket.charge <= 20.0


@unhurried
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 2), st.sampled_from("tgr")), max_size=60))
def test_keys_of_one_endpoint_never_hold_each_other_for_long(
    sequence: list[tuple[int, float, str]],
) -> None:
    clock, burst = FakeClock(), Burst()
    buckets = [make_bucket(clock, limit=limit, burst=burst) for limit in (60, 600, 6_000)]
    for number, after_s, what in sequence:
        clock.advance(after_s)
        bucket = buckets[number]
        bucket.refill(clock())
        told = Limit(bucket.limit, max(0, round(bucket.remaining)), None)
        if what == "t":
            bucket.take(1, clock())
        elif what == "g":
            burst.went_well(told.used_share)
        else:
            bucket.refused(told, clock())

    clock.advance(200.0)

    for bucket in buckets:  # each after the other, while those that have gone before keep silent
        while (wait_s := bucket.wait_s(1, clock())) > 0:
            assert wait_s <= 1.0
            clock.advance(wait_s)
        bucket.take(1, clock())
        assert clock() < 1000 + 200 + 120 + 5
