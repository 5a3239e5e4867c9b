"""Sound requests to every route, spoilt in their bytes, heads, framing, JSON, gzip and forms, over raw sockets.

Several threads send them, one a connection or many, in one piece or in several, one behind the other. Whatever comes
in, whole replies go out, soon, and none says that the service failed; its memory and its open files stay.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from chaos import log
from chaos.mangling import Request, mangle
from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.requests_of import sound_requests
from chaos.watching import MIB, Watch, least_rss_bytes, look
from chaos.wire import Garbled, Reply, connect, parse_replies
from tests.service import Service
from tests.upstream import Upstream

NAME = "bytes"

CASES, CASES_SHORT = 60_000, 4_000
SECONDS, SECONDS_SHORT = 540.0, 40.0
THREADS = 8
ENV = {
    "INLINE_WAIT_S": "0.5",
    "MAX_USER_JOBS": "0",
    "MAX_USER_REQUESTS_PER_MINUTE": "0",
    "MAX_JSON_BYTES": str(256 << 10),
    "MAX_UPLOAD_BYTES": str(1 << 20),
    "MAX_TASKS": "1000",
}
SOUND_SHARE = 0.1  # of the connections begin with a sound request
IN_A_ROW = (1, 1, 1, 2, 5)
SLOW_S = 1.0
QUIET_S = 0.1  # without a reply: the request is not whole, and its client says that no more will come
NO_END_S = 10.0
LOOK_EVERY_S = 0.25  # at the service's health, and whether the requests' token has ended
MOST_GROWTH_BYTES = 64 * MIB
MOST_FILES_MORE = 32  # SQLite keeps as many as were open at once
REST_WITHIN_S = 45.0
PROBLEM = b"application/problem+json"
# The only answers from 500 on: places that are taken, and what the description says of transfer codings.
SOUND_5XX = {
    (503, "Too many uploads at once."),
    (503, "Too many downloads at once."),
    (503, "Too many requests are held open."),
    (503, "Too many requests with large bodies at once."),
    (503, "The client did not wait for the check."),  # of a key: one that has said all may have gone
    (501, "Only the transfer coding chunked is known."),
}
BREACHES = ("5xx", "no problem", "garbled", "no end", "sound request without a reply")


@dataclass(frozen=True, slots=True)
class Span:
    """A request's time: from its last byte to the end of its reply."""

    from_s: float
    to_s: float

    @property
    def took_s(self) -> float:
        return self.to_s - self.from_s


@dataclass(frozen=True, slots=True)
class Late:
    """So many requests in a row whose replies took too long."""

    span: Span
    count: int
    sent: bytes

    def beside_s(self, healths: Sequence[Span]) -> float:
        """How long `/healthz` took at the same time, on a connection of its own: that long the machine needed."""
        return max(
            (it.took_s for it in healths if it.from_s < self.span.to_s and it.to_s > self.span.from_s),
            default=0.0,
        )


@dataclass
class Findings:
    """What the threads have seen; the first breaches of each kind are kept with the bytes that led to them."""

    wanted: int
    until_s: float
    cases: int = 0
    exchanges: int = 0
    slowest_s: float = 0.0
    late: list[Late] = field(default_factory=list)
    healths: list[Span] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    breaches: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in BREACHES})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_over(self) -> bool:
        return self.cases >= self.wanted or time.monotonic() >= self.until_s

    def breach(self, kind: str, told: str, sent: bytes) -> None:
        with self.lock:
            self.breaches[kind].append(f"{told} to {sent[:600]!r}")

    def count(self, cases: int, replies: Sequence[Reply], took_s: float) -> None:
        with self.lock:
            self.cases += cases
            self.exchanges += 1
            self.slowest_s = max(self.slowest_s, took_s)
            self.statuses.update(reply.status for reply in replies)


def run(options: Options) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Upstream() as upstream,
        Service(Path(folder), ENV, upstream) as service,
    ):
        requests = Sound(service)
        warm = _flood(
            service, requests, options, "warm", options.rounds_or(CASES, CASES_SHORT) // 10, SECONDS_SHORT
        )
        _rest(service)
        before_bytes, before = least_rss_bytes(service), look(service)
        assert before is not None
        files = before.files - _calls_open(upstream)
        with Watch(service) as watch:
            wanted, seconds = (
                options.rounds_or(CASES, CASES_SHORT),
                options.seconds_or(SECONDS, SECONDS_SHORT),
            )
            found = _flood(service, requests, options, "fuzz", wanted, seconds)
            _rest(service)
        after_bytes, after = least_rss_bytes(service), look(service)
        rows = _rows(found, warm.cases, wanted // 8 if options.short else wanted)
        grown = after_bytes - before_bytes
        rows += [
            fact("tokens that a spoilt request has ended", requests.renewals),
            Row(
                "memory grown by",
                f"≤ {MOST_GROWTH_BYTES / MIB:.0f} MiB",
                f"{grown / MIB:.1f} MiB, to {after_bytes / MIB:.0f}",
                grown <= MOST_GROWTH_BYTES,
            ),
            fact("memory at most", f"{watch.peak(lambda it: it.rss_bytes) / MIB:.0f} MiB"),
        ]
        assert after is not None
        more = after.files - _calls_open(upstream) - files
        rows.append(
            Row(
                "open files more than before",
                f"≤ {MOST_FILES_MORE}",
                f"{more}, {after.files} in all",
                more <= MOST_FILES_MORE,
            )
        )
        rows.append(Row("temporary files left", "0", str(after.temporary), after.temporary == 0))
        health = service.get("/healthz")
        rows.append(Row("/healthz at the end", "200", str(health.status_code), health.status_code == 200))
        rows.append(none_of("errors in the log", log.faults(service.stderr())))
    return rows


def _rows(found: Findings, warming: int, least: int) -> list[Row]:
    statuses = ", ".join(f"{status} × {count}" for status, count in sorted(found.statuses.items()))
    health_s = max((it.took_s for it in found.healths), default=0.0)
    return [
        Row(
            "cases",
            f"≥ {least}",
            f"{found.cases}, and {warming} to warm up",
            found.cases >= least,
        ),
        *(none_of(kind, breaches, found.exchanges) for kind, breaches in found.breaches.items()),
        *late_rows(found.late, found.healths, found.exchanges),
        Row(
            "/healthz beside them, slowest",
            f"≤ {SLOW_S:g} s",
            f"{health_s:.2f} s",
            health_s <= SLOW_S,
        ),
        fact("load of the machine", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
        fact("slowest replies in a row", f"{found.slowest_s:.2f} s"),
        fact("replies", statuses),
    ]


def late_rows(late: Sequence[Late], healths: Sequence[Span], exchanges: int) -> list[Row]:
    """What is slow by more than a `/healthz` at the same time is slow by what was sent; else the machine was busy."""
    slow: list[str] = []
    busy: list[str] = []
    for it in late:
        each_s, beside_s = it.span.took_s / it.count, it.beside_s(healths)
        told = f"{each_s:.2f} s, /healthz {beside_s:.2f} s"
        if each_s - beside_s > SLOW_S:
            slow.append(f"{told}, to {it.sent[:600]!r}")
        else:
            busy.append(told)
    return [
        none_of(f"over {SLOW_S:g} s a request, and {SLOW_S:g} s more than /healthz", slow, exchanges),
        fact(f"over {SLOW_S:g} s as the machine was busy", "; ".join((str(len(busy)), *busy[:3]))),
    ]


def _calls_open(upstream: Upstream) -> int:
    """Connections to the endpoint, which come with the threads of the keys and stay."""
    to_upstream = f":{urlsplit(upstream.base_url).port:04X}"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(remote.endswith(to_upstream) and state == "01" for _, _, remote, state, *_ in lines)


def _rest(service: Service) -> None:
    """Until the jobs that were made have ended."""
    deadline_s = time.monotonic() + REST_WITHIN_S
    while time.monotonic() < deadline_s:
        unfinished = sum(
            len(service.get(f"/jobs?all=true&limit=1&status={status}", service.admin).json()["data"])
            for status in ("queued", "running")
        )
        if not unfinished:
            return
        time.sleep(0.2)


def _flood(
    service: Service, requests: "Sound", options: Options, name: str, wanted: int, seconds: float
) -> Findings:
    found = Findings(wanted, time.monotonic() + seconds)
    threads = [
        threading.Thread(target=_send_all, args=(service.port, requests, options.random(name, number), found))
        for number in range(THREADS)
    ]
    threads.append(threading.Thread(target=_ask_health, args=(service.port, found)))
    threads.append(threading.Thread(target=_renew, args=(requests, found)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _ask_health(port: int, found: Findings) -> None:
    while not found.is_over():
        began_s = time.monotonic()
        with suppress(OSError), connect(port) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while sock.recv(65536):
                pass
        found.healths.append(Span(began_s, time.monotonic()))
        time.sleep(LOOK_EVERY_S)


def _renew(requests: "Sound", found: Findings) -> None:
    """New requests when the token of these has ended."""
    while not found.is_over():
        requests.renew_if_ended()
        time.sleep(LOOK_EVERY_S)


class Sound:
    """The sound requests that are spoilt; a spoilt one may be a logout, so there are new ones now and then."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.renewals = 0
        self.now, self._token = sound_requests(service)

    def renew_if_ended(self) -> None:
        if self._service.get("/users?limit=1", self._token).status_code != 200:
            self.renewals += 1
            self.now, self._token = sound_requests(self._service, self.renewals)


# A thread's work


def _send_all(port: int, requests: Sound, random: Random, found: Findings) -> None:
    while not found.is_over():
        try:
            with connect(port, NO_END_S) as sock:
                turns, is_kept = random.choice((1, 1, 3, 10)), True
                if random.random() < SOUND_SHARE:
                    is_kept = _exchange(
                        sock, [random.choice(requests.now).render()], random, found, is_sound=True
                    )
                while turns and is_kept and not found.is_over():
                    turns -= 1
                    is_kept = _exchange(sock, _spoilt(requests.now, random), random, found)
        except OSError as error:
            found.breach("no end", type(error).__name__, b"connect")


def _spoilt(requests: Sequence[Request], random: Random) -> list[bytes]:
    """One request or several in a row; among several one may be sound."""
    raw = [
        mangle(request, random, requests) for request in random.choices(requests, k=random.choice(IN_A_ROW))
    ]
    if len(raw) > 1 and random.random() < 0.5:
        raw[random.randrange(len(raw))] = random.choice(requests).render()
    return raw


def _exchange(
    sock: socket.socket, raw: Sequence[bytes], random: Random, found: Findings, *, is_sound: bool = False
) -> bool:
    """These requests, and what comes of them; whether the connection is kept."""
    count = len(raw)
    sent = b"".join(raw)
    received, span, is_open = _send_and_receive(sock, _pieces(sent, random), count)
    try:
        replies, _ = parse_replies(received, ended=True)
    except Garbled as error:
        found.breach("garbled", str(error), sent)
        return False
    found.count(count, replies, span.took_s)
    if span.took_s >= NO_END_S:
        found.breach("no end", f"{len(replies)} replies in {span.took_s:.1f} s", sent)
    elif span.took_s > SLOW_S * count:
        found.late.append(Late(span, count, sent))
    for reply in replies:
        _judge(reply, sent, found)
    if is_sound and not replies:
        found.breach("sound request without a reply", "nothing", sent)
    return is_open and not any(reply.headers.get(b"connection") == b"close" for reply in replies)


def _pieces(sent: bytes, random: Random) -> list[bytes]:
    """Mostly one; else cut where it hurts."""
    if random.random() < 0.8 or len(sent) < 2:
        return [sent]
    cuts = sorted(random.randrange(1, len(sent)) for _ in range(random.choice((1, 2, 5))))
    return [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]


def _send_and_receive(sock: socket.socket, pieces: Sequence[bytes], count: int) -> tuple[bytes, Span, bool]:
    """(what came, the time since our last byte, whether the connection is still good)."""
    received = b""
    sock.settimeout(NO_END_S)
    try:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.001)
            sock.sendall(piece)
    except OSError:
        pass  # refused before its end; the reply is there all the same
    sent_s = time.monotonic()
    has_ended = False
    while True:
        sock.settimeout(NO_END_S if has_ended else QUIET_S)
        try:
            more = sock.recv(1 << 18)
        except TimeoutError:
            if has_ended:
                return received, Span(sent_s, sent_s + NO_END_S), False
            has_ended = True  # not whole, or a long one: either way we have nothing more to say
            sent_s = time.monotonic()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            continue
        except OSError:
            more = b""
        if not more:
            return received, Span(sent_s, time.monotonic()), False
        received += more
        if not has_ended and _is_whole(received, count):
            return received, Span(sent_s, time.monotonic()), True


def _is_whole(received: bytes, count: int) -> bool:
    """Whether there are as many replies as requests; a garbled one is found later."""
    try:
        replies, left = parse_replies(received, ended=False)
    except Garbled:
        return False
    return len(replies) == count and not left


def _judge(reply: Reply, sent: bytes, found: Findings) -> None:
    if reply.status < 400:
        return
    problem: dict[str, Any] = {}
    with suppress(ValueError):
        problem = json.loads(reply.body) if reply.body else {"status": reply.status}
    if (
        reply.content_type != PROBLEM
        or not isinstance(problem, dict)
        or problem.get("status") != reply.status
    ):
        found.breach("no problem", f"{reply.status} {reply.content_type!r} {reply.body[:200]!r}", sent)
    if reply.status >= 500 and (reply.status, problem.get("detail")) not in SOUND_5XX:
        found.breach("5xx", f"{reply.status} {reply.body[:300]!r}", sent)
