"""The tasks of an uploaded file, read one by one: JSONL or CSV, a line or a row a task.

Every error tells the line, and tasks are made only as they are asked for, so a file of any size takes little memory.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

from werkzeug.exceptions import BadRequest

from gpt_worker.api.file_lines import FileLines, LineTooLong
from gpt_worker.api.job_body import MAX_ID_LENGTH, TASK_FORMS, TaskReader, check_id
from gpt_worker.api.parsing import not_utf8, parse_line, parse_lines
from gpt_worker.api.seen_ids import SeenIds
from gpt_worker.domain import JobSettings, NewTask
from gpt_worker.errors import Invalid, TooLarge
from gpt_worker.gpt import template_parts

DELIMITERS = ",;\t"  # when a header has as many of one as of another, the first counts
MAX_COLUMNS = 1000
LINE_ENDS_GONE = "(with curl send it by --data-binary: -d removes the line ends)"
# Of a cell with "" in it, two: a pattern for the whole takes memory by the letter.
QUOTED = re.compile(r'"[^"]*"')

SHAPES = frozenset(names for form in TASK_FORMS for names in ((form,), ("id", form), (form, "id")))
NO_ID = ("text",)
TEXTS = frozenset({NO_ID, ("id", "text"), ("text", "id")})

Row = tuple[int, dict[str, Any]]
"""A line's number, and what it says: an "id" if it has one, and one of TASK_FORMS."""


def jsonl_tasks(
    pieces: Iterable[bytes], settings: JobSettings, max_line_bytes: int, max_tasks: int
) -> Iterator[NewTask]:
    """A task a line: `{"id"?, "text" | "messages" | "vars"}`. Blank lines are passed over, and so is a BOM.

    Raises:
        BadRequest: a line is not JSON.
        Invalid: a line is no task, an id comes twice, or there is no task.
        TooLarge: too many tasks, or too long a line.
    """
    lines = FileLines(pieces, max_line_bytes, blank=b" \t\r\n")
    tasks = _Tasks(settings, max_line_bytes, max_tasks)
    one_by_one_to = 1  # the first may begin with a BOM
    while True:
        if lines.number >= one_by_one_to:
            whole = lines.peek_whole()
            many = parse_lines(whole)
            if many is not None:
                yield from tasks.of_lines(many, lines.number + 1)
                lines.pass_over(whole)
                continue
            one_by_one_to = lines.number + whole.count(b"\n")
        raw = lines.next(skip_blank=True)
        if raw is None:
            break
        yield tasks.of_line(lines.number, parse_line(raw, lines.number))
    tasks.check_any()


def csv_tasks(
    pieces: Iterable[bytes], settings: JobSettings, max_row_bytes: int, max_tasks: int
) -> Iterator[NewTask]:
    """A task a row: the cell under `text`, or with a template every cell as a variable; the id is that under `id`.

    Raises:
        BadRequest: not CSV, or not in UTF-8.
        Invalid: a column is missing, a row has more or fewer cells, an id comes twice, or there is no task.
        TooLarge: too many tasks, or too long a row.
    """
    lines = FileLines(pieces, max_row_bytes, blank=b"\r\n")
    tasks = _Tasks(settings, max_row_bytes, max_tasks)
    for line, said in _csv_rows(lines, settings, max_row_bytes):
        yield tasks.of_row(line, said)
    tasks.check_any()


def csv_body_tasks(
    pieces: Iterable[bytes], settings: JobSettings, max_row_bytes: int, max_tasks: int
) -> Iterator[NewTask]:
    """The same of a whole body; where that has no line end at all, errors say how the line ends may have gone."""
    body = _OneLine(pieces)
    try:
        yield from csv_tasks(body, settings, max_row_bytes, max_tasks)
    except BadRequest as error:
        if body.is_one_line:
            error.description = f"{str(error.description).removesuffix('.')} {LINE_ENDS_GONE}."
        raise
    except Invalid as error:
        if not body.is_one_line:
            raise
        raise Invalid(
            *(replace(each, msg=f"{each.msg} {LINE_ENDS_GONE}") for each in error.errors)
        ) from error
    except TooLarge as error:
        if not body.is_one_line:
            raise
        raise TooLarge(f"{error} {LINE_ENDS_GONE}") from error


class _OneLine:
    """Passes pieces on; `is_one_line` as long as there were some, and no line end in any."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.is_one_line = False
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        line_ended = False
        for piece in self._pieces:
            line_ended = line_ended or b"\n" in piece or b"\r" in piece
            self.is_one_line = not line_ended
            yield piece


class _Tasks:
    """Makes the tasks of what lines or rows say, in order: no id twice, and no more tasks than there may be."""

    def __init__(self, settings: JobSettings, max_json_bytes: int, max_tasks: int) -> None:
        self._reader = TaskReader(settings, max_json_bytes)
        self._seen = SeenIds()
        self._max_tasks = max_tasks
        self._count = 0

    def of_row(self, line: int, said: dict[str, Any]) -> NewTask:
        """The task of one row, from which its id is taken."""
        if self._count == self._max_tasks:
            raise TooLarge(f"a job may have at most {self._max_tasks} tasks (MAX_TASKS)")
        id_ = check_id(said.pop("id"), ("line", line, "id")) if "id" in said else str(self._count)
        if not self._seen.add(id_):
            raise _given_twice(id_, line)
        self._count += 1
        return self._reader.read(said, id_, ("line", line))

    def of_line(self, line: int, said: Any) -> NewTask:
        """The task of one line of JSONL."""
        _check_members(said, line)
        return self.of_row(line, said)

    def of_lines(self, many: Sequence[dict[str, str]], first_line: int) -> Iterable[NewTask]:
        """The tasks of so many lines; sooner where each says a text, or a text and an id, and no more."""
        ids = self._ids_of_texts(many)
        if ids is None:
            return starmap(self.of_line, enumerate(many, first_line))
        again = self._seen.add_all(ids)
        if again is not None:
            raise _given_twice(ids[again], first_line + again)
        self._count += len(many)
        return self._reader.read_texts([said["text"] for said in many], ids)

    def _ids_of_texts(self, many: Sequence[dict[str, str]]) -> Sequence[str] | None:
        """The ids of lines that say nothing else but texts that are tasks as they are; None for any others."""
        end = self._count + len(many)
        shapes = set(map(tuple, many))
        if not shapes <= TEXTS or not self._reader.takes_texts or end > self._max_tasks:
            return None
        if len(shapes) > 1 and NO_ID in shapes:
            return None
        ids = [*map(str, range(self._count, end))] if NO_ID in shapes else [said["id"] for said in many]
        are_right = all(ids) and max(map(len, ids)) <= MAX_ID_LENGTH and all(said["text"] for said in many)
        return ids if are_right else None

    def check_any(self) -> None:
        """Invalid if there was no task."""
        if not self._count:
            raise Invalid.at("the file needs at least one task", "file")


def _given_twice(id_: str, line: int) -> Invalid:
    return Invalid.at(f"the id {id_!r} is given twice", "line", line, "id")


def _check_members(said: Any, line: int) -> None:
    if not isinstance(said, dict):
        raise Invalid.at('must be an object such as {"text": "…"}', "line", line)
    if tuple(said) in SHAPES:
        return
    for name in said:
        if name not in TASK_FORMS and name != "id":
            raise Invalid.at("is not known here", "line", line, name)
    if len(said.keys() - {"id"}) != 1:
        raise Invalid.at('needs one of "text", "messages" and "vars"', "line", line)


# CSV


def _csv_rows(lines: FileLines, settings: JobSettings, max_row_bytes: int) -> Iterator[Row]:
    # The module's own limit on a cell is one for the whole process; a row's limit, which we check, is the smaller.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    feed = _RowFeed(lines, max_row_bytes)
    delimiter = feed.find_delimiter()
    if feed.ended:
        return
    rows = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while (cells := _next_row(rows, feed)) is not None:
        line = feed.first_line
        if header is None:
            header = _read_header(cells, settings, line)
            continue
        if len(cells) != len(header):
            raise Invalid.at(f"has {len(cells)} cells, and the header has {len(header)}", "line", line)
        values = dict(zip(header, cells, strict=True))
        said: dict[str, Any] = {"text": values["text"]} if settings.template is None else {"vars": values}
        if "id" in values:
            said["id"] = values["id"]
        yield line, said


def _next_row(rows: Iterator[list[str]], feed: "_RowFeed") -> list[str] | None:
    feed.begin_row()
    try:
        return next(rows, None)
    except csv.Error as error:
        if feed.ended:
            what = "opens a quote that is never closed"
        else:
            what = "is no CSV: a quote inside a quoted cell is written twice, and a line ends with LF or CRLF"
        raise BadRequest(f"The row that begins on line {feed.first_line} {what}.") from error


def _read_header(cells: list[str], settings: JobSettings, line: int) -> list[str]:
    if len(cells) > MAX_COLUMNS:
        raise Invalid.at(f"the header may have at most {MAX_COLUMNS} columns", "line", line)
    header = [name.strip() for name in cells]
    names: set[str] = set()
    for index, name in enumerate(header):
        if not name:
            raise Invalid.at(f"column {index + 1} of the header has no name", "line", line)
        if name in names:
            raise Invalid.at("two columns have this name", "line", line, name)
        names.add(name)
    if settings.template is None:
        if "text" not in names:
            raise Invalid.at(
                "this column is missing: without a template it is the task", "line", line, "text"
            )
        return header
    for _, variable in template_parts(settings.template):
        if variable is not None and variable not in names:
            raise Invalid.at("this column is missing: the template needs it", "line", line, variable)
    return header


class _RowFeed:
    """Gives csv.reader the lines of one row after the other, as text, within the limit of a row."""

    def __init__(self, lines: FileLines, max_row_bytes: int) -> None:
        self.first_line = 1  # of the row
        self.ended = False
        self._lines = lines
        self._max_row_bytes = max_row_bytes
        self._row_bytes = 0
        self._header_line: str | None = None

    def find_delimiter(self) -> str:
        """By the header, which stays to be read."""
        self._header_line = next(self, "")
        unquoted = QUOTED.sub("", self._header_line)
        return max(DELIMITERS, key=unquoted.count)

    def begin_row(self) -> None:
        if self._header_line is None:
            self._row_bytes = 0

    def __iter__(self) -> "_RowFeed":
        return self

    def __next__(self) -> str:
        if self._header_line is not None:
            text, self._header_line = self._header_line, None
            return text
        begins = self._row_bytes == 0
        try:
            # A row goes on where a quoted cell does, and no line without a quote ends that.
            raw = self._lines.next(skip_blank=True) if begins else self._lines.next_with(b'"')
        except LineTooLong as error:
            raise self._too_long() from error
        if raw is None:
            self.ended = True
            raise StopIteration
        line = self._lines.number
        if begins:
            self.first_line = line
        self._row_bytes += len(raw)
        if self._row_bytes > self._max_row_bytes:
            raise self._too_long()
        if b"\0" in raw:
            raise BadRequest(f"Line {line} holds a NUL character, which can't be stored.")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(line) from error

    def _too_long(self) -> TooLarge:
        line = self.first_line if self._row_bytes else self._lines.number + 1
        return TooLarge(
            f"The row that begins on line {line} has more than {self._max_row_bytes} bytes "
            "(MAX_JSON_BYTES): is a quote not closed?"
        )
