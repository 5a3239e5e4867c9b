"""SIGTERM and HUP under load: every request gets its whole reply or is never taken, and nothing is done twice."""

import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from chaos.client import Client, NoReply
from chaos.ledger import ASKED_AGAIN, CUT, REFUSED, UNANSWERED
from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.stand import Stand

NAME = "signals"
TERMS, SHORT_TERMS = 20, 3
SECONDS, SHORT_SECONDS = 600.0, 40.0
HUPS_A_TERM = 0.5
EXIT_S = 30.0
HUP_S = 60.0  # until the new worker serves alone
SPARE_S = 3.0  # beside the new worker's start: the old one's idle clients have 2 s to ask, its calls to end
PROBE_EVERY_S = 0.02
DAY_S = 86_400
STARTED = re.compile(r"^(\d\d):(\d\d):(\d\d\.\d+) .* action=started$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reload:
    """One HUP: when it was sent, and how long the new worker needed once the old one's lock was its own."""

    sent_s: float
    start_s: float


def run(options: Options) -> list[Row]:
    ends_s = options.started_s + options.seconds_or(SECONDS, SHORT_SECONDS)
    terms = options.rounds_or(TERMS, SHORT_TERMS)
    return _terms(options, terms, ends_s) + _hups(options, max(1, int(terms * HUPS_A_TERM)), ends_s)


def _terms(options: Options, wanted: int, ends_s: float) -> list[Row]:
    untold: list[str] = []
    statuses: list[int] = []
    exits_s: list[float] = []
    starts_s: list[float] = []
    with Stand(options.random(NAME, "term")) as stand:
        stand.start()
        stand.register()
        stand.kill()
        while len(statuses) < wanted and time.monotonic() < ends_s:
            random = options.random(NAME, "term", len(statuses))
            stand.launch()
            traffic = stand.traffic()
            traffic.start()
            began_s = time.monotonic()
            stand.service.wait_ready()
            starts_s.append(time.monotonic() - began_s)
            time.sleep(random.uniform(0.1, 1.5))
            signalled_s = time.monotonic()
            statuses.append(stand.service.terminate(EXIT_S + 10.0))
            exits_s.append(time.monotonic() - signalled_s)
            traffic.stop()
            untold += stand.ledger.untold(stand.end())
        stand.finish()
    rows = [
        options.enough("ends", wanted, len(statuses)),
        Row("exit statuses", "0", str(sorted(set(statuses))), set(statuses) == {0}),
        Row("slowest exit", f"≤ {EXIT_S:g} s", f"{max(exits_s):.1f} s", max(exits_s) <= EXIT_S),
        *_rows(stand, untold),
        fact("slowest start under load", f"{max(starts_s):.1f} s"),
    ]
    return _named("SIGTERM", rows)


def _hups(options: Options, wanted: int, ends_s: float) -> list[Row]:
    reloads: list[Reload] = []
    with Stand(options.random(NAME, "hup")) as stand:
        stand.start()
        stand.register()
        traffic = stand.traffic()
        traffic.start()
        with Probe(stand.service.port) as probe:
            while len(reloads) < wanted and time.monotonic() < ends_s:
                time.sleep(options.random(NAME, "hup", len(reloads)).uniform(0.2, 1.0))
                reloads.append(_hup(stand))
        traffic.stop()
        stand.rest()
        stand.service.terminate()
        untold = stand.ledger.untold(stand.end())
        stand.finish()
    rows = [
        options.enough("new workers", wanted, len(reloads)),
        silence_row(probe.answered_s, reloads),
        Row(
            "connections refused",
            "0",
            str(probe.refused + stand.ledger.counts[REFUSED]),
            not probe.refused and not stand.ledger.counts[REFUSED],
        ),
        *_rows(stand, untold),
    ]
    return _named("HUP", rows)


def _rows(stand: Stand, untold: list[str]) -> list[Row]:
    counts = stand.ledger.counts
    return [
        *stand.ledger.rows(),
        Row("replies cut", "0", str(counts[CUT]), not counts[CUT]),
        none_of("done, and never answered", untold),
        Row(ASKED_AGAIN, "0", str(counts[ASKED_AGAIN]), not counts[ASKED_AGAIN]),
        fact(UNANSWERED + ", which did nothing", counts[UNANSWERED]),
        *(fact(what, count) for what, count in sorted(counts.items()) if what not in (CUT, UNANSWERED)),
    ]


def _named(name: str, rows: list[Row]) -> list[Row]:
    return [Row(f"{name}: {row.what}", row.wanted, row.got, row.ok) for row in rows]


def _hup(stand: Stand) -> Reload:
    """One reload, once another worker serves alone. Raises TimeoutError."""
    service = stand.service
    old = _children(service.pid)
    sent_s = time.monotonic()
    service.signal(signal.SIGHUP)
    deadline_s = time.monotonic() + HUP_S
    while time.monotonic() < deadline_s:
        time.sleep(PROBE_EVERY_S)
        now = _children(service.pid)
        if len(now) == 1 and not now & old and service.get("/readyz").status_code == 200:
            owned_at = (service.data_dir / "lock").stat().st_mtime  # its owner writes its number into it
            return Reload(sent_s, start_of(service.stderr(), owned_at))
    raise TimeoutError(f"no new worker serves within {HUP_S:g} s of a HUP")


def start_of(log: str, owned_at: float) -> float:
    """Seconds from when the worker owned its data (in Unix time) to the last line of the log that says it is ready."""
    hours, minutes, seconds = STARTED.findall(log)[-1]
    return (int(hours) * 3600 + int(minutes) * 60 + float(seconds) - owned_at) % DAY_S


def silence_row(answered_s: Sequence[float], reloads: Sequence[Reload]) -> Row:
    """Each HUP's silence is held to the start of its own worker: a busy machine makes both longer."""
    nexts_s = [*(reload.sent_s for reload in reloads[1:]), float("inf")]
    silences_s = [
        (_longest_s(answered_s, reload.sent_s, next_s), reload.start_s)
        for reload, next_s in zip(reloads, nexts_s, strict=False)
    ]
    silence_s, start_s = max(silences_s, key=lambda it: it[0] - it[1], default=(0.0, 0.0))
    return Row(
        "without a reply for longer than the new worker's start",
        f"≤ {SPARE_S:g} s",
        f"{silence_s - start_s:.1f} s: {silence_s:.1f} s, of which the start took {start_s:.1f} s",
        silence_s - start_s <= SPARE_S,
    )


def _longest_s(answered_s: Sequence[float], from_s: float, to_s: float) -> float:
    """Between two answers, of which the later came within this time."""
    return max((b - a for a, b in pairwise(answered_s) if from_s < b <= to_s), default=0.0)


def _children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class Probe:
    """Asks whether the service is there, on a new connection each time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answered_s: list[float] = []
        self.refused = 0

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        self.answered_s.append(time.monotonic())
        while not self._stopping.wait(PROBE_EVERY_S):
            client = Client(self._port, "")
            try:
                if client.request("GET", "/healthz").status == 200:
                    self.answered_s.append(time.monotonic())
            except NoReply as failure:
                self.refused += failure.refused
            client.close()
