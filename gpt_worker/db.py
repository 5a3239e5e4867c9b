"""The database: how connections are set up, and the two ways to use one, `read()` and `write()`.

A writing transaction on SQLite begins IMMEDIATE behind a process-wide gate in which the recorder goes first: a
deferred one that reads and then writes fails with "database is locked" under load, and busy waiting is unfair.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flask import Flask
from flask_migrate import Migrate, upgrade
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker

from gpt_worker.models import Base

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 30_000

db = SQLAlchemy(metadata=Base.metadata)  # plain models: pool threads use them with no app context
migrate = Migrate(db=db, directory=str(MIGRATIONS))


class WriteGate:
    """A lock whose urgent callers go before all others, but not twice in a row while another waits.

    Without that bound, a recorder that always has something to commit would keep every submit and cancel out.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held = False
        self._waiting = {True: 0, False: 0}  # by urgency
        self._others_next = False

    @contextmanager
    def hold(self, urgent: bool) -> Iterator[None]:
        with self._condition:
            self._waiting[urgent] += 1
            self._condition.wait_for(lambda: not self._held and urgent is self._is_urgent_next())
            self._waiting[urgent] -= 1
            self._held, self._others_next = True, urgent
        try:
            yield
        finally:
            with self._condition:
                self._held = False
                self._condition.notify_all()

    def _is_urgent_next(self) -> bool:
        return self._waiting[True] > 0 and not (self._others_next and self._waiting[False])


class Database:
    """Sessions for any thread; the functions of `store/` take one as their first argument."""

    def __init__(self, app: Flask, url: str) -> None:
        self.path = Path(make_url(url).database or "")
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "hide_parameters": True,  # prompts and addresses must not reach the log with an error
            "pool_size": 16,
            "max_overflow": 48,
            "connect_args": {"timeout": BUSY_TIMEOUT_MS / 1000},
        }
        db.init_app(app)
        migrate.init_app(app)
        self._app = app
        with app.app_context():
            engine = db.engine
        _prepare_sqlite(engine)
        self._readers = sessionmaker(engine, expire_on_commit=False)
        self._writers = sessionmaker(engine.execution_options(writes=True), expire_on_commit=False)
        self._gate = WriteGate()

    def migrate(self) -> None:
        """Bring the tables to this version; the file is made readable by its owner alone."""
        if self.path.exists():  # not opened: closing it would drop the locks that SQLite may have on it
            with suppress(PermissionError):  # another user's, who lets us write it
                self.path.chmod(0o600)
        else:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with self._app.app_context():
            upgrade()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A short reading transaction; an open one would stop WAL checkpoints, so never hold it across a socket."""
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self, *, urgent: bool = False) -> Iterator[Session]:
        """A short writing transaction, committed at the end of the block; `urgent` is the recorder's."""
        with self._gate.hold(urgent), self._writers.begin() as session:
            yield session

    def close(self) -> None:
        with self._app.app_context():
            db.engine.dispose()


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
