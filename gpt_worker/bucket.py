"""One limit of one key as a bucket: what is left of it by our own count, corrected by what replies tell.

Pure: the clock is passed in. Replies overtake each other, and no header tells how much of a limit may be had at once
or what a call takes of it: both are learned here.
"""

import math
from dataclasses import dataclass, field, replace

from gpt_worker.limit_headers import UNIT_S, Limit

DEFAULT_WINDOW_S = 60.0
LONGEST_WINDOW_S = 86_400.0
SAME_MOMENT_S = 0.25
SHORTEST_BURST_S = 1.0
BELIEVE_AGAIN_S = 600.0
SCOUT_PACE = 4.0  # how much faster than it refills a bucket is drawn where nobody knows how deep it is
SCOUT_AGAIN_S = 3.0  # and at least as fast as if all that was proven were drawn again in so long
SLOWEST_SCOUT_S = 0.1
SCOUT_PATIENCE_S = 1.0
SHORTEST_LOOK_S, FOLLOW_S = 0.01, 0.25
CHARGE_CALLS = 20  # so many are sent before what they took is compared with what we thought
CHARGE_WEIGHT = 0.3
LEAST_CHARGE, MOST_CHARGE = 0.05, 20.0
GUARD = 0.3  # of a call: what must be left beside it, since headers are rounded and no two clocks agree
RESET_NEARLY = 0.02


@dataclass(slots=True)
class Moment:
    """A short while, and what a bucket had given in all before it and by its end; the calls of that while share it.

    In which order calls of one moment reach the server, nobody can tell: counting one of them as sent after another
    would count it twice where the other's reply has counted it already.
    """

    since_s: float
    before: float
    total: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Where in the sequence of all that a bucket gave one call stands."""

    moment: Moment
    sent_s: float
    amount: float
    total: float
    number: int  # of the call, counted from 1


def _never() -> Moment:
    return Moment(-math.inf, 0.0, 0.0)


@dataclass(slots=True, eq=False)
class Burst:
    """How large a share of a limit an endpoint lets go at once: the keys of one endpoint teach it to each other.

    A server may tell a minute's limit and hold to a quarter of that at once; it says so only by refusing. So beyond
    the share that was seen to go well, one bucket at a time goes ahead, at an even pace, and the others follow.
    """

    proven: float = 0.0
    most: float = 1.0  # the share at which a call was refused
    refused_s: float = 0.0
    scout: "Bucket | None" = None
    next_s: float = -math.inf  # when the scout may go on
    abandoned_s: float = -math.inf  # when another may, if the scout does not

    def went_well(self, share: float) -> None:
        self.proven = max(self.proven, min(share, self.most))

    def refused(self, share: float, now_s: float) -> None:
        self.most, self.refused_s, self.scout = min(self.most, share), now_s, None
        self.proven = min(self.proven, self.most)

    def forget(self, now_s: float) -> None:
        """After a while, an endpoint that was seen to hold to less than it says is believed again."""
        if self.most < 1 and now_s - self.refused_s > BELIEVE_AGAIN_S:
            self.most = 1.0

    def wait_s(self, bucket: "Bucket", share: float, now_s: float) -> float:
        """Seconds until this bucket may use so large a share of its limit, as far as the endpoint's burst goes."""
        if share <= self.proven or self.most < 1:
            return 0.0
        if self.scout is bucket or now_s >= self.abandoned_s:
            return max(0.0, self.next_s - now_s)
        back_s = (share - self.proven) * bucket.limit / bucket.per_s
        return min(FOLLOW_S, max(SHORTEST_LOOK_S, back_s))  # the scout may have got further by then

    def goes_beyond(self, bucket: "Bucket", amount: float, now_s: float) -> None:
        """A call goes out that uses more than was proven."""
        per_s = max(SCOUT_PACE * bucket.per_s, self.proven * bucket.limit / SCOUT_AGAIN_S)
        pause_s = min(SLOWEST_SCOUT_S, amount / per_s)
        self.next_s = (max(self.next_s, now_s) if self.scout is bucket else now_s) + pause_s
        self.scout = bucket
        self.abandoned_s = now_s + SCOUT_PATIENCE_S


@dataclass(slots=True, eq=False)
class Bucket:
    """A limit as we keep it: so much of it remains, as the server would tell it, and more each second."""

    limit: int
    remaining: float
    per_s: float
    updated_s: float
    burst: Burst = field(default_factory=Burst)
    learns_charge: bool = False
    charge: float = 1.0  # what the server takes for a call ÷ what we think that it costs
    sent: float = 0.0  # all that was ever taken, as we think that it costs
    calls: int = 0
    moment: Moment = field(default_factory=_never)
    told_s: float = -math.inf  # when the newest call was sent whose reply told of the level
    refused_amount: float = 0.0  # of all that was sent, what the server did not take
    anchor: tuple[Mark, int, float] | None = None  # an earlier call, then used at the server, refused by then

    @property
    def floor(self) -> int:
        """What the server says is left when nothing is; none is taken to hold to less than a second's share."""
        second = max(1, round(self.per_s * SHORTEST_BURST_S))
        return max(0, min(self.limit - round(self.limit * self.burst.most), self.limit - second))

    @property
    def capacity(self) -> int:
        return self.limit - self.floor

    @property
    def level(self) -> float:
        """What may be spent now."""
        return self.remaining - self.floor

    def refill(self, now_s: float) -> None:
        self.burst.forget(now_s)
        self.remaining += (now_s - self.updated_s) * self.per_s
        self.updated_s = now_s
        if self.remaining >= self.limit:
            self.remaining = self.limit
            self.anchor = None  # what was refilled since an earlier call, nobody knows

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is there; 0 if it is. Never asks for more than the bucket holds."""
        self.refill(now_s)
        amount = min(amount * self.charge, self.capacity)
        missing = min(amount * (1 + GUARD), self.capacity) - self.level
        if missing > 1e-9:
            return missing / self.per_s
        return self.burst.wait_s(self, self._share_with(amount), now_s)

    def take(self, amount: float, now_s: float) -> Mark:
        """Take what a call may spend; the mark tells later what was sent after it."""
        charged = min(amount * self.charge, self.capacity)
        if self._share_with(charged) > self.burst.proven and self.burst.most == 1:
            self.burst.goes_beyond(self, charged, now_s)
        self.remaining -= charged
        if now_s - self.moment.since_s >= SAME_MOMENT_S:
            self.moment = Moment(now_s, self.sent, self.sent)
        self.sent += amount
        self.calls += 1
        self.moment.total = self.sent
        return Mark(self.moment, now_s, amount, self.sent, self.calls)

    def _share_with(self, charged: float) -> float:
        """The share of the limit that is in use when so much more is."""
        return (self.limit - self.remaining + charged) / self.limit

    def learn(self, told: Limit, mark: Mark | None, now_s: float, *, taken: bool = True) -> None:
        """Heed the reply to a call; no mark: it was sent before this limit was known.

        The call may have reached the server before or after the others of its moment, so the level lies between two
        bounds. It is lowered to the upper one; raised to the lower one by calls only that were sent after all that
        told of it before, since replies overtake each other. `taken`: the server has let this call in.
        """
        used = told.limit - told.remaining
        sent_s = mark.sent_s if mark else -math.inf
        is_new = told.limit != self.limit
        if is_new and sent_s < self.told_s:
            return  # overtaken by a reply that told of another limit
        if is_new:
            self.per_s *= told.limit / self.limit
            self.limit, self.anchor = told.limit, None
        self._learn_window(told, used)
        self.refill(now_s)
        since_most = self.sent - mark.moment.before if mark else self.sent
        since_least = self.sent - mark.moment.total if mark else self.sent
        if mark and not taken:
            self.refused_amount += mark.amount
        elif mark and self.learns_charge:
            self._learn_charge(mark, used)
        at_most = told.remaining + (max(0.0, now_s - sent_s) if mark else 0.0) * self.per_s
        self.remaining = max(-self.limit, min(self.remaining, at_most - since_least * self.charge))
        if is_new or (mark and sent_s - self.told_s >= SAME_MOMENT_S):
            at_least = min(self.limit, at_most - since_most * self.charge)
            self.remaining = max(self.remaining, at_least)
        if mark:
            self.told_s = max(self.told_s, sent_s)

    def _learn_window(self, told: Limit, used: int) -> None:
        """Keep the window if the headers may mean it; they are rounded, so they mean a range of windows."""
        if told.reset_s and used > 0:
            rounded_s = 1.0 if told.reset_s.is_integer() else max(0.001, RESET_NEARLY * told.reset_s)
            shortest_s = (told.reset_s - rounded_s) * told.limit / used
            longest_s = (told.reset_s + rounded_s) * told.limit / (used - 1) if used > 1 else math.inf
            if not shortest_s <= self.limit / self.per_s <= longest_s:
                middle_s = told.reset_s * told.limit / (used - 0.5)
                likely = max(shortest_s, middle_s / 2), min(longest_s, middle_s * 2)
                units = (unit_s for unit_s in UNIT_S.values() if likely[0] <= unit_s <= likely[1])
                window_s = max(1.0, min(LONGEST_WINDOW_S, next(units, middle_s)))
                self.per_s = told.limit / window_s

    def _learn_charge(self, mark: Mark, used: int) -> None:
        """What the server took since an earlier call, beside what we sent since: it may count answers, or not.

        Had the bucket been full meanwhile, it would seem more; but never was more taken than all that is in use.
        """
        if self.anchor is None:
            self.anchor = (mark, used, self.refused_amount)
        earlier, used_then, refused_then = self.anchor
        sent = mark.total - earlier.total - (self.refused_amount - refused_then)
        if mark.number - earlier.number >= CHARGE_CALLS and sent > 0:
            taken = used - used_then + (mark.sent_s - earlier.sent_s) * self.per_s
            self.charge += CHARGE_WEIGHT * (_charge(taken / sent) - self.charge)
            self.anchor = (mark, used, self.refused_amount)
        self.charge = min(self.charge, _charge(used / mark.amount))

    def told_charge(self, requested: int, amount: float) -> None:
        """The server has said what it would have taken for a call of which we thought that it costs `amount`."""
        if amount < self.capacity:
            self.charge = _charge(requested / amount)

    def refused(self, told: Limit, now_s: float) -> None:
        """A call was refused for this limit, of which the server says that so much is left: it is in fact empty."""
        self.burst.refused((told.limit - told.remaining) / told.limit, now_s)
        self.remaining = min(self.remaining, self.floor)

    @classmethod
    def first(
        cls, told: Limit, now_s: float, burst: Burst | None = None, *, learns_charge: bool = False
    ) -> "Bucket":
        per_s = told.limit / DEFAULT_WINDOW_S
        bucket = cls(told.limit, told.limit, per_s, now_s, burst or Burst(), learns_charge)
        bucket.learn(told, None, now_s)
        return bucket

    def absorb(self, other: "Bucket", now_s: float) -> None:
        """Another bucket of the same limit: the lower level is the true one."""
        self.refill(now_s)
        other.refill(now_s)
        self.remaining = min(self.remaining, other.remaining)

    def copy(self) -> "Bucket":
        """Another bucket that stands as this one does; what was sent from this one is no part of its history."""
        return replace(self, sent=0.0, calls=0, moment=_never(), told_s=-math.inf, anchor=None)


def _charge(seen: float) -> float:
    return min(MOST_CHARGE, max(LEAST_CHARGE, seen))
