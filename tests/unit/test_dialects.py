"""Every statement and every migration, in the words of all five databases.

What PostgreSQL and MariaDB make of it is known from the tests on real servers. For SQL Server and Oracle, which no test
can run, this is all: SQLAlchemy has words for each statement, and none that is known to be wrong there.
"""

import importlib.util
import inspect
import io
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import ClauseElement, Dialect, event, insert
from sqlalchemy.dialects import mssql, mysql, oracle, postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateIndex, CreateTable

import gpt_worker.migrations.repeatable  # noqa: F401 (the steps of MySQL and Oracle, as env.py has them)
from gpt_worker.db import MIGRATIONS, Database
from gpt_worker.domain import (
    Answer,
    Caller,
    DeliveryStatus,
    ErrorCode,
    Failure,
    FileState,
    JobStatus,
    NewTask,
    Role,
    new_id,
    utc_now,
)
from gpt_worker.models import Base, IdempotencyRow, JobRow, LoginFailureRow, TokenRow, UserRow
from gpt_worker.store import accounts, bulk, deliveries, jobs, modes, owners, result_files, tasks
from gpt_worker.store.deliveries import Attempt, Due
from gpt_worker.store.jobs import JobProgress
from gpt_worker.store.result_files import OwedFile
from tests import factories

DIALECTS: dict[str, Callable[[], Dialect]] = {
    "sqlite": sqlite.dialect,
    "pgsql": postgresql.dialect,
    "mysql": mysql.dialect,
    "mssql": mssql.dialect,
    "oracle": oracle.dialect,
}
# What SQLAlchemy would write, and the database would not take.
WRONG = {
    "sqlite": r"$^",
    "pgsql": r"$^",
    "mysql": r"\bRETURNING\b|\bFULL OUTER\b",
    "mssql": r"\bLIMIT\b|SELECT EXISTS|\bIS [01]\b|\bFOR UPDATE\b|\btrue\b|\bfalse\b",
    "oracle": r"\bLIMIT\b|SELECT EXISTS|\bIS [01]\b|\btrue\b|\bfalse\b",
}
STORE = (accounts, bulk, deliveries, jobs, modes, owners, result_files, tasks)
NOW = utc_now()
ADMIN = Caller("a" * 32, "ada@example.org", Role.ADMIN)
FAILURE = Failure(ErrorCode.TIMEOUT, "too late")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


def make_calls(
    database: Database,
) -> dict[Callable[..., Any], tuple[Any, ...] | dict[str, Any] | Callable[[Session], Any]]:
    """How to call each query, so that it runs every statement it has."""
    user_id = factories.store_user(database=database)
    heir_id = factories.store_user(database=database, email="eve@example.org")
    job = factories.store_job(database=database, tasks=4, owner_id=user_id)
    gone = factories.store_job(database=database, tasks=0, owner_id=user_id)
    ended = factories.store_job(database=database, tasks=0)
    due = Due("msg", NOW, "http://x/")
    attempt = Attempt(NOW, 0.1, 200, None)
    file = OwedFile(job.id, 1, FileState.PENDING, 0)
    claim = IdempotencyRow(user_key="", key_hash="k", request_hash="r", job_id=None, created_at=NOW)
    outcomes = [
        factories.outcome(job_id=job.id, position=0, decision=decision)
        for decision in (Answer(""), FAILURE, None)
    ]
    delivery_id = ""

    def add_deliveries(session: Session) -> None:
        nonlocal delivery_id
        (delivery_id,) = deliveries.add_job_deliveries(session, jobs.standings(session, [job.id]), "u", NOW)
        session.flush()
        session.commit()

    def with_delivery(use: Callable[[Session, Any], object]) -> Callable[[Session], object]:
        return lambda session: use(session, deliveries.get_delivery(session, delivery_id))

    def with_job(use: Callable[[Session, JobRow], object]) -> Callable[[Session], object]:
        def run(session: Session) -> object:
            row = jobs.get_job(session, job.id)
            assert row is not None
            return use(session, row)

        return run

    page: dict[str, Any] = {"before": "f" * 32, "limit": 3}
    besides = {"besides": ["a", "b"], "besides_urls": ["u"]}
    return {
        accounts.any_user: (),
        accounts.add_user: (
            UserRow(id=new_id(), email="x@y", password_hash="-", role="user", disabled=False, created_at=NOW),
        ),
        accounts.find_user: (user_id,),
        accounts.find_user_by_email: ("x@y",),
        accounts.list_users: page,
        accounts.count_other_admins: (user_id,),
        accounts.add_token: (TokenRow(id="t", user_id=user_id, name="n", created_at=NOW, expires_at=NOW),),
        accounts.find_token: ("t",),
        accounts.list_api_tokens: lambda session: accounts.list_api_tokens(
            session, user_id, before="f", limit=3
        ),
        accounts.delete_token: (user_id, "t"),
        accounts.delete_tokens: lambda session: accounts.delete_tokens(session, user_id, but="t"),
        accounts.delete_expired_tokens: (NOW,),
        accounts.save_login_failure: (LoginFailureRow(email_hash="h", failures=1, last_failed_at=NOW),),
        accounts.find_login_failure: ("h",),
        accounts.clear_login_failures: ("h",),
        accounts.delete_old_login_failures: (NOW,),
        bulk.insert_rows: lambda session: bulk.insert_rows(session.connection(), bulk.TASKS, [], []),
        bulk.insert_tasks: lambda session: bulk.insert_tasks(session.connection(), job.id, []),
        bulk.in_parts: lambda _session: list(bulk.in_parts([])),
        bulk.pending_update: lambda _session: bulk.pending_update(),
        bulk.update_each: lambda session: bulk.update_each(session.connection(), bulk.pending_update(), []),
        bulk.limit_within: lambda session: bulk.limit_within(
            session.connection(), tasks._RESULT_LENGTHS, {"b_limit": 10}, 10
        ),
        tasks.add_tasks: lambda session: tasks.add_tasks(session, job.id, 10, [NewTask("A", "a", 1)]),
        tasks.pending_page: (job.id, -1, 10, 1000),
        tasks.record_answers: (outcomes,),
        tasks.record_failures: (outcomes,),
        tasks.record_attempts: (outcomes,),
        tasks.record_decisions: ([],),
        tasks.count_crash: (job.id, [1], 5, FAILURE),
        tasks.results_page: (job.id, -1, 10),
        tasks.fail_pending: lambda session: tasks.fail_pending(session, job.id, FAILURE, after=-1, spare=[1]),
        tasks.reopen_slice: (job.id, [ErrorCode.TIMEOUT], -1),
        deliveries.add_job_deliveries: add_deliveries,
        deliveries.add_frozen: lambda session: deliveries.add_frozen(
            session, owner_id=user_id, kind="test", url="u", body="{}", now=NOW
        ),
        deliveries.list_due: {"now": NOW, **besides, "limit": 3},
        deliveries.next_due_at: besides,
        deliveries.get_delivery: ("msg",),
        deliveries.find_delivery: ("msg", ADMIN),
        deliveries.list_deliveries: lambda session: deliveries.list_deliveries(
            session, ADMIN, everyone=False, job_id=job.id, status=DeliveryStatus.PENDING, **page
        ),
        deliveries.with_attempts: with_delivery(
            lambda session, row: deliveries.with_attempts(session, [row])
        ),
        deliveries.unfrozen_of_job: (job.id,),
        deliveries.has_unfrozen: with_job(deliveries.has_unfrozen),
        deliveries.can_be_made: with_delivery(deliveries.can_be_made),
        deliveries.freeze_body: ("msg", "{}"),
        deliveries.record_attempt: lambda session: deliveries.record_attempt(
            session, Due(delivery_id, due.due_at, due.url), attempt, ended=None, next_attempt_at=NOW, now=NOW
        ),
        deliveries.restart: with_delivery(lambda _session, row: deliveries.restart(row, url="u", now=NOW)),
        deliveries.drop_for_job: (job.id,),
        deliveries.prune: (NOW + timedelta(days=1),),
        deliveries.count_by_status: (),
        result_files.owe: ([(job.id, 1)], NOW),
        result_files.list_due: (NOW, 3),
        result_files.next_due_at: (),
        result_files.stands: (job.id, 1),
        result_files.note_written: (file, "0" * 64, 1, NOW),
        result_files.postpone: (file, NOW),
        result_files.give_up: (file, NOW),
        result_files.find_written: (job.id, 1),
        result_files.write_again: (job.id, 1, NOW),
        result_files.drop_for_job: (job.id, NOW),
        result_files.forget: (file,),
        result_files.count_by_state: (),
        modes.save_mode: ("auth", "true"),
        modes.all_modes: (),
        owners.now: (),
        owners.save: {"host": "h", "place": "p", "token": "t", "expires_at": NOW},
        owners.locked: (),
        owners.locked_token: (),
        jobs.add_job: lambda session: jobs.add_job(session, _job()),
        jobs.find_job: (job.id, ADMIN),
        jobs.get_job: (job.id,),
        jobs.is_visible: (job.id,),
        jobs.lock_job: (job.id,),
        jobs.run_of: (job.id,),
        jobs.owner_emails: ([job],),
        jobs.list_jobs: lambda session: jobs.list_jobs(session, ADMIN, everyone=False, status=None, **page),
        jobs.open_jobs: (),
        jobs.count_by_status: (),
        jobs.unfinished_of: lambda session: [jobs.unfinished_of(session, who) for who in (None, user_id)],
        jobs.count_failed: (job.id, [ErrorCode.TIMEOUT], -1),
        jobs.queue: (job.id, 4, 0),
        jobs.start: ([job.id], NOW),
        jobs.add_progress: ({job.id: JobProgress()},),
        jobs.standings: ([job.id],),
        jobs.end: ([ended.id], NOW),
        jobs.cancel: (job.id,),
        jobs.reopen: with_job(lambda _session, row: jobs.reopen(row, NOW)),
        jobs.claim_key: (claim,),
        jobs.knows_key: ("", "k"),
        jobs.bind_key: (claim, job.id),
        jobs.free_key: (claim,),
        jobs.drop_old_keys: (NOW,),
        jobs.discard: (gone.id,),
        jobs.discard_half_received: (),
        jobs.discard_older: (NOW,),
        jobs.discarded_jobs: (),
        jobs.delete_job: (gone.id,),
        tasks.delete_slice: (job.id,),
        accounts.delete_user: (user_id, heir_id),
    }


def _job() -> JobRow:
    return JobRow(
        id=new_id(),
        status=JobStatus.RECEIVING,
        model="m",
        delivery="inline",
        settings={},
        meta={},
        created_at=NOW,
        deadline_at=NOW,
    )


def queries() -> set[Callable[..., Any]]:
    return {
        function
        for module in STORE
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


@pytest.fixture
def statements(database: Database) -> list[ClauseElement]:
    """All that the queries have run."""
    # Those that SQLite is never given.
    found: list[ClauseElement] = [insert(bulk.TASKS), tasks._PENDING_LENGTHS, tasks._RESULT_LENGTHS]
    calls = make_calls(database)
    assert queries() == set(calls)

    @event.listens_for(database._engine, "before_execute")
    def before_execute(_connection: object, statement: object, *_others: object) -> None:
        if isinstance(statement, ClauseElement):
            found.append(statement)

    for query, given in calls.items():
        with database.write() as session:
            if isinstance(given, tuple):
                query(session, *given)
            elif isinstance(given, dict):
                query(session, **given)
            else:
                given(session)
    return found


@pytest.mark.parametrize("name", DIALECTS)
def test_every_query_has_words_that_the_database_knows(statements: list[ClauseElement], name: str) -> None:
    dialect = DIALECTS[name]()

    written = {str(statement.compile(dialect=dialect)) for statement in statements}

    assert len(written) > 80
    assert [sql for sql in written if re.search(WRONG[name], sql)] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("pgsql", "FOR UPDATE"), ("mysql", "FOR UPDATE"), ("oracle", "FOR UPDATE"), ("mssql", "WITH (UPDLOCK")],
)
def test_row_that_others_may_be_about_to_change_is_locked_by_who_reads_it(
    statements: list[ClauseElement], name: str, words: str
) -> None:
    dialect = DIALECTS[name]()

    locking = {sql for sql in (str(each.compile(dialect=dialect)) for each in statements) if words in sql}

    assert sorted(re.findall(r"FROM (\w+)", " ".join(locking))) == ["jobs", "owners", "owners"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def migrate(dialect: str, direction: str) -> str:
    """The SQL of every migration, up or down."""
    output = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect, opts={"as_sql": True, "output_buffer": output, "literal_binds": True}
    )
    with Operations.context(context):
        for path in sorted(MIGRATIONS.glob("versions/0*.py"), reverse=direction == "downgrade"):
            getattr(load(path), direction)()
    return output.getvalue()


# Which alters no table in place.
@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "sqlite"])
def test_every_migration_has_words_there_and_back(name: str) -> None:
    dialect = DIALECTS[name]().name

    up, down = migrate(dialect, "upgrade"), migrate(dialect, "downgrade")

    indexes = sum(len(table.indexes) for table in Base.metadata.sorted_tables)
    assert up.count("CREATE TABLE") == down.count("DROP TABLE") == len(Base.metadata.tables)
    assert up.count("CREATE INDEX") == down.count("DROP INDEX") == indexes
    assert up.count("crashes SMALLINT") == down.count("DROP COLUMN crashes") == 1


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("pgsql", r"prompt TEXT NOT NULL", r"\bCLOB\b"),
        ("mysql", r"prompt LONGTEXT NOT NULL|COLLATE utf8mb4_bin", r"\bTEXT\b|\bDATETIME\b(?!\(3\))"),
        (
            "mssql",
            r"prompt NVARCHAR\(max\) COLLATE Latin1_General_100_BIN2",
            r"\bVARCHAR\b|\bTEXT\b|\bDATETIME\b",
        ),
        ("oracle", r"prompt CLOB NOT NULL", r"\bDATE\b"),
    ],
)
def test_tables_hold_long_texts_every_character_and_milliseconds(
    name: str, wanted: str, unwanted: str
) -> None:
    dialect = DIALECTS[name]()

    tables = [str(CreateTable(table).compile(dialect=dialect)) for table in Base.metadata.sorted_tables]
    indexes = [
        str(CreateIndex(index).compile(dialect=dialect))
        for table in Base.metadata.sorted_tables
        for index in table.indexes
    ]

    assert len(indexes) > 10
    assert re.search(wanted, "\n".join(tables))
    for sql in (*tables, migrate(dialect.name, "upgrade")):
        assert not re.search(unwanted, sql), sql
