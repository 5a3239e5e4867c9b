"""Database servers for tests: PostgreSQL and MariaDB, each a process of our own, and databases on them.

They listen on a loopback port, and are started from the programs that the machine has, with their files in a temporary
directory, so that a test may stop one, kill one or cut its connections, and needs no account on a server of others.
Where the programs are missing, the tests are skipped; they fail where MUST_HAVE names the server, or where CI=true.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from tests.emulators import do_without
from tests.service import Service, free_port

PATIENCE_S = 60.0
USER = "gpt-worker"
DRIVERS = {"pgsql": "postgresql+psycopg", "mysql": "mysql+pymysql"}


class Server(ABC):
    """One server, a context manager that starts it. The account of the services may do as it likes in its databases."""

    name: ClassVar[str]
    """As DB_CONNECTION and MUST_HAVE have it."""
    package: ClassVar[str]
    user: ClassVar[str]
    """Of the machine, who runs it where we are root: it would refuse to be root's."""
    admin: ClassVar[str]
    crash_signal: ClassVar[signal.Signals]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self) -> None:
        self.port = free_port()
        # what addresses, quotes and logs could trip over
        self.password = f"p@ss'w/rd:%41?#&{secrets.token_urlsafe(12)}"
        self._folder = Path(tempfile.mkdtemp(prefix=f"gpt-worker-{self.name}-"))
        self._process: subprocess.Popen[bytes] | None = None

    # The process

    def start(self) -> None:
        """Returns when it takes connections."""
        self.launch()
        deadline_s = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"{self.name} does not answer\n{self._log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.05)

    def launch(self) -> None:
        """Starts it and does not wait for it."""
        if self._process is not None:
            raise RuntimeError("it runs already")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user(), *self._command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def runs(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """As its machine's administrator would: its connections end, and what was committed stays."""
        self._end(self.stop_signal)

    def crash(self) -> None:
        """With no time for anything."""
        self._end(self.crash_signal)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    def __enter__(self) -> Self:
        try:
            self._command()  # where a program is missing, that is told before anything else
            self._give(self._folder)
            self._prepare()
            self.start()
            self._make_account()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        try:
            self.crash()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _answers(self) -> bool:
        try:
            self.ask("SELECT 1")
        except DBAPIError:
            return False
        return True

    # Databases

    @contextmanager
    def database(self) -> Iterator[dict[str, str | None]]:
        """The settings of a service that has a database of its own here, which is dropped after."""
        name = f"gpt-{secrets.token_hex(4)}"
        self._make_database(name)
        try:
            yield {
                "DB_CONNECTION": self.name,
                "DB_HOST": "127.0.0.1",
                "DB_PORT": str(self.port),
                "DB_USER": USER,
                "DB_PASSWORD": self.password,
                "DB_DATABASE": name,
            }
        finally:
            if self.runs:
                self._drop_database(name)

    def ask(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        """The rows of a statement of the administrator's, which is no part of a transaction."""
        address = URL.create(DRIVERS[self.name], self.admin, self.password, "127.0.0.1", self.port)
        return _run(address.set(database=self._home), statement, values, isolation_level="AUTOCOMMIT")

    def quote(self, name: str) -> str:
        return str(_engine(make_url(f"{DRIVERS[self.name]}://")).dialect.identifier_preparer.quote(name))

    @abstractmethod
    def connections(self) -> list[int]:
        """Those of the services, as the server numbers them."""

    @abstractmethod
    def cut(self, connection: int) -> None:
        """Ends one, if it is still there."""

    def cut_all(self) -> int:
        """Ends those of the services; how many there were."""
        found = self.connections()
        for connection in found:
            self.cut(connection)
        return len(found)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """All databases can only be read meanwhile."""
        self._take_writes(False)
        try:
            yield
        finally:
            self._take_writes(True)

    @contextmanager
    def other_password(self) -> Iterator[None]:
        """The account of the services has another password meanwhile, and they have no connection."""
        self._change_password(secrets.token_urlsafe())
        try:
            self.cut_all()
            yield
        finally:
            self._change_password(self.password)

    @contextmanager
    def table_locked(self, service: Service, table: str) -> Iterator[None]:
        """Another program has a table of the service's for itself meanwhile."""
        with _engine(url_of(service)).connect() as connection:
            connection.execute(text(self._lock_statement.format(table)))
            yield

    _lock_statement: ClassVar[str]

    @abstractmethod
    def _take_writes(self, are_taken: bool) -> None: ...

    @abstractmethod
    def _change_password(self, password: str) -> None: ...

    _home: ClassVar[str]

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

    @abstractmethod
    def _make_account(self) -> None: ...

    @abstractmethod
    def _make_database(self, name: str) -> None: ...

    @abstractmethod
    def _drop_database(self, name: str) -> None: ...

    def _program(self, name: str, folders: str) -> str:
        """A program of the server, which need not be on the search path."""
        newest_first = sorted(map(str, Path("/").glob(folders)), reverse=True)
        path = os.pathsep.join([os.environ.get("PATH", ""), *newest_first])
        found = shutil.which(name, path=path)
        if found is None:
            do_without(self.name, f"{name} is not installed here: install {self.package}")
        return found

    def _as_user(self) -> Sequence[str]:
        if os.geteuid():
            return ()
        user = [f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        return [self._program("setpriv", "usr/bin"), *user, "--pdeathsig=KILL"]

    def _give(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, self.user, self.user)

    def _do(self, command: Sequence[str]) -> None:
        done = subprocess.run([*self._as_user(), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


class PostgreSql(Server):
    name = "pgsql"
    package = "postgresql"
    user = "postgres"
    admin = "postgres"
    stop_signal = signal.SIGINT
    crash_signal = signal.SIGQUIT  # SIGKILL would leave its children, for which the next start waits
    _home = "postgres"

    def _prepare(self) -> None:
        password = self._folder / "password"
        password.write_text(self.password)
        self._give(password)
        options = ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--encoding=UTF8"]
        self._do(
            [
                *(self._postgres("initdb"), "--locale=C", f"--username={self.admin}"),
                *(*options, f"--pgdata={self._folder / 'data'}"),
            ]
        )

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # a crash of the server loses nothing by it, only one of the machine
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._postgres("postgres"), "-D", str(self._folder / "data"), *options]

    def _postgres(self, program: str) -> str:
        return self._program(program, "usr/lib/postgresql/*/bin")

    def _make_account(self) -> None:
        self.ask(f"CREATE ROLE {self.quote(USER)} LOGIN PASSWORD '{_quoted(self.password)}'")

    def _make_database(self, name: str) -> None:
        self.ask(f"CREATE DATABASE {self.quote(name)} OWNER {self.quote(USER)}")

    def _drop_database(self, name: str) -> None:
        self.ask(f"DROP DATABASE {self.quote(name)} WITH (FORCE)")

    def connections(self) -> list[int]:
        found = self.ask("SELECT pid FROM pg_stat_activity WHERE usename = :user", user=USER)
        return [number for (number,) in found]

    def cut(self, connection: int) -> None:
        self.ask("SELECT pg_terminate_backend(:pid)", pid=connection)

    def _take_writes(self, are_taken: bool) -> None:
        change = "RESET default_transaction_read_only"
        if not are_taken:
            change = "SET default_transaction_read_only = on"
        self.ask(f"ALTER ROLE {self.quote(USER)} {change}")
        self.cut_all()  # a connection keeps what it began with

    def _change_password(self, password: str) -> None:
        self.ask(f"ALTER ROLE {self.quote(USER)} PASSWORD '{_quoted(password)}'")

    _lock_statement = "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE"


class MariaDb(Server):
    name = "mysql"
    package = "mariadb-server"
    user = "mysql"
    admin = "root"
    stop_signal = signal.SIGTERM
    crash_signal = signal.SIGKILL
    _home = "mysql"

    def _prepare(self) -> None:
        options = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]
        self._do([self._mariadb("mariadb-install-db"), *options, f"--datadir={self._data}"])
        accounts = self._folder / "accounts.sql"
        password = self.password.replace("\\", "\\\\").replace("'", "''")
        accounts.write_text(
            f"ALTER USER root@localhost IDENTIFIED BY '{password}';\n"
            f"CREATE OR REPLACE USER root@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            "GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        self._give(accounts)

    def _command(self) -> Sequence[str]:
        settings = {
            "datadir": self._data,
            "port": self.port,
            "bind-address": "127.0.0.1",
            "socket": self._folder / "socket",
            "pid-file": self._folder / "pid",
            "init-file": self._folder / "accounts.sql",
            "innodb-buffer-pool-size": "64M",
            "innodb-flush-log-at-trx-commit": 2,  # a crash of the server loses nothing by it, only one of the machine
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._mariadb("mariadbd"), "--no-defaults", "--skip-name-resolve", *options]

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _mariadb(self, program: str) -> str:
        return self._program(program, "usr/*bin")

    def _make_account(self) -> None:
        self.ask(f"CREATE USER {self._account} IDENTIFIED BY '{_quoted(self.password)}'")

    def _make_database(self, name: str) -> None:
        # in the server's own default, which is latin1: that the tables hold any text is the service's business
        self.ask(f"CREATE DATABASE {self.quote(name)}")
        self.ask(f"GRANT ALL ON {self.quote(name)}.* TO {self._account}")

    def _drop_database(self, name: str) -> None:
        self.ask(f"DROP DATABASE {self.quote(name)}")

    def connections(self) -> list[int]:
        found = self.ask("SELECT id FROM information_schema.processlist WHERE user = :user", user=USER)
        return [number for (number,) in found]

    def cut(self, connection: int) -> None:
        try:
            self.ask(f"KILL {connection:d}")
        except DBAPIError as error:
            if "Unknown thread id" not in str(error):
                raise

    def _take_writes(self, are_taken: bool) -> None:
        self.ask(f"SET GLOBAL read_only = {'OFF' if are_taken else 'ON'}")

    def _change_password(self, password: str) -> None:
        self.ask(f"ALTER USER {self._account} IDENTIFIED BY '{_quoted(password)}'")

    _lock_statement = "LOCK TABLES {} WRITE"

    @property
    def _account(self) -> str:
        return f"'{USER}'@'127.0.0.1'"


SERVERS: dict[str, Callable[[], Server]] = {server.name: server for server in (PostgreSql, MariaDb)}


def url_of(service: Service) -> URL:
    """The database of a service."""
    env = service.env
    if "DATABASE_URL" in env:
        return make_url(env["DATABASE_URL"])
    if "DB_HOST" in env:
        driver, port = DRIVERS[env["DB_CONNECTION"]], int(env["DB_PORT"])
        return URL.create(
            driver, env["DB_USER"], env["DB_PASSWORD"], env["DB_HOST"], port, env["DB_DATABASE"]
        )
    (path,) = service.data_dir.glob("*.sqlite3")
    return make_url(f"sqlite:///{path}")


def query(service: Service, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """Rows of the service's database, whether it runs or not."""
    return _run(url_of(service), statement, values)


def _run(address: URL, statement: str, values: Any, **options: Any) -> list[tuple[Any, ...]]:
    with _engine(address, **options).begin() as connection:
        found = connection.execute(text(statement), values)
        return [tuple(row) for row in found] if found.returns_rows else []


def _engine(address: URL, **options: Any) -> Engine:
    return create_engine(address, poolclass=NullPool, **options)


def _quoted(text: str) -> str:
    """What stands between apostrophes in a statement; `text()` must not read a parameter there."""
    return text.replace("'", "''").replace(":", "\\:")
