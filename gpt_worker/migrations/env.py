"""How Alembic runs our migrations: on the application's own engine, one transaction a migration (but: `repeatable`)."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from flask import current_app
from sqlalchemy import Connection

import gpt_worker.migrations.repeatable  # noqa: F401 (Alembic then takes its steps)
from gpt_worker.models import Base, LongText


def render_own_type(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """In a new migration, our column types by their own names."""
    name = "LongText" if item is LongText else type(item).__name__
    if kind != "type" or name not in ("LongText", "UtcDateTime", "JsonText"):
        return False
    autogen.imports.add(f"from gpt_worker.models import {name}")
    return name if name == "LongText" else f"{name}()"


def run(connection: Connection | None = None, url: str | None = None) -> None:
    context.configure(
        connection=connection,
        url=url,
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite can't alter most things in place
        compare_type=True,
        transaction_per_migration=True,
        render_item=render_own_type,
        literal_binds=url is not None,
    )
    with context.begin_transaction():
        context.run_migrations()


engine = current_app.extensions["migrate"].db.engine
if context.is_offline_mode():
    run(url=str(engine.url))
else:
    with engine.connect() as connection:
        run(connection)
