"""What a database server may have against a statement, by each driver's errors; and how its connections are set up.

The errors are made here as the drivers make them, none of which need be installed.
"""

from typing import Any, NoReturn, cast

import pytest
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from gpt_worker.db import is_full, trouble_of
from gpt_worker.db_servers import BUSY, FULL, LOST, REFUSED, START_WAIT_S, Server, what_happened
from gpt_worker.errors import StartGivenUp

REFUSED_BY_PGSQL = (
    'connection failed: connection to server at "db", port 5432 failed: '
    'FATAL:  password authentication failed for user "jobs"'
)


def driver_error(
    driver: str, *args: Any, sqlstate: str | None = None, name: str = "OperationalError"
) -> DBAPIError:
    kind = type(name, (Exception,), {"__module__": f"{driver}.errors", "sqlstate": sqlstate})
    return OperationalError("UPDATE tasks …", None, kind(*args))


class OracleError:
    def __init__(self, code: int, full_code: str = "") -> None:
        self.code = code
        self.full_code = full_code or f"ORA-{code:05}"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (driver_error("psycopg", "gone", sqlstate="57P01"), LOST),
        (driver_error("psycopg", "gone", sqlstate="08006"), LOST),
        (driver_error("psycopg", "the connection is closed"), LOST),
        (driver_error("psycopg", REFUSED_BY_PGSQL), REFUSED),
        (driver_error("psycopg", "no room", sqlstate="53100"), FULL),
        (driver_error("psycopg", "sorry", sqlstate="53300"), BUSY),
        (driver_error("psycopg", "deadlock", sqlstate="40P01"), BUSY),
        (driver_error("psycopg", "read-only", sqlstate="25006"), REFUSED),
        (driver_error("psycopg", "no such column", sqlstate="42703"), None),
        (driver_error("psycopg", "unique", sqlstate="23505"), None),
        (driver_error("pymysql", 2013, "Lost connection"), LOST),
        (driver_error("pymysql", 0, ""), LOST),
        (driver_error("pymysql", 1114, "The table is full"), FULL),
        (driver_error("pymysql", 1040, "Too many connections"), BUSY),
        (driver_error("pymysql", 1213, "Deadlock found"), BUSY),
        (driver_error("pymysql", 1045, "Access denied"), REFUSED),
        (driver_error("pymysql", 1153, "Got a packet bigger"), REFUSED),
        (driver_error("pymysql", 1054, "Unknown column"), None),
        (driver_error("pymysql", 1062, "Duplicate entry"), None),
        (driver_error("oracledb", OracleError(3113)), LOST),
        (driver_error("oracledb", OracleError(0, "DPY-6005")), LOST),
        (driver_error("oracledb", OracleError(1653)), FULL),
        (driver_error("oracledb", OracleError(904)), None),
        (driver_error("mssql_python", "[08S01] Communication link failure"), LOST),
        (driver_error("mssql_python", "[42S22] Invalid column name"), None),
        (driver_error("sqlite3", "no such table"), None),
    ],
)
def test_trouble_is_told_from_a_bug(error: DBAPIError, kind: str | None) -> None:
    found = what_happened(error)

    assert (found and found[0]) == kind
    assert (trouble_of(error) is None) == (kind is None)
    assert is_full(error) == (kind == FULL)


def test_connection_that_broke_in_an_unknown_way_is_lost() -> None:
    error = driver_error("pymysql", 9999, "something new")
    error.connection_invalidated = True

    assert what_happened(error) == (LOST, "the connection was lost")


def test_words_for_people_show_nothing_of_a_statement() -> None:
    error = driver_error("pymysql", 1213, "Deadlock found: 'a prompt'")

    assert "prompt" not in str(trouble_of(error))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@db:5433/jobs", "the database jobs on db:5433"),
        ("postgresql+psycopg://me:secret@/jobs?host=/run/postgresql", "the database jobs on /run/postgresql"),
        (
            "mysql+pymysql://me:secret@/jobs?unix_socket=/run/mysqld.sock",
            "the database jobs on /run/mysqld.sock",
        ),
        ("oracle+oracledb://me:secret@db/?service_name=jobs", "the database jobs on db"),
    ],
)
def test_server_is_shown_without_its_password(url: str, shown: str) -> None:
    assert str(Server(make_url(url))) == shown


def test_what_the_address_says_of_a_connection_goes_first() -> None:
    plain = Server(make_url("postgresql+psycopg://me@db/jobs"))
    own = Server(make_url("postgresql+psycopg://me@db/jobs?connect_timeout=60&sslmode=require"))

    assert plain.engine_options["connect_args"]["connect_timeout"] == 5
    assert "connect_timeout" not in own.engine_options["connect_args"]


def test_tls_is_asked_for_as_other_programs_do() -> None:
    server = Server(make_url("mysql+pymysql://me@db/jobs?ssl=true"))

    assert server.engine_options["connect_args"]["ssl"] == {"ca": None}


def test_start_that_waits_for_its_server_says_for_how_long(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        def connect(self) -> NoReturn:
            raise driver_error("pymysql", 2003, "Can't connect")

    with pytest.raises(StartGivenUp):
        Server(make_url("mysql+pymysql://me@db/jobs")).await_up(cast(Engine, Away()), lambda: False)

    (record,) = caplog.records
    waits = f"waiting up to {START_WAIT_S:.0f} s"
    assert (
        record.getMessage()
        == f"the database jobs on db does not answer yet: the connection was lost; {waits}"
    )


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ("a" * 999, True),
        ("a" * 1000, False),
        ("'" * 499, True),
        ("'" * 500, False),
        ("é" * 499, True),
        ("é" * 500, False),
        ("🙂" * 250, False),
        ("a\n" * 333, True),
        ("a\n" * 334, False),
    ],
)
def test_text_that_no_packet_of_mysql_holds_is_known_before_it_is_sent(text: str, *, is_taken: bool) -> None:
    server = Server(make_url("mysql+pymysql://me@db/jobs"))
    server.packet_bytes = 1000

    assert server.takes(text) is is_taken


def test_other_servers_take_texts_of_any_size() -> None:
    assert Server(make_url("postgresql+psycopg://me@db/jobs")).takes("a" * 1_000_000)
