"""An endpoint of whose replies three in ten are wrong, in every way there is: each task is decided once, and rightly.

Every task draws its own faults, one for each call that it makes, so what must become of it follows from the calls that
the endpoint saw. Plain jobs are held to that call by call; packed ones to what a task may say at all.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from chaos import log
from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.watching import MIB, Watch, least_rss_bytes, look
from gpt_worker.domain import ErrorCode
from tests.service import Service
from tests.upstream import Call, Fault, FaultKind, KeyRules, Upstream
from tests.upstream.answers import REFUSAL

NAME = "faults"

KEYS = 5
TASKS, TASKS_SHORT = 10_000, 1_000
SHARE = 0.3
TASKS_A_PACK = 4  # about so many, once packs have been halved by what goes wrong
DEADLINE_S = 4.0
MAX_ATTEMPTS, MAX_TIMEOUTS = 5, 3
FINISHED_WITHIN_S = 300.0
REST_WITHIN_S = 30.0
MOST_THREADS = KEYS * 64 + 128 + 24  # of the keys, of the server, and the service's own
MOST_FILES = KEYS * 64 + 100  # a connection a thread is kept open for the next call
MOST_RSS_BYTES = 700 * MIB
MOST_KEPT_BYTES = 64 * MIB  # by which the second job may leave more memory in use than the first
OTHER_ANSWER = "something else"
LATENCY_S = 0.02

STATUS = Fault(kind=FaultKind.STATUS)
TROUBLES: Sequence[tuple[Fault, int]] = (  # each with its weight
    (replace(STATUS, status=500), 6),
    (replace(STATUS, status=502), 3),
    (replace(STATUS, status=503, retry_after_s=1.0), 3),
    (replace(STATUS, status=504), 3),
    (replace(STATUS, status=408), 2),
    (replace(STATUS, status=409), 2),
    (replace(STATUS, status=429, code="rate_limit_exceeded"), 1),
    (replace(STATUS, status=429, code="rate_limit_exceeded", retry_after_s=0.2), 2),
    (replace(STATUS, status=400, message="Not this one."), 2),
    (replace(STATUS, status=422, message="Nor this one."), 2),
    (replace(STATUS, status=400, code="context_length_exceeded"), 2),
    (replace(STATUS, status=413), 1),
    (Fault(kind=FaultKind.RESET), 6),
    (Fault(kind=FaultKind.CLOSE), 6),
    (Fault(kind=FaultKind.HANG), 3),
    (Fault(kind=FaultKind.HANG, seconds=0.5), 3),
    (Fault(kind=FaultKind.HTML), 4),
    (Fault(kind=FaultKind.BROKEN_JSON), 4),
    (Fault(kind=FaultKind.EMPTY_OBJECT), 4),
    (Fault(kind=FaultKind.NULL_CONTENT), 4),
    (Fault(kind=FaultKind.CUT_BODY), 6),
    (Fault(kind=FaultKind.DRIP_BODY, seconds=0.05), 2),
    (Fault(kind=FaultKind.DRIP_HEADERS, seconds=0.05), 2),
    (Fault(kind=FaultKind.REDIRECT, status=307, location="http://127.0.0.1:9/"), 4),
    (Fault(kind=FaultKind.REDIRECT, status=302, location="/v1/chat/completions"), 2),
    (Fault(kind=FaultKind.GZIP_BOMB, size_bytes=64 * MIB), 1),
    (Fault(kind=FaultKind.HUGE_BODY, size_bytes=24 * MIB), 1),
    (Fault(kind=FaultKind.ANSWER, content=OTHER_ANSWER), 2),
    (Fault(kind=FaultKind.REFUSAL), 2),
    (Fault(kind=FaultKind.CONTENT_FILTER), 2),
    (Fault(kind=FaultKind.LENGTH), 3),
    (Fault(kind=FaultKind.NO_USAGE), 4),
)
PACK_TROUBLES: Sequence[tuple[Fault, int]] = (
    # Packs would end by these.
    *((fault, weight) for fault, weight in TROUBLES if fault.status not in (400, 422)),
    *((Fault(kind=kind), 6) for kind in FaultKind if kind.startswith("packed_")),
)


def run(options: Options) -> list[Row]:
    count = options.rounds_or(TASKS, TASKS_SHORT)
    keys = {f"sk-chaos-{number}": KeyRules(latency_s=LATENCY_S) for number in range(KEYS)}
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Upstream(keys, log_size=20 * count) as upstream,
        Service(Path(folder), {"GPT_DEADLINE_S": f"{DEADLINE_S:g}"}, upstream) as service,
    ):
        _ = service.admin
        with Watch(service, 0.2) as watch:
            plain = _Job("plain", service, upstream, count)
            plain.run(plan(options.random("plain"), plain.texts, SHARE, TROUBLES), pack=False)
            rows += plain.rows(_plain_breaches(plain))
            _rest(service)
            after_plain = least_rss_bytes(service)
            packed = _Job("packed", service, upstream, count)
            share = SHARE / TASKS_A_PACK
            packed.run(plan(options.random("packed"), packed.texts, share, PACK_TROUBLES), pack=True)
            rows += packed.rows(_packed_breaches(packed))
            rested = _rest(service)
            after_packed = least_rss_bytes(service)
        rows += _resource_rows(service, watch, rested, after_plain, after_packed)
        rows.append(none_of("errors in the log", log.faults(service.stderr())))
    return rows


# What goes wrong, and when


def plan(
    random: Random, texts: Sequence[str], share: float, troubles: Sequence[tuple[Fault, int]]
) -> Iterator[Fault]:
    """Each task's faults, in the order in which its calls meet them: every call has its own chance of `share`."""
    faults, weights = zip(*troubles, strict=True)
    for text in texts:
        while random.random() < share:
            yield replace(random.choices(faults, weights)[0], contains=text)


# What a task may become

CODES: dict[
    str | None, ErrorCode
] = {  # of what else goes wrong; all that is not here makes no sense as a reply
    None: ErrorCode.TIMEOUT,
    FaultKind.HANG: ErrorCode.TIMEOUT,
    FaultKind.DRIP_BODY: ErrorCode.TIMEOUT,
    FaultKind.DRIP_HEADERS: ErrorCode.TIMEOUT,
    FaultKind.RESET: ErrorCode.CONNECTION,
    FaultKind.CLOSE: ErrorCode.CONNECTION,
    FaultKind.CUT_BODY: ErrorCode.CONNECTION,
}


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a task: an answer and how it ended, or a code and the tries it took."""

    answer: str | None = None
    finish_reason: str | None = None
    code: str | None = None
    attempts: int | None = None


@dataclass(frozen=True, slots=True)
class _Tried:
    attempts: int = 0
    timeouts: int = 0
    stale: bool = False


def fates(text: str, calls: Sequence[Call]) -> set[Fate]:
    """All that may have become of a plain task after these calls; empty: it should have been asked again, or not."""
    found: set[Fate] = set()
    tried = {_Tried()}
    for number, call in enumerate(calls, 1):
        after: set[_Tried] = set()
        for before in tried:
            for what in _effects(text, call, before):
                if isinstance(what, _Tried):
                    after.add(what)
                elif number == len(calls):
                    found.add(what)
        tried = after
    return found


def _effects(text: str, call: Call, before: _Tried) -> list[Fate | _Tried]:
    """Where one call leads; more than one way where a connection broke that may have been a stale one."""
    if call.fault == FaultKind.STATUS:
        return [_after_status(call, before)]
    answer = _answer(text, call)
    if answer is not None:
        return [answer]
    if call.fault == FaultKind.CONTENT_FILTER:
        return [Fate(code=ErrorCode.CONTENT_FILTER, attempts=before.attempts + 1)]
    effects = [_charged(before, CODES.get(call.fault, ErrorCode.BAD_RESPONSE))]
    if call.fault in (FaultKind.RESET, FaultKind.CLOSE) and not before.stale:
        effects.append(replace(before, stale=True))
    # On a busy machine the deadline may come first.
    if call.fault in (FaultKind.HUGE_BODY, FaultKind.GZIP_BOMB):
        effects.append(_charged(before, ErrorCode.TIMEOUT))
    return effects


def _answer(text: str, call: Call) -> Fate | None:
    answer = f"answer to: {text}"
    match call.fault:
        case None | FaultKind.HANG | FaultKind.NO_USAGE if call.status == 200:
            return Fate(answer, "stop")
        case FaultKind.ANSWER:
            return Fate(OTHER_ANSWER, "stop")
        case FaultKind.LENGTH:
            return Fate(answer[: len(answer) // 2], "length")
        case FaultKind.REFUSAL:
            return Fate(REFUSAL, "refusal")
    return None


def _after_status(call: Call, before: _Tried) -> Fate | _Tried:
    if call.status == 429:
        return before
    if call.status in (400, 413, 422):
        too_long = call.status == 413 or call.code == "context_length_exceeded"
        code = ErrorCode.CONTEXT_LENGTH if too_long else ErrorCode.BAD_REQUEST
        return Fate(code=code, attempts=before.attempts + 1)
    return _charged(before, ErrorCode.UPSTREAM_ERROR)


def _charged(before: _Tried, code: ErrorCode) -> Fate | _Tried:
    attempts, timeouts = before.attempts + 1, before.timeouts + (code is ErrorCode.TIMEOUT)
    if attempts >= MAX_ATTEMPTS or timeouts >= MAX_TIMEOUTS:
        return Fate(code=code, attempts=attempts)
    return replace(before, attempts=attempts, timeouts=timeouts)


# One job


class _Job:
    """A job of `count` tasks, what the service says became of it, and what the endpoint saw of it."""

    def __init__(self, name: str, service: Service, upstream: Upstream, count: int) -> None:
        self.name = name
        self.texts = [f"{name} task {number:05}." for number in range(count)]
        self.results: list[dict[str, Any]] = []
        self.calls: list[Call] = []
        self.job: dict[str, Any] = {}
        self.sent = 0
        self.took_s = 0.0
        self._service = service
        self._upstream = upstream

    def run(self, faults: Iterator[Fault], *, pack: bool) -> None:
        self._upstream.reset()
        with ThreadPoolExecutor(
            4
        ) as pool:  # of which each task's own keep their order: they are added in turn
            list(pool.map(self._add, _by_task(faults)))
        began_s = time.monotonic()
        reply = self._service.submit(
            {f"id {number}": text for number, text in enumerate(self.texts)},
            {"pack": pack, "model": f"gpt-{self.name}"},
            prefer="respond-async",
        )
        assert reply.status_code == 202, reply.text
        job_id = reply.json()["id"]
        self._service.wait_finished(job_id, FINISHED_WITHIN_S)
        self.took_s = time.monotonic() - began_s
        self._upstream.clear_faults()
        self._upstream.release()
        self._upstream.wait_until_idle()
        self.job = self._service.job(job_id)
        lines = self._service.get(f"/jobs/{job_id}/results?format=jsonl", self._service.admin).content
        self.results = [json.loads(line) for line in lines.splitlines()]
        self.calls = self._upstream.calls()
        self.sent = sum(key["calls"] for key in self._upstream.counters().values())

    def _add(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            self._upstream.add_fault(fault)

    def fate(self, result: dict[str, Any]) -> Fate:
        error = result["error"]
        if error is None:
            return Fate(result["result"], result["finish_reason"])
        return Fate(code=error["code"], attempts=error["attempts"])

    def rows(self, wrong: Sequence[str]) -> list[Row]:
        counts, usage = self.job["counts"], self.job["usage"]
        answered = sum(result["error"] is None for result in self.results)
        failed = Counter(result["error"]["code"] for result in self.results if result["error"])
        said = {"total": len(self.texts), "answered": answered, "failed": failed.total(), "pending": 0}
        faulty = sum(call.fault is not None for call in self.calls)
        return [
            none_of(f"{self.name}: tasks not decided exactly once", self._undecided(), len(self.texts)),
            none_of(f"{self.name}: fates that do not follow from the replies", wrong, len(self.texts)),
            Row(f"{self.name}: counts", str(said), str(counts), counts == said),
            Row(
                f"{self.name}: usage.requests",
                str(self.sent),
                str(usage["requests"]),
                usage["requests"] == self.sent,
            ),
            fact(
                f"{self.name}: calls; with a fault; wall",
                f"{self.sent}; {faulty / max(1, self.sent):.0%}; {self.took_s:.1f} s",
            ),
            fact(f"{self.name}: failures", dict(failed.most_common())),
        ]

    def _undecided(self) -> list[str]:
        wanted = [f"id {number}" for number in range(len(self.texts))]
        breaches = (
            [] if [result["id"] for result in self.results] == wanted else ["ids or their order differ"]
        )
        for result in self.results:
            error = result["error"]
            is_failure = error is not None and error["code"] in set(ErrorCode) and error["message"]
            if (result["result"] is None) != (error is not None) or (error is not None and not is_failure):
                breaches.append(str(result))
        return breaches


def _by_task(faults: Iterator[Fault]) -> list[list[Fault]]:
    by_text: dict[str | None, list[Fault]] = {}
    for fault in faults:
        by_text.setdefault(fault.contains, []).append(fault)
    return list(by_text.values())


def _plain_breaches(job: _Job) -> list[str]:
    by_text: dict[str, list[Call]] = {}
    for call in job.calls:
        by_text.setdefault(call.user_text, []).append(call)
    breaches = []
    for text, result in zip(job.texts, job.results, strict=False):
        calls, fate = by_text.get(text, []), job.fate(result)
        if fate not in fates(text, calls):
            breaches.append(f"{text} {fate} after {[(call.fault, call.status) for call in calls]}")
    return breaches


def _packed_breaches(job: _Job) -> list[str]:
    breaches = []
    for text, result in zip(job.texts, job.results, strict=False):
        answer = f"answer to: {text}"
        may_be = {
            (answer, "stop"),
            (answer[: len(answer) // 2], "length"),
            (OTHER_ANSWER, "stop"),
            (REFUSAL, "refusal"),
        }
        if result["error"] is None and (result["result"], result["finish_reason"]) not in may_be:
            breaches.append(str(result))
    return breaches


# What the service itself uses


def _rest(service: Service) -> float | None:
    """Seconds until no key has a call in flight, or more than the one thread that waits for work; None: too long."""
    began_s = time.monotonic()

    def rests() -> bool:
        keys = service.get("/keys", service.admin).json()["data"]
        return all(key["in_flight"] == 0 and key["threads"] <= 1 for key in keys)

    try:
        service.wait_until(rests, REST_WITHIN_S)
    except TimeoutError:
        return None
    return time.monotonic() - began_s


def _resource_rows(
    service: Service, watch: Watch, rested: float | None, after_plain: int, after_packed: int
) -> list[Row]:
    threads, rss = watch.peak(lambda sample: sample.threads), watch.peak(lambda sample: sample.rss_bytes)
    files, now = watch.peak(lambda sample: sample.files), look(service)
    assert now is not None
    keeps = after_packed - after_plain
    return [
        Row(
            "threads at most",
            f"≤ {MOST_THREADS}",
            f"{threads}; {now.threads} at rest",
            threads <= MOST_THREADS,
        ),
        Row("memory at most", _mib(MOST_RSS_BYTES), _mib(rss), rss <= MOST_RSS_BYTES),
        Row(
            "memory at rest after the first job and the second",
            f"≤ {_mib(MOST_KEPT_BYTES)} more",
            f"{_mib(after_plain)}, {_mib(after_packed)}",
            keeps <= MOST_KEPT_BYTES,
        ),
        Row(
            "every key at rest again",
            f"≤ {REST_WITHIN_S:g} s",
            "never" if rested is None else f"{rested:.1f} s",
            rested is not None,
        ),
        Row(
            "files open at rest",
            f"≤ {MOST_FILES} and no temporary one",
            f"{now.files}, {now.temporary}; {files} at most",
            now.files <= MOST_FILES and now.temporary == 0,
        ),
    ]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f} MiB"
