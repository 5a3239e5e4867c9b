"""The database: the two ways to use it, `read()` and `write()`, and bringing its tables to this version.

What is particular to SQLite stands in `sqlite`, to databases on servers in `db_servers`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import click
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    Column,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    insert,
    inspect,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from config import SettingsError
from gpt_worker import backup, db_servers, sqlite
from gpt_worker.db_servers import Server
from gpt_worker.models import Base
from gpt_worker.sqlite import SqliteFile
from gpt_worker.write_gate import DatabaseUnusable, WriteGate

MIGRATIONS = Path(__file__).with_name("migrations")
START_WAIT_S = 30.0

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


def trouble_of(error: BaseException) -> str | None:
    """What the database or another program has against a statement, with no value in it; None for a bug of ours."""
    if isinstance(error, DatabaseUnusable | PoolTimeout):
        return str(error)
    if isinstance(error, DatabaseError) and (words := sqlite.trouble_of(error)):
        return words
    return db_servers.trouble_of(error) if isinstance(error, DBAPIError) else None


def log_failure(
    log: logging.Logger, message: str, error: BaseException, level: int = logging.ERROR, **facts: object
) -> None:
    """One line that adds what the database has against it; for a bug of ours, its traceback."""
    trouble = trouble_of(error)
    words = f"{message}: {trouble}" if trouble else message
    log.log(level, "%s", words, exc_info=None if trouble else error, extra=facts)


def is_full(error: BaseException) -> bool:
    """Whether the disk that has the database is full."""
    return isinstance(error, DBAPIError) and (sqlite.is_full(error) or db_servers.is_full(error))


class Database:
    """Sessions for any thread; the functions of `store/` take one as their first argument."""

    def __init__(self, app: Flask, url: str) -> None:
        parsed = make_url(url)
        is_file = parsed.get_backend_name() == "sqlite"
        self._home: SqliteFile | Server = (
            SqliteFile(Path(parsed.database or "")) if is_file else Server(parsed)
        )
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "hide_parameters": True,  # prompts and addresses must not reach the log with an error
            **self._home.engine_options,
        }
        db.init_app(app)
        self._app = app
        if click.get_current_context(silent=True):  # `flask --app wsgi`, which then has these commands
            self._load_alembic()
            app.cli.add_command(backup.make_command(self.path if is_file else None))
        with app.app_context():
            engine = db.engine
        self._home.attach(engine)
        self._engine = engine
        self._readers = sessionmaker(
            engine.execution_options(**self._home.read_options), expire_on_commit=False
        )
        self._writers = sessionmaker(
            engine.execution_options(**self._home.write_options), expire_on_commit=False
        )
        self._gate = WriteGate(self._home.is_locked)
        # In each writing transaction, before all else; and why this service may not write, if so.
        self.on_write: Callable[[Session], None] = lambda _session: None
        self.why_not_ours: Callable[[], str | None] = lambda: None

    @property
    def path(self) -> Path:
        """Of the SQLite file."""
        assert isinstance(self._home, SqliteFile)
        return self._home.path

    def await_up(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Return when the database's server answers; at once for a file. Raises SettingsError, or StartGivenUp."""
        if isinstance(self._home, Server):
            self._home.await_up(self._engine, is_wanted)

    def migrate(self) -> None:
        """Bring the tables to this version; an SQLite file is made readable by its owner alone.

        Raises SettingsError for a database that can't be used, or that a newer version has changed.
        """
        try:
            self._home.prepare()
            if not self._is_migrated():
                upgrade = self._load_alembic()
                with self._app.app_context():
                    upgrade()
            with self.read() as session:
                self._home.look_through(session)
        except DBAPIError as error:
            said = str(error.orig).partition("\n")[0]  # what follows may show values
            reason = self._home.why_not_started(error) or f"can't be brought to this version: {said}"
            raise SettingsError(f"{self._home} {reason}") from error
        self._home.opened()
        if isinstance(self._home, Server):
            self._engine.dispose()

    def _load_alembic(self) -> Callable[[], None]:
        """Set up flask-migrate, whose `upgrade` is returned. It brings Alembic: 11 MB, which few starts need."""
        from flask_migrate import Migrate, upgrade

        Migrate(self._app, db, directory=str(MIGRATIONS))
        return cast(Callable[[], None], upgrade)

    def _is_migrated(self) -> bool:
        """Whether no migration is due; an empty database gets its tables at once, if they are one transaction."""
        known = revisions()
        with self._write_at_last() as session:
            connection = session.connection()
            self._home.lock_tables(connection)
            tables = inspect(connection).get_table_names()
            stored: set[str] = set()
            if revision_table.name in tables:
                stored.update(connection.scalars(select(revision_table.c.version_num)))
            if not tables and not self._home.makes_tables_singly:
                Base.metadata.create_all(connection)  # what the migrations make; none of them makes rows
                revision_table.create(connection)
                connection.execute(insert(revision_table).values(version_num=known[-1]))
                return True
        if not stored.issubset(known):
            raise SettingsError(
                f"{self._home} belongs to a newer gpt-worker: start that one, or put the backup back"
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
                if not self._home.is_locked(error) or time.monotonic() > wait_until_s:
                    raise

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
            if self._home.missing:
                raise DatabaseUnusable(self._home.missing)
            with self._begun() as session:
                self.on_write(session)
                yield session
                session.commit()

    def _begun(self) -> Session:
        """A session whose writing transaction has begun."""
        while True:
            session = self._writers()
            try:
                connection = session.connection()
                if not self._home.is_outdated(connection):
                    return session
                connection.invalidate()
            except BaseException:
                session.close()
                raise
            session.close()

    def takes(self, value: str) -> bool:
        """Whether a text is not too large to be stored, which some servers know limits for."""
        return self._home.takes(value)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the database, for people; None if nothing is known to be."""
        return self.why_not_ours() or self._home.trouble

    def check_ours(self) -> None:
        """Raise DatabaseUnusable where another service may do the same: before something that can't be taken back."""
        if reason := self.why_not_ours():
            raise DatabaseUnusable(reason)

    def close(self) -> None:
        with self._app.app_context():
            db.engine.dispose()
