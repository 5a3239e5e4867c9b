"""What a contestant's processes use, and how far it has come, sampled while it works.

Processes are found by their session in /proc, so Linux only. Memory is the sum of the resident sets.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench.sampling import Sampling
from tests.upstream import Upstream

EVERY_S = 0.25
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group of processes uses at one moment; `cpu_s` is all they have used so far."""

    rss_bytes: int
    cpu_s: float
    processes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. `at_s` is `time.monotonic()`, `answered` what the upstream has answered so far."""

    at_s: float
    usage: Usage
    answered: int


def usage_of(session: int, *, without: int | None = None) -> Usage:
    """Of all processes whose session leader is `session`, but for the process `without`."""
    rss_bytes, cpu_ticks, processes = 0, 0, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if stat.parent.name == str(without):
            continue
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session:
            rss_bytes += int(fields[21]) * _PAGE_BYTES
            cpu_ticks += sum(map(int, fields[11:15]))  # its own, and that of children it has reaped
            processes += 1
    return Usage(rss_bytes, cpu_ticks / _TICKS_PER_S, processes)


def unshared_bytes(session: int) -> int:
    """Memory in which each page counts once, divided among the processes that share it."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[3]) != session:
                continue
            rollup = stat.with_name("smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


class Watch(Sampling[Sample]):
    """Samples a session of processes, and the upstream, until its `with` ends."""

    def __init__(self, session: int, upstream: Upstream | None = None, *, without: int | None = None) -> None:
        super().__init__(self._look_at_both, EVERY_S)
        self._session = session
        self._without = without
        self._upstream = upstream

    def peak_rss_bytes(self) -> int:
        return max(sample.usage.rss_bytes for sample in self.samples)

    def cpu_s(self, from_s: float, to_s: float) -> float:
        """CPU seconds between two moments, to the nearest samples."""
        return max(0.0, self._nearest(to_s).usage.cpu_s - self._nearest(from_s).usage.cpu_s)

    def answered(self, from_s: float) -> list[tuple[float, int]]:
        """Seconds since a moment → answers of the upstream."""
        first = self._nearest(from_s).answered
        later = [sample for sample in self.samples if sample.at_s > from_s]
        return [(0.0, 0), *((round(sample.at_s - from_s, 3), sample.answered - first) for sample in later)]

    def _nearest(self, at_s: float) -> Sample:
        return min(self.samples, key=lambda sample: abs(sample.at_s - at_s))

    def _look_at_both(self) -> Sample | None:
        usage = usage_of(self._session, without=self._without)
        if not usage.processes and self.samples:
            return None  # all have ended: what they had used is known from the sample before
        answered = 0
        if self._upstream is not None:
            answered = sum(key["by_status"].get(200, 0) for key in self._upstream.counters().values())
        return Sample(time.monotonic(), usage, answered)
