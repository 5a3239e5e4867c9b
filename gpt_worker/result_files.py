"""The drive at work: a file of each run's results, written when the run has ended, read for links, deleted in time.

The recorder stores a row in the commit that ends a run and calls `wake()`. One thread takes the owed rows in pages,
writes or deletes their files and notes a page in one commit; what fails goes again, for ever. Nobody waits for it:
without a file, or where the drive does not give one soon, results come from the database. Where files live is the
business of `drives.py`.
"""

import gzip
import hashlib
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from typing import IO

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gpt_worker import rendering
from gpt_worker.aside import Aside
from gpt_worker.backoff import drive_wait_s
from gpt_worker.db import Database, log_failure, trouble_of
from gpt_worker.domain import FileState, utc_now
from gpt_worker.drive_errors import DriveError, NoFile
from gpt_worker.drives import Drive
from gpt_worker.errors import NotFound, Unavailable
from gpt_worker.gzip_members import LEVEL, unpack, verified
from gpt_worker.models import JobRow
from gpt_worker.store import result_files as store
from gpt_worker.store.result_files import OwedFile

log = logging.getLogger(__name__)

PAGE_FILES = 50  # of one commit, which waits for no more than COMMIT_EVERY_S and the file that it ends in
COMMIT_EVERY_S = 1.0
SETTLE_S = 0.25  # after a job's end: its reply and its webhook go first, and small jobs make one page
BREATH = 0.5  # of the time that a page of results took: the processor is not ours alone
OPEN_S = 2.0  # for a file to give its first piece to a reader; then the database answers
MAX_OPENING = 16  # files at a time, those left behind included
LONGEST_CHECK_WAIT_S = 60.0  # of a drive that fails
LONGEST_SLEEP_S = 60.0
DATABASE_PAUSE_S = 5.0
STOP_WAIT_S = 0.5
RETRY_AFTER_S = 1.0

Note = Callable[[Session, datetime], None]


@dataclass(frozen=True, slots=True)
class StoredResults:
    """The lines of a finished run from the drive, in pieces: gzip, as they lie there, or unpacked."""

    pieces: Iterator[bytes]
    size_bytes: int | None  # None where they are unpacked


def _packer(file: IO[bytes]) -> gzip.GzipFile:
    """Packs what is written to it; the same lines give the same file."""
    return gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=file, mtime=0)


class _Stopped(Exception):
    """The service stops: the file stays owed."""


def file_name(job_id: str, run: int) -> str:
    """Where on the drive the results of a run are."""
    return f"jobs/{job_id}/results-{run}.jsonl.gz"


class ResultFiles:
    """The files of all results, and the one thread that writes and deletes them."""

    def __init__(
        self, database: Database, drive: Drive, *, hint: str = "", clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._database = database
        self._drive = drive
        self._hint = hint
        self._clock = clock
        self._stopping = threading.Event()
        self._woken = threading.Event()
        # Whether the drive is to be looked at before it is used; no reader asks it until that is done.
        self._in_doubt = True
        self._opening = Aside(MAX_OPENING)
        self._checks_failed = 0
        self._database_failed = False
        self._thread = threading.Thread(target=self._run, name="result files", daemon=True)
        self.failures = 0  # attempts to write or delete that failed, since the start
        self.trouble: str | None = None
        """Why the drive can't be used, for people; None if nothing is known to be wrong."""

    def start(self) -> None:
        """Begin, in the process that serves."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more. A drive that hangs is left behind: what it was doing stays owed."""
        self._stopping.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_WAIT_S)

    def wake(self) -> None:
        """There is a file to write or to delete."""
        self._woken.set()

    # For the HTTP face

    def find(self, job: JobRow, *, unpacked: bool = False) -> StoredResults | None:
        """The file of the run that the job has finished; None where the database must do."""
        if job.finished_at is None or self._in_doubt or self.trouble is not None:
            return None
        with self._database.read() as session:
            row = store.find_written(session, job.id, job.run)
        if row is None or row.size_bytes is None:
            return None
        name, size_bytes = file_name(job.id, job.run), row.size_bytes
        try:
            pieces = self._opening.within(OPEN_S, lambda: self._drive.read(name, size_bytes))
            sound = unpack(pieces) if unpacked else verified(pieces)
            first = next(sound, b"")
            rest = self._unless_damaged(job, sound)
            return StoredResults(chain([first], rest), None if unpacked else size_bytes)
        except (NoFile, zlib.error) as error:
            self._write_again(job, error)
        except (DriveError, TimeoutError):
            self._in_doubt = True
        self.wake()
        return None

    def _unless_damaged(self, job: JobRow, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces. Raises Unavailable for a damaged file, of which the next reader gets nothing."""
        try:
            yield from pieces
        except zlib.error as error:
            self._write_again(job, error)
            self.wake()
            raise Unavailable("a file of results is damaged, and written again", RETRY_AFTER_S) from error

    def _write_again(self, job: JobRow, error: Exception) -> None:
        facts = {"action": "drive", "job_id": job.id}
        log.warning("a file of results is written again: %s", error, extra=facts)
        # Where that fails, the next reader sees to it.
        with suppress(SQLAlchemyError), self._database.write() as session:
            store.write_again(session, job.id, job.run, self._clock())

    # The thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                wait_s = self._work()
                self._database_failed = False
            except _Stopped:
                return
            except Exception as error:
                self._say_broken(error)
                wait_s = DATABASE_PAUSE_S
            if wait_s:
                self._woken.wait(wait_s)
                self._stopping.wait(SETTLE_S)

    def _work(self) -> float:
        """One page of what is owed; seconds to the next look."""
        if self._in_doubt:
            try:
                self._drive.check()
            except DriveError as error:
                self._checks_failed += 1
                self._say(str(error))
                return self._pause(min(LONGEST_CHECK_WAIT_S, drive_wait_s(self._checks_failed)))
            self._checks_failed, self._in_doubt = 0, False
        now = self._clock()
        with self._database.read() as session:
            owed = store.list_due(session, now, PAGE_FILES)
            next_due_at = None if owed else store.next_due_at(session)
        if not owed:
            if next_due_at is None:
                self._say(None)
                return LONGEST_SLEEP_S
            return min(LONGEST_SLEEP_S, max(SETTLE_S, (next_due_at - now).total_seconds()))
        notes: list[Note] = []
        began_s = time.monotonic()
        try:
            for file in owed:
                notes.append(self._attend(file))
                if self._in_doubt or time.monotonic() > began_s + COMMIT_EVERY_S:
                    break
        finally:
            if notes:
                with self._database.write() as session:
                    for note in notes:
                        note(session, self._clock())
        return 0.0

    def _pause(self, seconds: float) -> float:
        """Wait, whoever calls: a drive that fails is not asked for each job that ends."""
        if self._stopping.wait(seconds):
            raise _Stopped
        return 0.0

    def _attend(self, file: OwedFile) -> Note:
        """Write or delete one file; what is to be noted of that. Raises _Stopped."""
        try:
            note = self._delete(file) if file.state is FileState.DELETING else self._write(file)
        except DriveError as error:
            self.failures += 1
            self._in_doubt = True
            self._say(str(error))
            wait = timedelta(seconds=drive_wait_s(file.attempts + 1))
            return lambda session, now: store.postpone(session, file, now + wait)
        self._say(None)
        return note

    def _delete(self, file: OwedFile) -> Note:
        if self._stopping.is_set():
            raise _Stopped
        self._drive.delete(file_name(file.job_id, file.run))
        return lambda session, _now: store.forget(session, file)

    def _write(self, file: OwedFile) -> Note:
        digest = hashlib.sha256()
        with self._drive.stage() as staged, _packer(staged) as packed, suppress(NotFound):
            began_s = time.monotonic()
            for page in rendering.results_jsonl(self._database, file.job_id):
                digest.update(page)
                packed.write(page)
                if self._stopping.wait(BREATH * (time.monotonic() - began_s)):
                    raise _Stopped
                began_s = time.monotonic()
        with self._database.read() as session:
            stands = store.stands(session, file.job_id, file.run)
        if not stands:  # run again or deleted meanwhile: these may be the results of two runs
            return lambda session, now: store.give_up(session, file, now)
        size_bytes = self._drive.put(file_name(file.job_id, file.run))
        sha256 = digest.hexdigest()
        return lambda session, now: store.note_written(session, file, sha256, size_bytes, now)

    # The log

    def _say(self, trouble: str | None) -> None:
        """Tell that the drive fails, or works again, once."""
        before, self.trouble = self.trouble, trouble
        if trouble is not None and before is None:
            log.warning(
                "the drive (%s) can't be used: %s%s; results stay in the database, their files are written later",
                self._drive.name,
                trouble,
                f" ({self._hint})" if self._hint else "",
                extra={"action": "drive"},
            )
        elif trouble is None and before is not None:
            log.info("the drive (%s) can be used again", self._drive.name, extra={"action": "drive"})

    def _say_broken(self, error: Exception) -> None:
        if trouble_of(error) is not None and self._database_failed:
            return
        self._database_failed = True
        log_failure(log, "files of results can't be written; trying again", error, action="drive")
