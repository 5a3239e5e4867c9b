"""The start of a service whose database is on a server: what it waits for, what it refuses, which tables it makes."""

import itertools
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import flask_migrate
import pytest
from flask import Flask
from sqlalchemy import NullPool, create_engine, inspect, text

from config import SettingsError
from gpt_worker import db_servers
from gpt_worker.db import Database, revisions
from gpt_worker.models import Base
from tests.cutting import is_cut
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


@contextmanager
def opened(service: Service) -> Iterator[Database]:
    """The service's database as a start has it, in this process."""
    app = Flask("test")
    database = Database(app, url_of(service).render_as_string(hide_password=False))
    try:
        with app.app_context():
            yield database
    finally:
        database.close()


def migrate(service: Service, revision: str | None = None) -> None:
    """As a start does; or with Alembic to an older revision, up or down."""
    with opened(service) as database:
        if revision is None:
            database.migrate()
        else:
            database._load_alembic()
            go = flask_migrate.downgrade if stored_revision(service) > revision else flask_migrate.upgrade
            go(revision=revision)


def stored_revision(service: Service) -> str:
    """Empty before the first."""
    engine = create_engine(url_of(service), poolclass=NullPool)
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return ""
        return connection.scalar(text("SELECT version_num FROM alembic_version")) or ""


def shape_of_models(server: Server, tmp_path: Path) -> dict[str, Any]:
    with server.database() as env:
        service = Service(tmp_path / "models", env)
        engine = create_engine(url_of(service), poolclass=NullPool)
        Base.metadata.create_all(engine)
        return shape(service)


def test_fresh_and_old_databases_get_the_tables_of_the_models(
    tmp_path: Path, server: Server, upstream: Upstream
) -> None:
    with server.database() as fresh, server.database() as old, ExitStack() as stack:
        first = stack.enter_context(Service(tmp_path / "fresh", fresh, upstream))
        second = Service(tmp_path / "old", old, upstream)
        query(second, "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)")

        with second:
            assert second.submit({"A": "upper", "a": "lower"}).json()["counts"]["answered"] == 2
            migrated = shape(second)

        assert migrated == shape(first) == shape_of_models(server, tmp_path)


# "" is an empty database.
@pytest.mark.parametrize("old", ["", *revisions()[:-1]])
def test_upgrade_that_is_cut_anywhere_is_finished_by_the_next_start(
    tmp_path: Path, server: Server, old: str
) -> None:
    wanted = shape_of_models(server, tmp_path)

    for after in itertools.count(1):
        with server.database() as env:
            service = Service(tmp_path / str(after), env)
            if old:
                migrate(service, old)
            if not is_cut(partial(migrate, service), after):
                break
            migrate(service)

            assert shape(service) == wanted, after
            assert stored_revision(service) == revisions()[-1]
    assert after > 1


@pytest.mark.parametrize("server", ["pgsql"], indirect=True)
def test_upgrade_that_is_cut_leaves_an_older_revision_whole(tmp_path: Path, server: Server) -> None:
    shapes: dict[str, dict[str, Any]] = {"": {}}
    with server.database() as env:
        service = Service(tmp_path / "whole", env)
        for revision in revisions():
            migrate(service, revision)
            shapes[revision] = shape(service)

    met = []
    for after in itertools.count(1):
        with server.database() as env:
            service = Service(tmp_path / str(after), env)
            migrate(service, "0001")
            if not is_cut(partial(migrate, service), after):
                break
            met.append(stored_revision(service))

            assert shape(service) == shapes[met[-1]], after
    assert sorted(set(met)) == revisions()[:-1]


def test_downgrade_that_is_cut_anywhere_can_be_taken_again(tmp_path: Path, server: Server) -> None:
    for after in itertools.count(1):
        with server.database() as env:
            service = Service(tmp_path / str(after), env)
            migrate(service, "0001")
            wanted = shape(service)
            migrate(service)
            if not is_cut(partial(migrate, service, "0001"), after):
                break
            migrate(service, "0001")

            assert shape(service) == wanted, after
    assert after > 1


def test_table_of_another_program_ends_the_start_in_one_line(stand: Stand) -> None:
    migrate(stand, "0002")
    query(stand, "CREATE TABLE result_files (pet INTEGER)")

    line = stand.refusal()

    assert "can't be brought to this version" in line
    assert "result_files" in line


@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_start_waits_no_longer_for_another_that_makes_the_tables(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_servers, "START_WAIT_S", 1.0)
    with opened(stand) as first, first.write() as session:
        first._home.lock_tables(session.connection())

        with pytest.raises(SettingsError, match="another gpt-worker"):
            migrate(stand)


def test_database_of_a_newer_version_is_refused(stand: Stand) -> None:
    stand.start()
    stand.terminate()
    query(stand, "UPDATE alembic_version SET version_num = '9999'")

    assert "newer gpt-worker" in stand.refusal()
