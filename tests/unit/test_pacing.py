"""Keys against the fake OpenAI's limits, in simulated time: how near the best possible they come, and at what price.

Everything is the real thing but time and the wire: the limiters, and the limits of `tests/upstream`.
"""

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from bench.ideal import KeyLimits, limited_s
from gpt_worker.limit_headers import LimitHeaders, read_headers
from gpt_worker.rate_limit import Bound, Bursts, Limiter, NamedLimit, RateRefusal, Reservation
from tests.clock import FakeClock
from tests.upstream.limits import Counted, Denied, Limits
from tests.upstream.rules import KeyRules

DAY_S = 86_400.0
REFUSAL_S = 0.01  # how fast an endpoint says no
JITTER_S = 0.004


@dataclass
class Key:
    """One key: our limiter for it, the server's limits, and what came of it."""

    limiter: Limiter
    limits: Limits
    sends_headers: bool = True
    in_flight: int = 0
    answered: int = 0
    refused: int = 0


@dataclass
class World:
    """Keys that work on one pile of tasks."""

    rules: Sequence[KeyRules]
    latency_s: float = 0.3
    threads: int = 64
    prompt_tokens: int = 50
    charged_tokens: int = 50  # what the server takes for a task
    estimate_tokens: int = 54  # what we take its prompt for
    same_quota: bool = False
    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        bursts, limiter = Bursts(), Limiter()
        shared = Limits(self.rules[0], self.clock)
        self.keys = [
            Key(limiter, shared)
            if self.same_quota
            else Key(Limiter(bursts), Limits(rules, self.clock), rules.send_limit_headers)
            for rules in self.rules
        ]
        self._random = random.Random(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._left = 0
        self._wakes_s = math.inf  # when it is looked again, if nothing happens before

    @property
    def refused(self) -> int:
        return sum(key.refused for key in self.keys)

    @property
    def answered(self) -> int:
        return sum(key.answered for key in self.keys)

    def run(self, tasks: int, *, at: Mapping[float, Callable[[], None]] | None = None) -> float:
        """Seconds until all are answered; `at` is done after so many seconds."""
        start_s = self.clock()
        self._left = tasks
        wanted = self.answered + tasks
        for after_s, act in (at or {}).items():
            self._later(after_s, act)
        self._send_all()
        while self.answered < wanted:
            self.clock.now_s, _, act = heapq.heappop(self._events)
            act()
            self._send_all()
        return self.clock() - start_s

    def _later(self, after_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock() + after_s, next(self._numbers), act))

    def _send_all(self) -> None:
        waits = [self._send(key) for key in self.keys]
        wait_s = max(0.001, min(waits))
        if self._left and self.clock() + wait_s < self._wakes_s:
            self._wakes_s = self.clock() + wait_s
            self._later(wait_s, self._wake)

    def _wake(self) -> None:
        self._wakes_s = math.inf

    def _send(self, key: Key) -> float:
        """Send what may go; how long until more may."""
        while self._left and key.in_flight < self.threads:
            cost = key.limiter.cost(self.estimate_tokens, None)
            reserved = key.limiter.reserve(cost, self.clock())
            if not isinstance(reserved, Reservation):
                return reserved.seconds
            self._left -= 1
            key.in_flight += 1
            self._later(self._random.uniform(0, JITTER_S), lambda sent=reserved: self._arrive(key, sent))  # type: ignore[misc]
        return math.inf

    def _arrive(self, key: Key, reservation: Reservation) -> None:
        denied = key.limits.admit(self.charged_tokens)
        headers = read_headers(key.limits.headers()) if key.sends_headers else LimitHeaders()
        if denied:
            self._later(REFUSAL_S, lambda: self._deny(key, reservation, headers, denied))
        else:
            took_s = self.latency_s * self._random.uniform(0.7, 1.3)
            self._later(took_s, lambda: self._answer(key, reservation, headers))

    def _deny(self, key: Key, reservation: Reservation, headers: LimitHeaders, denied: Denied) -> None:
        key.in_flight -= 1
        key.refused += 1
        self._left += 1
        bound = Bound.TOKENS if denied.counted is Counted.TOKENS else Bound.REQUESTS
        rest_s = denied.retry_after_s if key.sends_headers else None
        requested = denied.requested if bound is Bound.TOKENS else None
        named = NamedLimit(denied.limit, DAY_S if denied.counted is Counted.REQUESTS_A_DAY else 60.0)
        key.limiter.rate_limited(
            reservation, headers, self.clock(), rest_s, 0.5, RateRefusal(bound, named, requested)
        )

    def _answer(self, key: Key, reservation: Reservation, headers: LimitHeaders) -> None:
        key.in_flight -= 1
        key.answered += 1
        key.limiter.replied(
            reservation,
            headers,
            self.clock(),
            estimate=self.estimate_tokens,
            prompt_tokens=self.prompt_tokens,
        )


def best_s(world: World, tasks: int) -> float:
    limits = [KeyLimits(rules.rpm, rules.tpm, rules.bucket_s) for rules in world.rules]
    return limited_s(limits, tasks, world.charged_tokens, world.latency_s)


def keys(*per_minute: int, bucket_s: float = 15.0) -> list[KeyRules]:
    return [KeyRules(rpm=rpm, bucket_s=bucket_s) for rpm in per_minute]


MIXED = [*keys(300, 300, 600, 900), KeyRules(rpm=1500, tpm=50_000, bucket_s=15.0)]


@pytest.mark.parametrize(
    ("bucket_s", "latency_s"), [(1.0, 0.3), (1.0, 3.0), (5.0, 0.3), (15.0, 0.03), (15.0, 3.0)]
)
def test_cold_keys_come_near_the_best_possible(bucket_s: float, latency_s: float) -> None:
    world = World([replace(rules, bucket_s=bucket_s) for rules in MIXED], latency_s)
    tasks = 2000

    took_s = world.run(tasks)

    slack_s = 3 * latency_s + 1.0  # the first calls find out, the last answer takes its time
    assert best_s(world, tasks) / (took_s - slack_s) >= 0.97
    assert 1000 * world.refused / tasks <= 2


def test_burst_of_a_whole_minute_is_drawn_with_care_and_without_a_refusal() -> None:
    world = World(keys(300, 300, 600, bucket_s=60.0))

    took_s = world.run(1200)

    assert took_s <= 12.0
    assert world.refused == 0


def test_slow_calls_fill_every_key() -> None:
    world = World(keys(300, 600, bucket_s=60.0), latency_s=30.0, threads=400)

    took_s = world.run(2000)

    assert took_s <= best_s(world, 2000) + 3 * 30.0
    assert world.refused <= 2


@pytest.mark.parametrize("bucket_s", [1.0, 15.0])
@pytest.mark.parametrize("charged_tokens", [25, 50, 110, 250])
def test_key_bound_by_tokens_is_full_whatever_the_server_takes_for_a_task(
    charged_tokens: int, bucket_s: float
) -> None:
    world = World([KeyRules(tpm=50_000, bucket_s=bucket_s)] * 2, charged_tokens=charged_tokens)
    tasks = 80_000 // charged_tokens

    took_s = world.run(tasks)

    assert best_s(world, tasks) / (took_s - 1.0) >= 0.95
    # As many as are sent before the first reply tells.
    assert world.refused <= (10 if charged_tokens < 200 else 40)


def test_keys_of_one_quota_share_it() -> None:
    world = World(keys(600, 600, 600), same_quota=True)

    took_s = world.run(600)

    assert limited_s([KeyLimits(600, None, 15.0)], 600, 50, 0.3) / took_s >= 0.95
    assert world.refused <= 2


def change(world: World, rules: KeyRules) -> None:
    for key in world.keys:
        key.limits.change(rules)


@pytest.mark.parametrize(
    ("after", "best_s", "refused"),
    [
        # What was used is more than the new limit holds: it is in debt.
        (150, 20 + (150 - 37.5) / 2.5 + 300 / 5, 12),
        (1200, 20 + 0.3, 2),
    ],
)
def test_limit_that_changes_meanwhile_is_kept(after: int, best_s: float, refused: int) -> None:
    world = World(keys(600, 600))
    before = 2 * (150 + 10 * 20)
    changed = KeyRules(rpm=after, bucket_s=15.0)

    took_s = world.run(before + 300, at={20.0: lambda: change(world, changed)})

    assert took_s <= best_s + 4.0
    assert world.refused <= refused


def test_free_tier_spends_its_day_and_no_more() -> None:
    world = World([KeyRules(rpd=200), KeyRules(rpd=200)])

    took_s = world.run(410)

    assert took_s <= 6.5 * DAY_S / 200  # five more of each, and a moment's care
    assert world.refused <= 2


@pytest.mark.parametrize(("rpm", "rpd", "tasks"), [(500, 10_000, 2000), (3, 200, 100)])
def test_limit_a_minute_behind_that_of_a_day_is_kept(rpm: int, rpd: int, tasks: int) -> None:
    world = World([KeyRules(rpm=rpm, rpd=rpd)] * 2)

    took_s = world.run(tasks)

    assert took_s <= 1.1 * best_s(world, tasks) + 30
    assert world.refused <= 12


def test_endpoint_that_tells_no_limits_is_kept_busy_with_few_refusals() -> None:
    world = World([replace(rules, send_limit_headers=False) for rules in keys(600, 600, bucket_s=1.0)])
    tasks = 1200

    took_s = world.run(tasks)

    assert best_s(world, tasks) / took_s >= 0.5
    assert 1000 * world.refused / tasks <= 120


def test_burst_that_one_key_has_found_is_known_to_all() -> None:
    world = World(keys(300, 300, 300, 300, 300))

    world.run(1000)

    assert world.refused == 1


def test_rested_key_gives_its_burst_at_once() -> None:
    world = World(keys(600, 600))
    world.run(600)
    world.clock.advance(60)
    refused = world.refused

    took_s = world.run(300)

    assert took_s <= 0.3 * 4 + 1.0
    assert world.refused - refused <= 2
