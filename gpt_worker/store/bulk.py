"""Many rows of tasks in few statements, in the words of each database: a journey for each row would be too slow.

Values go as parameters; where a database has no words for it here, the driver runs a statement a row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

from sqlalchemy import Connection, Dialect, Integer, Select, Table, Update, bindparam, insert, update

from gpt_worker.domain import TaskState
from gpt_worker.models import TaskRow

Row = tuple[Any, ...]
TASKS = cast(Table, TaskRow.__table__)
ROWS = 250  # a statement
CHARACTERS = 100_000  # a statement: 1 MiB at most, as MySQL has them, unless one text alone is larger
# Of a task that is stored; the other columns are as PENDING has them.
NEW = ("position", "id", "prompt", "tokens")

_INSERT = "INSERT INTO tasks (job_id, position, id, prompt, tokens, state, attempts) "
_SQLITE_ROW = f"(?1,?,?,?,?,{TaskState.PENDING:d},0)"
_SQLITE_INSERTS = {rows: f"{_INSERT}VALUES {','.join([_SQLITE_ROW] * rows)}" for rows in (1000, 100, 10, 1)}

# How many rows a statement of SQLite's may have: few different ones, which it then knows. What a part has less is NULL.
_SQLITE_ROWS = (1, 4, 16, 64, 256)
ROWS_OF_ONE_JOB = 8  # from so many on, PostgreSQL has a statement for them


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


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Store rows of these columns; the first of them is never NULL."""
    if connection.dialect.name != "sqlite" or len(rows) == 1:
        if rows:
            connection.execute(insert(table), [dict(zip(columns, row, strict=True)) for row in rows])
        return
    stored = [_as_stored(table, name, connection.dialect) for name in columns]
    rows = [tuple(change(value) for change, value in zip(stored, row, strict=True)) for row in rows]
    for count, values in _sqlite_parts(rows):
        connection.exec_driver_sql(
            f"INSERT INTO {table.name} ({', '.join(columns)}) "  # noqa: S608
            f"SELECT * FROM ({_sqlite_values(count, len(columns))}) WHERE column1 IS NOT NULL",
            values,
        )


def _as_stored(table: Table, column: str, dialect: Dialect) -> Callable[[Any], Any]:
    """What makes the column's values into those that the driver is given."""
    return table.c[column].type.dialect_impl(dialect).bind_processor(dialect) or (lambda value: value)


def _sqlite_parts(rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """For each statement: how many rows it has, and their values."""
    most = _SQLITE_ROWS[-1]
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        count = next(count for count in _SQLITE_ROWS if count >= len(part))
        nothing = (None,) * (len(part[0]) * (count - len(part)))
        yield count, (*chain.from_iterable(part), *nothing)


def _sqlite_values(rows: int, columns: int) -> str:
    row = f"({','.join('?' * columns)})"
    return f"VALUES {','.join([row] * rows)}"


class EachUpdate:
    """Updates rows of a table that are found by `keys`, each by values of its own: numbers and texts.

    SQLite and MySQL have one statement for many. A row a statement would give Python's lock up after each, also inside
    a driver's `executemany`, and dozens of threads would have it before the next one.
    """

    def __init__(
        self,
        table: Table,
        keys: Sequence[str],
        columns: Sequence[str],
        *,
        adds: bool = False,
        guard: Mapping[str, int] | None = None,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        """`adds`: the values are added to what is there; `guard`: what else such a row must have; `fixed`: what all
        get.
        """
        guard, fixed = guard or {}, fixed or {}
        self._table = table.name
        self._names = (*keys, *columns)
        self._given = [f"b_{name}" for name in self._names]
        self._on = [f"{table.name}.{name} = new.{name}" for name in keys]
        self._guard = [f"{table.name}.{name} = {value:d}" for name, value in guard.items()]
        old = f"{table.name}.{{0}} + " if adds else ""
        self._changes = {name: f"{old}new.{{0}}".format(name) for name in columns} | {
            name: f"{value:d}" for name, value in fixed.items()
        }
        given: dict[str, Any] = {name: bindparam(f"b_{name}") for name in columns}
        if adds:
            given = {name: table.c[name] + value for name, value in given.items()}
        self._statement = (
            update(table)
            .where(*(table.c[name] == bindparam(f"b_{name}") for name in keys))
            .where(*(table.c[name] == value for name, value in guard.items()))
            .values({**given, **fixed})
        )
        self._on_sqlite = {rows: self._write_for_sqlite(rows) for rows in _SQLITE_ROWS}

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        """Update by rows of the keys and the columns, no two of the same keys; how many rows it has met."""
        if len(rows) > 1:
            match connection.dialect.name:
                case "sqlite":
                    return sum(
                        connection.exec_driver_sql(self._on_sqlite[count], values).rowcount
                        for count, values in _sqlite_parts(rows)
                    )
                case "mysql":
                    return sum(self._run_on_mysql(connection, part) for part in in_parts(rows))
        return update_each(
            connection, self._statement, [dict(zip(self._given, row, strict=True)) for row in rows]
        )

    def _write_for_sqlite(self, rows: int) -> str:
        """LIMIT tells SQLite how few they are: else, once it was analysed, it may read the whole table before."""
        names = ", ".join(f"column{number} AS {name}" for number, name in enumerate(self._names, 1))
        changes = ", ".join(f"{name} = {value}" for name, value in self._changes.items())
        return (
            f"UPDATE {self._table} SET {changes} "  # noqa: S608
            f"FROM (SELECT {names} FROM ({_sqlite_values(rows, len(self._names))}) LIMIT {rows}) AS new "
            f"WHERE {' AND '.join((*self._on, *self._guard))}"
        )

    def _run_on_mysql(self, connection: Connection, rows: Sequence[Row]) -> int:
        """By a table of the new values, which is read first (STRAIGHT_JOIN), whatever is believed of the other."""
        first = ", ".join(f"%s AS {name}" for name in self._names)
        more = f" UNION ALL SELECT {', '.join(['%s'] * len(self._names))}" * (len(rows) - 1)
        changes = ", ".join(f"{self._table}.{name} = {value}" for name, value in self._changes.items())
        where = f" WHERE {' AND '.join(self._guard)}" if self._guard else ""
        statement = (
            f"UPDATE (SELECT {first}{more}) AS new STRAIGHT_JOIN {self._table} "  # noqa: S608
            f"ON {' AND '.join(self._on)} SET {changes}{where}"
        )
        return connection.exec_driver_sql(statement, (*chain.from_iterable(rows),)).rowcount


class PendingUpdate(EachUpdate):
    """Sets these columns of pending tasks, and their state. Rows: the job, the position, the columns."""

    def __init__(self, columns: Sequence[str], state: TaskState) -> None:
        super().__init__(
            TASKS,
            ("job_id", "position"),
            columns,
            guard={"state": TaskState.PENDING},
            fixed={"state": int(state)},
        )
        self._columns = columns
        self._state = state

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        if connection.dialect.name != "postgresql":
            return super().run(connection, rows)
        by_job: dict[str, list[Row]] = {}
        for job_id, *row in rows:
            by_job.setdefault(job_id, []).append(tuple(row))
        many = {job_id: of_job for job_id, of_job in by_job.items() if len(of_job) >= ROWS_OF_ONE_JOB}
        met = sum(
            self._run_on_pgsql(connection, job_id, part)
            for job_id, of_job in many.items()
            for part in in_parts(of_job)
        )
        return met + super().run(connection, [row for row in rows if row[0] not in many])

    def _run_on_pgsql(self, connection: Connection, job_id: str, rows: Sequence[Row]) -> int:
        """By arrays that are looked into at each row: a join of a table that has grown since it was last analysed may
        be planned to read the whole job.
        """
        positions, *values = map(list, zip(*rows, strict=True))
        changes = ", ".join(
            f"{name} = ({_array(name)})[array_position({_array('position')}, position)]"
            for name in self._columns
        )
        statement = (
            f"UPDATE tasks SET {changes}, state = {self._state:d} "  # noqa: S608
            f"WHERE job_id = %s AND position = ANY({_array('position')}) AND state = {TaskState.PENDING:d}"
        )
        given = [given for column in values for given in (column, positions)]
        return connection.exec_driver_sql(statement, (*given, job_id, positions)).rowcount


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
