"""How a key fares: refused, out of quota, resting, missing a model; when it is tried again, and by how many calls."""

import pytest

from gpt_worker.backoff import ProblemKind
from gpt_worker.lanes import FAILURES_BEFORE_REST, Hold, Lane, LaneState, QuotaGroup
from gpt_worker.limit_headers import LimitHeaders
from gpt_worker.marks import MAX_MARKS
from gpt_worker.rate_limit import UNTOLD, Reservation
from tests import factories
from tests.clock import FakeClock
from tests.factories import MODEL

HOUR_S = 3600.0
MINUTE_S = 60.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def meet(lane: Lane, clock: FakeClock, kind: ProblemKind, *, jitter: float = 0.0) -> bool:
    """One call that ends in this problem; whether that is news."""
    lane.sent(clock())
    lane.came_back(clock())
    return lane.troubled(factories.problem(kind=kind), MODEL, clock(), clock(), jitter)


def lane_after(kind: ProblemKind, clock: FakeClock, times: int = 1) -> Lane:
    lane = factories.lane()
    for _ in range(times):
        meet(lane, clock, kind)
    return lane


def test_new_key_is_ready(clock: FakeClock) -> None:
    lane = factories.lane(number=3)

    assert lane.hold(MODEL, clock()) is None
    assert lane.state(clock()) == Hold(LaneState.READY, None)
    assert (lane.name, lane.tail) == ("key 3", "0003")


# Refused


def test_refused_key_is_tried_again_after_an_hour(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.KEY_REFUSED, clock)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.REFUSED, clock() + HOUR_S)
    clock.advance(HOUR_S - 1)
    assert lane.hold(MODEL, clock()) is not None
    clock.advance(1)
    assert lane.hold(MODEL, clock()) is None
    assert lane.state(clock()).state is LaneState.REFUSED


def test_refused_key_is_news_once(clock: FakeClock) -> None:
    lane = factories.lane()

    assert meet(lane, clock, ProblemKind.KEY_REFUSED)
    assert not meet(lane, clock, ProblemKind.KEY_REFUSED)


def test_refused_key_has_one_probe_in_flight(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.KEY_REFUSED, clock)
    clock.advance(HOUR_S)

    lane.sent(clock())

    assert lane.hold(MODEL, clock()) == Hold(LaneState.REFUSED, None)


def test_call_older_than_the_probe_does_not_make_room_for_a_second_one(clock: FakeClock) -> None:
    lane = factories.lane()
    old_s = clock()
    lane.sent(old_s)
    meet(lane, clock, ProblemKind.KEY_REFUSED)
    clock.advance(HOUR_S)
    lane.sent(clock())

    lane.came_back(old_s)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.REFUSED, None)


def test_refused_probe_means_another_hour(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.KEY_REFUSED, clock)
    clock.advance(HOUR_S)

    meet(lane, clock, ProblemKind.KEY_REFUSED)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.REFUSED, clock() + HOUR_S)


def test_answered_probe_brings_the_key_back(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.KEY_REFUSED, clock)
    clock.advance(HOUR_S)
    lane.sent(clock())
    lane.came_back(clock())

    assert lane.works(clock())

    assert lane.hold(MODEL, clock()) is None
    assert not lane.refused


def test_answer_to_a_call_older_than_the_refusal_shows_nothing(clock: FakeClock) -> None:
    lane = factories.lane()
    sent_at_s = clock()
    clock.advance(1)
    meet(lane, clock, ProblemKind.KEY_REFUSED)

    assert not lane.works(sent_at_s)

    assert lane.refused


# Out of quota


def test_quota_rests_double_from_ten_minutes_to_six_hours(clock: FakeClock) -> None:
    lane, rests = factories.lane(), []

    for _ in range(8):
        meet(lane, clock, ProblemKind.QUOTA_EXHAUSTED)
        hold = lane.hold(MODEL, clock())
        assert hold is not None
        assert hold.until_s is not None
        rests.append((hold.until_s - clock()) / MINUTE_S)
        clock.now_s = hold.until_s

    assert rests == [10, 20, 40, 80, 160, 320, 360, 360]


def test_quota_found_exhausted_by_a_burst_counts_once(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.QUOTA_EXHAUSTED, clock, times=64)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.OUT_OF_QUOTA, clock() + 10 * MINUTE_S)


def test_quota_is_the_groups_and_has_one_probe(clock: FakeClock) -> None:
    first, second = factories.lane(number=0), factories.lane(number=1)
    second.group = first.group
    meet(first, clock, ProblemKind.QUOTA_EXHAUSTED)
    assert second.hold(MODEL, clock()) == Hold(LaneState.OUT_OF_QUOTA, clock() + 10 * MINUTE_S)
    clock.advance(10 * MINUTE_S)

    second.sent(clock())

    for lane in (first, second):
        assert lane.hold(MODEL, clock()) == Hold(LaneState.OUT_OF_QUOTA, None)


def test_old_call_of_the_group_does_not_make_room_for_a_second_probe(clock: FakeClock) -> None:
    first, second = factories.lane(number=0), factories.lane(number=1)
    second.group = first.group
    old_s = clock()
    first.sent(old_s)
    clock.advance(1)
    meet(second, clock, ProblemKind.QUOTA_EXHAUSTED)
    clock.advance(10 * MINUTE_S)
    second.sent(clock())

    first.came_back(old_s)

    assert first.hold(MODEL, clock()) == Hold(LaneState.OUT_OF_QUOTA, None)


def test_answer_ends_the_groups_exhaustion(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.QUOTA_EXHAUSTED, clock)
    clock.advance(10 * MINUTE_S)

    assert lane.works(clock())

    assert lane.hold(MODEL, clock()) is None


# Failures of nobody


def test_key_rests_after_five_failures_in_a_row(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.TRANSIENT, clock, times=FAILURES_BEFORE_REST - 1)
    assert lane.hold(MODEL, clock()) is None

    assert meet(lane, clock, ProblemKind.TRANSIENT, jitter=1.0)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, clock() + 1.0)


def test_rests_after_failures_double_up_to_a_minute(clock: FakeClock) -> None:
    lane, rests = lane_after(ProblemKind.TRANSIENT, clock, times=FAILURES_BEFORE_REST - 1), []

    for _ in range(9):
        meet(lane, clock, ProblemKind.TRANSIENT, jitter=1.0)
        hold = lane.hold(MODEL, clock())
        assert hold is not None
        assert hold.until_s is not None
        rests.append(hold.until_s - clock())
        clock.now_s = hold.until_s

    assert rests == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


def test_rest_is_never_so_short_that_the_key_spins(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.TRANSIENT, clock, times=FAILURES_BEFORE_REST)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, clock() + 0.2)


def test_calls_in_flight_when_the_rest_began_do_not_lengthen_it(clock: FakeClock) -> None:
    lane, sent_at_s = factories.lane(), clock()
    clock.advance(1)
    for _ in range(64):
        lane.troubled(factories.problem(), MODEL, sent_at_s, clock(), 1.0)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, clock() + 1.0)


def test_rested_key_has_one_probe_in_flight(clock: FakeClock) -> None:
    lane, old_s = factories.lane(), clock()
    lane.sent(old_s)
    clock.advance(1)
    for _ in range(FAILURES_BEFORE_REST):
        meet(lane, clock, ProblemKind.TRANSIENT)
    clock.advance(1)
    lane.sent(clock())

    lane.came_back(old_s)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, None)


@pytest.mark.parametrize("kind", [ProblemKind.FINAL, ProblemKind.RATE_LIMITED, ProblemKind.STALE])
def test_other_trouble_does_not_rest_the_key(clock: FakeClock, kind: ProblemKind) -> None:
    lane = lane_after(kind, clock, times=20)

    assert lane.hold(MODEL, clock()) is None


def test_answer_forgets_failures(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.TRANSIENT, clock, times=FAILURES_BEFORE_REST - 1)

    lane.works(clock())
    meet(lane, clock, ProblemKind.TRANSIENT)

    assert lane.hold(MODEL, clock()) is None


# Models, limits, and the endpoint itself


def test_missing_model_holds_that_model_alone(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.MODEL_UNAVAILABLE, clock)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.READY, clock() + 600, model_missing=True)
    assert lane.hold("another", clock()) is None
    assert lane.state(clock()).state is LaneState.READY
    clock.advance(600)
    assert lane.hold(MODEL, clock()) is None


def test_rate_limit_of_one_model_leaves_the_others(clock: FakeClock) -> None:
    lane = factories.lane()
    limiter = lane.group.limiter(MODEL)
    reservation = limiter.reserve(1, clock())
    assert isinstance(reservation, Reservation)
    limiter.rate_limited(reservation, factories.headers(), clock(), 20.0, 0.0, UNTOLD)

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, clock() + 20)
    assert lane.hold("another", clock()) is None
    assert lane.state(clock()) == Hold(LaneState.RESTING, clock() + 20)


def test_rate_limits_are_counted(clock: FakeClock) -> None:
    lane = lane_after(ProblemKind.RATE_LIMITED, clock, times=3)

    assert lane.rate_limited == 3
    assert lane.last_error is not None


def test_endpoint_that_is_away_holds_the_lane(clock: FakeClock) -> None:
    lane = factories.lane()

    lane.down = "it is starting"

    assert lane.hold(MODEL, clock()) == Hold(LaneState.RESTING, None)


@pytest.mark.parametrize(
    "kind",
    [
        ProblemKind.KEY_REFUSED,
        ProblemKind.QUOTA_EXHAUSTED,
        ProblemKind.MODEL_UNAVAILABLE,
        ProblemKind.TRANSIENT,
    ],
)
def test_key_mended_by_hand_is_ready(clock: FakeClock, kind: ProblemKind) -> None:
    lane = lane_after(kind, clock, times=FAILURES_BEFORE_REST)
    assert lane.hold(MODEL, clock()) is not None

    lane.mend()

    assert lane.hold(MODEL, clock()) is None


def test_calls_in_flight_are_counted(clock: FakeClock) -> None:
    lane = factories.lane()

    lane.sent(clock())
    lane.sent(clock())
    lane.came_back(clock())

    assert (lane.in_flight, lane.requests) == (1, 2)


# Merging groups


def test_merged_group_is_as_exhausted_as_either(clock: FakeClock) -> None:
    lane, group = lane_after(ProblemKind.QUOTA_EXHAUSTED, clock), QuotaGroup()

    group.absorb(lane.group)
    lane.group = group

    assert lane.hold(MODEL, clock()) == Hold(LaneState.OUT_OF_QUOTA, clock() + 10 * MINUTE_S)


def test_merged_group_misses_the_models_of_either(clock: FakeClock) -> None:
    lane, group = lane_after(ProblemKind.MODEL_UNAVAILABLE, clock), QuotaGroup()

    group.absorb(lane.group)

    assert group.missing_models == lane.group.missing_models


def test_merged_group_has_the_limiters_of_both() -> None:
    ours, theirs = QuotaGroup(), QuotaGroup()
    own, foreign = ours.limiter("a"), theirs.limiter("b")

    ours.absorb(theirs)

    assert ours.limiter("a") is own
    assert ours.limiter("b") is foreign


@pytest.mark.parametrize("kind", [ProblemKind.KEY_REFUSED, ProblemKind.QUOTA_EXHAUSTED])
def test_probe_that_told_nothing_is_followed_by_another_after_a_minute(
    clock: FakeClock, kind: ProblemKind
) -> None:
    lane = lane_after(kind, clock)
    clock.advance(3600)
    lane.sent(clock())

    lane.came_back(clock())
    lane.troubled(factories.problem(), MODEL, clock(), clock(), 0.0)

    hold = lane.hold(MODEL, clock())
    assert hold is not None
    assert hold.until_s == clock() + 60


def test_limiters_of_models_that_callers_made_up_are_forgotten(clock: FakeClock) -> None:
    lane = factories.lane()
    kept = lane.group.limiter("in flight")
    kept.reserve(1, clock())

    for number in range(1000):
        lane.group.limiter(f"made up {number}")

    assert len(lane.group.limiters) <= 200
    assert len(lane.group.bursts) <= 200
    assert lane.group.limiter("in flight") is kept


def test_missing_models_that_callers_made_up_are_forgotten(clock: FakeClock) -> None:
    lane = factories.lane()
    missing = factories.problem(kind=ProblemKind.MODEL_UNAVAILABLE)

    for number in range(MAX_MARKS + 100):
        lane.troubled(missing, f"made up {number}", clock(), clock(), 0.0)
    meet(lane, clock, ProblemKind.MODEL_UNAVAILABLE)

    assert len(lane.group.missing_models) == MAX_MARKS
    hold = lane.hold(MODEL, clock())
    assert hold is not None
    assert hold.model_missing


def test_key_mended_by_hand_rests_no_longer(clock: FakeClock) -> None:
    lane = factories.lane()
    limiter = lane.group.limiter(MODEL)
    reservation = limiter.reserve(1, clock())
    assert isinstance(reservation, Reservation)
    limiter.rate_limited(reservation, LimitHeaders(), clock(), 86_400.0, 0.0, UNTOLD)

    lane.mend()

    assert lane.hold(MODEL, clock()) is None
