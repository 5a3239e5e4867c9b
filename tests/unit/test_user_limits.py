"""What one user may have and do at once: when a job is refused, and how requests are counted in bounded memory."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from config import Settings
from gpt_worker.domain import utc_now
from gpt_worker.errors import TooLarge, TooMany, Unavailable
from gpt_worker.store.jobs import Unfinished
from gpt_worker.user_limits import (
    Party,
    PartyPlaces,
    PartyTurns,
    RequestBuckets,
    RequestLimit,
    check_room,
    guess_wait_s,
    network,
)
from tests import factories
from tests.clock import FakeClock

NOW = utc_now()
TEN_S_AGO = NOW - timedelta(seconds=10)


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    """Two jobs, and a hundred tasks."""
    return factories.settings(data_dir=tmp_path, MAX_USER_JOBS="2", MAX_USER_TASKS="100")


# Jobs and tasks


@pytest.mark.parametrize(
    ("unfinished", "tasks"),
    [(Unfinished(), 100), (Unfinished(jobs=1, pending=40), 60), (Unfinished(jobs=1, pending=0), 1)],
)
def test_job_that_fits_is_let_in(limits: Settings, unfinished: Unfinished, tasks: int) -> None:
    check_room(unfinished, tasks, limits, NOW)


@pytest.mark.parametrize(
    ("unfinished", "tasks", "setting"),
    [
        (Unfinished(jobs=2, pending=2), 1, "MAX_USER_JOBS"),
        (Unfinished(jobs=3, pending=3), 1, "MAX_USER_JOBS"),
        (Unfinished(jobs=1, pending=40), 61, "MAX_USER_TASKS"),
        (Unfinished(jobs=1, pending=100), 1, "MAX_USER_TASKS"),
    ],
)
def test_job_too_many_is_refused_and_the_setting_named(
    limits: Settings, unfinished: Unfinished, tasks: int, setting: str
) -> None:
    with pytest.raises(TooMany, match=setting) as refused:
        check_room(unfinished, tasks, limits, NOW)

    assert 10 <= refused.value.retry_after_s <= 60


def test_job_that_can_never_fit_is_not_told_to_come_back(limits: Settings) -> None:
    with pytest.raises(TooLarge, match="MAX_USER_TASKS"):
        check_room(Unfinished(), 101, limits, NOW)


def test_limit_that_is_off_refuses_nothing(limits: Settings) -> None:
    off = replace(limits, max_user_jobs=None, max_user_tasks=None)

    check_room(Unfinished(jobs=10**6, pending=10**9), 10**6, off, NOW)


@pytest.mark.parametrize(
    ("unfinished", "tasks", "wait_s"),
    [
        (Unfinished(jobs=1, pending=9, decided=20, started_at=TEN_S_AGO), 50, 25),
        (Unfinished(jobs=1, pending=9, decided=20, started_at=TEN_S_AGO), 1, 10),
        (Unfinished(jobs=1, pending=9, decided=1, started_at=TEN_S_AGO), 1000, 60),
        (Unfinished(jobs=1, pending=9, decided=0, started_at=TEN_S_AGO), 1, 60),
        (Unfinished(jobs=1, pending=9), 1, 60),
    ],
)
def test_wait_is_guessed_by_the_pace_until_now(unfinished: Unfinished, tasks: int, wait_s: int) -> None:
    assert guess_wait_s(unfinished, tasks, NOW) == wait_s


# Requests


def test_minutes_requests_may_come_at_once() -> None:
    buckets = RequestBuckets(now_s=FakeClock())

    waits = [buckets.take("ada", 6000) for _ in range(6001)]

    assert waits[:6000] == [0.0] * 6000
    assert waits[6000] == pytest.approx(0.01)


def test_bucket_is_refilled_all_the_time() -> None:
    clock = FakeClock()
    buckets = RequestBuckets(now_s=clock)
    taken = [buckets.take("ada", 60) for _ in range(60)]

    clock.advance(2.0)

    assert taken == [0.0] * 60
    assert [buckets.take("ada", 60) for _ in range(2)] == [0.0, 0.0]
    assert buckets.take("ada", 60) == pytest.approx(1.0)


def test_refused_request_costs_nothing() -> None:
    clock = FakeClock()
    buckets = RequestBuckets(now_s=clock)
    buckets.take("ada", 1)
    refused = [buckets.take("ada", 1) for _ in range(100)]

    clock.advance(60.0)

    assert refused == [pytest.approx(60.0)] * 100
    assert buckets.take("ada", 1) == 0.0


def test_callers_have_buckets_of_their_own() -> None:
    buckets = RequestBuckets(now_s=FakeClock())

    assert [buckets.take(who, 1) > 0 for who in ("ada", "bob", "ada", "bob")] == [False, False, True, True]


def test_full_buckets_are_forgotten() -> None:
    clock = FakeClock()
    buckets = RequestBuckets(now_s=clock)
    for number in range(100):
        buckets.take(f"caller {number}", 60)

    clock.advance(60.0)
    for _ in range(60):
        buckets.take("another", 60)

    assert len(buckets) == 1


def test_memory_is_bounded_whoever_comes() -> None:
    clock = FakeClock()
    buckets = RequestBuckets(max_callers=100, now_s=clock)

    for number in range(10_000):
        buckets.take(f"caller {number}", 1)
        clock.advance(0.001)

    assert len(buckets) == 100
    assert buckets.take("caller 9999", 1) > 0, "the latest are remembered"


def test_strangers_move_no_users_bucket() -> None:
    limit = RequestLimit(now_s=FakeClock())
    limit.count("ada", "192.0.2.1", 1)

    for number in range(20_000):
        limit.count(None, f"10.0.{number >> 8}.{number & 255}", 1)

    with pytest.raises(TooMany, match="MAX_USER_REQUESTS_PER_MINUTE"):
        limit.count("ada", "192.0.2.1", 1)


def test_user_counts_wherever_they_come_from() -> None:
    limit = RequestLimit(now_s=FakeClock())
    limit.count("ada", "192.0.2.1", 1)
    limit.count(None, "192.0.2.1", 1)

    with pytest.raises(TooMany) as refused:
        limit.count("ada", "192.0.2.2", 1)

    assert refused.value.retry_after_s == pytest.approx(60.0)


def test_no_limit_counts_nothing() -> None:
    limit = RequestLimit(now_s=FakeClock())

    for _ in range(100):
        limit.count("ada", None, None)


def test_request_that_is_given_back_does_not_count() -> None:
    buckets = RequestBuckets(now_s=FakeClock())

    for _ in range(5):
        assert buckets.take("ada", 2) == 0.0
        buckets.give_back("ada", 2)

    assert [buckets.take("ada", 2), buckets.take("ada", 2)] == [0.0, 0.0]
    assert buckets.take("ada", 2) == pytest.approx(30.0)


# Places and turns


def stranger(name: str) -> Party:
    return Party(name, is_known=False)


def known(name: str) -> Party:
    return Party(name, is_known=True)


def test_party_has_a_few_of_the_places_and_all_together_no_more_than_there_are() -> None:
    places = PartyPlaces(total=3, each=2)
    with ExitStack() as held:
        for name in ("crowd", "crowd", "ada"):
            held.enter_context(places.hold(stranger(name)))
            with pytest.raises(Unavailable), places.hold(stranger("crowd")), places.hold(stranger("crowd")):
                pass
        with pytest.raises(Unavailable), places.hold(stranger("bob")):
            pass

    with places.hold(stranger("bob")), places.hold(stranger("bob")):
        pass


def order_of(turns: PartyTurns, parties: list[Party]) -> str:
    """The names in the order of their turns; they come one after the other, while the only turn is taken."""
    order: list[str] = []

    def come(party: Party) -> None:
        with turns.take(party, 10):
            order.append(party.name)

    threads = [threading.Thread(target=come, args=(party,)) for party in parties]
    with turns.take(stranger("first"), 0):
        for number, thread in enumerate(threads):
            thread.start()
            while turns.waiting == number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    return "".join(order)


@pytest.mark.parametrize(
    ("strangers", "order"), [("aaaab", "abaaa"), ("aaabbc", "abcaba"), ("abc", "abc"), ("aaa", "aaa")]
)
def test_networks_have_their_turns_one_after_the_other(strangers: str, order: str) -> None:
    assert order_of(PartyTurns(1), [stranger(name) for name in strangers]) == order


@pytest.mark.parametrize(
    ("comers", "order"), [("aaaA", "Aaaa"), ("abcAB", "AaBbc"), ("AAAa", "AaAA"), ("AABa", "AaBA")]
)
def test_known_users_go_before_strangers_but_for_every_second_turn(comers: str, order: str) -> None:
    parties = [known(name) if name.isupper() else stranger(name) for name in comers]

    assert order_of(PartyTurns(1), parties) == order


def test_turn_that_does_not_come_in_time_is_given_up_and_no_other_lost() -> None:
    turns = PartyTurns(1)

    with turns.take(stranger("a"), 0), pytest.raises(Unavailable), turns.take(stranger("b"), 0.01):
        pass

    assert turns.waiting == 0
    assert order_of(turns, [stranger("b"), stranger("c")]) == "bc"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        (None, "", True),
    ],
)
def test_address_of_one_machine_is_one_caller(one: str | None, other: str, same: bool) -> None:
    assert (network(one) == network(other)) is same
