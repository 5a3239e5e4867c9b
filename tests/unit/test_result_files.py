"""The files of results, on a real SQLite file: what is written when, what of a failing drive, what is deleted."""

import gzip
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, select, update

from gpt_worker import rendering, result_files
from gpt_worker.backoff import drive_wait_s
from gpt_worker.db import Database
from gpt_worker.domain import Answer, FileState, JobStatus, utc_now
from gpt_worker.drive_errors import DriveError
from gpt_worker.drives import LocalDrive
from gpt_worker.errors import Unavailable
from gpt_worker.models import JobRow, ResultFileRow, TaskRow
from gpt_worker.result_files import ResultFiles, file_name
from gpt_worker.store import jobs as job_store
from gpt_worker.store import result_files as store
from gpt_worker.store import tasks as task_store
from tests import factories
from tests.clock import eventually


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


class Drive(LocalDrive):
    """A directory that fails when a test says so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "local")
        self.root = root
        self.failure: DriveError | None = None
        self.before_put: Callable[[], None] = lambda: None
        self.before_check: Callable[[], None] = lambda: None
        self.before_read: Callable[[], None] = lambda: None
        self.puts = 0

    def check(self) -> None:
        self.before_check()
        self._fail()
        super().check()

    def read(self, name: str, size_bytes: int) -> Iterator[bytes]:
        self.before_read()
        self._fail()
        return super().read(name, size_bytes)

    def put(self, name: str) -> int:
        self.before_put()
        self._fail()
        self.puts += 1
        return super().put(name)

    def delete(self, name: str) -> None:
        self._fail()
        super().delete(name)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("results-*")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that fails is asked again soon."""
    monkeypatch.setattr(result_files, "SETTLE_S", 0.01)
    monkeypatch.setattr(result_files, "drive_wait_s", lambda _attempt: 0.02)


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    return Drive(tmp_path / "drive")


@pytest.fixture
def files(database: Database, drive: Drive) -> Iterator[ResultFiles]:
    made = ResultFiles(database, drive, hint="look at IT")
    yield made
    made.stop()


def end_job(database: Database, tasks: int = 2, text: str = "Hello") -> JobRow:
    """A job whose run ends, all of it answered, with the file that the recorder would owe."""
    job = factories.store_job(database=database, tasks=tasks)
    now = utc_now()
    with database.write() as session:
        answer = Answer(text, "stop")
        outcomes = [
            factories.outcome(job_id=job.id, position=number, decision=answer) for number in range(tasks)
        ]
        task_store.record_answers(session, outcomes)
        job_store.add_progress(session, {job.id: job_store.JobProgress(answered=tasks)})
        assert job_store.end(session, [job.id], now)
        store.owe(session, [(job.id, job.run)], now)
    with database.read() as session:
        ended = job_store.get_job(session, job.id)
    assert ended is not None
    return ended


def run_again(database: Database, job: JobRow) -> None:
    with database.write() as session:
        row = job_store.get_job(session, job.id)
        assert row is not None
        job_store.reopen(row, utc_now() + timedelta(days=1))


def row_of(database: Database, job: JobRow, run: int = 1) -> ResultFileRow | None:
    with database.read() as session:
        return session.get(ResultFileRow, (job.id, run))


def state_of(database: Database, job: JobRow) -> str | None:
    row = row_of(database, job)
    return None if row is None else row.state


def written(database: Database, job: JobRow) -> ResultFileRow:
    eventually(lambda: state_of(database, job) == FileState.WRITTEN, "the file")
    row = row_of(database, job)
    assert row is not None
    return row


def test_what_a_run_has_brought_is_written_to_a_file(
    database: Database, drive: Drive, files: ResultFiles
) -> None:
    job = end_job(database, tasks=2500)

    files.start()

    row = written(database, job)
    packed = (drive.root / file_name(job.id, 1)).read_bytes()
    content = gzip.decompress(packed)
    assert content == b"".join(rendering.results_jsonl(database, job.id))
    assert content.count(b"\n") == 2500
    assert row.sha256 == hashlib.sha256(content).hexdigest()
    assert (row.size_bytes, row.attempts, row.next_attempt_at) == (len(packed), 0, None)
    assert files.trouble is None


def test_many_small_jobs_cost_few_commits(database: Database, drive: Drive, files: ResultFiles) -> None:
    jobs = [end_job(database) for _ in range(result_files.PAGE_FILES)]
    commits = 0

    def count(_connection: object) -> None:
        nonlocal commits
        commits += 1

    engine = database._writers.kw["bind"]
    event.listen(engine, "commit", count)

    files.start()

    for job in jobs:
        written(database, job)
    assert commits <= 10


def test_the_file_is_found_once_it_is_written_and_only_then(
    database: Database, drive: Drive, files: ResultFiles
) -> None:
    job = end_job(database)
    assert files.find(job) is None

    files.start()
    written(database, job)

    found = files.find(job)
    assert found is not None
    assert gzip.decompress(b"".join(found.pieces)) == b"".join(rendering.results_jsonl(database, job.id))
    assert found.size_bytes == (drive.root / file_name(job.id, 1)).stat().st_size


def test_a_job_that_runs_again_has_no_file_until_that_run_ends(
    database: Database, drive: Drive, files: ResultFiles
) -> None:
    job = end_job(database)
    files.start()
    written(database, job)

    run_again(database, job)

    with database.read() as session:
        again = job_store.get_job(session, job.id)
    assert again is not None
    assert files.find(again) is None
    assert drive.files() == {file_name(job.id, 1)}


def test_a_run_that_is_overtaken_while_its_file_is_made_leaves_none(
    database: Database, drive: Drive, files: ResultFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = end_job(database)
    lines = rendering.results_jsonl

    def overtaken(made_of: Database, job_id: str) -> Iterator[bytes]:
        yield from lines(made_of, job_id)
        run_again(database, job)

    monkeypatch.setattr(rendering, "results_jsonl", overtaken)
    files.start()

    eventually(lambda: row_of(database, job) is None, "the row's end")
    assert (drive.puts, drive.files()) == (0, set())


def test_a_job_that_is_deleted_while_its_file_is_put_leaves_none(
    database: Database, drive: Drive, files: ResultFiles
) -> None:
    job = end_job(database)

    def purge() -> None:
        with database.write() as session:
            store.drop_for_job(session, job.id, utc_now())
            job_store.discard(session, job.id)

    drive.before_put = purge
    files.start()

    eventually(lambda: row_of(database, job) is None, "the row's end")
    assert (drive.puts, drive.files()) == (1, set())


def test_a_drive_that_fails_is_told_once_and_its_files_are_written_later(
    database: Database, drive: Drive, files: ResultFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gpt_worker.result_files")
    drive.failure = DriveError("it refuses access")
    jobs = [end_job(database) for _ in range(3)]
    files.start()

    eventually(lambda: files.trouble == "it refuses access", "the trouble")
    time.sleep(0.1)  # for more attempts than one
    assert {state_of(database, job) for job in jobs} == {FileState.PENDING}
    drive.failure = None
    for job in jobs:
        written(database, job)

    assert files.trouble is None
    said = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert said[0].startswith("the drive (local) can't be used: it refuses access (look at IT)")
    assert not any(record.exc_info for record in caplog.records)


def test_a_drive_without_work_is_well_again_by_a_check(drive: Drive, files: ResultFiles) -> None:
    drive.failure = DriveError("it is full")
    files.start()
    eventually(lambda: files.trouble, "the trouble")

    drive.failure = None

    eventually(lambda: files.trouble is None, "the end of it")


def test_one_file_that_fails_holds_up_no_other(
    database: Database, drive: Drive, files: ResultFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = end_job(database)
    put = Drive.put

    def put_others(self: Drive, name: str) -> int:
        if bad.id in name:
            raise DriveError("it is too large")
        return put(self, name)

    monkeypatch.setattr(Drive, "put", put_others)
    others = [end_job(database) for _ in range(3)]

    files.start()

    for job in others:
        written(database, job)
    assert state_of(database, bad) == FileState.PENDING
    eventually(lambda: files.failures > 1, "another attempt")
    row = row_of(database, bad)
    assert row is not None
    assert row.attempts > 0


def test_waits_double_from_a_second_to_ten_minutes() -> None:
    waits = [drive_wait_s(attempt) for attempt in (1, 2, 3, 10, 11, 10_000)]

    assert waits == [1, 2, 4, 512, 600, 600]


@pytest.mark.parametrize("damage", ["lost", "cut", "spoilt"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_file_that_is_lost_or_damaged_is_written_again(
    database: Database, drive: Drive, files: ResultFiles, damage: str, *, unpacked: bool
) -> None:
    job = end_job(database)
    files.start()
    written(database, job)
    path = drive.root / file_name(job.id, 1)
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else whole[:-8] + b"x" * 8)

    assert files.find(job, unpacked=unpacked) is None

    eventually(lambda: drive.puts == 2 and state_of(database, job) == FileState.WRITTEN, "the file")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_large_file_that_is_damaged_behind_its_beginning_is_cut_off_and_written_again(
    database: Database, drive: Drive, files: ResultFiles, *, unpacked: bool
) -> None:
    job = end_job(database, text=random.Random(7).randbytes(300_000).hex())
    files.start()
    written(database, job)
    path = drive.root / file_name(job.id, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"x" * 8)

    found = files.find(job, unpacked=unpacked)
    assert found is not None
    with pytest.raises(Unavailable):
        list(found.pieces)

    eventually(lambda: drive.puts == 2 and state_of(database, job) == FileState.WRITTEN, "the file")
    assert path.read_bytes() == whole


class Hang:
    """What a step waits for until the test lets it go."""

    def __init__(self) -> None:
        self.begun: list[threading.Thread] = []
        self._over = threading.Event()

    def __call__(self) -> None:
        self.begun.append(threading.current_thread())
        self._over.wait(30)

    def end(self) -> None:
        self._over.set()


def test_no_reader_waits_for_a_drive_that_has_not_answered_yet(database: Database, drive: Drive) -> None:
    job = end_job(database)
    before = ResultFiles(database, drive)
    before.start()
    written(database, job)
    before.stop()
    drive.before_check = checks = Hang()
    drive.before_read = reads = Hang()
    files = ResultFiles(database, drive)
    files.start()
    eventually(lambda: checks.begun, "the check")
    began_s = time.monotonic()

    assert files.find(job) is None

    assert time.monotonic() - began_s < 1
    assert reads.begun == []
    drive.before_read = lambda: None
    checks.end()
    eventually(lambda: files.find(job) is not None, "the file")
    files.stop()


def test_a_reader_waits_but_shortly_for_a_file_that_does_not_open(
    database: Database, drive: Drive, files: ResultFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "OPEN_S", 0.2)
    job = end_job(database)
    files.start()
    written(database, job)
    drive.failure = DriveError("it does not answer in time")
    drive.before_read = reads = Hang()
    began_s = time.monotonic()

    assert files.find(job) is None

    assert time.monotonic() - began_s < 5
    eventually(lambda: files.trouble == "it does not answer in time", "the trouble")
    for _ in range(3):
        assert files.find(job) is None
    assert len(reads.begun) == 1
    assert reads.begun[0].daemon
    reads.end()


def test_readers_that_come_at_once_leave_few_threads_behind(
    database: Database, drive: Drive, files: ResultFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "OPEN_S", 0.5)
    job = end_job(database)
    files.start()
    written(database, job)
    drive.before_read = reads = Hang()
    found: list[object] = []
    readers = [
        threading.Thread(target=lambda: found.append(files.find(job)))
        for _ in range(result_files.MAX_OPENING + 8)
    ]

    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)

    assert found == [None] * len(readers)
    assert len(reads.begun) <= result_files.MAX_OPENING
    reads.end()


def test_deleting_goes_on_until_the_file_is_gone(
    database: Database, drive: Drive, files: ResultFiles
) -> None:
    job = end_job(database)
    files.start()
    written(database, job)
    drive.failure = DriveError("it does not answer in time")

    with database.write() as session:
        assert store.drop_for_job(session, job.id, utc_now())
    files.wake()

    eventually(lambda: files.trouble, "the trouble")
    assert (state_of(database, job), drive.files()) == (FileState.DELETING, {file_name(job.id, 1)})
    drive.failure = None
    eventually(lambda: row_of(database, job) is None, "the row's end")
    assert not (drive.root / "jobs" / job.id).exists()


def test_dropping_twice_drops_once(database: Database) -> None:
    job = end_job(database)

    with database.write() as session:
        assert store.drop_for_job(session, job.id, utc_now())
        assert not store.drop_for_job(session, job.id, utc_now())


def test_what_is_pending_is_written_after_a_restart(database: Database, drive: Drive) -> None:
    job = end_job(database)
    with database.write() as session:
        session.execute(update(ResultFileRow).values(attempts=3))

    again = ResultFiles(database, drive)
    again.start()

    written(database, job)
    again.stop()


def test_stopping_waits_for_no_drive_that_hangs(database: Database, drive: Drive) -> None:
    files = ResultFiles(database, drive)
    hangs, over = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        over.wait(30)

    drive.before_put = hang
    job = end_job(database)
    files.start()
    assert hangs.wait(10)
    began_s = time.monotonic()

    files.stop()

    assert time.monotonic() - began_s < 5
    assert state_of(database, job) == FileState.PENDING
    over.set()
    files._thread.join(10)


def test_every_state_is_counted(database: Database) -> None:
    end_job(database)
    dropped = end_job(database)
    with database.write() as session:
        store.drop_for_job(session, dropped.id, utc_now())

    with database.read() as session:
        counts = store.count_by_state(session)

    assert counts == {FileState.PENDING: 1, FileState.WRITTEN: 0, FileState.DELETING: 1}


def test_the_lines_are_those_of_the_results(database: Database, drive: Drive, files: ResultFiles) -> None:
    job = end_job(database)
    with database.write() as session:
        session.execute(update(TaskRow).where(TaskRow.position == 0).values(answer="Grüße\n\u2028"))

    files.start()
    written(database, job)

    lines = gzip.decompress((drive.root / file_name(job.id, 1)).read_bytes()).decode().split("\n")
    assert json.loads(lines[0]) == {
        "id": "t0",
        "result": "Grüße\n\u2028",
        "error": None,
        "finish_reason": "stop",
    }
    assert lines[2:] == [""]
    with database.read() as session:
        assert session.scalar(select(JobRow.status)) == JobStatus.SUCCEEDED
