"""What one user, or one network of strangers, may have and do at once, so that none keeps the others out.

Unfinished jobs and their pending tasks, requests a minute, places, and turns at what few can do at a time. It judges
and counts; what there is of a user's jobs, and the clock, are passed in. A limit of jobs, tasks or requests may be
None: no limit.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv6Address, ip_address

from config import Settings
from gpt_worker.errors import TooLarge, TooMany, Unavailable
from gpt_worker.places import Places, Turns
from gpt_worker.store.jobs import Unfinished

SOONEST_S, LATEST_S = 10, 60  # what a refused job is told to wait, whatever is guessed
WINDOW_S = 60.0
ROUNDING_S = 1e-6
MAX_CALLERS = 10_000
DROPPED_AT_ONCE = 2


def check_room(unfinished: Unfinished, tasks: int, settings: Settings, now: datetime) -> None:
    """Whether one more job of so many tasks may stand beside what its owner has unfinished.

    Raises:
        TooMany: not now; with a guess at when.
        TooLarge: never, since it has more tasks than a user may have.
    """
    max_jobs, max_tasks = settings.max_user_jobs, settings.max_user_tasks
    if max_jobs is not None and unfinished.jobs >= max_jobs:
        raise TooMany(
            f"there are {unfinished.jobs} unfinished jobs of yours, and no more than {max_jobs} may be "
            "(MAX_USER_JOBS): come back when one has ended, or cancel one",
            guess_wait_s(unfinished, unfinished.least_pending, now),
        )
    if max_tasks is None or unfinished.pending + tasks <= max_tasks:
        return
    if tasks > max_tasks:
        raise TooLarge(f"a user may have at most {max_tasks} pending tasks (MAX_USER_TASKS)")
    raise TooMany(
        f"there are {unfinished.pending} pending tasks of yours, and with this job more than {max_tasks} would be "
        "(MAX_USER_TASKS): come back when some are done, or cancel a job",
        guess_wait_s(unfinished, unfinished.pending + tasks - max_tasks, now),
    )


def guess_wait_s(unfinished: Unfinished, tasks: int, now: datetime) -> int:
    """About how long so many tasks take, as those of the user's unfinished jobs have gone until now."""
    if unfinished.started_at is None or not unfinished.decided:
        return LATEST_S
    per_task_s = (now - unfinished.started_at).total_seconds() / unfinished.decided
    return math.ceil(min(max(SOONEST_S, tasks * per_task_s), LATEST_S))


class RequestBuckets:
    """A token bucket a caller, which holds a minute's requests and is refilled all the time.

    Of a bucket only the moment at which it is full again is kept, and of a full one nothing. When there are too many,
    the one that was not asked for longest is taken for full.
    """

    def __init__(self, max_callers: int = MAX_CALLERS, now_s: Callable[[], float] = time.monotonic) -> None:
        self._max_callers = max_callers
        self._now_s = now_s
        self._lock = threading.Lock()
        self._full_at_s: OrderedDict[str, float] = OrderedDict()  # least lately asked first

    def __len__(self) -> int:
        return len(self._full_at_s)

    def take(self, who: str, per_minute: int) -> float:
        """Take one request out of a caller's bucket: 0, or if it is empty the seconds until there is one again."""
        now_s = self._now_s()
        with self._lock:
            full_at_s = max(now_s, self._full_at_s.pop(who, now_s)) + WINDOW_S / per_minute
            wait_s = full_at_s - now_s - WINDOW_S
            is_empty = wait_s > ROUNDING_S
            self._full_at_s[who] = full_at_s - WINDOW_S / per_minute if is_empty else full_at_s
            self._drop(now_s)
        return wait_s if is_empty else 0.0

    def give_back(self, who: str, per_minute: int) -> None:
        """Put one request back that was taken, since it shall not count."""
        with self._lock:
            if who in self._full_at_s:
                self._full_at_s[who] -= WINDOW_S / per_minute

    def _drop(self, now_s: float) -> None:
        """A few of those that are full, and one too many: as much in every request, so that none takes long."""
        for _ in range(DROPPED_AT_ONCE):
            who, full_at_s = next(iter(self._full_at_s.items()))
            if full_at_s > now_s and len(self._full_at_s) <= self._max_callers:
                return
            del self._full_at_s[who]


class RequestLimit:
    """The requests of users, and of addresses apart from them: whoever has many addresses moves no user's bucket."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._users = RequestBuckets(now_s=now_s)
        self._addresses = RequestBuckets(now_s=now_s)

    def count(self, user_id: str | None, address: str | None, per_minute: int | None) -> None:
        """One more request of this user, or where there is none of this address. Raises TooMany."""
        if per_minute is None:
            return
        if user_id is not None:
            wait_s = self._users.take(user_id, per_minute)
        else:
            wait_s = self._addresses.take(network(address), per_minute)
        if wait_s:
            raise TooMany(
                f"no more than {per_minute} requests a minute may be made (MAX_USER_REQUESTS_PER_MINUTE)",
                wait_s,
            )


@dataclass(frozen=True, slots=True)
class Party:
    """Who shares a few places and takes turns with others: a user who is known, or a network of strangers."""

    name: str
    is_known: bool


class PartyPlaces:
    """So many places, of which one party may have a few alone."""

    def __init__(self, total: int, each: int) -> None:
        self._places = Places(total, each)

    @contextmanager
    def hold(self, party: Party, wait_s: float = 0.0) -> Iterator[None]:
        """A place, given back at the end of the block. Raises Unavailable when there is none."""
        with self._places.hold(party.name, wait_s) as held:
            if not held:
                raise _too_many()
            yield


class PartyTurns:
    """So many parties at a time; those who wait have their turns."""

    def __init__(self, at_once: int) -> None:
        self._turns = Turns(at_once)

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return self._turns.waiting

    @contextmanager
    def take(self, party: Party, wait_s: float) -> Iterator[None]:
        """One's turn, which ends with the block. Raises Unavailable when it does not come in time."""
        with self._turns.hold(party.name, wait_s, is_known=party.is_known) as held:
            if not held:
                raise _too_many()
            yield


def _too_many() -> Unavailable:
    return Unavailable("Too many logins at once.", retry_after_s=1)


def network(address: str | None) -> str:
    """What counts as one caller: an IPv4 address, or the /64 of an IPv6 one, which a single machine has whole."""
    try:
        known = ip_address(address or "")
    except ValueError:
        return ""  # a Unix socket, for one
    if isinstance(known, IPv6Address):
        return str(known.ipv4_mapped or int(known) >> 64)
    return str(known)
