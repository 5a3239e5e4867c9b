"""Databases on servers: how their connections are set up, waiting for one that is not up yet, and what can go wrong.

Reading transactions see one state of the database, as they do on SQLite; writing ones see what is committed. A
connection is tried before it is used, for a server that was restarted, and lost ones are noticed within half a minute.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL, Connection, Engine, event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from config import SettingsError
from gpt_worker.errors import StartGivenUp, TooLarge

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30  # none of ours takes that long, but those of a migration, which has no limit
LOCK_TIMEOUT_S = 10  # our own writers wait at the gate
UNUSED_S = 1_800  # after which a firewall or the server may have forgotten a connection
START_WAIT_S = 45.0
LOOK_EVERY_S = 0.5
TABLES_LOCK = 7_421_095_310  # any number that no other program uses
LEAST_PACKET_BYTES = 1 << 20
PACKET_ROOM_BYTES = 64 << 10  # for the rest of a statement
WIDEST = 8  # bytes of a character, doubled or not
LOST, FULL, BUSY, REFUSED = "no connection", "disk full", "busy", "refused"

# What has happened, by SQLSTATE or the beginning of one (PostgreSQL, appendix A), and what of it people are told.
PGSQL: Mapping[str, tuple[str, str]] = {
    "08": (LOST, "the connection was lost"),
    "57P": (LOST, "the server ends connections: it stops, starts or was told to"),
    "53100": (FULL, "the server's disk is full"),
    "53": (BUSY, "the server has no room for more connections, or no memory"),
    "57014": (BUSY, "a statement took too long, or was cancelled"),
    "55P03": (BUSY, "another program holds a lock"),
    "40": (BUSY, "another program's transaction was in the way"),
    "25006": (REFUSED, "the database is read-only"),
    "28": (REFUSED, "the server refuses this user or password"),
    "3D000": (REFUSED, "there is no such database"),
    "42501": (REFUSED, "this user may not do that"),
    "58": (REFUSED, "the server has trouble with its files"),
    "XX": (REFUSED, "the server has trouble with its files"),
}
# What a PostgreSQL server may have against a connection, which time will not mend, in its words.
REFUSALS = re.compile(
    r"FATAL: .*(authentication failed|does not exist|no pg_hba.conf entry|permission denied)", re.DOTALL
)
# The same by the numbers of MySQL and MariaDB.
MYSQL: Mapping[int, tuple[str, str]] = {
    **dict.fromkeys((0, 1927, 2002, 2003, 2006, 2013, 2014, 2055, 4031), (LOST, "the connection was lost")),
    **dict.fromkeys(
        (1053, 1077, 1079, 1080, 3169), (LOST, "the server stops, or was told to end connections")
    ),
    **dict.fromkeys((1021, 1114, 1041), (FULL, "the server's disk or memory is full")),
    **dict.fromkeys((1040, 1203, 1226), (BUSY, "the server has no room for more connections")),
    **dict.fromkeys((1317, 1969, 3024), (BUSY, "a statement took too long, or was cancelled")),
    **dict.fromkeys((1205, 1206, 1213, 1180), (BUSY, "another program's transaction was in the way")),
    **dict.fromkeys((1290, 1792, 1836), (REFUSED, "the server or the database is read-only")),
    **dict.fromkeys((1044, 1045, 1698), (REFUSED, "the server refuses this user or password")),
    **dict.fromkeys((1142, 1227), (REFUSED, "this user may not do that")),
    **dict.fromkeys((1049,), (REFUSED, "there is no such database")),
    **dict.fromkeys((1153,), (REFUSED, "a text is larger than the server's max_allowed_packet: raise it")),
    **dict.fromkeys((1030, 1034, 1194), (REFUSED, "the server has trouble with its files")),
}
ORACLE: Mapping[int, tuple[str, str]] = {
    **dict.fromkeys((28, 1012, 1033, 1034, 1089, 3113, 3114, 3135, 12514, 12541), (LOST, "no connection")),
    **dict.fromkeys((1653, 1654, 257), (FULL, "the server's disk is full")),
    **dict.fromkeys((54, 60, 8177, 18, 20), (BUSY, "another program is in the way, or the server is full")),
    **dict.fromkeys((1017, 28000, 28001, 1031, 16000), (REFUSED, "the server refuses this user or password")),
}
ORACLE_DRIVER_LOST = frozenset({"DPY-1001", "DPY-4011", "DPY-6000", "DPY-6001", "DPY-6005"})
MSSQL: Mapping[str, tuple[str, str]] = {
    "08": (LOST, "the connection was lost"),
    "HYT": (BUSY, "a statement took too long"),
    "40": (BUSY, "another program's transaction was in the way"),
    "28": (REFUSED, "the server refuses this user or password"),
}


def what_happened(error: DBAPIError) -> tuple[str, str] | None:
    """The kind of trouble with the server and its words for people; None for a bug of ours."""
    cause = error.orig
    if cause is None:
        return None
    sqlstate = getattr(cause, "sqlstate", None)
    number = cause.args[0] if cause.args else None
    found: tuple[str, str] | None = None
    match type(cause).__module__.partition(".")[0]:
        case "psycopg" if sqlstate is not None:
            found = _by_beginning(PGSQL, sqlstate)
        case "psycopg" if type(cause).__name__ in ("OperationalError", "ConnectionTimeout"):
            # The client library's own words, which name host, port and user; it tells no code.
            found = (REFUSED if REFUSALS.search(str(cause)) else LOST), _one_line(str(cause))
        case "pymysql" if isinstance(number, int):
            found = MYSQL.get(number)
        case "oracledb":
            by_driver = str(getattr(number, "full_code", "")) in ORACLE_DRIVER_LOST
            found = (LOST, "no connection") if by_driver else ORACLE.get(getattr(number, "code", 0))
        case "mssql_python":
            shown = re.search(r"\[([0-9A-Z]{5})\]", str(cause))
            found = _by_beginning(MSSQL, shown[1]) if shown else None
    if found is None and error.connection_invalidated:
        return LOST, "the connection was lost"
    return found


def _sql_bytes(value: str) -> int:
    """Of a text as it goes to MySQL, where some characters are doubled."""
    return len(value.encode("utf-8", "replace")) + sum(map(value.count, "\\'\"\n\r\0\x1a"))


def _by_beginning(known: Mapping[str, tuple[str, str]], code: str) -> tuple[str, str] | None:
    return next((known[code[:length]] for length in (5, 3, 2) if code[:length] in known), None)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def trouble_of(error: DBAPIError) -> str | None:
    """What the server or the way to it has against a statement, in words that show no value; None for a bug."""
    found = what_happened(error)
    return None if found is None else found[1]


def is_full(error: DBAPIError) -> bool:
    found = what_happened(error)
    return found is not None and found[0] == FULL


class Server:
    """A database on a server, which other hosts may reach."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._dialect = url.get_backend_name()
        self._patient = True  # statements of the start, migrations among them, have no limit
        place = url.host or url.query.get("host") or url.query.get("unix_socket")
        port = f":{url.port}" if url.port else ""
        self._where = f"{url.database or url.query.get('service_name')} on {place}{port}"
        self.read_options: dict[str, Any] = {}
        self.write_options: dict[str, Any] = {}
        self.engine_options: dict[str, Any] = {
            "pool_size": 16,
            "max_overflow": 16,  # a server has room for about 100
            "pool_pre_ping": True,
            "pool_recycle": UNUSED_S,
        }
        match self._dialect:
            case "postgresql":
                # Of the client's: it costs nothing.
                self.read_options = {"isolation_level": "REPEATABLE READ"}
                self.write_options = {"isolation_level": "READ COMMITTED"}
                self.engine_options["connect_args"] = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "application_name": "gpt-worker",
                    "client_encoding": "utf8",
                    "keepalives": 1,
                    "keepalives_idle": 10,
                    "keepalives_interval": 5,
                    "keepalives_count": 3,
                    "tcp_user_timeout": 25_000,
                }
            case "mysql":
                # Set once a connection: each change costs journeys. What is updated is always the latest committed.
                self.engine_options["isolation_level"] = "REPEATABLE READ"
                self.engine_options["connect_args"] = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "charset": "utf8mb4",
                    "init_command": "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', "
                    f"innodb_lock_wait_timeout = {LOCK_TIMEOUT_S}, lock_wait_timeout = {LOCK_TIMEOUT_S} "
                    # MariaDB's alone: the locks of a host that vanished in mid-transaction would stay for hours
                    f"/*M!100300 , idle_transaction_timeout = {STATEMENT_TIMEOUT_S} */",
                }

        self.packet_bytes: int | None = None  # the most that MySQL takes and gives at once
        ours = self.engine_options.get("connect_args", {})
        for name in ours.keys() & url.query.keys():  # what the address says goes first
            del ours[name]
        if self._dialect == "mysql" and url.query.get("ssl") in ("true", "1"):  # as other programs have it
            # TLS, and whoever answers is believed; ssl_ca=… in the address asks who it is.
            ours["ssl"] = {"ca": None}

    def __str__(self) -> str:
        return f"the database {self._where}"

    def attach(self, engine: Engine) -> None:
        """Have the engine's connections set up."""

        @event.listens_for(engine, "do_connect")
        def do_connect(_dialect: object, _record: object, _args: list[Any], options: dict[str, Any]) -> None:
            if self._dialect == "mysql" and not self._patient:
                options.setdefault("read_timeout", STATEMENT_TIMEOUT_S)
                options.setdefault("write_timeout", STATEMENT_TIMEOUT_S)

        @event.listens_for(engine, "connect")
        def connect(connection: Any, _record: object) -> None:
            if self._dialect == "postgresql":
                statement_s = 0 if self._patient else STATEMENT_TIMEOUT_S
                connection.autocommit = True
                connection.execute(
                    "SELECT set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false), "
                    "set_config('idle_in_transaction_session_timeout', %s, false)",
                    [f"{seconds}s" for seconds in (statement_s, LOCK_TIMEOUT_S, statement_s)],
                )
                connection.autocommit = False

        if self._dialect == "mysql":
            event.listen(engine, "before_cursor_execute", self._check_size)

    def takes(self, value: str) -> bool:
        """Whether a text can be stored."""
        limit_bytes = self.packet_bytes
        return limit_bytes is None or len(value) * WIDEST < limit_bytes or _sql_bytes(value) < limit_bytes

    def _check_size(
        self, _connection: object, _cursor: object, _statement: str, given: Any, _context: object, many: bool
    ) -> None:
        """Raise TooLarge for what the server would answer by ending the connection."""
        for values in given if many else (given,):
            given_values = values.values() if isinstance(values, Mapping) else values
            texts = [value for value in given_values if isinstance(value, str)]
            if not self.takes("".join(texts)):
                raise TooLarge(
                    "A text is larger than the database takes: "
                    f"its server's max_allowed_packet is {self.packet_bytes} bytes."
                )

    def await_up(self, engine: Engine, is_wanted: Callable[[], bool]) -> None:
        """Return when the server answers, which it is given some time for.

        Raises SettingsError where it refuses us or does not come up, StartGivenUp when the service is to stop.
        """
        wait_until_s, told = time.monotonic() + START_WAIT_S, False
        while True:
            try:
                with engine.connect() as connection:
                    self._learn_limits(connection)
                    return
            except (
                TypeError,
                AttributeError,
                ValueError,
            ) as error:  # by an option that the driver does not know
                raise SettingsError(f"{self} can't be used: {_one_line(str(error))}") from error
            except DBAPIError as error:
                kind, words = what_happened(error) or (REFUSED, _one_line(str(error.orig)))
                if kind == REFUSED or time.monotonic() > wait_until_s:
                    raise SettingsError(f"{self} can't be used: {words}") from error
                if not told:
                    log.warning(
                        "%s does not answer yet: %s; waiting up to %.0f s",
                        self,
                        words,
                        START_WAIT_S,
                        extra={"action": "database_wait"},
                    )
                    told = True
            next_s = time.monotonic() + LOOK_EVERY_S
            while time.monotonic() < next_s:
                if not is_wanted():
                    raise StartGivenUp
                time.sleep(0.05)

    def _learn_limits(self, connection: Connection) -> None:
        if self._dialect != "mysql":
            return
        found = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one()
        if found < LEAST_PACKET_BYTES:
            raise SettingsError(
                f"{self} can't be used: its server's max_allowed_packet is {found} bytes: "
                f"make it {LEAST_PACKET_BYTES} or more"
            )
        self.packet_bytes = found - PACKET_ROOM_BYTES

    def prepare(self) -> None:
        """Nothing is made here: the database itself is the operator's."""

    @property
    def makes_tables_singly(self) -> bool:
        """Whether each table is committed as it is made: a start cut short leaves some, and the next makes the rest."""
        return self._dialect in ("mysql", "oracle")

    def lock_tables(self, connection: Connection) -> None:
        """Let no other service make or change the tables, until this connection's transaction, or itself, has ended.

        Raises SettingsError on MySQL, where another takes too long for that.
        """
        if self._dialect == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(TABLES_LOCK)))
        elif self._dialect == "mysql":
            got = connection.scalar(
                text("SELECT GET_LOCK(SHA2(CONCAT('gpt-worker ', DATABASE()), 224), :wait_s)"),
                {"wait_s": int(START_WAIT_S)},
            )
            if not got:  # a statement of one that was killed goes on too
                raise SettingsError(f"{self} is being changed by another gpt-worker: wait for it to finish")

    def look_through(self, session: Session) -> None:
        """The server looks after its files."""

    def opened(self) -> None:
        """From here on statements have their limit of time; connections of before have none, and go."""
        self._patient = False

    def is_locked(self, error: DBAPIError) -> bool:
        return False  # another program can't lock out all our writers

    def is_outdated(self, connection: Connection) -> bool:
        return False  # the pool asks each one whether it is alive

    def why_not_started(self, error: DBAPIError) -> str | None:
        """Why a start fails; None for a bug."""
        found = what_happened(error)
        return None if found is None else f"can't be used: {found[1]}"

    @property
    def missing(self) -> str | None:
        return None

    @property
    def trouble(self) -> str | None:
        return None
