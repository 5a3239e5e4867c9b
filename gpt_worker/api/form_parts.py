"""A multipart form, read as it comes: small parts into memory, the file into a temporary one that has no name.

A part that is not known, or comes twice, is refused before its content is read. RFC 7578.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from werkzeug.datastructures import Headers
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from gpt_worker.api.unpacking import PIECE_BYTES, too_large
from gpt_worker.errors import Invalid

FILE_PART = "file"
SMALL_PARTS = ("settings", "metadata")
MAX_BOUNDARY_LENGTH = 70
BOUNDARY_END_BYTES = 4  # "--" and a line end
MAX_WAITING_BYTES = 4 * PIECE_BYTES  # of headers, and of what stands before and behind the parts


@dataclass(slots=True)
class Part:
    """One part: what its headers say, and its content in memory, or for the file part in `file`."""

    headers: Headers
    filename: str
    file: IO[bytes] | None
    content: bytearray = field(default_factory=bytearray)
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, data: bytes, max_small_bytes: int) -> None:
        self.digest.update(data)
        if self.file is not None:
            self.file.write(data)
        elif len(self.content) + len(data) > max_small_bytes:
            raise too_large(max_small_bytes, "MAX_JSON_BYTES")
        else:
            self.content += data


@contextmanager
def read_form(
    pieces: Iterable[bytes], boundary: str, folder: Path, max_small_bytes: int
) -> Iterator[dict[str, Part]]:
    """The parts by name, `file` always among them, and rewound; it is gone at the end of the block.

    Raises:
        BadRequest: not multipart, or broken off.
        Invalid: a part is missing, unknown, or given twice.
        TooLarge: a small part is over its limit.
    """
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise BadRequest("The Content-Type multipart/form-data needs a boundary of 1 to 70 characters.")
    parts: dict[str, Part] = {}
    part: Part | None = None
    with ExitStack() as files:
        for event in _events(pieces, boundary):
            if isinstance(event, Field | File):
                part = _begin(event, parts)
                if event.name == FILE_PART:
                    part.file = files.enter_context(tempfile.TemporaryFile(dir=folder))
            elif isinstance(event, Data) and part is not None:
                part.add(event.data, max_small_bytes)
        if FILE_PART not in parts:
            raise Invalid.at("this part is required", FILE_PART)
        file = parts[FILE_PART].file
        assert file is not None
        file.seek(0)
        yield parts


def _begin(event: Field | File, parts: dict[str, Part]) -> Part:
    name: str | None = event.name
    if name is None:
        raise BadRequest("A part of the form has no name.")
    if name != FILE_PART and name not in SMALL_PARTS:
        raise Invalid.at("is no part that is known here: send file, settings and metadata", name)
    if name in parts:
        raise Invalid.at("this part is given twice", name)
    parts[name] = Part(event.headers, event.filename if isinstance(event, File) else "", None)
    return parts[name]


def _events(pieces: Iterable[bytes], boundary: str) -> Iterator[Event]:
    raw_boundary = boundary.encode("latin-1", "replace")
    decoder = MultipartDecoder(raw_boundary, MAX_WAITING_BYTES)
    source = _not_cut_behind(b"--" + raw_boundary, pieces)
    while True:
        try:
            event = decoder.next_event()
        except ValueError as error:
            raise BadRequest("The body is not multipart/form-data, or is not complete.") from error
        if not isinstance(event, NeedData):
            yield event
            if isinstance(event, Epilogue):
                return
            continue
        try:
            decoder.receive_data(next(source, None))
        except RequestEntityTooLarge as error:
            raise BadRequest("The body is not multipart/form-data: its parts don't begin or end.") from error


def _not_cut_behind(marker: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, in pieces that don't end just behind the marker.

    Werkzeug's decoder (3.1) takes the first byte of the line end before a boundary for data if it sees the boundary
    and no more than the byte behind it.
    """
    before = held = b""
    for piece in pieces:
        held += piece
        last = (before + held)[-len(marker) - BOUNDARY_END_BYTES :]
        if marker in last and len(held) < 2 * PIECE_BYTES:
            continue
        yield held
        before, held = last, b""
    if held:
        yield held
