"""What is kept of what replies name: quota groups, and models that take no packs."""

from collections import deque
from typing import Any

import pytest

from gpt_worker.backoff import ProblemKind
from gpt_worker.gpt import AnyReply, Reply
from gpt_worker.lanes import Lane
from gpt_worker.marks import MAX_MARKS
from gpt_worker.rate_limit import Reservation
from gpt_worker.settling import PAST_GROUPS, UNPACKABLE_S, Grant, Settling
from tests import factories
from tests.clock import FakeClock
from tests.factories import MODEL


class Stand:
    """Lanes of one endpoint, and what settles their calls."""

    def __init__(self, lanes: int = 1) -> None:
        self.clock = FakeClock()
        self.lanes = [factories.lane(number=number) for number in range(lanes)]
        self.settling = Settling(self.lanes, lambda _lanes: None, lambda: 0.0)

    def call(self, lane: Lane, reply: AnyReply, model: str = MODEL) -> None:
        """One call that brings this reply."""
        job = factories.job_run(tasks=1, pack=True)
        job.model = model
        task = job.fresh.popleft()
        limiter = lane.group.limiter(model)
        reservation = limiter.reserve(1, self.clock())
        assert isinstance(reservation, Reservation)
        grant = Grant(job, [task], limiter, reservation, deque(), self.clock())
        lane.sent(self.clock())
        lane.came_back(self.clock())
        self.settling.settle(lane, grant, reply, self.clock())


def of(group: str, **fields: Any) -> AnyReply:
    return factories.reply(organization=group, project="one", **fields)


def exhausted(group: str) -> AnyReply:
    return Reply(factories.problem(kind=ProblemKind.QUOTA_EXHAUSTED), organization=group, project="one")


@pytest.fixture
def stand() -> Stand:
    return Stand(lanes=2)


def test_groups_that_an_endpoint_makes_up_are_forgotten(stand: Stand) -> None:
    made_up, other = stand.lanes
    stand.call(other, of("kept"))

    for number in range(1000):
        stand.call(made_up, of(f"made up {number}"))

    assert len(stand.settling._groups) <= len(stand.lanes) + PAST_GROUPS
    assert (made_up.group.name, other.group.name) == ("made up 999/one", "kept/one")
    stand.call(made_up, of("kept"))
    assert made_up.group is other.group


def test_group_that_a_key_comes_back_to_is_as_exhausted_as_before(stand: Stand) -> None:
    lane, _ = stand.lanes
    stand.call(lane, exhausted("empty"))
    until_s = lane.group.exhausted_until_s

    stand.call(lane, of("full"))
    assert lane.group.exhausted_until_s == 0.0
    stand.call(lane, exhausted("empty"))

    assert lane.group.exhausted_until_s == until_s > stand.clock()


def test_models_that_take_no_packs_are_remembered_up_to_a_bound(stand: Stand) -> None:
    lane, _ = stand.lanes
    refused = factories.trouble(kind=ProblemKind.PACK_REFUSED)

    for number in range(MAX_MARKS + 100):
        stand.call(lane, refused, model=f"made up {number}")
    stand.call(lane, refused)

    assert len(stand.settling._unpackable) == MAX_MARKS
    job = factories.job_run(pack=True)
    assert not stand.settling.packs(lane, job, stand.clock())
    assert stand.settling.packs(lane, job, stand.clock() + UNPACKABLE_S)
