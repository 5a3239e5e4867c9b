"""A submit in any of its forms: JSON, a file of tasks with the settings in the query, or a form with both.

The tasks of a file are read from the socket while they are stored: the request that comes out carries an iterator.
Only a form, and a file with an Idempotency-Key, whose hash is known at its end, go through a temporary file first.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

from flask import request
from werkzeug.exceptions import UnsupportedMediaType
from werkzeug.http import parse_options_header

from gpt_worker.api.context import service
from gpt_worker.api.file_tasks import csv_tasks, jsonl_tasks
from gpt_worker.api.form_parts import FILE_PART, Part, read_form
from gpt_worker.api.job_body import job_without_tasks, read_job, read_metadata, read_settings
from gpt_worker.api.job_schemas import JobSettingsBody
from gpt_worker.api.parsing import parse_body, parse_json
from gpt_worker.api.unpacking import bounded, file_pieces, gunzip, sent_pieces, too_large
from gpt_worker.api.upload_query import UploadQuery
from gpt_worker.domain import DeliveryMode, JobSettings, NewTask
from gpt_worker.errors import FieldError, Invalid, Unavailable
from gpt_worker.jobs import JobRequest

Json = dict[str, Any]
ReadTasks = Callable[[Iterable[bytes], JobSettings, int, int], Iterator[NewTask]]

JSON = "application/json"
FORM = "multipart/form-data"
FILES: dict[str, ReadTasks] = {
    "application/jsonl": jsonl_tasks,
    "application/x-ndjson": jsonl_tasks,
    "text/csv": csv_tasks,
}
FILE_NAMES: dict[str, ReadTasks] = {
    ".jsonl": jsonl_tasks,
    ".ndjson": jsonl_tasks,
    ".json": jsonl_tasks,
    ".csv": csv_tasks,
}
TAKEN = ", ".join((JSON, *FILES, FORM))
RETRY_AFTER_S = 5


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
        Unavailable: too many uploads at once, or the service stops.
        BadRequest, Invalid, TooLarge, pydantic.ValidationError: naming what is wrong, also while tasks are read.
    """
    _refuse_repeated()
    kind = request.mimetype
    if kind == JSON:
        yield _from_json(query, hashed=hashed)
        return
    read_tasks = FILES.get(kind)
    if read_tasks is None and kind != FORM:
        raise UnsupportedMediaType(f"Send the header Content-Type: {TAKEN}.")
    _check_charset(request.mimetype_params)
    with ExitStack() as held:
        if not held.enter_context(service().places.hold()):
            raise Unavailable("Too many uploads at once.", RETRY_AFTER_S)
        if read_tasks is None:
            yield _from_form(query, held)
        else:
            yield _from_file(query, read_tasks, held, hashed=hashed)


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


def _from_json(query: UploadQuery, *, hashed: bool) -> Received:
    _refuse_settings(query, "the body")
    body = _unpacked_json() if _is_gzip(request.headers.get("Content-Encoding")) else request.get_json()
    job = read_job(body, service().settings, *_defaults())
    return Received(job, _said(body) if hashed else None)


def _unpacked_json() -> Json:
    _check_charset(request.mimetype_params)
    max_bytes = service().settings.max_json_bytes
    return parse_body(
        b"".join(bounded(gunzip(_sent(max_bytes, "MAX_JSON_BYTES")), max_bytes, "MAX_JSON_BYTES"))
    )


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
    tasks = _file_tasks(pieces, read_tasks, job.settings, is_gzip=is_gzip)
    return Received(replace(job, tasks=tasks), said)


def _file_tasks(
    pieces: Iterable[bytes], read_tasks: ReadTasks, job: JobSettings, *, is_gzip: bool
) -> Iterator[NewTask]:
    settings = service().settings
    unpacked = gunzip(pieces) if is_gzip else pieces
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
    tasks = _file_tasks(file_pieces(file), read_tasks, job.settings, is_gzip=is_gzip)
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
