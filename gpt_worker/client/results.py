"""Brings a job's results: into a file that is complete or not there, or onto an open stream."""

import gzip
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from gpt_worker.client.errors import NotWritten
from gpt_worker.client.options import FileForm, Form
from gpt_worker.client.patience import OnWait, patiently
from gpt_worker.client.server import Server, job_path

PATIENCE_S = 120.0
PACK_LEVEL = 6


def check_out(path: Path) -> None:
    """Raises NotWritten for a place where no file can be, before anything is sent."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise NotWritten(f"--out {path} is not a file")
    if not target.parent.is_dir():
        raise NotWritten(f"--out {path}: there is no directory {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise NotWritten(f"--out {path}: the directory {target.parent} can't be written to")


def save(server: Server, job_id: str, path: Path, form: FileForm, on_wait: OnWait) -> None:
    """Writes the results beside `path` and then moves them there, so that it never holds half of them."""
    check_out(path)
    target = Path(os.path.realpath(path))
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        patiently(lambda: _write_new(server, job_id, new, form), PATIENCE_S, on_wait)
        new.replace(target)
    except OSError as error:
        raise NotWritten(f"{path} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def write_to(stream: IO[bytes], server: Server, job_id: str, form: Form, on_wait: OnWait) -> None:
    """Writes the results to an open stream, once all of them are here.

    Raises BrokenPipeError when whoever reads the stream has left.
    """

    def fetch(kept: IO[bytes]) -> None:
        kept.seek(0)
        kept.truncate()
        _fetch(server, job_id, form, kept.write)

    try:
        with tempfile.TemporaryFile() as kept:
            patiently(lambda: fetch(kept), PATIENCE_S, on_wait)
            kept.seek(0)
            shutil.copyfileobj(kept, stream)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotWritten(f"the results can't be written: {error.strerror}") from error


def _write_new(server: Server, job_id: str, new: Path, form: FileForm) -> None:
    with new.open("wb") as file:
        if not form.packed:
            _fetch(server, job_id, form.form, file.write)
            return
        with gzip.GzipFile("", "wb", PACK_LEVEL, file) as packed:
            _fetch(server, job_id, form.form, packed.write)


def _fetch(server: Server, job_id: str, form: Form, write: Callable[[bytes], object]) -> None:
    """The results, written as they come."""
    path = f"{job_path(job_id)}/results"
    with server.request("GET", path, params={"format": form.value}, stream=True) as reply:
        for piece in server.pieces(reply):
            write(piece)
