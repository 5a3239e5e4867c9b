"""The database: how connections are set up, and the two ways to use one, `read()` and `write()`.

A writing transaction on SQLite begins IMMEDIATE behind a process-wide gate in which the recorder goes first: a
deferred one that reads and then writes fails with "database is locked" under load, and busy waiting is unfair.
Trouble with the file is known here: one that is locked, damaged, or not where it was (`Database.trouble`).
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import click
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from config import SettingsError
from gpt_worker import backup
from gpt_worker.models import Base

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 5_000  # another program's lock: our own writers wait at the gate
GATE_WAIT_S = 30.0
LONG_S = 1.0  # to hold the gate
MAX_WAITING = 96  # at a gate that is held for long; there are more threads for requests
START_WAIT_S = 30.0
LARGE_TABLES = frozenset({"tasks", "deliveries", "delivery_attempts"})  # not looked through at start

LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
DAMAGED_REASON = "is damaged: put the backup back"
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A connection that has met one of these is not used again: one that was opened while the file could not be written
# would stay read-only for ever.
UNSOUND = DAMAGED | {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
TROUBLES = LOCKED | UNSOUND | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL}

db = SQLAlchemy(metadata=Base.metadata)  # plain models: pool threads use them with no app context
# Where Alembic notes how far a database is, as Alembic itself makes it.
revision_table = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def revisions() -> list[str]:
    """The migrations in their order, by the numbers that their files begin with."""
    return sorted(path.name.partition("_")[0] for path in MIGRATIONS.glob("versions/[0-9]*.py"))


class DatabaseUnusable(SQLAlchemyError):
    """Nothing can be written now; the message says why, and shows no value."""


def error_code(error: BaseException | None) -> int:
    """SQLite's primary result code, of its own exception or of SQLAlchemy's around it; 0 if there is none."""
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else 0


def trouble_of(error: BaseException) -> str | None:
    """What the disk, the file or another program has against a statement, in SQLite's words; None for a bug of ours."""
    if isinstance(error, DatabaseUnusable | PoolTimeout):
        return str(error)
    if isinstance(error, DatabaseError) and error_code(error) in TROUBLES:
        return str(error.orig)
    return None


class WriteGate:
    """A lock whose urgent callers go before all others, but not twice in a row while another waits.

    Without that bound, a recorder that always has something to commit would keep every submit and cancel out.
    While another program has the database locked, one of the others tries and the rest are turned away, and before
    that is known, those that are too many: they would all wait, and no thread would be left to say so.
    """

    def __init__(self, wait_s: float = GATE_WAIT_S) -> None:
        self._condition = threading.Condition()
        self._held = False
        self._waiting = {True: 0, False: 0}  # by urgency
        self._others_next = False
        self._since_s = 0.0  # when it was last taken
        self._locked = False  # whether the last one in found it so
        self._wait_s = wait_s

    @contextmanager
    def hold(self, urgent: bool) -> Iterator[None]:
        """Raises DatabaseUnusable for a caller that is turned away, or that has waited too long."""
        with self._condition:
            self._waiting[urgent] += 1
            try:
                self._await_turn(urgent)
            finally:
                self._waiting[urgent] -= 1
            self._held, self._others_next, self._since_s = True, urgent, time.monotonic()
        locked = False
        try:
            yield
        except DatabaseError as error:
            locked = error_code(error) in LOCKED
            raise
        finally:
            with self._condition:
                self._held, self._locked = False, locked
                self._condition.notify_all()

    def _await_turn(self, urgent: bool) -> None:
        wait_until_s = time.monotonic() + self._wait_s
        while not self._is_turn(urgent):
            now_s = time.monotonic()
            crowded = self._waiting[False] > MAX_WAITING and now_s > self._since_s + LONG_S
            if not urgent and (self._locked or crowded or now_s > wait_until_s):
                self._condition.notify_all()  # the recorder may have been waiting for this one's turn to pass
                raise DatabaseUnusable("it is locked" if self._locked else "too many wait to write")
            self._condition.wait(None if urgent else LONG_S)

    def _is_turn(self, urgent: bool) -> bool:
        """Whether one who waits may have the lock now."""
        is_urgent_next = self._waiting[True] > 0 and not (self._others_next and self._waiting[False])
        return not self._held and urgent is is_urgent_next


class Database:
    """Sessions for any thread; the functions of `store/` take one as their first argument."""

    def __init__(self, app: Flask, url: str) -> None:
        self.path = Path(make_url(url).database or "")
        self._file: tuple[int, int] | None = None  # device and inode, once the service has opened it
        self._damaged = False
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "hide_parameters": True,  # prompts and addresses must not reach the log with an error
            "pool_size": 16,
            "max_overflow": 48,
            "connect_args": {"timeout": BUSY_TIMEOUT_MS / 1000},
        }
        db.init_app(app)
        self._app = app
        if click.get_current_context(silent=True):  # `flask --app wsgi`, which then has these commands
            self._load_alembic()
            app.cli.add_command(backup.make_command(self.path))
        with app.app_context():
            engine = db.engine
        self._watch(engine)
        _prepare_sqlite(engine)
        self._readers = sessionmaker(engine, expire_on_commit=False)
        self._writers = sessionmaker(engine.execution_options(writes=True), expire_on_commit=False)
        self._gate = WriteGate()

    def migrate(self) -> None:
        """Bring the tables to this version; the file is made readable by its owner alone.

        Raises SettingsError for a database that can't be used, or that a newer version has changed.
        """
        try:
            self._migrate()
            self._look_through()
        except DatabaseError as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise SettingsError(f"the database {self.path} {reason}") from error
        self._file = self._file_there()

    def _migrate(self) -> None:
        if self.path.exists():  # not opened: closing it would drop the locks that SQLite may have on it
            with suppress(PermissionError):  # another user's, who lets us write it
                self.path.chmod(0o600)
        else:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        if not self._is_migrated():
            upgrade = self._load_alembic()
            with self._app.app_context():
                upgrade()

    def _load_alembic(self) -> Callable[[], None]:
        """Set up flask-migrate, whose `upgrade` is returned. It brings Alembic: 11 MB, which few starts need."""
        from flask_migrate import Migrate, upgrade

        Migrate(self._app, db, directory=str(MIGRATIONS))
        return cast(Callable[[], None], upgrade)

    def _is_migrated(self) -> bool:
        """Whether no migration is due; an empty database gets its tables at once."""
        known = revisions()
        with self._write_at_last() as session:
            connection = session.connection()
            tables = inspect(connection).get_table_names()
            if not tables:
                Base.metadata.create_all(connection)  # what the migrations make; none of them makes rows
                revision_table.create(connection)
                connection.execute(insert(revision_table).values(version_num=known[-1]))
                return True
            stored: set[str] = set()
            if revision_table.name in tables:
                stored.update(connection.scalars(select(revision_table.c.version_num)))
        if not stored.issubset(known):
            raise SettingsError(
                f"the database {self.path} belongs to a newer gpt-worker: start that one, or put the backup back"
            )
        return stored == {known[-1]}

    @contextmanager
    def _write_at_last(self) -> Iterator[Session]:
        """The first writing transaction of a start, which waits longer while another program has the lock."""
        wait_until_s = time.monotonic() + START_WAIT_S
        while True:
            try:
                with self.write() as session:
                    wait_until_s = 0.0
                    yield session
                return
            except DatabaseError as error:
                if error_code(error) not in LOCKED or time.monotonic() > wait_until_s:
                    raise

    def _look_through(self) -> None:
        """Raise SettingsError where a table that every start reads is damaged; the large ones would take long."""
        with self.read() as session:
            present = inspect(session.connection()).get_table_names()
            for name in present:
                if name in LARGE_TABLES:
                    continue
                if session.scalars(text(f"PRAGMA quick_check({name})")).first() != "ok":
                    raise SettingsError(f"the database {self.path} {DAMAGED_REASON}")

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A short reading transaction; an open one would stop WAL checkpoints, so never hold it across a socket."""
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self, *, urgent: bool = False) -> Iterator[Session]:
        """A short writing transaction, committed at the end of the block; `urgent` is the recorder's.

        Raises DatabaseUnusable where SQLite would not say it.
        """
        with self._gate.hold(urgent):
            if not self._is_in_place():
                raise DatabaseUnusable("its file was moved, deleted or replaced")
            with self._begun() as session:
                yield session
                session.commit()

    def _begun(self) -> Session:
        """A session whose writing transaction has begun."""
        for is_last in (False, True):
            session = self._writers()
            try:
                session.connection()
            except DatabaseError as error:
                session.close()
                if is_last or error_code(error) != sqlite3.SQLITE_READONLY:
                    raise  # else the connection may be one that was opened while the file could not be written
            else:
                break
        return session

    @property
    def trouble(self) -> str | None:
        """What is wrong with the file, for people; None if nothing is known to be."""
        if not self._is_in_place():
            return "The database is not where it was: its file was moved, deleted or replaced."
        return "The database is damaged: put the backup back." if self._damaged else None

    def close(self) -> None:
        with self._app.app_context():
            db.engine.dispose()

    # The file

    def _file_there(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _is_in_place(self) -> bool:
        """Whether the file is still the one that was opened: what goes into a deleted one is lost."""
        return self._file is None or self._file == self._file_there()

    def _watch(self, engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def do_connect(_dialect: object, _record: object, args: list[Any], options: dict[str, Any]) -> None:
            if self._file is None:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:  # SQLite must not make a new file where the old one was
                args[0], options["uri"] = f"file:{quote(str(self.path))}?mode=rw", True

        @event.listens_for(engine, "handle_error")
        def handle_error(context: ExceptionContext) -> None:
            code = error_code(context.original_exception)
            if code in UNSOUND:
                context.is_disconnect = True
            if code in DAMAGED and not self._damaged and self._file is not None:
                self._damaged = True
                facts = {"action": "database_damaged"}
                log.error("the database %s %s", self.path, DAMAGED_REASON, extra=facts)


def _reason(error: DatabaseError) -> str | None:
    """Why a start fails, and what to do; None for a bug."""
    code = error_code(error)
    if code in LOCKED:
        return "is locked by another program: end that one"
    if code in DAMAGED:
        return DAMAGED_REASON
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"can't be written ({error.orig}): it and its directory must be writable"
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
        return f"can't be written ({error.orig}): look after the disk"
    return None


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = (
            None  # the driver must not begin transactions of its own: `begin` below does
        )
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "journal_size_limit=67108864",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
