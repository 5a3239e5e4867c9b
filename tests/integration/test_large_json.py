"""Large jobs as JSON: what they take in memory, alone and many at once, and that each of them gets its turn."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.service import Service
from tests.upstream import Upstream

TASK = b'{"vars":{"a":1}}'
BY_ID = b'"%06x":{"vars":{"a":1}}'
MIB = 1 << 20


def job(size_bytes: int, *, by_id: bool = False) -> bytes:
    """The body that takes most for its size."""
    count = size_bytes // (len(BY_ID % 0 if by_id else TASK) + 1)
    tasks = b",".join(BY_ID % number for number in range(count)) if by_id else b",".join([TASK] * count)
    data = b"{%s}" % tasks if by_id else b"[%s]" % tasks
    return b'{"settings":{"template":"x"},"data":%s}' % data


def send(service: Service, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
    return service.post("/jobs", service.admin, data=body, headers=headers, timeout=120.0)


def peak_mib(service: Service, act: Callable[[], None]) -> float:
    """How much more memory the service had at its highest while this went on."""
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text()
    proc = Path(f"/proc/{children.split()[0]}")

    def kib(name: str) -> int:
        return int((proc / "status").read_text().partition(f"{name}:")[2].split()[0])

    (proc / "clear_refs").write_text("5")  # the peak is counted from here
    before = kib("VmRSS")
    act()
    return (kib("VmHWM") - before) / 1024


@pytest.fixture
def service(start: Callable[..., tuple[Service, Upstream]]) -> Service:
    service, _ = start(env={"MAX_USER_JOBS": "0", "MAX_USER_TASKS": "0"})
    assert service.admin
    return service


@pytest.mark.parametrize(
    ("size_bytes", "most_mib"), [(4 * MIB, 170), pytest.param(MIB - 100, 420, marks=pytest.mark.slow)]
)
def test_many_at_once_take_turns_and_little_memory(service: Service, size_bytes: int, most_mib: int) -> None:
    body = job(size_bytes)
    count = 5 if size_bytes > MIB else 24

    def send_all() -> None:
        with ThreadPoolExecutor(count) as pool:
            replies = [*pool.map(lambda _: send(service, body), range(count))]
        told = Counter(reply.status_code for reply in replies)
        assert told.keys() <= {202, 503}
        assert told[202] >= 1
        assert all("Retry-After" in reply.headers for reply in replies if reply.status_code == 503)

    assert peak_mib(service, send_all) < most_mib


@pytest.mark.parametrize("by_id", [False, True])
def test_one_keeps_nothing_twice(service: Service, by_id: bool) -> None:
    body = job(8 * MIB, by_id=by_id)

    def send_one() -> None:
        assert send(service, body).status_code == 202

    assert peak_mib(service, send_one) < 260
