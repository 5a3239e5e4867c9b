"""What a service's worker uses while it runs, looked at every second: memory, threads, open files, files on disk.

Linux only, from /proc. The worker is found anew at each look, since a scenario may kill it.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.sampling import Sampling
from tests.service import Service

MIB = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the worker. `temporary`: files that it holds open and that have no name any more."""

    at_s: float
    rss_bytes: int
    threads: int
    files: int
    temporary: int
    wal_bytes: int


def worker_proc(service: Service) -> Path | None:
    """The worker's directory in /proc; None while there is none."""
    try:
        arbiter = service.pid
        children = Path(f"/proc/{arbiter}/task/{arbiter}/children").read_text().split()
    except (OSError, RuntimeError):
        return None
    return Path("/proc", children[0]) if children else None


def look(service: Service) -> Sample | None:
    """How the worker stands now; None while there is none."""
    proc = worker_proc(service)
    if proc is None:
        return None
    try:
        rss_pages = int((proc / "statm").read_text().split()[1])
        threads = sum(1 for _ in (proc / "task").iterdir())
        targets = [_target(link) for link in (proc / "fd").iterdir()]
    except OSError:
        return None  # it has just ended
    return Sample(
        at_s=time.monotonic(),
        rss_bytes=rss_pages * _PAGE_BYTES,
        threads=threads,
        files=len(targets),
        temporary=sum(target.endswith(" (deleted)") and "/dev/shm/" not in target for target in targets),
        wal_bytes=sum(_size(path) for path in service.data_dir.glob("*-wal")),
    )


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Watch(Sampling[Sample]):
    """Looks at the worker until its `with` ends."""

    def __init__(self, service: Service, every_s: float = 1.0) -> None:
        super().__init__(lambda: look(service), every_s)

    def peak(self, of: Callable[[Sample], int]) -> int:
        return max(map(of, self.samples), default=0)


def slope_per_s(samples: Sequence[tuple[float, float]]) -> float:
    """The least squares line's slope through (seconds, value); 0 for fewer than two points."""
    if len(samples) < 2:
        return 0.0
    mean_s = sum(at_s for at_s, _ in samples) / len(samples)
    mean = sum(value for _, value in samples) / len(samples)
    spread = sum((at_s - mean_s) ** 2 for at_s, _ in samples)
    return sum((at_s - mean_s) * (value - mean) for at_s, value in samples) / spread if spread else 0.0


def least_rss_bytes(service: Service, for_s: float = 3.0) -> int:
    """The least memory that the worker is seen with for so long."""
    until_s = time.monotonic() + for_s
    least = 0
    while True:
        sample = look(service)
        if sample is not None:
            least = min(least or sample.rss_bytes, sample.rss_bytes)
        if time.monotonic() >= until_s:
            return least
        time.sleep(0.2)
