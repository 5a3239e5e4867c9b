"""JSON bodies, read strictly: what two parsers could understand differently is refused.

A body is read only as far as MAX_JSON_BYTES allows. Bad syntax is a 400 with line and column; a name given
twice and a body that is no object are a 422. Messages name places and members, never the caller's values.
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, NoReturn

import jiter
from flask import Request
from werkzeug.exceptions import BadRequest, UnsupportedMediaType

from gpt_worker.api.context import service
from gpt_worker.errors import FieldError, Invalid, TooLarge

ONE_AT_A_TIME_BYTES = 1 << 20
PIECE_BYTES = 64 << 10
LARGEST = int(sys.float_info.max)

# jiter's, with a place that is the end of the text, or column 0 of the line after it.
ENDS_EARLY = "EOF while parsing"
PLACE = re.compile(r" at (line \d+ )(column \d+)$")
DUPLICATE = re.compile(r'Detected duplicate key (".*") at (line \d+ )(column \d+)$', re.DOTALL)
# Only a body that has one of these can hold a NUL character or a number that no double can hold.
SUSPECT = re.compile(rb"\\u0000|\d[eE]|\d{300}")

_large_line = threading.Lock()  # 16 MiB of JSON take about 100 MB while they are parsed


class StrictRequest(Request):
    """The app's request class: `get_json` is strict whatever its arguments say."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """The body as an object.

        The arguments are Flask's and change nothing: flask-openapi3 asks for silence, which hides mistakes.

        Raises:
            UnsupportedMediaType: not said to be plain JSON.
            TooLarge: over MAX_JSON_BYTES.
            BadRequest: not JSON.
            Invalid: no object, or a name given twice.
        """
        if "gpt_worker.json" not in self.environ:
            self.environ["gpt_worker.json"] = self._read_object()
        return self.environ["gpt_worker.json"]

    def _read_object(self) -> dict[str, Any]:
        return parse_object(b"".join(self.json_pieces(service().settings.max_json_bytes)))

    def json_pieces(self, max_bytes: int) -> Iterator[bytes]:
        """The whole body as it comes, also a chunked one, of which the length is known only at its end.

        Raises UnsupportedMediaType, TooLarge, BadRequest.
        """
        self._check_headers()
        if (self.content_length or 0) > max_bytes:
            raise _too_large(max_bytes)
        left = max_bytes + 1
        try:
            while left and (piece := self.stream.read(min(left, PIECE_BYTES))):
                left -= len(piece)
                yield piece
        except OSError as error:
            raise BadRequest("The body broke off.") from error
        if not left:
            raise _too_large(max_bytes)

    def _check_headers(self) -> None:
        charset = self.mimetype_params.get("charset", "utf-8").lower()
        if self.mimetype != "application/json" or charset not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("Send the header Content-Type: application/json, in UTF-8.")
        if self.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise UnsupportedMediaType("Send JSON uncompressed, without the header Content-Encoding.")


def parse_line(raw: bytes, line: int) -> Any:
    """The JSON value in one line of a file; raises like `parse_json`, and tells the line."""
    if len(raw) < ONE_AT_A_TIME_BYTES and b"\\u0000" not in raw:
        try:
            value = jiter.from_json(raw, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True)
        except ValueError:
            pass  # what is wrong is found, and told, below
        else:
            if isinstance(value, dict) and set(map(type, value.values())) <= {str}:
                return value  # nothing in it can be unusable: millions of lines are not searched for that
    try:
        with _large_line if len(raw) > ONE_AT_A_TIME_BYTES else nullcontext():
            return parse_json(raw, f"Line {line}", line=line)
    except BadRequest as error:
        if _is_broken_utf8(raw):
            raise not_utf8(line) from error
        raise


def parse_lines(whole: bytes) -> list[dict[str, str]] | None:
    """What many lines of a file say, each an object of texts, in a third of the time; None: read them one by one.

    Each begins with "{" and ends with "}". They are read as one list, and no object of texts reaches over the end of a
    line: a "}" there is the object's own, since a text of JSON has no line end. So as many objects as lines are one
    each.
    """
    count = whole.count(b"\n")
    if whole.endswith(b"}\r\n"):
        whole = whole.replace(b"\r\n", b"\n")
    is_plain = whole[:1] == b"{" and whole[-2:] == b"}\n" and whole.count(b"}\n{") == count - 1
    if not is_plain or len(whole) > ONE_AT_A_TIME_BYTES or b"\\u0000" in whole:
        return None
    try:
        values = jiter.from_json(
            b"[%s]" % whole[:-1].replace(b"\n", b",\n"),
            allow_inf_nan=False,
            cache_mode="keys",
            catch_duplicate_keys=True,
        )
    except ValueError:
        return None
    if len(values) != count or set(map(type, values)) != {dict}:
        return None
    members = chain.from_iterable(map(dict.values, values))
    return values if set(map(type, members)) <= {str} else None


def not_utf8(line: int) -> BadRequest:
    """The line of a file is in some other encoding."""
    return BadRequest(f"Line {line} is not UTF-8: save the file as UTF-8.")


def _is_broken_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return False


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`; raises like `parse_json`, and Invalid for anything but an object."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise Invalid(FieldError((), "the body must be a JSON object"))
    return value


def parse_json(raw: bytes, what: str = "The body", *, line: int | None = None) -> Any:
    """The JSON value in `raw`, UTF-8 without BOM.

    Args:
        what: how messages call it.
        line: where it stands in a file; it is one line then.

    Raises:
        BadRequest: not JSON, nested deeper than 200, with a NUL character, or a number beyond a double's.
        Invalid: a name given twice in one object, such as a task's id.
    """
    if not raw.strip():
        raise BadRequest(f"{what} is empty: send a JSON object.")
    try:
        value = jiter.from_json(raw, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True)
    except ValueError as error:
        _explain(str(error), what, line)
    if SUSPECT.search(raw):
        _refuse_unusable(value, what)
    return value


def _explain(message: str, what: str, line: int | None) -> NoReturn:
    duplicate = DUPLICATE.fullmatch(message)
    if duplicate is not None:
        where = duplicate[2] + duplicate[3] if line is None else duplicate[3]
        loc = () if line is None else ("line", line)
        raise Invalid(FieldError((*loc, _unquoted(duplicate[1])), f"given twice, again at {where}"))
    if message.startswith(ENDS_EARLY):
        raise BadRequest(f"{what} is not valid JSON: it ends too early.")
    place = PLACE.search(message)
    where = "" if place is None else " at " + (place[1] + place[2] if line is None else place[2])
    raise BadRequest(f"{what} is not valid JSON{where}.")


def _unquoted(name: str) -> str:
    """jiter shows a name as Rust does, which is JSON but for rare escapes."""
    try:
        return str(json.loads(name))
    except ValueError:
        return name[1:-1]


def _refuse_unusable(value: Any, what: str) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
        elif isinstance(item, str):
            if "\0" in item:
                raise BadRequest(f"{what} holds a NUL character (\\u0000), which can't be stored.")
        elif isinstance(item, int | float) and abs(item) > LARGEST:
            raise BadRequest(f"{what} holds a number that is too large.")


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"JSON bodies may have at most {max_bytes} bytes (MAX_JSON_BYTES); JSONL takes more.")
