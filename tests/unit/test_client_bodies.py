"""What the client sends for a file of tasks: every byte of it, the same each time."""

import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpt_worker.client.bodies import Body, TaskFile, make_body, open_tasks
from gpt_worker.client.errors import BadInput
from gpt_worker.client.options import FileForm, Form

CSV = b"id,text\n1,hello\n"
JOB = {"data": ["hello"], "settings": {"model": "a", "temperature": 1}, "metadata": {"x": "1"}}


def tasks(content: bytes, form: Form, *, packed: bool = False) -> TaskFile:
    held = gzip.compress(content) if packed else content
    return TaskFile("tasks", FileForm(form, packed), io.BytesIO(held), len(held))


def sent(body: Body) -> bytes:
    """The bytes of a body, which must be as many as it says, and the same again."""
    whole = b"".join(body)
    assert len(whole) == len(body)
    assert b"".join(body) == whole
    return whole


def parts(body: Body) -> dict[str, tuple[str, bytes]]:
    """Headers and content of each part of a form, by name."""
    found = re.fullmatch(r"multipart/form-data; boundary=(\S+)", body.headers["Content-Type"])
    assert found
    first, *middle, last = (b"\r\n" + sent(body)).split(b"\r\n--" + found[1].encode())
    assert (first, last) == (b"", b"--\r\n")
    by_name = {}
    for part in middle:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(r'name="(\w+)"', head.decode())
        assert name
        by_name[name[1]] = (head.decode(), content)
    return by_name


@contextmanager
def opened(path: Path) -> Iterator[TaskFile]:
    with open_tasks(str(path), FileForm(Form.CSV), io.BytesIO()) as found:
        yield found


@pytest.mark.parametrize(
    ("form", "content_type"),
    [(Form.JSON, "application/json"), (Form.JSONL, "application/jsonl"), (Form.CSV, "text/csv")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_file_alone_travels_as_it_is(form: Form, content_type: str, packed: bool) -> None:
    file = tasks(CSV, form, packed=packed)

    body = make_body(file, {}, {})

    assert sent(body) == (gzip.compress(CSV) if packed else CSV)
    assert body.headers == {"Content-Type": content_type} | ({"Content-Encoding": "gzip"} if packed else {})


def test_settings_and_metadata_travel_beside_the_file_in_a_form() -> None:
    body = make_body(tasks(CSV, Form.CSV), {"template": "Käse {text}\r\n--"}, {"batch": "42"})

    found = parts(body)
    assert list(found) == ["settings", "metadata", "file"]
    assert json.loads(found["settings"][1]) == {"template": "Käse {text}\r\n--"}
    assert json.loads(found["metadata"][1]) == {"batch": "42"}
    assert found["file"][1] == CSV
    assert "Content-Type: text/csv" in found["file"][0]


def test_packed_file_in_a_form_says_so() -> None:
    body = make_body(tasks(CSV, Form.JSONL, packed=True), {"model": "a"}, {})

    head, content = parts(body)["file"]
    assert gzip.decompress(content) == CSV
    assert 'filename="tasks.jsonl.gz"' in head
    assert "Content-Encoding: gzip" in head


@pytest.mark.parametrize("packed", [False, True])
def test_settings_of_the_command_line_win_over_those_in_a_json_job(packed: bool) -> None:
    file = tasks(json.dumps(JOB).encode(), Form.JSON, packed=packed)

    body = make_body(file, {"model": "b"}, {"y": "2"})

    assert body.headers == {"Content-Type": "application/json"}
    assert json.loads(sent(body)) == {
        "data": ["hello"],
        "settings": {"model": "b", "temperature": 1},
        "metadata": {"x": "1", "y": "2"},
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"data": [1,]}', "tasks is not valid JSON: .*line 1"),
        (b'{"data": {"a": "1", "a": "2"}}', "'a' is given twice"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'["a"]', "must be a job"),
        (b'{"data": ["a"], "settings": 5}', "settings must be an object"),
    ],
)
def test_json_that_settings_can_not_be_merged_into_is_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        make_body(tasks(content, Form.JSON), {"model": "a"}, {})


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (gzip.compress(CSV * 100, mtime=0)[:-10], "ends early"),
        (b"not gzip", "is not gzip"),
        (b"\x1f\x8b\x08\x00bad!bad!bad!", "gzip"),
    ],
)
def test_broken_gzip_is_told_in_a_sentence(held: bytes, sentence: str) -> None:
    file = TaskFile("tasks", FileForm(Form.JSON, packed=True), io.BytesIO(held), len(held))

    with pytest.raises(BadInput, match=sentence):
        make_body(file, {"model": "a"}, {})


def test_file_that_shrinks_while_it_is_sent_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    path.write_bytes(CSV)
    with opened(path) as file:
        body = make_body(file, {}, {})
        path.write_bytes(CSV[:5])

        with pytest.raises(BadInput, match="became shorter"):
            b"".join(body)


def test_file_that_grows_while_it_is_sent_is_sent_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    path.write_bytes(CSV)
    with opened(path) as file:
        body = make_body(file, {}, {})
        path.write_bytes(CSV + b"2,more\n")

        assert sent(body) == CSV


def test_missing_file_directory_and_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()

    for path, sentence in [
        (tmp_path / "missing.csv", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "empty.csv", "is empty"),
    ]:
        with pytest.raises(BadInput, match=sentence), opened(path):
            pytest.fail("it was opened")


def test_standard_input_can_be_sent_twice(tmp_path: Path) -> None:
    path = tmp_path / "piped"
    path.write_bytes(CSV)
    with path.open("rb") as pipe, open_tasks("-", FileForm(Form.CSV), pipe) as file:
        body: Any = make_body(file, {}, {})

        assert sent(body) == CSV
