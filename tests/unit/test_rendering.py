"""A job as the outside sees it, on a real SQLite file."""

import csv
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gpt_worker import rendering
from gpt_worker.db import Database
from gpt_worker.domain import Answer, ErrorCode, Failure, JobStatus, Outcome
from gpt_worker.errors import NotFound
from gpt_worker.models import JobRow
from gpt_worker.rendering import PAGE_TASKS, render_job, render_time
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.jobs import JobProgress
from tests import factories

LATE = Failure(ErrorCode.TIMEOUT, "no whole reply within 5 s")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


def decide(database: Database, job: JobRow, decisions: dict[int, Answer | Failure]) -> None:
    outcomes = [Outcome(job.id, position, decision, attempts=2) for position, decision in decisions.items()]
    with database.write() as session:
        progress = JobProgress(
            answered=task_store.record_answers(session, outcomes),
            failed=task_store.record_failures(session, outcomes),
        )
        job_store.add_progress(session, {job.id: progress})


def rendered(database: Database, job: JobRow, *, with_results: bool = True, **changes: Any) -> dict[str, Any]:
    with database.read() as session:
        row = job_store.get_job(session, job.id)
        assert row is not None
        for name, value in changes.items():
            setattr(row, name, value)
        return render_job(session, row, with_results=with_results)


def text(chunks: Iterator[bytes]) -> str:
    return b"".join(chunks).decode()


@pytest.fixture
def job(database: Database) -> JobRow:
    """Four tasks: answered, cut by its length, failed, not decided."""
    stored = factories.store_job(database=database, ids=["z", "a", "ü", "last"], status=JobStatus.RUNNING)
    decide(database, stored, {0: Answer("Bonjour"), 1: Answer("Bon", "length"), 2: LATE})
    return stored


@pytest.mark.parametrize(
    ("moment", "shown"),
    [
        (None, None),
        (datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC), "2026-01-31T12:00:00.000Z"),
        (datetime(2026, 1, 31, 12, 0, 0, 123_999, tzinfo=UTC), "2026-01-31T12:00:00.123Z"),
        (datetime(2026, 1, 31, 12, tzinfo=timezone(timedelta(hours=2))), "2026-01-31T10:00:00.000Z"),
    ],
)
def test_times_are_utc_with_milliseconds(moment: datetime | None, shown: str | None) -> None:
    assert render_time(moment) == shown


def test_job_holds_every_id_in_the_order_of_its_data(database: Database, job: JobRow) -> None:
    shown = rendered(database, job)

    assert list(shown["results"].items()) == [("z", "Bonjour"), ("a", "Bon"), ("ü", None), ("last", None)]
    assert shown["errors"] == {"ü": {"code": "timeout", "message": LATE.message, "attempts": 2}}
    assert shown["finish_reasons"] == {"a": "length"}
    assert shown["counts"] == {"total": 4, "answered": 2, "failed": 1, "pending": 1}
    assert shown["results_url"] is None


def test_job_has_the_members_of_the_contract(database: Database, job: JobRow) -> None:
    assert list(rendered(database, job)) == [
        "id",
        "status",
        "run",
        "model",
        "delivery",
        "owner",
        "metadata",
        "waiting",
        "counts",
        "usage",
        "results",
        "errors",
        "finish_reasons",
        "results_url",
        "created_at",
        "started_at",
        "finished_at",
    ]


def test_results_may_be_left_out(database: Database, job: JobRow) -> None:
    shown = rendered(database, job, with_results=False)

    assert (shown["results"], shown["errors"], shown["finish_reasons"]) == (None, None, None)
    assert shown["results_url"] is None


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"total": 10_000}, True),
        ({"total": 10_001}, False),
        ({"results_bytes": 8 << 20}, True),
        ({"results_bytes": (8 << 20) + 1}, False),
    ],
)
def test_large_results_are_somewhere_else(
    database: Database, job: JobRow, changes: dict[str, Any], fits: bool
) -> None:
    shown = rendered(database, job, **changes)

    assert (shown["results"] is not None) is fits
    assert shown["results_url"] == (None if fits else f"/jobs/{job.id}/results")


def test_owner_is_shown_by_address(database: Database) -> None:
    owner_id = factories.store_user(database=database, email="ada@example.org")

    shown = rendered(database, factories.store_job(database=database, owner_id=owner_id))

    assert shown["owner"] == "ada@example.org"


def test_ownerless_job_has_no_owner(database: Database, job: JobRow) -> None:
    assert rendered(database, job)["owner"] is None


def test_empty_answer_is_an_answer(database: Database) -> None:
    job = factories.store_job(database=database, ids=["a"])
    decide(database, job, {0: Answer("")})

    assert rendered(database, job)["results"] == {"a": ""}


def test_jsonl_tells_what_is_decided(database: Database, job: JobRow) -> None:
    lines = text(rendering.results_jsonl(database, job.id)).splitlines()

    assert [json.loads(line) for line in lines] == [
        {"id": "z", "result": "Bonjour", "error": None, "finish_reason": "stop"},
        {"id": "a", "result": "Bon", "error": None, "finish_reason": "length"},
        {
            "id": "ü",
            "result": None,
            "error": {"code": "timeout", "message": LATE.message, "attempts": 2},
            "finish_reason": None,
        },
    ]


def test_json_tells_every_id(database: Database, job: JobRow) -> None:
    shown = json.loads(text(rendering.results_json(database, job.id)))

    assert list(shown["results"].items()) == [("z", "Bonjour"), ("a", "Bon"), ("ü", None), ("last", None)]
    assert shown["errors"] == {"ü": {"code": "timeout", "message": LATE.message, "attempts": 2}}


def test_csv_tells_what_is_decided(database: Database, job: JobRow) -> None:
    rows = list(csv.reader(io.StringIO(text(rendering.results_csv(database, job.id)))))

    assert rows == [
        ["id", "result", "error_code", "finish_reason"],
        ["z", "Bonjour", "", "stop"],
        ["a", "Bon", "", "length"],
        ["ü", "", "timeout", ""],
    ]


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_csv_runs_no_formula(database: Database, cell: str) -> None:
    job = factories.store_job(database=database, ids=[cell])
    decide(database, job, {0: Answer(cell)})

    rows = list(csv.reader(io.StringIO(text(rendering.results_csv(database, job.id)))))

    assert rows[1][:2] == [f"'{cell}", f"'{cell}"]


@pytest.mark.parametrize(
    "odd", ['a "quoted", text', "two\nlines", "\r\n", "\u2028", "👋", "a\\b", "</script>"]
)
def test_odd_text_survives_every_form(database: Database, odd: str) -> None:
    job = factories.store_job(database=database, ids=[odd])
    decide(database, job, {0: Answer(odd)})

    as_json = json.loads(text(rendering.results_json(database, job.id)))
    as_jsonl = json.loads(text(rendering.results_jsonl(database, job.id)))
    as_csv = list(csv.reader(io.StringIO(text(rendering.results_csv(database, job.id)), newline="")))

    assert as_json["results"] == {odd: odd}
    assert (as_jsonl["id"], as_jsonl["result"]) == (odd, odd)
    assert as_csv[1][:2] == [odd, odd]


@pytest.mark.parametrize("count", [PAGE_TASKS - 1, PAGE_TASKS, PAGE_TASKS + 1])
def test_no_task_falls_between_two_pages(database: Database, count: int) -> None:
    job = factories.store_job(database=database, tasks=count)
    decide(database, job, {position: Answer(str(position)) for position in range(count)})

    lines = text(rendering.results_jsonl(database, job.id)).splitlines()

    assert [json.loads(line)["result"] for line in lines] == [str(position) for position in range(count)]
    assert len(json.loads(text(rendering.results_json(database, job.id)))["results"]) == count
    assert text(rendering.results_csv(database, job.id)).count("\r\n") == count + 1


def test_job_without_decisions_streams_nothing_but_its_frame(database: Database) -> None:
    job = factories.store_job(database=database, ids=["a"])

    assert text(rendering.results_jsonl(database, job.id)) == ""
    assert text(rendering.results_csv(database, job.id)) == "id,result,error_code,finish_reason\r\n"
    assert json.loads(text(rendering.results_json(database, job.id))) == {
        "results": {"a": None},
        "errors": {},
    }


@pytest.mark.parametrize("form", [rendering.results_jsonl, rendering.results_json, rendering.results_csv])
def test_no_page_holds_more_than_it_may_of_long_answers(
    database: Database, monkeypatch: pytest.MonkeyPatch, form: Callable[[Database, str], Iterator[bytes]]
) -> None:
    monkeypatch.setattr(rendering, "PAGE_CHARACTERS", 10_000)
    monkeypatch.setattr(rendering, "PIECE_CHARACTERS", 2000)
    lengths = [10] * 500 + [1000] * 30 + [30_000] * 3 + [10] * 500
    job = factories.store_job(database=database, tasks=len(lengths))
    decide(database, job, {place: Answer("ü" * length) for place, length in enumerate(lengths)})
    read: list[int] = []  # answers' characters, by page

    def note(stored: bytes) -> str:
        found = stored.decode()
        read[-1] += found.count("ü")
        return found

    @event.listens_for(database._engine, "checkout")
    def checkout(connection: sqlite3.Connection, *_others: object) -> None:
        connection.text_factory = note
        read.append(0)

    pieces = [*form(database, job.id)]

    shown = b"".join(pieces).decode()
    assert shown.count("ü") == sum(lengths)
    assert max(read) < 10_000 + 30_000
    assert max(map(len, pieces)) < 2 * (2000 + 30_000 + 1000)


@pytest.mark.parametrize("form", [rendering.results_json, rendering.results_jsonl, rendering.results_csv])
def test_results_break_off_when_the_job_is_deleted_meanwhile(
    database: Database, form: Callable[[Database, str], Iterator[bytes]]
) -> None:
    large = factories.store_job(database=database, tasks=2 * PAGE_TASKS)
    decide(database, large, {position: Answer("x" * 1000, "stop") for position in range(2 * PAGE_TASKS)})
    pieces = form(database, large.id)
    next(pieces)

    with database.write() as session:
        job_store.discard(session, large.id)

    with pytest.raises(NotFound):
        list(pieces)
