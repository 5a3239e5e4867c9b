"""The outbox at work: a stored delivery → its body, frozen once → a signed POST → the next one or the end.

The recorder stores a delivery in the commit that ends its job and calls `wake()`. One scheduler sleeps until
the next is due and hands it to one of a few senders, of which no receiver has all, and one that does not answer has
one. A delivery is in one hand at a time, and all it needs to go on stands in the database, so a restart only continues.
Signatures come from `signing`.
"""

import hashlib
import json
import logging
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from config import Settings
from gpt_worker import rendering, signing
from gpt_worker.addresses import is_loopback
from gpt_worker.db import Database, log_failure, trouble_of
from gpt_worker.domain import HIDDEN, Caller, DeliveryStatus, utc_now
from gpt_worker.errors import Conflict, Forbidden, NotFound
from gpt_worker.models import DeliveryRow
from gpt_worker.posting import NETWORK_ERRORS, Reply, Wire, post
from gpt_worker.store import deliveries as store
from gpt_worker.store import jobs as job_store
from gpt_worker.store.deliveries import Attempt, DeliveryRecord, Due

logger = logging.getLogger(__name__)
T = TypeVar("T")

SENDERS = 4
SENDERS_OF_ONE = SENDERS - 1  # origin; and of all together that don't answer
EXCHANGE_DEADLINE_S = 20.0
MAX_BODY_BYTES = 256 << 10
LINK_LIFETIME = timedelta(days=7)
WAITS_S = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 36_000.0)
WAIT_SPREAD = 0.2
LONGEST_RETRY_AFTER_S = 86_400.0
LONGEST_SLEEP_S = 60.0  # a wall clock may be set forward, and a laptop may sleep
DATABASE_PAUSE_S = 5.0
SAY_AGAIN_S = 600.0  # that the database is in the same trouble still
CUT_GRACE_S = 1.0


# Decisions


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt means: the delivery's end, or the wait before the next attempt."""

    ended: DeliveryStatus | None
    wait_s: float | None = None


def judge(status_code: int | None, attempt: int, retry_after_s: float | None, jitter: float) -> Verdict:
    """What to do after attempt 1, 2, …; no status code means that there was no reply."""
    if status_code is not None and 200 <= status_code < 300:
        return Verdict(DeliveryStatus.DELIVERED)
    wait_s = None if status_code == 410 else next_wait_s(attempt, retry_after_s, jitter)
    return Verdict(DeliveryStatus.FAILED) if wait_s is None else Verdict(None, wait_s)


def next_wait_s(attempt: int, retry_after_s: float | None, jitter: float) -> float | None:
    """Seconds before attempt + 1, or None to give up; `jitter` in [0, 1) spreads the wait by ±20 %.

    What the receiver asks for is the least wait, up to a day.
    """
    if attempt > len(WAITS_S):
        return None
    wait_s = WAITS_S[attempt - 1] * (1 - WAIT_SPREAD + 2 * WAIT_SPREAD * jitter)
    return max(wait_s, min(retry_after_s or 0.0, LONGEST_RETRY_AFTER_S))


def read_retry_after_s(header: str | None, now: datetime) -> float | None:
    """`Retry-After` as seconds from now: a number or a date (RFC 9110, 10.2.3). Nonsense is None."""
    text = (header or "").strip()
    if re.fullmatch(r"\d{1,10}", text, re.ASCII):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


# The body


class JobGone(Exception):
    """There is nothing to tell any more; the message says why, for the delivery's owner."""


Render = Callable[[Database, Settings, DeliveryRow, datetime], str]


def render_body(database: Database, settings: Settings, delivery: DeliveryRow, now: datetime) -> str:
    """`{"type", "timestamp", "data": {…the job…}}`, with a link and a hash in place of long results.

    Raises JobGone when the job was deleted, or has moved on from the run that the delivery is about.
    """
    if delivery.job_id is None:
        raise ValueError("only a job's delivery has a body to make")
    with database.read() as session:
        job = job_store.get_job(session, delivery.job_id)
        if job is None or job.status in HIDDEN:
            raise JobGone("given up: the job was deleted")
        if job.run != delivery.run or job.finished_at is None:
            raise JobGone("given up: the job was run again before its webhook was made")
        fits = rendering.results_fit(job)
        data = rendering.render_job(session, job, with_results=True)
    body = _message(delivery.type, delivery.created_at, data)
    if fits and len(body.encode()) <= MAX_BODY_BYTES:
        return body
    link = signing.sign_link(signing.link_key(settings.app_key), delivery.job_id, now + LINK_LIFETIME)
    digest = hashlib.sha256()
    try:
        for piece in rendering.results_jsonl(database, delivery.job_id):
            digest.update(piece)
    except NotFound as error:
        raise JobGone("given up: the job was deleted") from error
    data |= {
        "results": None,
        "errors": None,
        "finish_reasons": None,
        "results_url": f"{settings.public_url}/jobs/{delivery.job_id}/results?format=jsonl&{link}",
        "results_sha256": digest.hexdigest(),
    }
    return _message(delivery.type, delivery.created_at, data)


def _message(kind: str, happened_at: datetime, data: dict[str, Any]) -> str:
    message = {"type": kind, "timestamp": rendering.render_time(happened_at), "data": data}
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


# The outbox


def origin_of(url: str) -> str:
    """Scheme, host and port: what is there or not, whatever the path."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()


class _Share:
    """How the senders are shared out: no origin has all, one that does not answer has one to try it with."""

    def __init__(self, busy: Mapping[str, str], silent: set[str]) -> None:
        self._silent = set(silent)
        self._senders = Counter(origin_of(url) for url in busy.values())

    def has_room(self, url: str) -> bool:
        origin = origin_of(url)
        if origin not in self._silent:
            return self._senders[origin] < SENDERS_OF_ONE
        waiting = sum(self._senders[silent] for silent in self._silent)
        return not self._senders[origin] and waiting < SENDERS_OF_ONE

    def take(self, url: str) -> None:
        self._senders[origin_of(url)] += 1


class _Stopped(Exception):
    """The service stops: leave the delivery as it is, due."""


class Deliveries:
    """Sends what is owed, for as long as the process lives.

    Args:
        version: of this service, for the user agent.
        render: makes the body of a finished job's delivery.
        clock: tells the time, aware.
        jitter: tells a number in [0, 1).
        deadline_s: the most that one exchange with the receiver may take, whole.
        pause_s: the wait after a failure of the database.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        version: str,
        render: Render = render_body,
        clock: Callable[[], datetime] = utc_now,
        jitter: Callable[[], float] = random.random,
        deadline_s: float = EXCHANGE_DEADLINE_S,
        pause_s: float = DATABASE_PAUSE_S,
    ) -> None:
        self._database = database
        self._settings = settings
        self._secret = signing.secret_bytes(settings.webhook_secret)
        self._user_agent = f"gpt-worker/{version}"
        self._render = render
        self._clock = clock
        self._jitter = jitter
        self._deadline_s = deadline_s
        self._pause_s = pause_s
        self._condition = threading.Condition()
        self._woken = False
        self._stopping = threading.Event()
        self._told_at_s: dict[str, float] = {}  # by trouble
        self._busy: dict[str, str] = {}  # in a sender's hand: the delivery's id, and where it goes
        self._silent: set[str] = set()  # origins that gave no reply the last time
        self._wires: set[Wire] = set()
        self._handed: queue.Queue[Due | None] = queue.Queue()
        self._scheduler = threading.Thread(target=self._schedule, name="deliveries", daemon=True)
        self._senders = [
            threading.Thread(target=self._send, name=f"delivery sender {number}", daemon=True)
            for number in range(SENDERS)
        ]

    # For the rest of the service

    def start(self) -> None:
        """Begin, once; everything that is owed goes on at its time."""
        for thread in (self._scheduler, *self._senders):
            thread.start()

    def wake(self) -> None:
        """Look again: a delivery was committed, or was given another time."""
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def stop(self, deadline_s: float) -> None:
        """Begin nothing more; exchanges get `deadline_s` to end, and what is then undone stays due."""
        ends_at_s = time.monotonic() + deadline_s
        with self._condition:
            self._stopping.set()
            self._condition.notify_all()
        for _ in self._senders:
            self._handed.put(None)
        self._join(ends_at_s)
        with self._condition:
            for wire in self._wires:
                wire.abandon()
        self._join(time.monotonic() + CUT_GRACE_S)

    def _join(self, ends_at_s: float) -> None:
        for thread in (self._scheduler, *self._senders):
            if thread.ident is not None:
                thread.join(max(0.0, ends_at_s - time.monotonic()))

    def freeze_owed(self, job_id: str) -> None:
        """Make the bodies that are still owed for a job, before a new run changes what they tell."""
        with self._database.read() as session:
            owed = store.unfrozen_of_job(session, job_id)
        for delivery in owed:
            with suppress(JobGone):  # the sender will say so in the delivery
                self._freeze(delivery)

    # For the HTTP face

    def list_deliveries(
        self,
        caller: Caller,
        *,
        everyone: bool = False,
        job_id: str | None = None,
        status: DeliveryStatus | None = None,
        before: str | None = None,
        limit: int = 20,
    ) -> tuple[list[DeliveryRecord], str | None]:
        """A page, newest first, and the cursor of the next one, or None."""
        if everyone and not caller.is_admin:
            raise Forbidden("Only an admin sees everyone's deliveries.")
        with self._database.read() as session:
            records = store.list_deliveries(
                session,
                caller,
                everyone=everyone,
                job_id=job_id,
                status=status,
                before=before,
                limit=limit + 1,
            )
        return records[:limit], records[limit - 1].delivery.id if len(records) > limit else None

    def get_delivery(self, delivery_id: str, caller: Caller) -> DeliveryRecord:
        with self._database.read() as session:
            return store.with_attempts(session, [_found(store.find_delivery(session, delivery_id, caller))])[
                0
            ]

    def redeliver(self, delivery_id: str, caller: Caller) -> DeliveryRecord:
        """Send again, under the same id and with the same body, to where webhooks go now."""
        with self._database.write() as session:
            delivery = _found(store.find_delivery(session, delivery_id, caller))
            if delivery.body is None and not store.can_be_made(session, delivery):
                raise Conflict("There is nothing to send: the job was deleted or run again.")
            store.restart(delivery, url=self._settings.request_api, now=self._clock())
            record = store.with_attempts(session, [delivery])[0]
        self.wake()
        return record

    def send_test(self, caller: Caller) -> DeliveryRecord:
        """Send a small message of the type `webhook.test`."""
        now = self._clock()
        body = _message("webhook.test", now, {"message": "This is a test of the webhook address."})
        with self._database.write() as session:
            delivery_id = store.add_frozen(
                session,
                owner_id=caller.user_id,
                kind="webhook.test",
                url=self._settings.request_api,
                body=body,
                now=now,
            )
        self.wake()
        return self.get_delivery(delivery_id, caller)

    def verify(self, message_id: str, sent_at: str, signatures: str, body: bytes) -> None:
        """Check that a message was signed with our own secret, just now. Raises signing.SignatureInvalid."""
        signing.verify(
            self._secret,
            message_id=message_id,
            sent_at=sent_at,
            signatures=signatures,
            body=body,
            now=self._clock(),
        )

    # The scheduler's thread

    def _schedule(self) -> None:
        sleep_s: float | None = 0.0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._woken or self._stopping.is_set(), sleep_s)
                if self._stopping.is_set():
                    return
                self._woken = False
            try:
                sleep_s = self._hand_out()
            except Exception as error:
                self._complain("Due deliveries can't be read", "read_due_deliveries", error)
                sleep_s = self._pause_s

    def _hand_out(self) -> float | None:
        """Give due deliveries to idle senders; seconds to the next look, or None to sleep until woken."""
        with self._condition:
            busy, share = dict(self._busy), _Share(self._busy, self._silent)
        idle = SENDERS - len(busy)
        if not idle:
            return None
        now = self._clock()
        with self._database.read() as session:
            dues, full = self._choose(session, now, busy, share)
            busy |= {due.id: due.url for due in dues}
            next_due_at = (
                store.next_due_at(session, besides=busy, besides_urls=full) if len(dues) < idle else None
            )
        with self._condition:
            self._busy |= {due.id: due.url for due in dues}
        for due in dues:
            self._handed.put(due)
        return (
            None
            if next_due_at is None
            else min(max(0.0, (next_due_at - now).total_seconds()), LONGEST_SLEEP_S)
        )

    @staticmethod
    def _choose(
        session: Session, now: datetime, busy: Mapping[str, str], share: "_Share"
    ) -> tuple[list[Due], set[str]]:
        """What the idle senders send next, and the addresses that must wait until a sender is back."""
        chosen: dict[str, Due] = {}
        full = {url for url in busy.values() if not share.has_room(url)}
        while idle := SENDERS - len(busy) - len(chosen):
            dues = store.list_due(session, now=now, besides={*busy, *chosen}, besides_urls=full, limit=idle)
            if not dues:
                break
            for due in dues:
                if share.has_room(due.url):
                    share.take(due.url)
                    chosen[due.id] = due
                else:
                    full.add(due.url)
        return [*chosen.values()], full

    # A sender's thread

    def _send(self) -> None:
        while (due := self._handed.get()) is not None:
            try:
                self._deliver(due)
            except _Stopped:
                continue
            except Exception:
                logger.exception(
                    "A delivery can't be sent.", extra={"action": "send_delivery", "delivery_id": due.id}
                )
                self._stopping.wait(self._pause_s)
            finally:
                with self._condition:
                    self._busy.pop(due.id, None)
                self.wake()

    def _deliver(self, due: Due) -> None:
        if self._stopping.is_set():
            raise _Stopped
        delivery = self._patiently(lambda: self._find(due))
        if delivery is None:
            return
        attempt, verdict = self._attempt(delivery)
        self._patiently(lambda: self._record(due, attempt, verdict))
        _log(delivery, attempt, verdict)

    def _find(self, due: Due) -> DeliveryRow | None:
        self._database.check_ours()
        with self._database.read() as session:
            delivery = store.get_delivery(session, due.id)
        return delivery if delivery is not None and delivery.next_attempt_at == due.due_at else None

    def _attempt(self, delivery: DeliveryRow) -> tuple[Attempt, Verdict]:
        """One attempt and what it means. Raises _Stopped when the service stops before its end."""
        sent_at, began_s = self._clock(), time.monotonic()
        status_code = error = retry_after_s = None
        try:
            body = self._body(delivery)
            sent_at, began_s = self._clock(), time.monotonic()
            reply = self._exchange(delivery, body, sent_at)
            status_code = reply.status_code
            retry_after_s = read_retry_after_s(reply.retry_after, self._clock())
        except _Stopped:
            raise
        except JobGone as gone:
            return Attempt(sent_at, 0.0, None, str(gone)), Verdict(DeliveryStatus.FAILED)
        except _NotCalled as refusal:
            error = str(refusal)
        except NETWORK_ERRORS as failure:
            error = type(failure).__name__
        except Exception as bug:
            logger.exception(
                "An attempt broke.", extra={"action": "attempt_delivery", "delivery_id": delivery.id}
            )
            error = type(bug).__name__
        attempt = Attempt(sent_at, round(time.monotonic() - began_s, 3), status_code, error)
        number = store.TRIES - delivery.tries_left + 1
        return attempt, judge(status_code, number, retry_after_s, self._jitter())

    def _body(self, delivery: DeliveryRow) -> bytes:
        """The body as it stands in the database, made and stored now if this is the first attempt."""
        body = delivery.body or self._patiently(lambda: self._freeze(delivery))
        return body.encode()

    def _freeze(self, delivery: DeliveryRow) -> str:
        """Make the body outside of any transaction and store it; the one that stands in the end.

        Raises JobGone.
        """
        rendered = self._render(self._database, self._settings, delivery, self._clock())
        with self._database.write() as session:
            store.freeze_body(session, delivery.id, rendered)
            frozen = store.get_delivery(session, delivery.id)
        if frozen is None or frozen.body is None:
            raise JobGone("given up: the job was deleted or run again before its webhook was made")
        return frozen.body

    def _exchange(self, delivery: DeliveryRow, body: bytes, sent_at: datetime) -> Reply:
        """POST once. Raises _Stopped, _NotCalled or one of NETWORK_ERRORS."""
        if self._settings.offline and not is_loopback(delivery.url):
            raise _NotCalled("not called: NODE_ENV=test reaches loopback addresses alone")
        headers = {
            "content-type": "application/json",
            "user-agent": self._user_agent,
            "connection": "close",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(signing.timestamp(sent_at)),
            "webhook-signature": signing.sign(self._secret, delivery.id, sent_at, body),
        }
        wire = Wire()
        with self._condition:
            if self._stopping.is_set():
                raise _Stopped
            self._wires.add(wire)
        try:
            reply = post(delivery.url, headers, body, wire=wire, deadline_s=self._deadline_s)
        except NETWORK_ERRORS as error:
            if wire.abandoned:
                raise _Stopped from error
            with self._condition:
                self._silent.add(origin_of(delivery.url))
            raise
        else:
            with self._condition:
                self._silent.discard(origin_of(delivery.url))
            return reply
        finally:
            with self._condition:
                self._wires.discard(wire)

    def _record(self, due: Due, attempt: Attempt, verdict: Verdict) -> None:
        now = self._clock()
        next_attempt_at = None if verdict.wait_s is None else now + timedelta(seconds=verdict.wait_s)
        with self._database.write() as session:
            store.record_attempt(
                session, due, attempt, ended=verdict.ended, next_attempt_at=next_attempt_at, now=now
            )

    def _patiently(self, step: Callable[[], T]) -> T:
        """Do a step again and again while the database fails it. Raises _Stopped when the service stops."""
        while True:
            try:
                return step()
            except SQLAlchemyError as error:
                self._complain("The database failed a delivery", "store_delivery", error)
                if self._stopping.wait(self._pause_s):
                    raise _Stopped from error

    def _complain(self, message: str, action: str, error: Exception) -> None:
        """A traceback for a bug; for a database that can't be used one line, now and then."""
        trouble = trouble_of(error)
        if trouble is not None:
            now_s = time.monotonic()
            with self._condition:
                if now_s < self._told_at_s.get(trouble, -SAY_AGAIN_S) + SAY_AGAIN_S:
                    return
                self._told_at_s[trouble] = now_s
        log_failure(logger, message, error, action=action)


class _NotCalled(Exception):
    """The address may not be called; the message says why."""


def _found(delivery: DeliveryRow | None) -> DeliveryRow:
    if delivery is None:
        raise NotFound("There is no such delivery.")
    return delivery


def _log(delivery: DeliveryRow, attempt: Attempt, verdict: Verdict) -> None:
    facts: dict[str, object] = {
        "action": "deliver",
        "delivery_id": delivery.id,
        "job_id": delivery.job_id,
        "status_code": attempt.status_code,
        "error": attempt.error,
    }
    match verdict.ended:
        case DeliveryStatus.DELIVERED:
            logger.info("A webhook was delivered.", extra=facts)
        case DeliveryStatus.FAILED:
            logger.warning("A webhook was given up.", extra=facts)
        case _:
            logger.info(
                "A webhook was not taken; it goes again later.", extra={**facts, "wait_s": verdict.wait_s}
            )
