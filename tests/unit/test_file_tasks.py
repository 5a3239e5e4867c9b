"""Files of tasks: JSONL and CSV in, tasks out, and for what is none an error that tells the line."""

import csv
import io
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.exceptions import BadRequest

from gpt_worker.api.file_tasks import LINE_ENDS_GONE, csv_body_tasks, csv_tasks, jsonl_tasks
from gpt_worker.domain import JobSettings, NewTask
from gpt_worker.errors import Invalid, TooLarge

Read = Callable[[Iterable[bytes], JobSettings, int, int], Iterator[NewTask]]
Found = list[tuple[str, Any]]

PLAIN = JobSettings()
TRANSLATE = JobSettings(template="Translate to {lang}: {text}")
OFTEN = JobSettings(template="{text}" * 200)
MARK = "s3cr3t"
MAX_LINE_BYTES = 1000
MAX_TASKS = 20


def found(read: Read, raw: bytes, settings: JobSettings = PLAIN) -> Found:
    """The ids and prompts, the same whether the file comes at once or byte by byte."""
    at_once = [*read([raw], settings, MAX_LINE_BYTES, MAX_TASKS)]
    slowly = [*read((bytes([byte]) for byte in raw), settings, MAX_LINE_BYTES, MAX_TASKS)]
    assert slowly == at_once
    return [(task.id, task.prompt) for task in at_once]


@pytest.mark.parametrize(
    ("raw", "settings", "tasks"),
    [
        (b'{"text": "a"}', PLAIN, [("0", "a")]),
        (b'{"text": "a"}\n{"text": "b"}\n', PLAIN, [("0", "a"), ("1", "b")]),
        (b'{"text": "a"}\r\n\r\n \n{"text": "b"}\r\n', PLAIN, [("0", "a"), ("1", "b")]),
        (b'\xef\xbb\xbf{"text": "a"}\n', PLAIN, [("0", "a")]),
        (b'{"id": "x", "text": "a"}\n{"text": "b"}', PLAIN, [("x", "a"), ("1", "b")]),
        ('{"id": "ї", "text": "Привіт"}'.encode(), PLAIN, [("ї", "Привіт")]),
        (b'{"messages": [{"role": "user"}]}', PLAIN, [("0", [{"role": "user"}])]),
        (
            b'{"vars": {"lang": "fr", "text": "a", "n": 1}}',
            TRANSLATE,
            [("0", {"lang": "fr", "text": "a"})],
        ),
    ],
)
def test_jsonl_is_a_task_a_line(raw: bytes, settings: JobSettings, tasks: Found) -> None:
    assert found(jsonl_tasks, raw, settings) == tasks


# Lines that would be others, or none, where they are read together.
ODD_LINES = [
    b'{"text": "a"}',
    b'{"text": "b", "id": "x"}',
    b'{"id": "y", "text": "\\u00e9}"}',
    b'{"id": "1", "text": "c"}',
    b'{"id": "", "text": "c"}',
    b'{"id": "%s", "text": "c"}' % (b"i" * 201),
    b'{"id": "e", "text": ""}',
    b'{"text": ""}',
    b'{"text": "}"}',
    b'{"text": "a"},{"text": "b"}',
    b'{"text": "a"},{"id": "z"',
    b'"text": "b"}',
    b'{"text": "a}',
    b'{"}',
    b"{}",
    b'{"text": [{}',
    b"{}]}",
    b'{"messages": [{"role": "user"}]}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "\\u0000"}',
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b'{"texts": "a"}',
    b'{"text": "a"}\r',
    b'[{"text": "a"}]',
    b" ",
    b"",
]


def told(pieces: Iterable[bytes], max_tasks: int = 100) -> list[NewTask] | str:
    """The tasks, or the error in place of them all."""
    try:
        return [*jsonl_tasks(pieces, PLAIN, 1 << 20, max_tasks)]
    except (BadRequest, Invalid, TooLarge) as error:
        return f"{error.description if isinstance(error, BadRequest) else error} {vars(error)}"


TWO = b'{"text": "a"},{"text": "b"}'


@example(lines=[TWO], ends=True, crlf=False)
@example(lines=[b'{"text": "a"},{"id": "z"', b'"text": "b"}'], ends=True, crlf=False)
@example(lines=[b'{"text": "a}', b'{"}', TWO], ends=True, crlf=False)
@example(lines=[b'{"text": [{}', b"{}]}", TWO], ends=True, crlf=False)
@example(lines=[b'{"text": "a"}', b'{"text": "\\u0000"}'], ends=True, crlf=True)
@example(lines=[b'{"text": "a"}', b'{"id": "1", "text": "c"}'], ends=True, crlf=False)
@example(lines=[b'{"id": "1", "text": "c"}', b'{"text": "a"}'], ends=True, crlf=False)
@example(lines=[b'{"id": "1", "text": "c"}'] * 2, ends=True, crlf=False)
@example(lines=[b'{"id": "", "text": "c"}'] * 2, ends=True, crlf=False)
@example(lines=[b'{"id": "%s", "text": "c"}' % (b"i" * 201)] * 2, ends=True, crlf=False)
@example(lines=[b'{"text": "a"}', b'{"text": ""}'], ends=True, crlf=False)
@example(lines=[b'{"text": "a"}'] * 4, ends=True, crlf=False)
@example(lines=[b'{"text": "a"}'] * 5, ends=True, crlf=False)
@given(lines=st.lists(st.sampled_from(ODD_LINES), max_size=6), ends=st.booleans(), crlf=st.booleans())
def test_jsonl_lines_that_are_read_together_are_what_each_is_alone(
    lines: list[bytes], *, ends: bool, crlf: bool
) -> None:
    newline = b"\r\n" if crlf else b"\n"
    raw = newline.join([b'{"text": "first"}', *lines]) + newline * ends

    assert told([raw], 5) == told((bytes([byte]) for byte in raw), 5)


@pytest.mark.parametrize("line", ['{{"id": "{0}", "text": "text {0}"}}\n', '{{"text": "text {0}"}}\n'])
def test_jsonl_of_many_lines_comes_in_their_order(line: str) -> None:
    raw = "".join(line.format(number) for number in range(5000)).encode()
    pieces = [raw[start : start + 1000] for start in range(0, len(raw), 1000)]

    read = [(task.id, task.prompt) for task in jsonl_tasks(pieces, PLAIN, 1 << 20, 5000)]

    assert read == [(str(number), f"text {number}") for number in range(5000)]


def test_jsonl_error_among_many_lines_tells_its_own() -> None:
    raw = b'{"text": "a"}\n' * 40 + b'{"text": 1}\n' + b'{"text": "a"}\n' * 40

    assert "41" in str(told([raw]))


@pytest.mark.parametrize(
    ("raw", "settings", "tasks"),
    [
        (b"text\na\nb\n", PLAIN, [("0", "a"), ("1", "b")]),
        (b"\xef\xbb\xbftext\r\na\r\n\r\nb", PLAIN, [("0", "a"), ("1", "b")]),
        (b"id,text\nx,a\n", PLAIN, [("x", "a")]),
        (b"id;text\nx;a, b\n", PLAIN, [("x", "a, b")]),
        (b"id\ttext\nx\ta;b, c\n", PLAIN, [("x", "a;b, c")]),
        (b'"id;1","x;2",text\n1,2,a\n', PLAIN, [("0", "a")]),
        (b'\xef\xbb\xbf"text","id"\n"a","x"\n', PLAIN, [("x", "a")]),
        (b" id , text \nx, a\n", PLAIN, [("x", " a")]),
        (
            b'id,text\nx,"one\n\ntwo ""2""\r\nthree"\ny,b\n',
            PLAIN,
            [("x", 'one\n\ntwo "2"\r\nthree'), ("y", "b")],
        ),
        (b'"the\ntopic",text\n1,a\n', PLAIN, [("0", "a")]),
        (b'text\n5" pipe\n', PLAIN, [("0", '5" pipe')]),
        (b"note,text\n,a\n", PLAIN, [("0", "a")]),
        ("текст,text\nю,Привіт\n".encode(), PLAIN, [("0", "Привіт")]),
        (b"lang,text,id\nfr,a,x\n", TRANSLATE, [("x", {"lang": "fr", "text": "a"})]),
        (b"lang,text\nfr,\n", TRANSLATE, [("0", {"lang": "fr", "text": ""})]),
        (b"id,n\nx,1\n", JobSettings(template="{id} {n}"), [("x", {"id": "x", "n": "1"})]),
    ],
)
def test_csv_is_a_task_a_row(raw: bytes, settings: JobSettings, tasks: Found) -> None:
    assert found(csv_tasks, raw, settings) == tasks


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
            st.text("ab,;\t\"\r\n' "),
        ),
        min_size=1,
        max_size=10,
        unique_by=lambda row: row[0],
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 50),
)
def test_csv_that_a_library_writes_is_read_as_it_was(
    rows: list[tuple[str, str]], delimiter: str, line_end: str, size: int
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "note", "text"), *((id_, "", text + "!") for id_, text in rows)])
    raw = file.getvalue().encode()

    tasks = csv_tasks((raw[at : at + size] for at in range(0, len(raw), size)), PLAIN, 10_000, MAX_TASKS)

    assert [(task.id, task.prompt) for task in tasks] == [(id_, text + "!") for id_, text in rows]


def test_csv_may_have_a_thousand_columns() -> None:
    names = ["text", *(f"column {number}" for number in range(1, 1001))]

    def read(columns: int) -> list[NewTask]:
        raw = f"{','.join(names[:columns])}\n{'a,' * (columns - 1)}a\n"
        return [*csv_tasks([raw.encode()], PLAIN, 1 << 20, MAX_TASKS)]

    assert [task.prompt for task in read(1000)] == ["a"]
    with pytest.raises(Invalid, match=r"^line\.1: .* at most 1000 columns$"):
        read(1001)


@pytest.mark.parametrize("header", ['"' + "x" * (1 << 20), '"' + 'x""' * (1 << 18)], ids=["open", "doubled"])
def test_csv_header_takes_a_few_times_its_size_in_memory(header: str) -> None:
    raw = header.encode()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match="never closed"):
            next(csv_tasks([raw], PLAIN, 1 << 21, MAX_TASKS))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 20 * len(raw)


OK = b'{"text": "ok"}\n'


@pytest.mark.parametrize(
    ("raw", "settings", "loc"),
    [
        (OK + b'"s3cr3t"', PLAIN, ("line", 2)),
        (OK + b"[]", PLAIN, ("line", 2)),
        (OK + b"{}", PLAIN, ("line", 2)),
        (OK + b'{"id": "a"}', PLAIN, ("line", 2)),
        (OK + b'{"text": "a", "vars": {}}', PLAIN, ("line", 2)),
        (OK + b'{"prompt": "s3cr3t"}', PLAIN, ("line", 2, "prompt")),
        (OK + b'{"text": "a", "settings": "s3cr3t"}', PLAIN, ("line", 2, "settings")),
        (OK + b'\n\n{"text": ""}', PLAIN, ("line", 4, "text")),
        (OK + b'{"text": 7}', PLAIN, ("line", 2, "text")),
        (OK + b'{"text": null}', PLAIN, ("line", 2, "text")),
        (OK + b'{"messages": "s3cr3t"}', PLAIN, ("line", 2, "messages")),
        (OK + b'{"messages": [{}]}', PLAIN, ("line", 2, "messages", 0)),
        (OK + b'{"messages": [{"role": "s3cr3t"}]}', JobSettings(pack=True), ("line", 2, "messages")),
        (OK + b'{"vars": {"x": "s3cr3t"}}', PLAIN, ("line", 2, "vars")),
        (b'{"vars": {"lang": "s3cr3t"}}', TRANSLATE, ("line", 1, "vars")),
        (b'{"text": "s3cr3t"}', TRANSLATE, ("line", 1, "text")),
        (OK + b'{"id": 1, "text": "a"}', PLAIN, ("line", 2, "id")),
        (OK + b'{"id": null, "text": "a"}', PLAIN, ("line", 2, "id")),
        (OK + b'{"id": "", "text": "a"}', PLAIN, ("line", 2, "id")),
        (OK + b'{"id": "%s", "text": "a"}' % (b"i" * 201), PLAIN, ("line", 2, "id")),
        (OK + b'{"id": "a", "text": "a"}\n{"id": "a", "text": "b"}', PLAIN, ("line", 3, "id")),
        (b'{"id": "1", "text": "a"}\n{"text": "b"}', PLAIN, ("line", 2, "id")),
        (OK + b'{"text": "a", "text": "s3cr3t"}', PLAIN, ("line", 2, "text")),
        (b'{"text": "s3cr3"}\n{"text": "s3cr3t"}', OFTEN, ("line", 2)),
        (b'{"vars": {"text": "s3cr3t"}}', OFTEN, ("line", 1)),
        (b"", PLAIN, ("file",)),
        (b"\n \n", PLAIN, ("file",)),
    ],
)
def test_jsonl_line_that_is_no_task_is_told(
    raw: bytes, settings: JobSettings, loc: tuple[str | int, ...]
) -> None:
    refuses(jsonl_tasks, raw, settings, loc)


@pytest.mark.parametrize(
    ("raw", "settings", "loc"),
    [
        (b"", PLAIN, ("file",)),
        (b"\xef\xbb\xbf", PLAIN, ("file",)),
        (b"text\n", PLAIN, ("file",)),
        (b"id,text\n\r\n\n", PLAIN, ("file",)),
        (b"id,prompt\nx,s3cr3t\n", PLAIN, ("line", 1, "text")),
        (b"Text\ns3cr3t\n", PLAIN, ("line", 1, "text")),
        (b"\n\ntext;text\na;b\n", PLAIN, ("line", 3, "text")),
        (b"text,,x\na,b,c\n", PLAIN, ("line", 1)),
        (b"text,\na,\n", PLAIN, ("line", 1)),
        (b"text, text\na,b\n", PLAIN, ("line", 1, "text")),
        (b"text\ns3cr3t\n", TRANSLATE, ("line", 1, "lang")),
        (b"id,text\nx,a\ny,s3cr3t,c\n", PLAIN, ("line", 3)),
        (b"id,text\nx,a\ns3cr3t\n", PLAIN, ("line", 3)),
        (b"id,text\nx,a\n,\n", PLAIN, ("line", 3, "id")),
        (b'id,text\nx,"two\nlines"\ny,\n', PLAIN, ("line", 4, "text")),
        (b'text\n""\n', PLAIN, ("line", 2, "text")),
        (b"id,text\nx,a\nx,s3cr3t\n", PLAIN, ("line", 3, "id")),
        (b"text\ns3cr3\ns3cr3t\n", OFTEN, ("line", 3)),
        (b"id,text\n%s,a\n" % (b"i" * 201), PLAIN, ("line", 2, "id")),
    ],
)
def test_csv_row_that_is_no_task_is_told(
    raw: bytes, settings: JobSettings, loc: tuple[str | int, ...]
) -> None:
    refuses(csv_tasks, raw, settings, loc)


def refuses(read: Read, raw: bytes, settings: JobSettings, loc: tuple[str | int, ...]) -> None:
    with pytest.raises(Invalid) as refused:
        [*read([raw], settings, MAX_LINE_BYTES, MAX_TASKS)]

    (error,) = refused.value.errors
    assert error.loc == loc
    assert MARK not in str(refused.value)
    if loc[0] == "line":
        assert "(line" not in error.msg  # the place tells it already


@pytest.mark.parametrize(
    ("read", "raw", "says"),
    [
        (jsonl_tasks, OK + b"s3cr3t", "Line 2 is not valid JSON at column 1"),
        (jsonl_tasks, OK + b'{"text": "s3cr3t', "Line 2 is not valid JSON: it ends too early."),
        (jsonl_tasks, OK + b'{"text": "s3cr3t"\n' + OK, "Line 2 is not valid JSON: it ends too early."),
        (jsonl_tasks, OK + OK.rstrip() + OK, "Line 2 is not valid JSON at column 15"),
        (jsonl_tasks, OK + b'{"text": NaN}', "Line 2 is not valid JSON"),
        (jsonl_tasks, OK + b'{\n"text": "a"}', "Line 2 is not valid JSON"),
        (jsonl_tasks, OK + rb'{"text": "\u0000"}', "Line 2 holds a NUL"),
        (jsonl_tasks, OK + '{"text": "Привіт"}'.encode("cp1251"), "Line 2 is not UTF-8"),
        (jsonl_tasks, '{"text": "a"}'.encode("utf-16"), "Line 1 is not UTF-8"),
        (csv_tasks, "text\na\nПривіт\n".encode("cp1251"), "Line 3 is not UTF-8"),
        (csv_tasks, "текст,text\na,b\n".encode("cp1251"), "Line 1 is not UTF-8"),
        (csv_tasks, "text\na\n".encode("utf-16"), "Line 1"),
        (csv_tasks, b"text\na\0\n", "Line 2 holds a NUL"),
        (csv_tasks, b'id,text\nx,a\ny,"s3cr3t\nz,b\n', "begins on line 3 opens a quote that is never closed"),
        (csv_tasks, b'id,text\nx,a\ny,"', "begins on line 3 opens a quote that is never closed"),
        (csv_tasks, b'id,text\ny,"s3cr3t\nz,"b"\n', "begins on line 2 is no CSV"),
        (csv_tasks, b'id,"text\nx,a\n', "begins on line 1 opens a quote that is never closed"),
        (csv_tasks, b"text\ra\rb\r", "begins on line 1 is no CSV"),
    ],
)
def test_what_cannot_be_read_is_told_by_its_line(read: Read, raw: bytes, says: str) -> None:
    with pytest.raises(BadRequest) as refused:
        [*read([raw], PLAIN, MAX_LINE_BYTES, MAX_TASKS)]

    description = str(refused.value.description)
    assert says in description
    assert MARK not in description


@pytest.mark.parametrize(
    ("read", "raw", "says"),
    [
        (jsonl_tasks, OK + b'{"text": "%s"}' % (b"x" * 1000), "Line 2 has more than 1000 bytes"),
        (csv_tasks, b"text\n" + b"x" * 1001, "begins on line 2 has more than 1000 bytes"),
        (csv_tasks, b'text\na\n"' + b"x\n" * 600, "begins on line 3 has more than 1000 bytes"),
        (csv_tasks, b'text\na\n"' + b'""\n' * 400, "begins on line 3 has more than 1000 bytes"),
        (jsonl_tasks, OK * 21, "at most 20 tasks"),
        (csv_tasks, b"text\n" + b"a\n" * 21, "at most 20 tasks"),
    ],
)
def test_limits_are_named(read: Read, raw: bytes, says: str) -> None:
    with pytest.raises(TooLarge, match=says):
        [*read([raw], PLAIN, MAX_LINE_BYTES, MAX_TASKS)]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'id,texta,"b"c,d', "begins on line 1 is no CSV: a quote"),
        (b'id,texta,"b', "begins on line 1 opens a quote that is never closed"),
        (b"id,texta,b", "line.1.text: this column is missing"),
        (b"id,text", "file: the file needs at least one task"),
        (b"," * 900 + b"text" + b"," * 99, "line.1: column 1 of the header has no name"),
        (b"," * 1000, "line.1: the header may have at most 1000 columns"),
        (b"x" * 2001, "begins on line 1 has more than 2000 bytes"),
    ],
)
def test_csv_body_of_one_line_is_told_how_its_line_ends_may_have_gone(raw: bytes, says: str) -> None:
    def refusal(read: Read, raw: bytes) -> str:
        with pytest.raises((BadRequest, Invalid, TooLarge)) as refused:
            [*read([raw[:3], raw[3:]], PLAIN, 2000, MAX_TASKS)]
        return str(refused.value)

    told = refusal(csv_body_tasks, raw)

    assert says in told
    assert LINE_ENDS_GONE in told
    assert LINE_ENDS_GONE not in refusal(csv_tasks, raw)
    assert LINE_ENDS_GONE not in refusal(csv_body_tasks, raw + b"\n")


def test_csv_body_that_breaks_off_at_once_is_told_nothing_of_line_ends() -> None:
    def not_gzip() -> Iterator[bytes]:
        yield from ()
        raise BadRequest("The body is not gzip.")

    with pytest.raises(BadRequest, match=r"gzip\.$"):
        [*csv_body_tasks(not_gzip(), PLAIN, MAX_LINE_BYTES, MAX_TASKS)]


@pytest.mark.parametrize(("read", "raw"), [(jsonl_tasks, OK), (csv_tasks, b"text\na\n")])
def test_tasks_are_read_as_they_are_asked_for(read: Read, raw: bytes) -> None:
    def broken_off() -> Iterator[bytes]:
        yield raw
        raise ConnectionError

    tasks = read(broken_off(), PLAIN, MAX_LINE_BYTES, MAX_TASKS)

    assert next(tasks).id == "0"
    with pytest.raises(ConnectionError):
        next(tasks)
