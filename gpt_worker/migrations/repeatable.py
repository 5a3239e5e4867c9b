"""The steps of a migration on MySQL, MariaDB and Oracle, which commit each of them by itself: there they look first.

A start that is cut in a migration leaves what that has done so far, and not its number: the next start takes it from
its beginning, and leaves out what is done. The other databases keep all of a migration or nothing, and have Alembic's
own steps; so has a script of SQL (`--sql`), which has no database to look at. What is left out is a table, a column or
an index of that name; a migration that does something else must see to it by itself.

Alembic takes these classes for its own by their `__dialect__`, once this module is imported.
"""

from typing import Any

from alembic.ddl.impl import DefaultImpl
from alembic.ddl.mysql import MariaDBImpl, MySQLImpl
from alembic.ddl.oracle import OracleImpl
from sqlalchemy import Column, Index, Inspector, Table, inspect


class Repeatable(DefaultImpl):
    """Alembic's steps, each taken if it is not done."""

    def create_table(self, table: Table, **options: Any) -> None:
        """A table of that name that lacks a column is another program's, which the database will say."""
        if self.as_sql or not {column.name for column in table.columns} <= self._columns(table.name):
            super().create_table(table, **options)
        else:
            for index in table.indexes:
                self.create_index(index)

    def drop_table(self, table: Table, **options: Any) -> None:
        if self.as_sql or self._columns(table.name):
            super().drop_table(table, **options)

    def add_column(self, table_name: str, column: Column[Any], **options: Any) -> None:
        if self.as_sql or column.name not in self._columns(table_name):
            super().add_column(table_name, column, **options)

    def drop_column(self, table_name: str, column: Column[Any], **options: Any) -> None:
        if self.as_sql or column.name in self._columns(table_name):
            super().drop_column(table_name, column, **options)

    def create_index(self, index: Index, **options: Any) -> None:
        if self.as_sql or index.name not in self._indexes(index):
            super().create_index(index, **options)

    def drop_index(self, index: Index, **options: Any) -> None:
        if self.as_sql or index.name in self._indexes(index):
            super().drop_index(index, **options)

    def _columns(self, table: str) -> set[str]:
        """Of a table as it is now; none, if there is none."""
        look = self._look()
        return {column["name"] for column in look.get_columns(table)} if look.has_table(table) else set()

    def _indexes(self, index: Index) -> set[str | None]:
        """Those that the index's table has now."""
        assert index.table is not None
        look, table = self._look(), index.table.name
        return {found["name"] for found in look.get_indexes(table)} if look.has_table(table) else set()

    def _look(self) -> Inspector:
        """A new one each time: it remembers what it has seen."""
        assert self.connection is not None
        return inspect(self.connection)


class RepeatableMySql(Repeatable, MySQLImpl):
    __dialect__ = "mysql"


class RepeatableMariaDb(Repeatable, MariaDBImpl):
    __dialect__ = "mariadb"


class RepeatableOracle(Repeatable, OracleImpl):
    __dialect__ = "oracle"
