"""When one more thread of a key is of use. No threads, no clock of its own.

Python runs one thread at a time. Where calls take no time, a few threads keep the processor busy, and more would only
stand in their way: that shows by a thread being woken late, while the key's calls come and go.
"""

LATE_S = 0.002
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.1
MOST_LATE = 8


class Joining:
    """One thread that would join: it sleeps for `pause_s`, says how that went, and joins or sleeps again.

    On a busy processor it is woken in time too, by chance, now and then: so that must have happened more often than the
    other, of the last times at least.
    """

    def __init__(self) -> None:
        self.pause_s = FIRST_PAUSE_S
        self._late = 0

    def may_join(self, late_s: float, *, calls_end: bool) -> bool:
        """Whether it is of use, woken so late, and whether calls of the key have ended meanwhile."""
        if late_s > LATE_S and calls_end:
            self._late = min(MOST_LATE, self._late + 1)
            self.pause_s = min(LONGEST_PAUSE_S, 2 * self.pause_s)
        else:
            self._late -= 1
            self.pause_s = max(FIRST_PAUSE_S, self.pause_s / 2)
        return self._late < 0
