"""A file of tasks, and the settings for it, as the body of `POST /jobs`.

A file travels as it is, beside settings and metadata in a form (RFC 7578); only JSON gets them merged in. Files are
streamed, and can be sent again from the start: what comes from a pipe is first kept in a temporary file.
"""

import gzip
import json
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt_worker.client.errors import BadInput
from gpt_worker.client.options import FileForm, Form

PIECE_BYTES = 64 << 10
CONTENT_TYPES = {Form.JSON: "application/json", Form.JSONL: "application/jsonl", Form.CSV: "text/csv"}
MAX_MERGED_BYTES = 256 << 20  # far above what a server takes as JSON; a gzip bomb ends here

Settings = Mapping[str, Any]
Metadata = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TaskFile:
    """An open file that can be read again and again; `name` is for sentences about it."""

    name: str
    form: FileForm
    file: IO[bytes]
    size_bytes: int


class Body:
    """What is sent: pieces whose whole length is known beforehand, from the start whenever it is iterated."""

    def __init__(
        self, headers: Mapping[str, str], head: bytes, tasks: TaskFile | None = None, tail: bytes = b""
    ) -> None:
        self.headers = headers
        self._head = head
        self._tasks = tasks
        self._tail = tail

    def __len__(self) -> int:
        return len(self._head) + (self._tasks.size_bytes if self._tasks else 0) + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        if self._tasks:
            yield from _as_it_is(self._tasks)
        yield self._tail


@contextmanager
def open_tasks(path: str, form: FileForm, standard_input: IO[bytes]) -> Iterator[TaskFile]:
    """The file at `path`; "-" is standard input. Raises BadInput for one that can't be read, or is empty."""
    name = "standard input" if path == "-" else path
    with ExitStack() as stack:
        try:
            file = standard_input if path == "-" else stack.enter_context(Path(path).open("rb"))
        except OSError as error:
            raise BadInput(f"{name} can't be read: {error.strerror}") from error
        source = stack.enter_context(_rereadable(file, name))
        size_bytes = source.seek(0, os.SEEK_END)
        if size_bytes == 0:
            raise BadInput(f"{name} is empty: there is nothing to ask")
        yield TaskFile(name, form, source, size_bytes)


@contextmanager
def _rereadable(file: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """`file` itself, or a temporary file with all that comes from it."""
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and name != "standard input":
        yield file
        return
    with tempfile.TemporaryFile() as kept:
        try:
            shutil.copyfileobj(file, kept, PIECE_BYTES)
        except OSError as error:
            raise BadInput(f"{name} can't be kept to be sent: {error.strerror}") from error
        yield kept


def make_body(tasks: TaskFile, settings: Settings, metadata: Metadata) -> Body:
    """The body for these tasks. Raises BadInput for JSON that settings can't be merged into."""
    headers = {"Content-Type": CONTENT_TYPES[tasks.form.form]}
    if tasks.form.packed:
        headers["Content-Encoding"] = "gzip"
    if not settings and not metadata:
        return Body(headers, b"", tasks)
    if tasks.form.form is Form.JSON:
        return _merged_body(tasks, settings, metadata)
    return _form_body(tasks, headers, settings, metadata)


def _form_body(
    tasks: TaskFile, file_headers: Mapping[str, str], settings: Settings, metadata: Metadata
) -> Body:
    """The boundary stays the same when it is sent again, so that the request does."""
    boundary = f"gpt-worker-{secrets.token_hex(16)}"
    json_headers = {"Content-Type": "application/json"}
    small = {name: value for name, value in (("settings", settings), ("metadata", metadata)) if value}
    head = ""
    for name, value in small.items():
        head += _part_head(boundary, f'name="{name}"', json_headers) + json.dumps(value) + "\r\n"
    head += _part_head(boundary, f'name="file"; filename="tasks.{tasks.form}"', file_headers)
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return Body(headers, head.encode(), tasks, f"\r\n--{boundary}--\r\n".encode())


def _part_head(boundary: str, names: str, headers: Mapping[str, str]) -> str:
    lines = [f"--{boundary}", f"Content-Disposition: form-data; {names}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""])


def _merged_body(tasks: TaskFile, settings: Settings, metadata: Metadata) -> Body:
    """The job in a JSON file with more settings and metadata; those of the command line win."""
    job = _read_object(tasks)
    for name, added in (("settings", settings), ("metadata", metadata)):
        held = job.get(name) or {}
        if not isinstance(held, dict):
            raise BadInput(f"{tasks.name}: {name} must be an object")
        if added:
            job[name] = {**held, **added}
    return Body({"Content-Type": "application/json"}, json.dumps(job).encode())


def _read_object(tasks: TaskFile) -> dict[str, Any]:
    text = bytearray()
    for piece in _unpacked(tasks) if tasks.form.packed else _as_it_is(tasks):
        text += piece
        if len(text) > MAX_MERGED_BYTES:
            raise BadInput(f"{tasks.name} is too large for JSON: JSONL and CSV take more")
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{tasks.name} is not valid JSON: {_explain(error)}") from error
    if not isinstance(value, dict):
        raise BadInput(f'{tasks.name} must be a job, such as {{"data": ["a task", "another"]}}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counted = Counter(name for name, _ in pairs)
        raise ValueError(f"{counted.most_common(1)[0][0]!r} is given twice")
    return value


def _explain(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deep"
        case _:
            return str(error)


def _as_it_is(tasks: TaskFile) -> Iterator[bytes]:
    """Exactly the bytes that were announced."""
    left = tasks.size_bytes
    try:
        tasks.file.seek(0)
        while left and (piece := tasks.file.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece
    except OSError as error:
        raise BadInput(f"{tasks.name} can't be read: {error.strerror}") from error
    if left:
        raise BadInput(f"{tasks.name} became shorter while it was sent")


def _unpacked(tasks: TaskFile) -> Iterator[bytes]:
    try:
        tasks.file.seek(0)
        with gzip.GzipFile(fileobj=tasks.file) as unpacked:
            while piece := unpacked.read(PIECE_BYTES):
                yield piece
    except EOFError as error:
        raise BadInput(f"{tasks.name} is cut off: the gzip in it ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{tasks.name} is not gzip, or broken") from error
    except OSError as error:
        raise BadInput(f"{tasks.name} can't be read: {error.strerror}") from error
