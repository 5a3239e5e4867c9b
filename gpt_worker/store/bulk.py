"""Many rows of tasks in few statements, in the words of each database: a journey for each row would be too slow.

Values go as parameters; where a database has no words for it here, the driver runs a statement a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Integer, Select, Table, Update, bindparam, insert, update

from gpt_worker.domain import TaskState
from gpt_worker.models import TaskRow

TASKS = cast(Table, TaskRow.__table__)
ROWS = 250  # a statement
CHARACTERS = 100_000  # a statement: 1 MiB at most, as MySQL has them, unless one text alone is larger
# Of a task that is stored; the other columns are as PENDING has them.
NEW = ("position", "id", "prompt", "tokens")

_INSERT = "INSERT INTO tasks (job_id, position, id, prompt, tokens, state, attempts) "
_SQLITE_ROW = f"(?1,?,?,?,?,{TaskState.PENDING:d},0)"
_SQLITE_INSERTS = {rows: f"{_INSERT}VALUES {','.join([_SQLITE_ROW] * rows)}" for rows in (1000, 100, 10, 1)}


def _array(column: str) -> str:
    """A parameter of PostgreSQL: values of this column."""
    return f"%s::{'int' if isinstance(TASKS.c[column].type, Integer) else 'text'}[]"


_PGSQL_INSERT = (
    f"{_INSERT}SELECT %s, {', '.join(NEW)}, {TaskState.PENDING:d}, 0 "  # noqa: S608
    f"FROM unnest({', '.join(map(_array, NEW))}) AS new ({', '.join(NEW)})"
)


def insert_tasks(connection: Connection, job_id: str, rows: Sequence[tuple[int, str, str, int]]) -> None:
    """Store pending tasks of one job: position, id, prompt as JSON, tokens."""
    match connection.dialect.name:
        case "sqlite":
            _insert_into_sqlite(connection, job_id, rows)
        case "postgresql":
            for part in in_parts(rows):
                connection.exec_driver_sql(_PGSQL_INSERT, (job_id, *map(list, zip(*part, strict=True))))
        case _ if rows:
            values = [dict(zip(NEW, row, strict=True)) for row in rows]
            fixed = {"job_id": job_id, "state": int(TaskState.PENDING), "attempts": 0}
            connection.execute(insert(TASKS), [fixed | value for value in values])


def _insert_into_sqlite(
    connection: Connection, job_id: str, rows: Sequence[tuple[int, str, str, int]]
) -> None:
    """Many rows a statement: half the time of a row each. And other threads run while SQLite is at it, but after each
    statement they are waited for, so there are few.
    """
    start = 0
    for count, statement in _SQLITE_INSERTS.items():
        while start + count <= len(rows):
            values: list[str | int] = [job_id]
            for row in rows[start : start + count]:
                values += row
            connection.exec_driver_sql(statement, tuple(values))
            start += count


class PendingUpdate:
    """Sets these columns of pending tasks, and their state."""

    def __init__(self, columns: Sequence[str], state: TaskState) -> None:
        self.columns = columns
        self.state = state
        given: dict[str, Any] = {name: bindparam(name) for name in columns}
        self._statement = pending_update().values(given | {"state": int(state)})

    def run(self, connection: Connection, job_id: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Update one job's tasks by rows of the position and the columns; how many were pending."""
        server = connection.dialect.name
        if len(rows) > 1 and server in ("postgresql", "mysql"):
            run = self._run_on_pgsql if server == "postgresql" else self._run_on_mysql
            return sum(run(connection, job_id, part) for part in in_parts(rows))
        names = ("b_position", *self.columns)
        return update_each(
            connection,
            self._statement,
            [{"b_job": job_id, **dict(zip(names, row, strict=True))} for row in rows],
        )

    def _run_on_pgsql(self, connection: Connection, job_id: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """By arrays that are looked into at each row: a join of a table that has grown since it was last analysed may
        be planned to read the whole job.
        """
        positions, *values = map(list, zip(*rows, strict=True))
        changes = ", ".join(
            f"{name} = ({_array(name)})[array_position({_array('position')}, position)]"
            for name in self.columns
        )
        statement = (
            f"UPDATE tasks SET {changes}, state = {self.state:d} "  # noqa: S608
            f"WHERE job_id = %s AND position = ANY({_array('position')}) AND state = {TaskState.PENDING:d}"
        )
        given = [given for column in values for given in (column, positions)]
        return connection.exec_driver_sql(statement, (*given, job_id, positions)).rowcount

    def _run_on_mysql(self, connection: Connection, job_id: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """By a table of the new values, which is read first (STRAIGHT_JOIN), whatever is believed of the other."""
        columns = ("position", *self.columns)
        first = ", ".join(f"%s AS {name}" for name in columns)
        more = f" UNION ALL SELECT {', '.join(['%s'] * len(columns))}" * (len(rows) - 1)
        changes = ", ".join(f"tasks.{name} = new.{name}" for name in self.columns)
        statement = (
            f"UPDATE (SELECT {first}{more}) AS new STRAIGHT_JOIN tasks "  # noqa: S608
            "ON tasks.job_id = %s AND tasks.position = new.position "
            f"SET {changes}, tasks.state = {self.state:d} WHERE tasks.state = {TaskState.PENDING:d}"
        )
        values = [value for row in rows for value in row]
        return connection.exec_driver_sql(statement, (*values, job_id)).rowcount


def pending_update() -> Update:
    """Of one pending task: `b_job`, `b_position`."""
    return update(TASKS).where(
        TASKS.c.job_id == bindparam("b_job"),
        TASKS.c.position == bindparam("b_position"),
        TASKS.c.state == TaskState.PENDING,
    )


def update_each(connection: Connection, statement: Update, rows: Sequence[dict[str, Any]]) -> int:
    """Run an update for each row of parameters; how many rows of the database it has met."""
    if not rows:
        return 0
    if connection.dialect.supports_sane_multi_rowcount:
        return connection.execute(statement, rows).rowcount
    return sum(connection.execute(statement, row).rowcount for row in rows)


def limit_within(
    connection: Connection, lengths: Select[Any], given: Mapping[str, Any], max_characters: int
) -> int:
    """How many of `b_limit` rows to ask for, so that they end with the one that reaches `max_characters` of text.

    The driver of a server has all rows of a statement in memory before it hands out the first; so `lengths`, the same
    statement with nothing but the lengths of the texts, is asked before. SQLite finds a row as it is asked for: who
    reads them stops in time.
    """
    limit: int = given["b_limit"]
    if connection.dialect.name == "sqlite":
        return limit
    for count, length in enumerate(connection.scalars(lengths, given).all(), 1):
        max_characters -= length or 0
        if max_characters <= 0:
            return count
    return limit


def in_parts(rows: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
    """The rows in parts that a statement may have."""
    first, characters = 0, 0
    for number, row in enumerate(rows):
        size = sum(len(value) for value in row if isinstance(value, str))
        if number > first and (number - first == ROWS or characters + size > CHARACTERS):
            yield rows[first:number]
            first, characters = number, 0
        characters += size
    if rows:
        yield rows[first:]
