"""PostgreSQL and MariaDB that stop, fall silent, cut their connections or refuse, under the real service.

Nothing accepted is lost, nothing is asked twice in vain, and the service goes on by itself when its server can. The
faults are real: the server is stopped or killed, its connections are ended, the network between falls silent.
That ordinary work is the same on every database is told by the tests that are marked `every_database`.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event, func, select

from gpt_worker.db import Database
from gpt_worker.domain import Answer, DeliveryMode, ErrorCode, Failure, NewTask
from gpt_worker.models import DeliveryRow, JobRow, ResultFileRow
from gpt_worker.recorder import Recorder
from gpt_worker.store import tasks as task_store
from tests import factories
from tests.link import Link
from tests.servers import Server, query
from tests.service import Env
from tests.stand import Stand, asked_otherwise, assert_refused
from tests.upstream import Fault, FaultKind

pytestmark = pytest.mark.services


# A server that goes and comes back


@pytest.mark.parametrize("end", [Server.stop, Server.crash])
def test_job_outlives_its_database_server(
    stand: Stand, server: Server, end: Callable[[Server], None]
) -> None:
    stand.begin()
    token = stand.admin

    end(server)

    assert "database" in stand.wait_unready().lower()
    stand.wait_until_nothing_is_sent()
    asked = len(stand.upstream.calls())
    for _ in range(2):
        assert_refused(stand.submit(["more"], token=token))
        assert_refused(stand.get("/jobs", token))
        assert stand.get("/healthz").status_code == 200
        assert stand.get("/metrics", token).status_code in (200, 503)
    assert len(stand.upstream.calls()) == asked
    server.start()
    stand.assert_ends_as_if_nothing_had_been()
    assert stand.submit(["more"]).json()["status"] == "succeeded"
    stand.assert_ends_well()


def test_service_that_stops_without_its_server_asks_again_only_what_it_could_not_store(
    stand: Stand, server: Server
) -> None:
    stand.begin()
    server.stop()
    stand.wait_unready()
    stand.wait_until_nothing_is_sent()

    assert stand.terminate() == 0

    server.start()
    stored = {id_ for (id_,) in query(stand, "SELECT id FROM tasks WHERE state = 1")}
    sent = {call.user_text for call in stand.upstream.calls()}
    stand.start()
    assert stand.wait_finished(stand.job_id, 60)["status"] == "succeeded"
    asked = asked_otherwise(stand.upstream, stand.data.values())
    assert asked == {text: 2 for id_, text in stand.data.items() if text in sent and id_ not in stored}
    stand.assert_ends_well()


def test_connections_that_are_ended_cost_nothing(stand: Stand, server: Server) -> None:
    for key in stand.upstream.keys:
        stand.upstream.set_key(key, latency_s=0.1)
    stand.begin()
    token = stand.admin
    all_calls = len(stand.data) + 1

    for _ in range(5):
        stand.wait_until(lambda: server.cut_all() > 0)
        before = len(stand.upstream.calls())
        reply = stand.get(f"/jobs/{stand.job_id}", token)
        assert reply.status_code in (200, 503), reply.text
        stand.upstream.wait_for_calls(min(before + 10, all_calls), 60)

    stand.assert_ends_as_if_nothing_had_been()
    stand.assert_ends_well()


def test_silent_network_is_outlived(linked: Stand, link: Link) -> None:
    linked.begin()

    link.silence()

    assert linked.get("/healthz", timeout=10).status_code == 200
    linked.wait_until_nothing_is_sent()
    link.restore()
    linked.assert_ends_as_if_nothing_had_been()
    linked.assert_ends_well()


# What a server refuses


@pytest.mark.parametrize("refusal", [Server.read_only, Server.other_password])
def test_server_that_refuses_for_a_while_costs_nothing(
    stand: Stand, server: Server, refusal: Callable[[Server], AbstractContextManager[None]]
) -> None:
    stand.begin()
    token = stand.admin

    with refusal(server):
        assert "database" in stand.wait_unready().lower()
        stand.wait_until_nothing_is_sent()
        asked = len(stand.upstream.calls())
        assert_refused(stand.submit(["more"], token=token))
        assert stand.get("/healthz").status_code == 200
        assert len(stand.upstream.calls()) == asked

    stand.assert_ends_as_if_nothing_had_been()
    stand.assert_ends_well()


@pytest.mark.parametrize("table", ["jobs", "tasks", "owners"])
def test_table_that_another_program_has_locked_costs_nothing(
    stand: Stand, server: Server, table: str
) -> None:
    stand.begin()

    with server.table_locked(stand, table):
        assert stand.get("/healthz").status_code == 200
        stand.wait_until_nothing_is_sent()

    stand.assert_ends_as_if_nothing_had_been()
    stand.assert_ends_well()


def test_text_larger_than_a_packet_is_refused_and_what_is_smaller_is_stored(
    stand: Stand, server: Server
) -> None:
    if server.name != "mysql":
        pytest.skip("it has no such limit")
    ((usual,),) = server.ask("SELECT @@GLOBAL.max_allowed_packet")
    stand.upstream.add_fault(Fault(kind=FaultKind.HUGE_BODY, size_bytes=3 << 20, contains="too much"))
    stand.upstream.add_fault(
        Fault(kind=FaultKind.HUGE_BODY, size_bytes=300 << 10, contains="much", times=None)
    )
    server.ask("SET GLOBAL max_allowed_packet = 1048576")
    try:
        stand.start()
        answered = stand.submit(["too much", *(["much"] * 20)]).json()
        refused = stand.submit(["small", "x" * (2 << 20)], prefer="respond-async")
        lines = "".join(
            json.dumps({"id": f"id {size}", "text": "y" * size}) + "\n" for size in (9, 2 << 20, 10)
        )
        file = {"Content-Type": "application/jsonl", "Prefer": "respond-async"}
        refused_file = stand.post("/jobs", stand.admin, data=lines, headers=file)
        many = stand.submit([f"{number} " + "x" * 2000 for number in range(2000)]).json()
        assert stand.readiness()[0] == 200
    finally:
        server.ask(f"SET GLOBAL max_allowed_packet = {usual}")

    assert answered["counts"] == {"total": 21, "answered": 20, "failed": 1, "pending": 0}
    assert "larger than the database takes" in answered["errors"]["0"]["message"]
    for reply, task in ((refused, "1"), (refused_file, f"id {2 << 20}")):
        assert reply.status_code == 413, reply.text
        assert f"The prompt of the task '{task}' is too large." in reply.json()["detail"]
        assert "max_allowed_packet" in reply.json()["detail"]
    assert many["counts"]["answered"] == 2000
    stand.assert_ends_well()


# What is read at once


def connect(database: Env, folder: Path) -> Database:
    env = {name: value for name, value in database.items() if value is not None}
    made = Database(Flask("test"), factories.settings(data_dir=folder, **env).database.url)
    made.migrate()
    return made


def test_server_is_asked_for_no_more_rows_than_a_page_may_hold(database: Env, tmp_path: Path) -> None:
    made = connect(database, tmp_path)
    sent: list[int] = []  # rows, by statement

    @event.listens_for(made._engine, "after_cursor_execute")
    def after_cursor_execute(_connection: object, cursor: Any, *_others: object) -> None:
        sent.append(cursor.rowcount)

    job = factories.store_job(database=made, tasks=0)
    tasks = [NewTask(str(place), "a" * 4000, 5) for place in range(30)]
    answers = [
        factories.outcome(job_id=job.id, position=place, decision=Answer("ü" * 4000)) for place in range(20)
    ]
    with made.write() as session:
        task_store.add_tasks(session, job.id, 0, tasks)
        task_store.record_answers(session, answers)
    with made.read() as session:
        pending = task_store.pending_page(session, job.id, 24, 500, 3000)
        sent_pending = sent[-1]
        results = task_store.results_page(session, job.id, 9, 1000, 40_000)
        sent_results = sent[-1]
        last = task_store.results_page(session, job.id, 18, 1000, 40_000)
    made.close()

    assert [task.position for task in pending.tasks] == [25, 26, 27]
    assert [task.position for task in results.tasks] == [*range(10, 10 + sent_results)]
    assert (sent_pending, sent_results) in {(3, 10), (3, 5)}  # MySQL tells bytes
    assert (pending.more, results.more, len(last.tasks), last.more) == (True, True, 11, False)


# What is stored at once


def test_many_jobs_that_end_together_are_stored_by_few_statements(database: Env, tmp_path: Path) -> None:
    made = connect(database, tmp_path)
    small = [factories.store_job(database=made, delivery=DeliveryMode.WEBHOOK) for _ in range(40)]
    large = factories.store_job(database=made, tasks=30)
    again = factories.store_job(database=made, tasks=2)
    recorder = Recorder(made, "http://127.0.0.1:9/hook")
    ended: list[str] = []
    recorder.on_ended = lambda job_id, _run: ended.append(job_id)
    late = Failure(ErrorCode.TIMEOUT, "no whole reply")
    for number, job in enumerate(small):
        recorder.job_started(job.id)
        recorder.put(factories.outcome(job_id=job.id, decision=late if number % 2 else Answer(f"{number} ü")))
    for position in range(30):
        recorder.put(factories.outcome(job_id=large.id, position=position, decision=Answer(f"{position}")))
    for position in range(2):
        recorder.put(factories.outcome(job_id=again.id, position=position, decision=None, attempts=7))
    statements: list[str] = []

    @event.listens_for(made._engine, "before_cursor_execute")
    def before_cursor_execute(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        statements.append(statement)

    recorder.start()
    assert recorder.stop(20.0)

    assert len(statements) < 25
    assert (recorder.commits, ended) == (1, [*(job.id for job in small), large.id])
    with made.read() as session:
        rows = {row.id: row for row in session.scalars(select(JobRow))}
        tasks = task_store.results_page(session, large.id, -1, 100).tasks
        tried = task_store.results_page(session, again.id, -1, 100).tasks
        webhooks = session.scalar(select(func.count()).select_from(DeliveryRow))
        files = session.scalar(select(func.count()).select_from(ResultFileRow))
    made.close()
    assert [rows[job.id].status for job in small] == ["succeeded", "failed"] * 20
    assert all(rows[job.id].started_at and rows[job.id].requests == 1 for job in small)
    assert (rows[large.id].status, rows[large.id].answered, rows[large.id].requests) == ("succeeded", 30, 30)
    assert [task.answer for task in tasks] == [str(position) for position in range(30)]
    assert [task.attempts for task in tried] == [7, 7]
    assert (webhooks, files) == (40, 41)
