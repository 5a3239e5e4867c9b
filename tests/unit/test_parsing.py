"""The strict parser, and the request class that uses it."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import request
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import BadRequest

from gpt_worker.api import access, parsing
from gpt_worker.api.parsing import parse_json, parse_line, parse_object
from gpt_worker.errors import Invalid
from tests.unit.small_app import SmallApp

MAX_JSON_BYTES = 2 << 20


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": [1, 2.5, "\xc3\xa4", true, null]}', {"a": [1, 2.5, "ä", True, None]}),
        (b' {"smile": "\\ud83d\\ude00"}\n', {"smile": "😀"}),
        (b'{"text": "\\\\u0000 is not a NUL"}', {"text": "\\u0000 is not a NUL"}),
        (b'{"n": 12345678901234567890123}', {"n": 12345678901234567890123}),
        (b'{"n": 1e308}', {"n": 1e308}),
        (b'{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
        (b"[" * 150 + b"]" * 150, None),
    ],
)
def test_good_json_is_read_as_it_is(raw: bytes, value: Any) -> None:
    parsed = parse_json(raw)

    assert value is None or parsed == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" \n",
        b"{",
        b'{"a": 1} {}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1E+999}',
        b'{"a": 1' + b"0" * 400 + b"}",
        b'{"a": 1' + b"0" * 400 + b".5}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"a": [[{"b": "x\\u0000"}]]}',
        b'{"a": "\x00"}',
        b'{"a": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b"[" * 100_000,
        b"{'a': 1}",
        b'{"a": 1,}',
    ],
)
def test_what_is_not_plain_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(raw)


def test_syntax_error_names_line_and_column() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(b'{"a": 1,\n "b": tru}')

    assert "line 2 column 10" in (caught.value.description or "")


@pytest.mark.parametrize(
    "raw",
    [b"{", b'{"a": 1', b'{"a": 1\n', b'{"a": 1,\n', b'["a', b'{"a": tru', b'{"a": "\\u12', b'{"a": "b\\'],
)
def test_text_that_ends_too_early_is_told_so_and_not_where(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(raw)

    assert caught.value.description == "The body is not valid JSON: it ends too early."


def test_syntax_error_repeats_nothing_of_the_body() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(b'{"password": hunter2hunter2}')

    assert "hunter2" not in (caught.value.description or "")


@pytest.mark.parametrize(
    ("raw", "name", "place"),
    [
        (b'{"data": {"greet": "x", "greet": "y"}}', "greet", "line 1 column 33"),
        (b'{"a\\"b\\n": 1,\n"a\\"b\\n": 2}', 'a"b\n', "line 2 column 10"),
        (b'{"\xc3\xa4": 1, "\\u00e4": 2}', "ä", "line 1 column 20"),
    ],
)
def test_name_given_twice_is_named_with_its_place(raw: bytes, name: str, place: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_json(raw)

    (error,) = caught.value.errors
    assert error.loc == (name,)
    assert place in error.msg


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"1", b"null", b"true"])
def test_body_that_is_no_object_is_invalid(raw: bytes) -> None:
    with pytest.raises(Invalid):
        parse_object(raw)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(raw: bytes) -> None:
    with suppress(BadRequest, Invalid):
        parse_json(raw)


# The request class


def echo() -> dict[str, Any]:
    return dict(request.get_json(silent=True) or {})


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path, max_json_bytes=MAX_JSON_BYTES)
    monkeypatch.setitem(access.POLICIES, "echo", access.Access.PUBLIC)
    app.app.add_url_rule("/echo", "echo", echo, methods=["POST"])
    yield app
    app.close()


def post(small: SmallApp, raw: bytes, **options: Any) -> Any:
    options.setdefault("content_type", "application/json")
    return small.client.post("/echo", data=raw, **options)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=UTF-8"])
def test_json_content_type_is_taken(small: SmallApp, content_type: str) -> None:
    assert post(small, b'{"a": 1}', content_type=content_type).json == {"a": 1}


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/jsonl",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
    ],
)
def test_other_content_type_is_a_415_that_says_what_to_send(small: SmallApp, content_type: str) -> None:
    reply = post(small, b'{"a": 1}', content_type=content_type)

    assert reply.status_code == 415
    assert "Content-Type: application/json" in reply.json["detail"]


def test_compressed_json_is_a_415(small: SmallApp) -> None:
    reply = post(small, b'{"a": 1}', headers={"Content-Encoding": "gzip"})

    assert reply.status_code == 415
    assert "Content-Encoding" in reply.json["detail"]


@pytest.mark.parametrize(("raw", "status"), [(b"", 400), (b"{", 400), (b"[]", 422), (b'{"a":1,"a":2}', 422)])
def test_bad_json_is_a_problem_though_silence_was_asked_for(small: SmallApp, raw: bytes, status: int) -> None:
    reply = post(small, raw)

    assert reply.status_code == status
    assert reply.mimetype == "application/problem+json"


class Counting(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.taken += len(piece)
        return piece


def chunked(small: SmallApp, stream: io.BytesIO) -> Any:
    return small.client.open(
        "/echo",
        method="POST",
        input_stream=stream,
        content_type="application/json",
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )


def test_body_of_the_largest_size_is_taken(small: SmallApp) -> None:
    raw = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert len(raw) == MAX_JSON_BYTES

    assert post(small, raw).status_code == 200
    assert chunked(small, io.BytesIO(raw)).status_code == 200


def test_body_over_the_limit_is_a_413_that_names_it(small: SmallApp) -> None:
    reply = post(small, b'{"a": "' + b"x" * (MAX_JSON_BYTES - 8) + b'"}')

    assert reply.status_code == 413
    assert "MAX_JSON_BYTES" in reply.json["detail"]
    assert "JSONL" in reply.json["detail"]


def test_body_that_says_it_is_too_large_is_not_read(small: SmallApp) -> None:
    stream = Counting(b"x" * (2 * MAX_JSON_BYTES))

    reply = small.client.open(
        "/echo",
        method="POST",
        input_stream=stream,
        content_type="application/json",
        content_length=2 * MAX_JSON_BYTES,
    )

    assert reply.status_code == 413
    assert stream.taken == 0


def test_chunked_body_is_read_no_further_than_the_limit(small: SmallApp) -> None:
    stream = Counting(b'{"a": "' + b"x" * (4 * MAX_JSON_BYTES))

    reply = chunked(small, stream)

    assert reply.status_code == 413
    assert stream.taken == MAX_JSON_BYTES + 1


class Breaking(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError("connection reset")


def test_body_that_breaks_off_is_a_400(small: SmallApp) -> None:
    assert chunked(small, Breaking()).status_code == 400


@pytest.mark.parametrize(("size_bytes", "most_at_once"), [(1000, 2), ((1 << 20) + 1, 1)])
def test_large_lines_are_parsed_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, most_at_once: int
) -> None:
    seen = watch_parsing(monkeypatch)
    raw = b'{"n": 1, "a": "' + b"x" * (size_bytes - 17) + b'"}'

    threads = [threading.Thread(target=parse_line, args=(raw, 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(seen()) == most_at_once


def watch_parsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """How many lines were in the parser whenever one came in; two small ones wait there for each other."""
    inside: list[int] = []
    together = threading.Barrier(2)
    lock = threading.Lock()
    now = 0

    def parse(_raw: bytes, _what: str, *, line: int) -> dict[str, Any]:
        nonlocal now
        with lock:
            now += 1
            inside.append(now)
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        with lock:
            now -= 1
        return {}

    monkeypatch.setattr(parsing, "parse_json", parse)
    return lambda: inside
