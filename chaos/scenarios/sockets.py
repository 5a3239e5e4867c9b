"""Thousands of clients that say nothing, half of it, or take nothing, and a flood of those that are gone at once.

Beside each crowd `GET /healthz` is asked, by a client that behaves: how long the slowest took is in the table. What is
beyond the places must be answered as documented, and afterwards memory, open files and places are as before.
"""

import json
import os
import re
import resource
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random

from chaos import log
from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.watching import MIB, least_rss_bytes, look
from chaos.wire import Garbled, Reply, connect, parse_replies, reset
from tests.service import Service
from tests.upstream import Fault, FaultKind, Upstream

NAME = "sockets"

SILENT = 2000
HALVES = 64
BEYOND = 500
READERS = 200
RESETS, RESETS_SHORT = 20_000, 4000
RESETTERS = 4
PLACES = 96  # shared by inline waits, streams, downloads and uploads
PLACES_EACH = 80  # of them, for one user
ENV = {"MAX_USER_JOBS": "0", "MAX_USER_REQUESTS_PER_MINUTE": "0"}
QUICK_S, BOUNDED_S = 1.0, 6.0
HEALTH_ASKS = 10
ANSWERED_WITHIN_S = 30.0
TOLD_WITHIN_S = 20.0  # a head has 10 s, and the client is told of its end
BACK_WITHIN_S = 60.0
MOST_FILES_MORE = 16
MOST_GROWTH_BYTES = 64 * MIB
OPEN_FILES = 8192
HANGING = "this one hangs"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def run(options: Options) -> list[Row]:
    _allow_files()
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Upstream() as upstream,
        Service(Path(folder), ENV, upstream) as service,
    ):
        service.submit(["Say hello."] * 4).raise_for_status()  # the first call of a key goes alone
        job_id = _large_job(service)
        count = options.rounds_or(RESETS, RESETS_SHORT)
        # What is made once is made before it is measured: the C library keeps what many large replies took at once.
        _everything(service, upstream, job_id, options.random("first"), count, is_patient=False)
        _readers(service, job_id)
        before_bytes, before = least_rss_bytes(service), look(service)
        assert before is not None
        rows = _everything(
            service, upstream, job_id, options.random("second"), count, is_patient=not options.short
        )
        took_s, files = _until_back(service, before.files)
        after_bytes, free = least_rss_bytes(service), _places_free(service)
        rows += [
            Row(
                "open files more than before",
                f"≤ {MOST_FILES_MORE}",
                f"{files - before.files}, after {took_s:.0f} s",
                files - before.files <= MOST_FILES_MORE,
            ),
            Row(
                "memory more than before",
                f"≤ {MOST_GROWTH_BYTES / MIB:.0f} MiB",
                f"{(after_bytes - before_bytes) / MIB:.1f} MiB, {after_bytes / MIB:.0f} in all",
                after_bytes - before_bytes <= MOST_GROWTH_BYTES,
            ),
            fact("load of the machine", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
            Row("places free", str(PLACES), str(free), free == PLACES),
            none_of("errors in the log", log.faults(service.stderr())),
        ]
    return rows


def _everything(
    service: Service, upstream: Upstream, job_id: str, random: Random, resets: int, *, is_patient: bool
) -> list[Row]:
    return [
        *_silent(service),
        *_halves(service, is_patient=is_patient),
        *_waiters(service, upstream),
        *_streams(service, upstream),
        *_readers(service, job_id),
        *_resets(service, random, resets),
    ]


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))


def _large_job(service: Service) -> str:
    """A finished job whose results are 2 MB."""
    data = {f"t{number}": "x" * 20_000 for number in range(100)}
    job_id = str(service.submit(data, prefer="respond-async").json()["id"])
    service.wait_finished(job_id)
    return job_id


# Crowds


@contextmanager
def _crowd(
    service: Service, sent: Sequence[bytes], receive_bytes: int | None = None
) -> Iterator[list[socket.socket]]:
    """A connection for each of these, which has sent it."""
    with ExitStack() as stack:
        socks = []
        for data in sent:
            sock = stack.enter_context(connect(service.port, receive_bytes=receive_bytes))
            with suppress(ConnectionError):  # it may have been refused already, and has its reply
                sock.sendall(data)
            socks.append(sock)
        yield socks


def _slowest_health_s(service: Service, every_s: float = 0.1) -> float:
    return max(_health_s(service, every_s) for _ in range(HEALTH_ASKS))


def _health_s(service: Service, rest_s: float = 0.0) -> float:
    """Seconds until the whole answer; endless if it is none."""
    began_s = time.monotonic()
    with connect(service.port, ANSWERED_WITHIN_S) as sock:
        sock.sendall(HEALTH)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    took_s = time.monotonic() - began_s
    time.sleep(rest_s)
    return took_s if answer.startswith(b"HTTP/1.1 200 ") else float("inf")


def _within(what: str, limit_s: float, took_s: float) -> Row:
    return Row(
        f"{what}: /healthz beside them, slowest", f"≤ {limit_s:g} s", f"{took_s:.3f} s", took_s <= limit_s
    )


def _replies(
    socks: Sequence[socket.socket], wanted: int, within_s: float, whole: Callable[[bytes], Reply | None]
) -> dict[socket.socket, Reply]:
    """The first reply on each, until there are so many, or for so long."""
    received = dict.fromkeys(socks, b"")
    found: dict[socket.socket, Reply] = {}
    deadline_s = time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        for each in socks:
            selector.register(each, selectors.EVENT_READ, each)
        while len(found) < wanted and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                sock: socket.socket = key.data
                more = b""
                with suppress(OSError):
                    more = sock.recv(65536)
                received[sock] += more
                reply = whole(received[sock])
                if reply is not None:
                    found[sock] = reply
                if reply is not None or not more:
                    selector.unregister(sock)
    return found


def _first_reply(received: bytes) -> Reply | None:
    with suppress(Garbled):
        replies, _ = parse_replies(received, ended=False)
        if replies:
            return replies[0]
    return None


def _first_head(received: bytes) -> Reply | None:
    """The reply with what is there of its body, once its head is."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(.*?)\r\n\r\n(.*)", received, re.DOTALL)
    if found is None:
        return None
    fields = (line.partition(b":") for line in found[2].split(b"\r\n"))
    return Reply(int(found[1]), {name.lower(): value.strip() for name, _, value in fields}, found[3])


def _told(replies: Sequence[Reply]) -> str:
    return ", ".join(
        f"{status} × {count}" for status, count in sorted(Counter(it.status for it in replies).items())
    )


# What they do


def _silent(service: Service) -> list[Row]:
    with _crowd(service, [b""] * SILENT):
        return [_within(f"{SILENT} silent sockets", QUICK_S, _slowest_health_s(service))]


def _halves(service: Service, *, is_patient: bool) -> list[Row]:
    """`is_patient`: wait until those that don't finish their heads are told."""
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Ha"
    body = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{"
    sent = [head, body % 1000, body % 100_000]
    with _crowd(service, [data for data in sent for _ in range(HALVES)]) as socks:
        rows = [
            _within(f"{HALVES} half heads, {2 * HALVES} half bodies", BOUNDED_S, _slowest_health_s(service))
        ]
        if is_patient:
            replies = list(_replies(socks[:HALVES], HALVES, TOLD_WITHIN_S, _first_reply).values())
            told = [reply for reply in replies if reply.status == 408]
            rows.append(
                Row("half heads that are told", f"{HALVES} × 408", _told(replies), len(told) == HALVES)
            )
        return rows


def _post_job(service: Service, text: str) -> bytes:
    body = json.dumps({"data": [text]}).encode()
    head = (
        "POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {service.admin}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _waiters(service: Service, upstream: Upstream) -> list[Row]:
    """Inline submits beyond a user's places: those are told where to look, the others wait and get their answers."""
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None, contains=HANGING))
    with _crowd(service, [_post_job(service, HANGING)] * BEYOND) as socks:
        accepted = _replies(socks, BEYOND - PLACES_EACH, ANSWERED_WITHIN_S, _first_reply)
        slowest_s = _slowest_health_s(service)
        waiting = [sock for sock in socks if sock not in accepted]
        upstream.clear_faults()
        upstream.release()
        answered = list(_replies(waiting, len(waiting), ANSWERED_WITHIN_S, _first_reply).values())
    good = [
        it
        for it in accepted.values()
        if it.status == 202 and it.headers.get(b"location", b"").startswith(b"/jobs/")
    ]
    done = [it for it in answered if it.status == 200 and json.loads(it.body)["status"] == "succeeded"]
    return [
        _within(f"{BEYOND} inline waiters", QUICK_S, slowest_s),
        Row(
            "beyond the places",
            f"{BEYOND - PLACES_EACH} × 202",
            _told([*accepted.values()]),
            len(good) == BEYOND - PLACES_EACH == len(accepted),
        ),
        Row(
            "waiters answered",
            f"{PLACES_EACH} × 200",
            _told(answered),
            len(done) == PLACES_EACH == len(answered),
        ),
    ]


def _streams(service: Service, upstream: Upstream) -> list[Row]:
    """Event streams beyond a user's places, and whether these come back when the clients are gone."""
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None, contains=HANGING))
    job_id = str(service.submit([HANGING], prefer="respond-async").json()["id"])
    head = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n\r\n".encode()
    with _crowd(service, [head] * BEYOND) as socks:
        replies = list(_replies(socks, BEYOND, ANSWERED_WITHIN_S, _first_head).values())
        slowest_s = _slowest_health_s(service)
        for sock in socks:
            reset(sock)
    began_s = time.monotonic()
    while _places_free(service) < PLACES and time.monotonic() < began_s + ANSWERED_WITHIN_S:
        time.sleep(0.1)
    took_s, free = time.monotonic() - began_s, _places_free(service)
    upstream.clear_faults()
    upstream.release()
    service.wait_finished(job_id)
    streams = [it for it in replies if it.status == 200 and it.content_type.startswith(b"text/event-stream")]
    refused = [it for it in replies if it.status == 503 and b"retry-after" in it.headers]
    return [
        _within(f"{BEYOND} event streams", QUICK_S, slowest_s),
        Row(
            "streams",
            f"{PLACES_EACH} × 200, {BEYOND - PLACES_EACH} × 503",
            _told(replies),
            (len(streams), len(refused)) == (PLACES_EACH, BEYOND - PLACES_EACH),
        ),
        Row(
            "their places, when they are gone",
            f"{PLACES} free",
            f"{free} free after {took_s:.1f} s",
            free == PLACES,
        ),
    ]


def _readers(service: Service, job_id: str) -> list[Row]:
    head = f"GET /jobs/{job_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n\r\n".encode()
    with _crowd(service, [head] * READERS, receive_bytes=4096):
        return [_within(f"{READERS} slow readers", BOUNDED_S, _slowest_health_s(service))]


def _resets(service: Service, random: Random, count: int) -> list[Row]:
    """Connections that are reset at once, with nothing, half a head, half a body or a whole request behind them."""
    pieces = (b"", HEALTH[:20], _post_job(service, "gone")[:-3], HEALTH, b"\0" * 100)
    refused = 0

    def flood(data: Sequence[bytes]) -> None:
        nonlocal refused
        for sent in data:
            try:
                sock = connect(service.port)
                with suppress(OSError):
                    sock.sendall(sent)
                reset(sock)
            except OSError:
                refused += 1

    sent = [random.choices(pieces, k=count // RESETTERS) for _ in range(RESETTERS)]
    threads = [threading.Thread(target=flood, args=(data,)) for data in sent]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    slowest_s = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest_s = max(slowest_s, _health_s(service, 0.05))
    for thread in threads:
        thread.join()
    took_s = time.monotonic() - began_s
    return [
        _within(f"{count} connects and resets", QUICK_S, slowest_s),
        Row("connects refused", "0", str(refused), refused == 0),
        fact("resets a second", f"{count / took_s:.0f}"),
    ]


# Afterwards


def _until_back(service: Service, files: int) -> tuple[float, int]:
    """(seconds, open files): until the worker has closed what is gone."""
    began_s = time.monotonic()
    while True:
        sample = look(service)
        now = sample.files if sample is not None else 0
        took_s = time.monotonic() - began_s
        if now <= files + MOST_FILES_MORE or took_s > BACK_WITHIN_S:
            return took_s, now
        time.sleep(0.5)


def _places_free(service: Service) -> int:
    found = re.search(r"^gpt_worker_held_places_free ([\d.]+)", service.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))
