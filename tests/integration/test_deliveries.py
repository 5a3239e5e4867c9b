"""The outbox with a real SQLite file and a real receiver on a loopback socket; only the clock is a fake."""

import contextlib
import hashlib
import json
import logging
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from flask import Flask, g
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from config import Settings
from gpt_worker import rendering, signing
from gpt_worker.api import problems, webhooks
from gpt_worker.db import Database
from gpt_worker.deliveries import (
    MAX_BODY_BYTES,
    SENDERS,
    SENDERS_OF_ONE,
    Deliveries,
    render_body,
)
from gpt_worker.domain import Answer, Caller, DeliveryStatus, NewTask, Outcome, Role, new_id, utc_now
from gpt_worker.errors import Conflict, Forbidden, NotFound
from gpt_worker.models import AttemptRow, DeliveryRow, JobRow
from gpt_worker.posting import Reply, Wire, post
from gpt_worker.store import deliveries as store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from tests.receiver import Answer as Says
from tests.receiver import Cut, Hang, Receiver, redirect, verified

OWNER = Caller("a" * 32, "ada@example.org", Role.USER)
OTHER = Caller("b" * 32, "bob@example.org", Role.USER)
ADMIN = Caller("c" * 32, "eve@example.org", Role.ADMIN)
PATIENCE_S = 20.0


class FakeClock:
    """A wall clock that a test turns; it starts now, since receivers look at the real one."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class WatchedDatabase(Database):
    """Tells whoever waits that something was committed."""

    def __init__(self, app: Flask, url: str) -> None:
        super().__init__(app, url)
        self._committed = threading.Condition()
        self._failures = {"read": 0, "write": 0}
        self.migrate()

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._counted("read"), super().read() as session:
            yield session

    @contextmanager
    def write(self, *, urgent: bool = False) -> Iterator[Session]:
        with self._counted("write"), super().write(urgent=urgent) as session:
            yield session
        with self._committed:
            self._committed.notify_all()

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError:
            with self._committed:
                self._failures[kind] += 1
                self._committed.notify_all()
            raise

    def wait_failures(self, kind: str, count: int) -> None:
        """Returns when so many more have failed. Raises TimeoutError."""
        with self._committed:
            enough = self._failures[kind] + count
            if not self._committed.wait_for(lambda: self._failures[kind] >= enough, PATIENCE_S):
                raise TimeoutError("the database works")

    def wait_until(self, holds: Callable[[Session], bool]) -> None:
        """Returns after the first commit that makes it so. Raises TimeoutError."""

        def look() -> bool:
            with self.read() as session:
                return holds(session)

        with self._committed:
            if not self._committed.wait_for(look, PATIENCE_S):
                raise TimeoutError("the database never got there")


class Outbox:
    """Deliveries to a receiver, and the jobs that they tell of."""

    def __init__(self, tmp_path: Path, url: str) -> None:
        self.settings = Settings.from_env(
            {
                "NODE_ENV": "test",
                "APP_KEY": "k" * 32,
                "DATA_DIR": str(tmp_path),
                "REQUEST_API": url,
                "PUBLIC_URL": "https://worker.example.org/gpt",
            }
        )
        self.database = WatchedDatabase(Flask(__name__), self.settings.database.url)
        self.clock = FakeClock()
        self.deliveries = self.make()

    def make(self, **options: Any) -> Deliveries:
        usual: dict[str, Any] = {
            "version": "1.2.3",
            "clock": self.clock,
            "jitter": lambda: 0.5,
            "pause_s": 0.01,
        }
        self.deliveries = Deliveries(self.database, self.settings, **usual | options)
        return self.deliveries

    def start(self, **options: Any) -> None:
        self.make(**options).start()

    def close(self) -> None:
        self.deliveries.stop(0)
        self.database.close()

    def finish_job(
        self, answers: dict[str, str], owner: Caller = OWNER, url: str | None = None
    ) -> tuple[str, str]:
        """A job that ends in one commit with its delivery, as the recorder does it; both ids."""
        now = self.clock()
        job = JobRow(
            id=new_id(),
            owner_id=None,
            status="succeeded",
            model="gpt-test",
            delivery="webhook",
            settings={},
            meta={"order": "7"},
            total=len(answers),
            answered=len(answers),
            results_bytes=sum(len(answer.encode()) for answer in answers.values()),
            created_at=now,
            started_at=now,
            finished_at=now,
            deadline_at=now,
        )
        with self.database.write() as session:
            job_store.add_job(session, job)
            session.flush()
            task_store.add_tasks(session, job.id, 0, [NewTask(id_, "prompt", 1) for id_ in answers])
            task_store.record_answers(
                session,
                [Outcome(job.id, at, Answer(text)) for at, text in enumerate(answers.values())],
            )
            (standing,) = job_store.standings(session, [job.id])
            owed = replace(standing, owner_id=owner.user_id)
            (delivery_id,) = store.add_job_deliveries(session, [owed], url or self.settings.request_api, now)
        self.deliveries.wake()
        return job.id, delivery_id

    def run_again(self, job_id: str) -> None:
        with self.database.write() as session:
            job = job_store.get_job(session, job_id)
            assert job is not None
            job_store.reopen(job, self.clock())

    def row(self, delivery_id: str) -> DeliveryRow:
        with self.database.read() as session:
            row = store.get_delivery(session, delivery_id)
        assert row is not None
        return row

    def attempts(self, delivery_id: str) -> list[AttemptRow]:
        return list(self.deliveries.get_delivery(delivery_id, ADMIN).attempts)

    def errors(self, delivery_id: str) -> list[tuple[int | None, str | None]]:
        return [(attempt.status_code, attempt.error) for attempt in self.attempts(delivery_id)]

    def wait_attempts(self, delivery_id: str, count: int) -> None:
        self.database.wait_until(
            lambda session: (
                (row := store.get_delivery(session, delivery_id)) is not None and row.attempts >= count
            )
        )

    def wait_status(self, delivery_id: str, status: DeliveryStatus) -> None:
        self.database.wait_until(
            lambda session: (
                (row := store.get_delivery(session, delivery_id)) is not None and row.status == status
            )
        )

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.deliveries.wake()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def outbox(tmp_path: Path, receiver: Receiver) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path, receiver.url)
    yield outbox
    receiver.release()
    outbox.close()


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """`host:port` of a server that does with each connection what the test says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if over.is_set():
                        return
                    with contextlib.suppress(OSError):
                        talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def drip(connection: socket.socket, head: bytes, drop: bytes) -> None:
    """The head, then a drop now and then until nobody is there any more."""
    connection.recv(65536)
    connection.sendall(head)
    while True:
        connection.sendall(drop)
        connection.settimeout(0.02)
        with contextlib.suppress(TimeoutError):
            if not connection.recv(65536):
                return


def swallow(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def send(url: str, deadline_s: float = 0.5) -> Reply:
    return post(url, {"content-type": "application/json"}, b"{}", wire=Wire(), deadline_s=deadline_s)


# What goes out


def test_finished_job_is_delivered_signed(outbox: Outbox, receiver: Receiver) -> None:
    outbox.start()

    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour", "bye": "À bientôt 👋"})

    [request] = receiver.wait_for(1)
    message = verified(request, outbox.settings.webhook_secret)
    assert message["type"] == "job.finished"
    assert message["timestamp"] == rendering.render_time(outbox.clock())
    assert message["data"]["id"] == job_id
    assert message["data"]["metadata"] == {"order": "7"}
    assert message["data"]["results"] == {"greet": "Bonjour", "bye": "À bientôt 👋"}
    assert message["data"]["results_url"] is None
    assert request.method == "POST"
    assert request.headers["webhook-id"] == delivery_id
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"] == "gpt-worker/1.2.3"
    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    assert outbox.errors(delivery_id) == [(200, None)]
    assert outbox.row(delivery_id).finished_at == outbox.clock()


def test_next_attempt_keeps_id_and_body_and_is_signed_anew(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(500)
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_attempts(delivery_id, 1)
    assert outbox.row(delivery_id).next_attempt_at == outbox.clock() + timedelta(seconds=5)

    outbox.pass_time(5)

    first, second = receiver.wait_for(2)
    verified(second, outbox.settings.webhook_secret)
    assert second.body == first.body
    assert second.headers["webhook-id"] == first.headers["webhook-id"] == delivery_id
    assert second.headers["webhook-timestamp"] != first.headers["webhook-timestamp"]
    assert second.headers["webhook-signature"] != first.headers["webhook-signature"]
    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    assert outbox.errors(delivery_id) == [(500, None), (200, None)]


def test_body_stays_when_the_job_changes_between_attempts(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(500)
    outbox.start()
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_attempts(delivery_id, 1)
    outbox.run_again(job_id)

    outbox.pass_time(5)

    first, second = receiver.wait_for(2)
    assert second.body == first.body


def test_long_results_are_linked_and_hashed(outbox: Outbox, receiver: Receiver) -> None:
    outbox.start()

    job_id, _ = outbox.finish_job({"long": "é" * (MAX_BODY_BYTES // 2), "empty": ""})

    [request] = receiver.wait_for(1)
    data = verified(request, outbox.settings.webhook_secret)["data"]
    assert len(request.body) < 2000
    assert (data["results"], data["errors"], data["finish_reasons"]) == (None, None, None)
    results = b"".join(rendering.results_jsonl(outbox.database, job_id))
    assert data["results_sha256"] == hashlib.sha256(results).hexdigest()
    url = urlsplit(data["results_url"])
    assert f"{url.scheme}://{url.netloc}{url.path}" == (
        f"https://worker.example.org/gpt/jobs/{job_id}/results"
    )
    query = {name: values[0] for name, values in parse_qs(url.query, strict_parsing=True).items()}
    assert query["format"] == "jsonl"
    key = signing.link_key(outbox.settings.app_key)
    assert signing.link_is_valid(key, job_id, query, outbox.clock() + timedelta(days=7, seconds=-1))
    assert not signing.link_is_valid(key, job_id, query, outbox.clock() + timedelta(days=7))


def test_body_just_under_the_limit_carries_its_results(outbox: Outbox, receiver: Receiver) -> None:
    outbox.start()
    outbox.finish_job({"long": ""})
    [short] = receiver.wait_for(1)

    outbox.finish_job({"long": "x" * (MAX_BODY_BYTES - len(short.body))})
    outbox.finish_job({"long": "x" * (MAX_BODY_BYTES - len(short.body) + 1)})

    by_size = sorted(receiver.wait_for(3)[1:], key=lambda request: len(request.body))
    assert len(by_size[1].body) == MAX_BODY_BYTES
    assert json.loads(by_size[0].body)["data"]["results_url"] is not None


def test_results_that_do_not_fit_a_job_object_are_linked(
    outbox: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MAX_RESULT_TASKS", 1)
    outbox.start()

    outbox.finish_job({"a": "1", "b": "2"})

    [request] = receiver.wait_for(1)
    data = json.loads(request.body)["data"]
    assert data["results"] is None
    assert data["results_url"].startswith("https://")


# What the receiver says


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_a_failure_and_not_followed(outbox: Outbox, receiver: Receiver, status: int) -> None:
    with Receiver() as elsewhere:
        receiver.script(redirect(elsewhere.url, status))
        outbox.start()

        _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

        outbox.wait_attempts(delivery_id, 1)
        assert elsewhere.received() == []
    assert outbox.errors(delivery_id) == [(status, None)]
    assert outbox.row(delivery_id).status == DeliveryStatus.PENDING


def test_gone_gives_up(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(410)
    outbox.start()

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    assert outbox.row(delivery_id).next_attempt_at is None
    assert outbox.errors(delivery_id) == [(410, None)]


def test_receiver_that_always_fails_is_given_up_after_eight_attempts(
    outbox: Outbox, receiver: Receiver
) -> None:
    receiver.script(*[503] * 8)
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    waits = []
    for attempt in range(1, 8):
        outbox.wait_attempts(delivery_id, attempt)
        next_attempt_at = outbox.row(delivery_id).next_attempt_at
        assert next_attempt_at is not None
        waits.append((next_attempt_at - outbox.clock()).total_seconds())
        outbox.pass_time(waits[-1])

    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    assert waits == [5, 300, 1800, 7200, 18_000, 36_000, 36_000]
    assert len(receiver.received()) == 8


def test_retry_after_is_waited_for(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Says(503, {"Retry-After": "600"}))
    outbox.start()

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_attempts(delivery_id, 1)
    assert outbox.row(delivery_id).next_attempt_at == outbox.clock() + timedelta(seconds=600)


@pytest.mark.parametrize("cut", list(Cut))
def test_receiver_that_hangs_up_is_a_failed_attempt(outbox: Outbox, receiver: Receiver, cut: Cut) -> None:
    receiver.script(cut)
    outbox.start()

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_attempts(delivery_id, 1)
    assert outbox.errors(delivery_id) == [(None, "ConnectionError")]
    assert outbox.row(delivery_id).status == DeliveryStatus.PENDING


def test_receiver_that_is_silent_is_left_after_the_deadline(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Hang())
    outbox.start(deadline_s=0.2)

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_attempts(delivery_id, 1)
    [attempt] = outbox.attempts(delivery_id)
    assert attempt.error in ("Timeout", "ReadTimeout")
    assert 0.2 <= attempt.took_s < 10


def test_other_addresses_are_not_called_in_a_test(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "http://192.0.2.1/hook")
    outbox.start()

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_attempts(delivery_id, 1)
    assert outbox.errors(delivery_id) == [
        (None, "not called: NODE_ENV=test reaches loopback addresses alone")
    ]
    outbox.close()


# One exchange


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["silence", "status line", "headers", "interim replies"],
)
def test_dripping_head_is_cut_at_the_deadline(head: bytes, drop: bytes) -> None:
    with raw_server(lambda connection: drip(connection, head, drop)) as address:
        began_s = time.monotonic()

        with pytest.raises(requests.Timeout):
            send(f"http://{address}/")

        assert time.monotonic() - began_s < 10


def test_silent_tls_handshake_is_cut_at_the_deadline() -> None:
    with raw_server(swallow) as address:
        began_s = time.monotonic()

        with pytest.raises(requests.Timeout):
            send(f"https://{address}/")

        assert time.monotonic() - began_s < 10


def test_body_that_is_never_taken_is_cut_at_the_deadline() -> None:
    over = threading.Event()

    def ignore(_connection: socket.socket) -> None:
        over.wait(PATIENCE_S)

    with raw_server(ignore) as address:
        began_s = time.monotonic()

        with pytest.raises(requests.Timeout):
            post(f"http://{address}/", {}, b"x" * (64 << 20), wire=Wire(), deadline_s=0.5)

        assert time.monotonic() - began_s < 10
        over.set()


def test_success_counts_although_its_body_drips() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    with raw_server(lambda connection: drip(connection, head, b"x")) as address:
        began_s = time.monotonic()

        reply = send(f"http://{address}/")

        assert reply.status_code == 200
        assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("status", [b"200 OK", b"302 Found\r\nlocation: /"])
def test_endless_body_is_read_to_its_bound_only(status: bytes) -> None:
    sent = []

    def flood(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
        while True:
            sent.append(connection.send(bytes(65536)))

    with raw_server(flood) as address:
        reply = send(f"http://{address}/", deadline_s=PATIENCE_S)

    assert reply.status_code == int(status[:3])
    assert sum(sent) < 32 << 20


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"transfer-encoding: identity, Chunked"])
@pytest.mark.parametrize("chunk", [b"-1\r\n", b"7fffffff\r\n"])
def test_chunks_of_a_reply_are_not_read(head: bytes, chunk: bytes) -> None:
    sent: list[int] = []

    def flood(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 503 No\r\nRetry-After: 7\r\n" + head + b"\r\n\r\n" + chunk)
        while len(sent) < 1024:
            sent.append(connection.send(bytes(65536)))

    with raw_server(flood) as address:
        reply = send(f"http://{address}/", deadline_s=PATIENCE_S)

    assert reply == Reply(503, "7")
    assert sum(sent) < 32 << 20


def test_cookie_of_one_attempt_is_not_sent_with_the_next(receiver: Receiver) -> None:
    receiver.script(Says(200, {"Set-Cookie": "taste=bitter"}))

    send(receiver.url)
    send(receiver.url)

    assert "cookie" not in receiver.received()[1].headers


def test_proxy_of_the_environment_is_used_but_for_loopback(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("http_proxy", raising=False)

        send(receiver.url)
        send("http://receiver.invalid/hook")

        assert [request.path for request in proxy.received()] == ["http://receiver.invalid/hook"]
    assert [request.path for request in receiver.received()] == ["/hook"]


# Going on


def test_what_is_owed_at_start_goes_out(outbox: Outbox, receiver: Receiver) -> None:
    delivery_ids = {outbox.finish_job({"greet": "Bonjour"})[1] for _ in range(9)}

    outbox.start()

    assert {request.headers["webhook-id"] for request in receiver.wait_for(9)} == delivery_ids


def test_schedule_continues_after_a_restart(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(500)
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_attempts(delivery_id, 1)
    outbox.deliveries.stop(5)

    outbox.start()
    early = len(receiver.received())
    outbox.pass_time(5)

    first, second = receiver.wait_for(2)
    assert early == 1
    assert second.body == first.body
    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    assert [attempt.number for attempt in outbox.attempts(delivery_id)] == [1, 2]


def test_stop_leaves_an_exchange_its_time(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Hang(0.3))
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    receiver.wait_for(1)

    outbox.deliveries.stop(PATIENCE_S)

    assert outbox.row(delivery_id).status == DeliveryStatus.DELIVERED


def test_exchange_that_stop_cuts_stays_due(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Hang())
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    receiver.wait_for(1)
    began_s = time.monotonic()

    outbox.deliveries.stop(0.1)

    assert time.monotonic() - began_s < 10
    assert not [thread for thread in threading.enumerate() if "deliver" in thread.name]
    assert outbox.errors(delivery_id) == []
    outbox.start()
    first, second = receiver.wait_for(2)
    assert (second.body, second.headers["webhook-id"]) == (first.body, delivery_id)


def test_silent_receiver_does_not_hold_up_the_other_senders(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Hang())
    outbox.start()
    outbox.finish_job({"greet": "Bonjour"})
    receiver.wait_for(1)

    others = [outbox.finish_job({"greet": "Bonjour"})[1] for _ in range(8)]

    for delivery_id in others:
        outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)


def owe(outbox: Outbox, url: str, count: int) -> None:
    for _ in range(count):
        outbox.finish_job({"greet": "Bonjour"}, url=url)


def test_receiver_that_was_there_before_and_is_silent_does_not_delay_the_new_one(
    outbox: Outbox, receiver: Receiver
) -> None:
    with Receiver([Hang()] * 30) as before:
        owe(outbox, before.url, 15)
        owe(outbox, before.url.replace("/hook", "/another-path"), 15)
        outbox.start()
        before.wait_for(SENDERS_OF_ONE)

        owe(outbox, receiver.url, 5)

        receiver.wait_for(5)
        assert len(before.received()) == SENDERS_OF_ONE
        outbox.deliveries.stop(0)


def test_receiver_that_does_not_answer_is_tried_by_one_sender_until_it_does(
    outbox: Outbox, receiver: Receiver
) -> None:
    deadline_s = 0.4
    receiver.script(*[Hang()] * 6)
    owe(outbox, receiver.url, 12)
    outbox.start(deadline_s=deadline_s)

    times_s = [request.at for request in receiver.wait_for(12)]

    tries = times_s[SENDERS_OF_ONE:6]  # after the first three, which began before anything was known
    assert all(later - earlier > 0.9 * deadline_s for earlier, later in pairwise(tries))
    assert times_s[-1] - times_s[6] < deadline_s, "once it has answered, it has its senders again"


def test_silent_receivers_together_leave_a_sender_to_others(outbox: Outbox, receiver: Receiver) -> None:
    deadline_s = 3.0
    with ExitStack() as stack:
        dead = [stack.enter_context(Receiver([Hang()] * 9)) for _ in range(SENDERS + 1)]
        outbox.start(deadline_s=0.1)
        for one in dead:
            owe(outbox, one.url, 1)
            one.wait_for(1)
        outbox.database.wait_until(lambda session: session.query(AttemptRow).count() == len(dead))
        outbox.deliveries._deadline_s = deadline_s
        for one in dead:
            owe(outbox, one.url, 1)
        for one in dead[:SENDERS_OF_ONE]:
            one.wait_for(2)
        began_s = time.monotonic()

        owe(outbox, receiver.url, 1)

        [request] = receiver.wait_for(1)
        assert request.at - began_s < deadline_s / 2
        outbox.deliveries.stop(0)


def list_due(outbox: Outbox, *, limit: int = 10, besides_urls: tuple[str, ...] = ()) -> list[str]:
    with outbox.database.read() as session:
        dues = store.list_due(session, now=outbox.clock(), besides=(), besides_urls=besides_urls, limit=limit)
    return [due.id for due in dues]


def test_first_attempts_go_before_others_and_the_longest_waiting_first(outbox: Outbox) -> None:
    ids = []
    for _ in range(4):
        ids.append(outbox.finish_job({"greet": "Bonjour"})[1])
        outbox.clock.advance(1)
    with outbox.database.write() as session:
        for number in (0, 1):
            row = store.get_delivery(session, ids[number])
            assert row is not None
            row.tries_left -= 1

    assert list_due(outbox) == [ids[2], ids[3], ids[0], ids[1]]


def test_many_that_are_due_to_one_address_hide_none_to_another(outbox: Outbox) -> None:
    owe(outbox, "http://127.0.0.1:1/dead", 50)
    _, other = outbox.finish_job({"greet": "Bonjour"}, url="http://127.0.0.1:2/hook")

    assert list_due(outbox, limit=1, besides_urls=("http://127.0.0.1:1/dead",)) == [other]


def test_delivery_is_never_sent_twice_at_a_time(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(Hang())
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    receiver.wait_for(1)

    outbox.clock.advance(1)
    outbox.deliveries.redeliver(delivery_id, OWNER)
    _, other_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_status(other_id, DeliveryStatus.DELIVERED)
    while_it_hung = [request.headers["webhook-id"] for request in receiver.received()]
    receiver.release()

    receiver.wait_for(3)
    assert while_it_hung == [delivery_id, other_id]
    outbox.wait_attempts(delivery_id, 2)
    assert outbox.errors(delivery_id) == [(200, None), (200, None)]


# Trouble of our own


def test_database_that_fails_while_recording_does_not_send_again(
    outbox: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([True, True, False])
    record = store.record_attempt

    def fail_twice(session: Session, *args: Any, **kwargs: Any) -> None:
        record(session, *args, **kwargs)
        if next(failures):
            raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    monkeypatch.setattr(store, "record_attempt", fail_twice)
    outbox.start()

    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    assert len(receiver.received()) == 1
    assert outbox.errors(delivery_id) == [(200, None)]


def test_attempt_recorded_twice_counts_once(outbox: Outbox) -> None:
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    now = outbox.clock()
    attempt = store.Attempt(now, 0.1, 500, None)

    for _ in range(2):
        with outbox.database.write() as session:
            store.record_attempt(
                session,
                store.Due(delivery_id, now, outbox.settings.request_api),
                attempt,
                ended=None,
                next_attempt_at=now + timedelta(seconds=5),
                now=now,
            )

    assert outbox.errors(delivery_id) == [(500, None)]
    assert outbox.row(delivery_id).tries_left == store.TRIES - 1


@pytest.mark.parametrize("query", ["list_due", "get_delivery", "freeze_body"])
def test_database_that_fails_before_the_attempt_only_delays_it(
    outbox: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    failures = iter([True, True])
    works = getattr(store, query)

    def fail_twice(*args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise OperationalError("SELECT", {}, Exception("disk I/O error"))
        return works(*args, **kwargs)

    outbox.finish_job({"greet": "Bonjour"})
    monkeypatch.setattr(store, query, fail_twice)

    outbox.start()

    [request] = receiver.wait_for(1)
    assert verified(request, outbox.settings.webhook_secret)["type"] == "job.finished"


def complaints(caplog: pytest.LogCaptureFixture) -> list[tuple[str, bool]]:
    """What the deliveries have logged as errors, and whether with a traceback."""
    return [
        (record.getMessage(), record.exc_info is not None)
        for record in caplog.records
        if record.name == "gpt_worker.deliveries" and record.levelno >= logging.ERROR
    ]


def test_database_that_can_not_be_written_for_long_is_told_of_in_one_line(
    outbox: Outbox, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    path, elsewhere = outbox.database.path, outbox.database.path.with_suffix(".elsewhere")
    receiver.script(Hang())
    outbox.start()
    outbox.finish_job({"greet": "Bonjour"})
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    receiver.wait_for(2)
    path.rename(elsewhere)

    receiver.release()
    outbox.database.wait_failures("write", 20)
    elsewhere.rename(path)

    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    told = "The database failed a delivery: its file was moved, deleted or replaced"
    assert complaints(caplog) == [(told, False)]


def test_database_that_can_not_be_read_for_long_is_told_of_in_one_line(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    path = outbox.database.path
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xa5" * (len(pages) - 4096))

    outbox.start()
    outbox.database.wait_failures("read", 20)

    told = "Due deliveries can't be read: database disk image is malformed"
    assert complaints(caplog) == [(told, False)]


def test_bug_of_the_deliveries_is_told_of_with_a_traceback(
    outbox: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bugs = iter([True, True])
    list_due = store.list_due

    def break_twice(*args: Any, **kwargs: Any) -> Any:
        if next(bugs, False):
            raise KeyError("due")
        return list_due(*args, **kwargs)

    monkeypatch.setattr(store, "list_due", break_twice)
    outbox.finish_job({"greet": "Bonjour"})

    outbox.start()

    receiver.wait_for(1)
    assert complaints(caplog) == [("Due deliveries can't be read", True)] * 2


def test_bug_in_rendering_is_an_attempt_and_goes_by_the_schedule(outbox: Outbox, receiver: Receiver) -> None:
    bugs = iter([True])

    def render(database: Database, settings: Settings, delivery: DeliveryRow, now: datetime) -> str:
        if next(bugs, False):
            raise KeyError("results")
        return render_body(database, settings, delivery, now)

    outbox.start(render=render)
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_attempts(delivery_id, 1)
    assert outbox.row(delivery_id).status == DeliveryStatus.PREPARING

    outbox.pass_time(5)

    receiver.wait_for(1)
    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    assert outbox.errors(delivery_id) == [(None, "KeyError"), (200, None)]


# The job goes its own way


def test_delivery_of_a_purged_job_is_dropped(outbox: Outbox, receiver: Receiver) -> None:
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    with outbox.database.write() as session:
        job_store.discard(session, job_id)

    outbox.start()

    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    assert outbox.errors(delivery_id) == [(None, "given up: the job was deleted")]
    assert receiver.received() == []


def test_delivery_never_tells_of_another_run(outbox: Outbox, receiver: Receiver) -> None:
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    def render(database: Database, settings: Settings, delivery: DeliveryRow, now: datetime) -> str:
        body = render_body(database, settings, delivery, now)
        outbox.run_again(job_id)
        return body

    outbox.start(render=render)

    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    assert receiver.received() == []


def test_delivery_of_a_job_that_was_run_again_says_why_it_is_dropped(outbox: Outbox) -> None:
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.run_again(job_id)

    outbox.start()

    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    assert outbox.errors(delivery_id) == [
        (None, "given up: the job was run again before its webhook was made")
    ]


def test_freezing_what_is_owed_lets_a_new_run_begin(outbox: Outbox, receiver: Receiver) -> None:
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    outbox.deliveries.freeze_owed(job_id)

    with outbox.database.read() as session:
        assert not store.unfrozen_of_job(session, job_id)
    outbox.run_again(job_id)
    outbox.start()
    [request] = receiver.wait_for(1)
    data = json.loads(request.body)["data"]
    assert (data["run"], data["status"]) == (1, "succeeded")
    assert request.headers["webhook-id"] == delivery_id


def test_purge_takes_bodies_along_and_gives_up_what_is_owed(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(500)
    outbox.start()
    job_id, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_attempts(delivery_id, 1)

    with outbox.database.write() as session:
        store.drop_for_job(session, job_id)
        job_store.discard(session, job_id)

    row = outbox.row(delivery_id)
    assert (row.status, row.body, row.next_attempt_at) == (DeliveryStatus.FAILED, None, None)
    assert outbox.errors(delivery_id) == [(500, None), (None, "given up: the job was deleted")]
    with pytest.raises(Conflict):
        outbox.deliveries.redeliver(delivery_id, OWNER)


# By hand


def test_redelivery_has_the_same_id_and_body_and_a_fresh_schedule(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(410)
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    outbox.clock.advance(60)
    receiver.script(500)

    record = outbox.deliveries.redeliver(delivery_id, OWNER)

    assert (record.delivery.status, record.delivery.tries_left) == (DeliveryStatus.PENDING, store.TRIES)
    assert record.delivery.next_attempt_at == outbox.clock()
    first, second = receiver.wait_for(2)
    assert second.body == first.body
    assert second.headers["webhook-id"] == first.headers["webhook-id"]
    outbox.wait_attempts(delivery_id, 2)
    assert outbox.row(delivery_id).next_attempt_at == outbox.clock() + timedelta(seconds=5)
    assert [attempt.number for attempt in outbox.attempts(delivery_id)] == [1, 2]


def test_redelivery_goes_to_where_webhooks_go_now(outbox: Outbox, receiver: Receiver) -> None:
    receiver.script(410)
    outbox.start()
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})
    outbox.wait_status(delivery_id, DeliveryStatus.FAILED)
    outbox.deliveries.stop(5)
    outbox.clock.advance(1)

    with Receiver() as elsewhere:
        outbox.settings = replace(outbox.settings, request_api=elsewhere.url)
        outbox.start()
        outbox.deliveries.redeliver(delivery_id, OWNER)

        assert elsewhere.wait_for(1)[0].headers["webhook-id"] == delivery_id
        outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)


def test_test_message_is_small_and_signed(outbox: Outbox, receiver: Receiver) -> None:
    outbox.start()

    record = outbox.deliveries.send_test(ADMIN)

    [request] = receiver.wait_for(1)
    message = verified(request, outbox.settings.webhook_secret)
    assert message["type"] == record.delivery.type == "webhook.test"
    assert message["data"].keys() == {"message"}
    assert request.headers["webhook-id"] == record.delivery.id


def test_delivery_is_shown_to_its_owner_and_to_admins(outbox: Outbox) -> None:
    _, delivery_id = outbox.finish_job({"greet": "Bonjour"})

    assert outbox.deliveries.get_delivery(delivery_id, OWNER).delivery.id == delivery_id
    assert outbox.deliveries.get_delivery(delivery_id, ADMIN).delivery.id == delivery_id
    with pytest.raises(NotFound):
        outbox.deliveries.get_delivery(delivery_id, OTHER)
    with pytest.raises(NotFound):
        outbox.deliveries.redeliver(delivery_id, OTHER)


def test_list_is_ones_own_newest_first_a_page_at_a_time(outbox: Outbox) -> None:
    own = sorted((outbox.finish_job({"a": "1"})[1] for _ in range(3)), reverse=True)
    foreign = outbox.finish_job({"a": "1"}, owner=OTHER)[1]

    first, cursor = outbox.deliveries.list_deliveries(OWNER, limit=2)
    second, end = outbox.deliveries.list_deliveries(OWNER, limit=2, before=cursor)
    everything, _ = outbox.deliveries.list_deliveries(ADMIN, everyone=True)

    assert [record.delivery.id for record in first + second] == own
    assert (cursor, end) == (own[1], None)
    assert {record.delivery.id for record in everything} == {*own, foreign}
    assert outbox.deliveries.list_deliveries(ADMIN) == ([], None)
    with pytest.raises(Forbidden):
        outbox.deliveries.list_deliveries(OWNER, everyone=True)


def test_list_can_be_narrowed_to_a_job_or_a_status(outbox: Outbox) -> None:
    job_id, delivery_id = outbox.finish_job({"a": "1"})
    outbox.finish_job({"a": "1"})

    of_job, _ = outbox.deliveries.list_deliveries(OWNER, job_id=job_id)
    delivered, _ = outbox.deliveries.list_deliveries(OWNER, status=DeliveryStatus.DELIVERED)

    assert [record.delivery.id for record in of_job] == [delivery_id]
    assert delivered == []


def test_old_deliveries_are_deleted_with_their_attempts(outbox: Outbox, receiver: Receiver) -> None:
    outbox.start()
    ended = [outbox.finish_job({"a": "1"})[1] for _ in range(3)]
    for delivery_id in ended:
        outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)
    receiver.script(500)
    _, owed = outbox.finish_job({"a": "1"})
    outbox.wait_attempts(owed, 1)
    later = outbox.clock() + timedelta(days=30)

    with outbox.database.write() as session:
        deleted = [store.prune(session, later, limit=2) for _ in range(3)]

    assert deleted == [2, 1, 0]
    with outbox.database.read() as session:
        assert store.count_by_status(session) == {
            DeliveryStatus.PREPARING: 0,
            DeliveryStatus.PENDING: 1,
            DeliveryStatus.DELIVERED: 0,
            DeliveryStatus.FAILED: 0,
        }
        assert [attempt.delivery_id for attempt in session.query(AttemptRow)] == [owed]


# Over HTTP


@pytest.fixture
def client(outbox: Outbox) -> FlaskClient:
    app = OpenAPI(__name__)
    problems.install(app)
    app.extensions["gpt_worker"] = SimpleNamespace(settings=outbox.settings, deliveries=outbox.deliveries)

    @app.before_request
    def admit() -> None:
        g.caller = OWNER

    app.register_api(webhooks.api)
    return app.test_client()


def signed(outbox: Outbox, body: bytes) -> dict[str, str]:
    now = outbox.clock()
    secret = signing.secret_bytes(outbox.settings.webhook_secret)
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(signing.timestamp(now)),
        "webhook-signature": signing.sign(secret, "msg_1", now, body),
    }


def test_delivery_object_has_the_members_of_the_contract(outbox: Outbox, client: FlaskClient) -> None:
    job_id, delivery_id = outbox.finish_job({"a": "1"})

    reply = client.get(f"/deliveries/{delivery_id}")

    now = rendering.render_time(outbox.clock())
    assert reply.json == {
        "id": delivery_id,
        "job_id": job_id,
        "run": 1,
        "type": "job.finished",
        "url": outbox.settings.request_api,
        "status": "preparing",
        "attempts": [],
        "next_attempt_at": now,
        "created_at": now,
        "finished_at": None,
    }
    assert client.get("/deliveries").json == {"data": [reply.json], "next_cursor": None}


def test_attempts_stand_in_the_delivery_object(outbox: Outbox, client: FlaskClient) -> None:
    _, delivery_id = outbox.finish_job({"a": "1"})
    outbox.start()
    outbox.wait_status(delivery_id, DeliveryStatus.DELIVERED)

    reply = client.get(f"/deliveries/{delivery_id}")

    assert reply.json is not None
    [attempt] = reply.json["attempts"]
    assert attempt.pop("took_s") > 0
    assert attempt == {
        "number": 1,
        "sent_at": rendering.render_time(outbox.clock()),
        "status_code": 200,
        "error": None,
    }


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "status=lost", "cursor=1", "colour=red", "job_id=x"]
)
def test_odd_query_is_refused(client: FlaskClient, query: str) -> None:
    assert client.get(f"/deliveries?{query}").status_code == 422


def test_redelivery_and_test_are_accepted(outbox: Outbox, client: FlaskClient) -> None:
    _, delivery_id = outbox.finish_job({"a": "1"})

    again, test = client.post(f"/deliveries/{delivery_id}/redeliver"), client.post("/webhooks/test")

    assert (again.status_code, test.status_code) == (202, 202)
    assert again.json is not None
    assert again.json["id"] == delivery_id
    assert test.json is not None
    assert (test.json["type"], test.json["job_id"], test.json["run"]) == ("webhook.test", None, None)
    assert client.post("/deliveries/msg_none/redeliver").status_code == 404


def test_secret_is_the_one_that_signs(outbox: Outbox, client: FlaskClient) -> None:
    assert client.get("/webhooks/secret").json == {"secret": outbox.settings.webhook_secret}


def test_echo_answers_with_what_was_signed(outbox: Outbox, client: FlaskClient) -> None:
    body = '{"data":{"results":{"bye":"À bientôt 👋"}}}'.encode()

    reply = client.post("/", data=body, headers=signed(outbox, body))

    assert (reply.status_code, reply.data, reply.mimetype) == (200, body, "application/json")


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_echo_refuses_what_is_not_signed(outbox: Outbox, client: FlaskClient, missing: str) -> None:
    headers = signed(outbox, b"{}")
    del headers[missing]

    assert client.post("/", data=b"{}", headers=headers).status_code == 401


def test_echo_refuses_another_body(outbox: Outbox, client: FlaskClient) -> None:
    assert client.post("/", data=b"[]", headers=signed(outbox, b"{}")).status_code == 401


def test_echo_reads_no_more_than_the_limit(outbox: Outbox, client: FlaskClient) -> None:
    body = b"x" * (outbox.settings.max_json_bytes + 1)

    reply = client.post("/", data=body, headers=signed(outbox, body))

    assert reply.status_code == 413
    assert reply.json is not None
    assert "MAX_JSON_BYTES" in reply.json["detail"]
