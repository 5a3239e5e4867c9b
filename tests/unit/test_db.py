"""Bringing a database to this version: an empty one, an older one, one that is up to date, and one that is newer."""

import itertools
import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from flask import Flask
from flask_migrate import Migrate, upgrade

from config import SettingsError
from gpt_worker import db
from gpt_worker.db import MIGRATIONS, Database, revisions
from tests.cutting import is_cut

NEXT = f"{int(revisions()[-1]) + 1:04}"
NEXT_MIGRATION = f'''"""a note for every mode"""

import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{revisions()[-1]}"


def upgrade() -> None:
    op.add_column("modes", sa.Column("note", sa.String(length=50), nullable=True))
'''


def migrated(path: Path) -> None:
    with closing(Database(Flask("test"), f"sqlite:///{path}")) as database:
        database.migrate()


def migrated_by_alembic(path: Path, revision: str = "head") -> None:
    app = Flask("test")
    database = Database(app, f"sqlite:///{path}")
    Migrate(app, db.db, directory=str(MIGRATIONS))
    with app.app_context():
        upgrade(revision=revision)
    database.close()


def use_next_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, migration: str = NEXT_MIGRATION
) -> None:
    migrations = Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))
    (migrations / "versions" / f"{NEXT}_note.py").write_text(migration)
    monkeypatch.setattr(db, "MIGRATIONS", migrations)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(query).fetchall()


def schema(path: Path) -> dict[str, str]:
    return dict(rows(path, "SELECT name, sql FROM sqlite_master"))


def tables(path: Path) -> dict[str, list[Any]]:
    """Each table's columns, keys and indexes: altered or made at once, its SQL differs."""
    found = {}
    for (table,) in rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        parts = [rows(path, f"PRAGMA {part}({table})") for part in ("table_xinfo", "foreign_key_list")]
        for _, index, *kind in sorted(rows(path, f"PRAGMA index_list({table})"), key=lambda row: row[1]):
            parts.append([(index, *kind), *rows(path, f"PRAGMA index_xinfo({index})")])
        found[table] = parts
    return found


def stored_revision(path: Path) -> list[tuple[Any, ...]]:
    return rows(path, "SELECT version_num FROM alembic_version")


def test_revisions_are_those_of_alembic_in_its_order() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)

    newest_first = [step.revision for step in script.walk_revisions()]

    assert script.get_heads() == [revisions()[-1]]
    assert revisions() == newest_first[::-1]


def test_an_empty_database_gets_what_every_migration_would_make(tmp_path: Path) -> None:
    migrated(tmp_path / "at-once")
    migrated_by_alembic(tmp_path / "by-alembic")

    assert tables(tmp_path / "at-once") == tables(tmp_path / "by-alembic")
    assert stored_revision(tmp_path / "at-once") == stored_revision(tmp_path / "by-alembic")


def test_a_database_that_is_up_to_date_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    rows(path, "INSERT INTO modes VALUES ('auth', 'false')")
    before = schema(path)

    migrated(path)

    assert schema(path) == before
    assert rows(path, "SELECT * FROM modes") == [("auth", "false")]


def test_an_old_database_gets_the_migrations_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    rows(path, "INSERT INTO modes VALUES ('auth', 'false')")
    use_next_migration(tmp_path, monkeypatch)

    migrated(path)

    assert rows(path, "SELECT * FROM modes") == [("auth", "false", None)]
    assert stored_revision(path) == [(NEXT,)]


def test_upgrade_that_is_cut_leaves_an_older_revision_whole(tmp_path: Path) -> None:
    for revision in revisions():
        migrated_by_alembic(tmp_path / revision, revision)

    met = []
    for after in itertools.count(1):
        path = tmp_path / f"cut after {after}"
        shutil.copy(tmp_path / "0001", path)
        if not is_cut(partial(migrated, path), after):
            break
        ((revision,),) = stored_revision(path)
        met.append(revision)

        assert tables(path) == tables(tmp_path / revision)
        migrated(path)
        assert tables(path) == tables(tmp_path / revisions()[-1])
    assert sorted(set(met)) == revisions()[:-1]


def test_first_start_that_is_cut_leaves_nothing(tmp_path: Path) -> None:
    assert is_cut(partial(migrated, tmp_path / "jobs"), 5)

    assert schema(tmp_path / "jobs") == {}


def test_what_a_database_has_against_a_migration_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    rows(path, "ALTER TABLE modes ADD COLUMN note TEXT")
    use_next_migration(tmp_path, monkeypatch)

    with pytest.raises(SettingsError) as refusal:
        migrated(path)

    assert str(refusal.value) == (
        f"the database {path} can't be brought to this version: duplicate column name: note"
    )


def test_bug_of_a_migration_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    use_next_migration(tmp_path, monkeypatch, NEXT_MIGRATION.replace("op.add_column", "op.ad_column"))

    with pytest.raises(AttributeError, match="ad_column"):
        migrated(path)

    assert stored_revision(path) == [(revisions()[-2],)]


def test_tasks_of_the_first_version_have_seen_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    migrated_by_alembic(path, "0001")
    rows(
        path,
        "INSERT INTO tasks (job_id, position, id, prompt, tokens, state, attempts) "
        "VALUES ('a job', 7, 'an id', '\"Hello\"', 1, 0, 2)",
    )

    migrated(path)

    assert rows(path, "SELECT position, attempts, crashes FROM tasks") == [(7, 2, 0)]


@pytest.mark.parametrize("statement", ["DROP TABLE alembic_version", "DELETE FROM alembic_version"])
def test_a_database_of_unknown_revision_is_left_to_alembic(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    for table in schema(path).keys() - {"alembic_version"}:
        if not table.startswith(("ix_", "sqlite_")):
            rows(path, f"DROP TABLE {table}")
    rows(path, "CREATE TABLE another (id INTEGER)")
    rows(path, statement)

    migrated(path)

    assert stored_revision(path) == [(revisions()[-1],)]
    assert {"another", "jobs", "users"} <= schema(path).keys()


def test_a_newer_database_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    migrated(path)
    rows(path, "UPDATE alembic_version SET version_num = '9999'")
    before = schema(path)

    with pytest.raises(SettingsError, match="newer gpt-worker"):
        migrated(path)

    assert schema(path) == before
    assert stored_revision(path) == [("9999",)]
