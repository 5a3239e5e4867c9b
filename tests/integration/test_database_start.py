"""The start of a service whose database is on a server: what it waits for, what it refuses, which tables it makes."""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import NullPool, create_engine, inspect

from tests.servers import Server, query, url_of
from tests.service import Env, Service
from tests.stand import Stand
from tests.upstream import Upstream

pytestmark = pytest.mark.services


# A start without a server


def test_start_waits_for_a_server_that_comes_up(stand: Stand, server: Server) -> None:
    server.stop()
    stand.launch()
    stand.wait_until(lambda: str(server.port) in stand.stderr())

    server.start()

    stand.wait_ready()
    assert stand.submit(["hello"]).json()["status"] == "succeeded"
    stand.assert_ends_well()


def test_start_that_waits_for_its_server_ends_when_it_is_told(stand: Stand, server: Server) -> None:
    server.stop()
    stand.launch()
    stand.wait_until(lambda: str(server.port) in stand.stderr())

    stand.signal(signal.SIGTERM)

    stand.wait_exit(15)
    assert "Traceback" not in stand.stderr()


@pytest.mark.parametrize(
    "changes",
    [
        {"DB_PASSWORD": "not-the-password-at-all"},
        {"DB_USER": "nobody-known-here"},
        {"DB_DATABASE": "no-such-database"},
    ],
    ids=["password", "user", "database"],
)
def test_refused_account_or_database_ends_the_start_in_one_line(
    stand: Stand, database: Env, changes: dict[str, str]
) -> None:
    stand.change_env(changes)

    line = stand.refusal(20)

    assert str(database["DB_PORT"]) in line
    said = stand.stderr()
    assert str(database["DB_PASSWORD"]) not in said
    assert changes.get("DB_PASSWORD", "nothing of the kind") not in said


@pytest.mark.parametrize("alias", [0, 1, 2])
def test_address_in_one_setting_does_as_well(
    tmp_path: Path, server: Server, database: Env, upstream: Upstream, alias: int
) -> None:
    scheme = {
        "pgsql": ["postgres", "postgresql", "pgsql"],
        "mysql": ["mysql", "mariadb", "mysql+pymysql"],
    }[server.name][alias]
    login = f"{quote(str(database['DB_USER']), safe='')}:{quote(server.password, safe='')}"
    url = f"{scheme}://{login}@127.0.0.1:{server.port}/{database['DB_DATABASE']}"

    with Service(tmp_path, {"DATABASE_URL": url}, upstream) as service:
        assert service.submit(["hello"]).json()["results"] == {"0": "answer to: hello"}
        assert service.terminate() == 0
        said = service.stderr()
    assert server.password not in said
    assert quote(server.password, safe="") not in said


# The tables


def shape(service: Service) -> dict[str, Any]:
    """Every table with its columns, keys and indexes."""
    engine = create_engine(url_of(service), poolclass=NullPool)
    with engine.connect() as connection:
        look = inspect(connection)
        return {
            table: {
                "columns": {
                    column["name"]: (str(column["type"]), column["nullable"], column["default"])
                    for column in look.get_columns(table)
                },
                "key": look.get_pk_constraint(table)["constrained_columns"],
                "indexes": sorted(
                    (str(index["name"]), index["column_names"], bool(index["unique"]))
                    for index in look.get_indexes(table)
                ),
                "references": sorted(
                    (
                        key["constrained_columns"],
                        key["referred_table"],
                        {name.lower(): value for name, value in key["options"].items()},
                    )
                    for key in look.get_foreign_keys(table)
                ),
                "options": {
                    name: value
                    for name, value in look.get_table_options(table).items()
                    if name != "mysql_auto_increment"
                },
            }
            for table in look.get_table_names()
            if table != "alembic_version"
        }


def test_migrations_make_the_same_tables_as_a_fresh_start(
    tmp_path: Path, server: Server, upstream: Upstream
) -> None:
    with server.database() as fresh, server.database() as old, ExitStack() as stack:
        first = stack.enter_context(Service(tmp_path / "fresh", fresh, upstream))
        second = Service(tmp_path / "old", old, upstream)
        query(second, "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)")

        with second:
            assert second.submit({"A": "upper", "a": "lower"}).json()["counts"]["answered"] == 2
            migrated = shape(second)

        assert migrated == shape(first)


def test_database_of_a_newer_version_is_refused(stand: Stand) -> None:
    stand.start()
    stand.terminate()
    query(stand, "UPDATE alembic_version SET version_num = '9999'")

    assert "newer gpt-worker" in stand.refusal()
