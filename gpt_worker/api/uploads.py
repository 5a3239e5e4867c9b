"""A submit in any of its forms: JSON, a file of tasks with the settings in the query, or a form with both.

The tasks of a file are read from the socket while they are stored: the request that comes out carries an iterator.
Only a form, and a file with an Idempotency-Key, whose hash is known at its end, go through a temporary file first, and
so does large JSON, which takes thirty times its size in memory: it waits there until it is its turn to be parsed, and
has it until it is stored.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, cast

from flask import request
from werkzeug.exceptions import UnsupportedMediaType
from werkzeug.http import parse_options_header

from gpt_worker.api.access import holder
from gpt_worker.api.context import service
from gpt_worker.api.file_tasks import csv_body_tasks, csv_tasks, jsonl_tasks
from gpt_worker.api.form_parts import FILE_PART, Part, read_form
from gpt_worker.api.job_body import job_without_tasks, read_job, read_metadata, read_settings
from gpt_worker.api.job_schemas import JobSettingsBody
from gpt_worker.api.parsing import ONE_AT_A_TIME_BYTES, StrictRequest, parse_json, parse_object
from gpt_worker.api.unpacking import bounded, file_pieces, gunzip, not_packed, sent_pieces, too_large
from gpt_worker.api.upload_query import UploadQuery
from gpt_worker.domain import DeliveryMode, JobSettings, NewTask
from gpt_worker.errors import FieldError, Invalid, Unavailable
from gpt_worker.jobs import JobRequest
from gpt_worker.places import SMALL_BODY_BYTES, Turns

Json = dict[str, Any]
ReadTasks = Callable[[Iterable[bytes], JobSettings, int, int], Iterator[NewTask]]

JSON = "application/json"
FORM = "multipart/form-data"
FILES: dict[str, ReadTasks] = {
    "application/jsonl": jsonl_tasks,
    "application/x-ndjson": jsonl_tasks,
    "text/csv": csv_tasks,
}
BODIES: dict[str, ReadTasks] = {**FILES, "text/csv": csv_body_tasks}
FILE_NAMES: dict[str, ReadTasks] = {
    ".jsonl": jsonl_tasks,
    ".ndjson": jsonl_tasks,
    ".json": jsonl_tasks,
    ".csv": csv_tasks,
}
TAKEN = ", ".join((JSON, *FILES, FORM))
BODY_IS_GZIP = "The body is gzip: add the header Content-Encoding: gzip."
PART_IS_GZIP = "The part file is gzip: its name must end in .gz."
RETRY_AFTER_S = 5
MAX_MIDDLING = 8
TURN_WAIT_S = 20.0

# Of the whole process, as its memory is: 15 MiB of JSON may take 450 MB until they are stored, and 1 MiB 40 MB.
_large_json, _middling_json = Turns(), Turns(MAX_MIDDLING)


@dataclass(frozen=True, slots=True)
class Received:
    """What a submit asks for; `said` is the request in short, for its hash, if that was asked for."""

    job: JobRequest
    said: str | None


@contextmanager
def receive(query: UploadQuery, *, hashed: bool) -> Iterator[Received]:
    """The job that this request asks for; its tasks must be read inside the block.

    Raises:
        UnsupportedMediaType: a body that nobody here reads.
        Unavailable: too many uploads or too much large JSON at once, or the service stops.
        BadRequest, Invalid, TooLarge, pydantic.ValidationError: naming what is wrong, also while tasks are read.
    """
    _refuse_repeated()
    kind = request.mimetype
    if kind == JSON:
        with ExitStack() as held:
            yield _from_json(query, held, hashed=hashed)
        return
    read_tasks = BODIES.get(kind)
    if read_tasks is None and kind != FORM:
        raise UnsupportedMediaType(f"Send the header Content-Type: {TAKEN}.")
    _check_charset(request.mimetype_params)
    with ExitStack() as held:
        _hold_place(held)
        if read_tasks is None:
            yield _from_form(query, held)
        else:
            yield _from_file(query, read_tasks, held, hashed=hashed)


def _hold_place(held: ExitStack) -> None:
    if not held.enter_context(service().places.hold(holder())):
        raise Unavailable("Too many uploads at once.", RETRY_AFTER_S)


def _refuse_repeated() -> None:
    repeated = [name for name, values in request.args.lists() if len(values) > 1]
    if repeated:
        raise Invalid(*(FieldError((name,), "is given twice") for name in repeated))


def _refuse_settings(query: UploadQuery, where: str) -> None:
    misplaced = sorted(query.model_fields_set - {"dry_run"})
    if misplaced:
        raise Invalid(*(FieldError((name,), f"goes into {where}, not into the query") for name in misplaced))


def _job(settings: JobSettingsBody, *loc: str) -> JobRequest:
    return job_without_tasks(settings, service().settings, *_defaults(), *loc)


def _defaults() -> tuple[DeliveryMode, str | None]:
    """How a job is delivered that does not say, and the model that answers whatever a job says."""
    parts = service()
    return parts.modes.current().delivery, parts.model_name if parts.settings.embedded else None


# JSON


def _from_json(query: UploadQuery, held: ExitStack, *, hashed: bool) -> Received:
    _refuse_settings(query, "the body")
    body = _json_body(held)
    said = _said(body) if hashed else None
    if "data" in body:
        body["data"] = _drained(body["data"])  # and of what it was before nothing is kept
    job = read_job(body, service().settings, *_defaults())
    return Received(replace(job, tasks=_Drained(job.tasks)), said)


def _json_body(held: ExitStack) -> Json:
    """The body, parsed when it is its turn; what of it may be slow to come holds a place meanwhile."""
    settings = service().settings
    if _is_gzip(request.headers.get("Content-Encoding")):
        _check_charset(request.mimetype_params)
        sent = _sent(settings.max_json_bytes, "MAX_JSON_BYTES")
        pieces = bounded(gunzip(sent), settings.max_json_bytes, "MAX_JSON_BYTES")
    else:
        sent = cast(StrictRequest, request).json_pieces(settings.max_json_bytes)
        pieces = not_packed(sent, BODY_IS_GZIP)
    if not _has_come():
        _hold_place(held)
    with tempfile.SpooledTemporaryFile(ONE_AT_A_TIME_BYTES, dir=str(settings.data_dir)) as file:
        for piece in pieces:
            file.write(piece)
        _take_turn(file.tell(), held)
        file.seek(0)
        raw = file.read()
    return parse_object(raw)


def _has_come() -> bool:
    """Whether the server had the whole body before it began this request."""
    length = request.content_length
    return length is not None and length <= SMALL_BODY_BYTES and "Expect" not in request.headers


def _take_turn(size_bytes: int, held: ExitStack) -> None:
    if size_bytes <= SMALL_BODY_BYTES:
        return
    turns = _large_json if size_bytes > ONE_AT_A_TIME_BYTES else _middling_json
    if not held.enter_context(turns.hold(holder(), TURN_WAIT_S)):
        raise Unavailable("Too much large JSON at once; JSONL need not wait.", RETRY_AFTER_S)


class _Drained:
    """Hands out each task once and keeps it no longer: so what is stored takes no memory beside what is not yet."""

    def __init__(self, tasks: Iterable[NewTask]) -> None:
        self._left = [*tasks]
        self._count = len(self._left)
        self._left.reverse()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[NewTask]:
        while self._left:
            yield self._left.pop()


class _DrainedList(list[Any]):
    """The same, of what a job's `data` says."""

    def __iter__(self) -> Iterator[Any]:
        self.reverse()
        while self:
            yield self.pop()


class _DrainedDict(dict[str, Any]):
    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        return ((name, self.pop(name)) for name in [*self])


def _drained(data: Any) -> Any:
    if isinstance(data, dict):
        return _DrainedDict(data)
    return _DrainedList(data) if isinstance(data, list) else data


# Files


def _from_file(query: UploadQuery, read_tasks: ReadTasks, held: ExitStack, *, hashed: bool) -> Received:
    settings = service().settings
    job = replace(_job(query), metadata=read_metadata(query.metadata or {}))
    is_gzip = _is_gzip(request.headers.get("Content-Encoding"))
    pieces = _sent(settings.max_upload_bytes, "MAX_UPLOAD_BYTES")
    said = None
    if hashed:
        file, digest = _kept(pieces, held)
        pieces = file_pieces(file)
        said = _said(request.content_type, request.content_encoding, digest)
    unpacked = _unpacked(pieces, BODY_IS_GZIP, is_gzip=is_gzip)
    return Received(replace(job, tasks=_file_tasks(unpacked, read_tasks, job.settings)), said)


def _unpacked(pieces: Iterable[bytes], otherwise: str, *, is_gzip: bool) -> Iterator[bytes]:
    """What the pieces hold; `otherwise` is told where they are gzip and it was not said."""
    return gunzip(pieces) if is_gzip else not_packed(pieces, otherwise)


def _file_tasks(unpacked: Iterable[bytes], read_tasks: ReadTasks, job: JobSettings) -> Iterator[NewTask]:
    settings = service().settings
    whole = bounded(unpacked, settings.max_upload_bytes, "MAX_UPLOAD_BYTES", _check_service)
    return read_tasks(whole, job, settings.max_json_bytes, settings.max_tasks)


def _kept(pieces: Iterable[bytes], held: ExitStack) -> tuple[IO[bytes], str]:
    """All of the body in a file that goes with `held`, and its hash."""
    file = held.enter_context(
        tempfile.TemporaryFile(dir=service().settings.data_dir)  # noqa: SIM115 (`held` closes it)
    )
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        file.write(piece)
    file.seek(0)
    return file, digest.hexdigest()


# Forms


def _from_form(query: UploadQuery, held: ExitStack) -> Received:
    _refuse_settings(query, "the form's part settings, or metadata")
    settings = service().settings
    pieces: Iterable[bytes] = _sent(settings.max_upload_bytes, "MAX_UPLOAD_BYTES")
    if _is_gzip(request.headers.get("Content-Encoding")):
        pieces = bounded(gunzip(pieces), settings.max_upload_bytes, "MAX_UPLOAD_BYTES", _check_service)
    boundary = request.mimetype_params.get("boundary", "")
    parts = held.enter_context(read_form(pieces, boundary, settings.data_dir, settings.max_json_bytes))
    job = _job(read_settings(_json_part(parts, "settings")), "settings")
    job = replace(job, metadata=read_metadata(_json_part(parts, "metadata")))
    read_tasks, is_gzip = _kind_of(parts[FILE_PART])
    file = parts[FILE_PART].file
    assert file is not None
    unpacked = _unpacked(file_pieces(file), PART_IS_GZIP, is_gzip=is_gzip)
    tasks = _file_tasks(unpacked, read_tasks, job.settings)
    return Received(replace(job, tasks=tasks), _said_by_form(parts))


def _json_part(parts: dict[str, Part], name: str) -> Any:
    part = parts.get(name)
    return parse_json(bytes(part.content), f"The part {name}") if part is not None else {}


def _kind_of(part: Part) -> tuple[ReadTasks, bool]:
    """How the file is read, by its own content type, else by its name; and whether it is packed."""
    name = part.filename.lower()
    is_gzip = _is_gzip(part.headers.get("Content-Encoding")) or name.endswith(".gz")
    kind, options = parse_options_header(part.headers.get("Content-Type"))
    read_tasks = FILES.get(kind.lower())
    if read_tasks is not None:
        _check_charset(options)
        return read_tasks, is_gzip
    plain = name.removesuffix(".gz")
    read_tasks = next((read for ending, read in FILE_NAMES.items() if plain.endswith(ending)), None)
    if read_tasks is None:
        raise UnsupportedMediaType(
            f"Send the part file with the header Content-Type: {', '.join(FILES)}, "
            f"or with a name that ends in {', '.join(FILE_NAMES)}."
        )
    return read_tasks, is_gzip


def _said_by_form(parts: dict[str, Part]) -> str:
    """By its parts: a client that sends the same again makes another boundary."""
    headers = ("Content-Type", "Content-Encoding")
    told = [
        [name, part.filename, *map(part.headers.get, headers), part.digest.hexdigest()]
        for name, part in sorted(parts.items())
    ]
    return _said(FORM, told)


# What all have in common


def _said(*what: object) -> str:
    return json.dumps([sorted(request.args.items(multi=True)), *what], separators=(",", ":"))


def _sent(max_bytes: int, limit: str) -> Iterator[bytes]:
    length = request.content_length
    if (length or 0) > max_bytes:
        raise too_large(max_bytes, limit)
    return bounded(sent_pieces(request.stream, length), max_bytes, limit, _check_service)


def _check_service() -> None:
    """Whether it is still worth going on with an upload."""
    parts = service()
    if parts.stopping:
        raise Unavailable("The service is being stopped.", RETRY_AFTER_S)
    parts.jobs.check_disk()


def _is_gzip(encoding: str | None) -> bool:
    match (encoding or "identity").strip().lower():
        case "identity":
            return False
        case "gzip" | "x-gzip":
            return True
    raise UnsupportedMediaType(
        "Send the header Content-Encoding: gzip, or the body as it is and no such header."
    )


def _check_charset(options: dict[str, str]) -> None:
    if options.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"Send the body in UTF-8, and the header Content-Type: {TAKEN}.")
