"""kill -9 exactly before and after every commit, and before, within and after every call and webhook.

The points are found first, by letting the usual traffic pass them all; then each is deadly in turn.
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from chaos.ledger import Ledger
from chaos.options import Options
from chaos.report import Row, fact
from chaos.stand import STANDS, Stand, side_by_side

NAME = "failpoints"
TIMES, SHORT_TIMES = 10, 1
SECONDS, SHORT_SECONDS = 600.0, 100.0
HOOKS = Path(__file__).parents[1] / "failing"
LATEST_HIT = 6  # a later passage is no other moment, and would take long to come; so would a late one of few
FEW_HITS = 10
PART_S = 0.3  # for the service's threads to do what a part of the tour has left to them
PATIENCE_S = 30.0  # for a point to be passed
MORE_TRIES = (
    3  # in lives of their own: what a client does may come too late for it, as a cancel behind the job's end
)
REST_EVERY = 10  # deaths, all comes to rest in one life: what is stuck must not be freed by the next start
KINDS = ("commit", "the call", "the webhook")
CLIENTS = 4
FIRST = "first life, "
FIRST_SHARE = 2  # of the times are for each point of a first life, which takes longer
MIGRATION = "db.Database."  # makes the tables in a first life, and has nothing to do later
ENV = {"PYTHONPATH": str(HOOKS)}


@dataclass
class Points:
    """How often each was passed, and in which part of the tour first."""

    passed: Counter[str] = field(default_factory=Counter)
    part_of: dict[str, int] = field(default_factory=dict)

    def note(self, log: Path, part: int) -> None:
        """Take what the service has noted since the last time."""
        noted = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        for point in noted:
            self.passed[point] += 1
            self.part_of.setdefault(point, part)


@dataclass
class Deaths:
    """What one stand has seen; each point with how often it was armed, and how often it was deadly."""

    ledger: Ledger = field(default_factory=Ledger)
    armed: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)

    def note(self, point: str, died: bool) -> None:
        self.armed[point] += 1
        self.deaths[point] += died

    def absorb(self, other: "Deaths") -> None:
        self.ledger.absorb(other.ledger)
        self.armed += other.armed
        self.deaths += other.deaths


def run(options: Options) -> list[Row]:
    ends_s = options.started_s + options.seconds_or(SECONDS, SHORT_SECONDS)
    times = options.rounds_or(TIMES, SHORT_TIMES)
    first, usual = _find(options)
    first_times = max(1, times // FIRST_SHARE)
    lives = [(point, True, round_) for round_ in range(first_times) for point in sorted(first.passed)]
    for round_ in range(times):
        points = sorted(usual.passed)
        options.random(NAME, "order", round_).shuffle(points)
        lives += [(point, False, round_) for point in points]

    def die(number: int, stopping: threading.Event) -> Deaths:
        seen = Deaths()
        with Stand(options.random(NAME, number), ENV) as stand:
            stand.start()
            stand.register()
            stand.kill()
            for point, is_first, round_ in lives[number::STANDS]:
                if stopping.is_set() or time.monotonic() > ends_s:
                    break
                if is_first:
                    seen.note(FIRST + point, _first_dies(options, point, round_, seen.ledger))
                    continue
                latest = min(LATEST_HIT, 1 + usual.passed[point] // FEW_HITS)
                hit = options.random(NAME, point, round_).randint(1, latest)
                part = usual.part_of[point]
                seen.note(point, any(_dies(stand, point, one, part) for one in (hit, *[1] * MORE_TRIES)))
                if seen.armed.total() % REST_EVERY == 0:
                    _rest(stand)
            stand.finish()
            seen.ledger.absorb(stand.ledger)
        return seen

    whole = Deaths()
    for seen in side_by_side(die):
        whole.absorb(seen)
    return _rows(whole, [FIRST + point for point in first.passed], list(usual.passed), options, len(lives))


def _rows(whole: Deaths, first: list[str], usual: list[str], options: Options, wanted: int) -> list[Row]:
    armed, deaths, counts = whole.armed, whole.deaths, whole.ledger.counts
    found = [*first, *usual]
    missed = {point: armed[point] - deaths[point] for point in armed if deaths[point] < armed[point]}
    told = f"{sum(missed.values())} of {armed.total()} {', '.join(list(missed)[:5])}"
    return [
        Row(
            "points found",
            "commits, calls, webhooks",
            _kinds(found),
            all(_has(found, kind) for kind in KINDS),
        ),
        options.enough("points armed, each time", wanted, armed.total()),
        Row("armed, and not passed", "0", told, not missed),
        *whole.ledger.rows(),
        whole.ledger.again(),
        *(fact(what, count) for what, count in sorted(counts.items())),
        *(fact(f"deaths {point}", f"{deaths[point]} of {armed[point]}") for point in sorted(armed)),
    ]


def _find(options: Options) -> tuple[Points, Points]:
    """The points that are another in a first life, and those of a life as usual."""
    with Stand(options.random(NAME, "find"), ENV) as stand:
        log = stand.service.data_dir.parent / "points"
        stand.service.change_env({"CHAOS_LOG": str(log)})
        first, usual = Points(), Points()
        stand.start()
        stand.register()
        first.note(log, 0)
        shopper = stand.shopper("find")
        for part, operation in enumerate(shopper.tour()):
            operation()
            time.sleep(PART_S)
            usual.note(log, part)
        shopper.close()
        stand.rest()
        stand.rest_of_webhooks()
        stand.service.terminate()
        stand.start()
        stand.service.terminate()
        usual.note(log, 0)
    for point in list(first.passed):
        if point in usual.passed and MIGRATION not in point:
            del first.passed[point]
    return first, usual


def _dies(stand: Stand, point: str, hit: int, part: int) -> bool:
    """One life that ends at a point; whether it did."""
    stand.service.change_env({"CHAOS_POINT": point, "CHAOS_HIT": str(hit)})
    stand.launch()
    traffic = stand.traffic(threads=CLIENTS, tour_from=max(0, part - 1))
    traffic.start()
    died = stand.dies(PATIENCE_S)
    stand.service.change_env({"CHAOS_POINT": None, "CHAOS_HIT": None})
    traffic.stop()
    stand.end()
    return died


def _rest(stand: Stand) -> None:
    stand.start()
    stand.rest()
    stand.kill()


def _first_dies(options: Options, point: str, round_: int, ledger: Ledger) -> bool:
    """A service that never lived dies while it makes its tables or its first account, and then lives."""
    with Stand(options.random(NAME, point, round_), {**ENV, "CHAOS_POINT": point}) as stand:
        stand.launch()
        stand.try_to_register()
        died = stand.dies(PATIENCE_S)
        stand.end()
        stand.service.change_env({"CHAOS_POINT": None})
        stand.start()
        stand.register()
        stand.come_to_rest()
        ledger.absorb(stand.ledger)
        return died


def _has(points: list[str], kind: str) -> bool:
    return any(kind in point for point in points)


def _kinds(points: list[str]) -> str:
    commits = sum(" commit " in point for point in points)
    return f"{commits} at commits, {len(points) - commits} at sends"
