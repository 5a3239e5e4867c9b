"""SQLite: how its connections are set up, and what can be wrong with its file.

A writing transaction begins IMMEDIATE: a deferred one that reads and then writes fails with "database is locked" under
load. Trouble with the file is known here: one that is locked, damaged, or not where it was.
"""

import logging
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, event, inspect, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.orm import Session

from config import SettingsError

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 5_000  # another program's lock: our own writers wait at the gate
LARGE_TABLES = frozenset({"tasks", "deliveries", "delivery_attempts"})  # not looked through at start

LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
DAMAGED_REASON = "is damaged: put the backup back"
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A connection that has met one of these is not used again: one that was opened while the file could not be written
# would stay read-only for ever.
UNSOUND = DAMAGED | {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
READ_ONLY = "read_only"  # of a connection: what SQLite makes, without a word, where it may not write
TROUBLES = LOCKED | UNSOUND | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL}


def error_code(error: BaseException | None) -> int:
    """SQLite's primary result code, of its own exception or of SQLAlchemy's around it; 0 if there is none."""
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else 0


def trouble_of(error: DatabaseError) -> str | None:
    """What the disk, the file or another program has against a statement, in SQLite's words; None for a bug of ours."""
    return str(error.orig) if error_code(error) in TROUBLES else None


def is_full(error: DBAPIError) -> bool:
    return error_code(error) == sqlite3.SQLITE_FULL


class SqliteFile:
    """One file, which this process alone writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, int] | None = None  # device and inode, once the service has opened it
        self._damaged = False

    engine_options: dict[str, Any] = {  # noqa: RUF012 (never changed)
        "pool_size": 16,
        "max_overflow": 48,
        "connect_args": {"timeout": BUSY_TIMEOUT_MS / 1000},
    }
    read_options: dict[str, Any] = {}  # noqa: RUF012
    write_options: dict[str, Any] = {"writes": True}  # noqa: RUF012

    def __str__(self) -> str:
        return f"the database {self.path}"

    def attach(self, engine: Engine) -> None:
        """Have the engine's connections set up and watched."""
        _prepare_connections(engine)

        @event.listens_for(engine, "do_connect")
        def do_connect(_dialect: object, record: Any, args: list[Any], options: dict[str, Any]) -> None:
            if self._opened is None:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:  # SQLite must not make a new file where the old one was
                args[0], options["uri"] = f"file:{quote(str(self.path))}?mode=rw", True
                record.info[READ_ONLY] = not self._is_writable()

        @event.listens_for(engine, "connect")
        def connect(_connection: object, record: Any) -> None:
            if self._opened is not None and not self._is_writable():  # now, or when it was opened
                record.info[READ_ONLY] = True

        @event.listens_for(engine, "handle_error")
        def handle_error(context: ExceptionContext) -> None:
            code = error_code(context.original_exception)
            if code in UNSOUND:
                context.is_disconnect = True
            if code in DAMAGED and not self._damaged and self._opened is not None:
                self._damaged = True
                facts = {"action": "database_damaged"}
                log.error("the database %s %s", self.path, DAMAGED_REASON, extra=facts)

    def prepare(self) -> None:
        """Make the file, or make it readable by its owner alone."""
        if self.path.exists():  # not opened: closing it would drop the locks that SQLite may have on it
            with suppress(PermissionError):  # another user's, who lets us write it
                self.path.chmod(0o600)
        else:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))

    def takes(self, value: str) -> bool:
        return True

    makes_tables_singly = False  # a start that is cut short leaves none

    def lock_tables(self, connection: Connection) -> None:
        """Nobody else makes them: this transaction has the file."""

    def look_through(self, session: Session) -> None:
        """Raise SettingsError where a table that every start reads is damaged; the large ones would take long."""
        for name in inspect(session.connection()).get_table_names():
            if name in LARGE_TABLES:
                continue
            if session.scalars(text(f"PRAGMA quick_check({name})")).first() != "ok":
                raise SettingsError(f"{self} {DAMAGED_REASON}")

    def opened(self) -> None:
        """From here on it must be this very file."""
        self._opened = self._file_there()

    def is_locked(self, error: DBAPIError) -> bool:
        return error_code(error) in LOCKED

    def is_outdated(self, connection: Connection) -> bool:
        """Whether it was opened while the file could not be written, which it can be now: it would never be able to."""
        return bool(connection.connection.info.get(READ_ONLY)) and self._is_writable()

    def _is_writable(self) -> bool:
        return os.access(self.path, os.W_OK)

    def why_not_started(self, error: DBAPIError) -> str | None:
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

    @property
    def missing(self) -> str | None:
        """That the file is not the one that was opened, in which case what goes into it is lost."""
        if self._opened is None or self._opened == self._file_there():
            return None
        return "its file was moved, deleted or replaced"

    @property
    def trouble(self) -> str | None:
        """What is wrong with the file, for people; None if nothing is known to be."""
        if self.missing:
            return f"The database is not where it was: {self.missing}."
        return f"The database {DAMAGED_REASON}." if self._damaged else None

    def _file_there(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino


def _prepare_connections(engine: Engine) -> None:
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
