"""A disk that is full, a database that is locked, read-only, damaged or gone, under the real service.

Nothing accepted is lost, nothing is paid for in vain, and the service goes on by itself when it can. The faults are
real: a file system without room, another program's lock, modes, overwritten pages. None is made in our own code.
"""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.service import ROOT
from tests.stand import KEYS, Stand, assert_refused
from tests.upstream import Upstream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="the faults are made by Linux's means"),
]

DATABASE = "gpt-worker.sqlite3"
ROOM_BYTES = 272 << 20  # of a small file system: 200 MiB must be free for work to be accepted
LIMIT_BYTES = 64 << 10  # of a file, beyond which the kernel refuses a write


class FileStand(Stand):
    """A service started through a prefix such as `unshare`."""

    def __init__(self, tmp_path: Path, upstream: Upstream, prefix: Sequence[str] = ()) -> None:
        super().__init__(tmp_path, upstream)
        self._prefix = prefix

    def launch(self) -> None:
        with self._output_path.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "gunicorn", "wsgi:app"],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def begun(self) -> "FileStand":
        self.begin()
        return self

    @property
    def seen_dir(self) -> Path:
        """DATA_DIR as the service itself sees it."""
        return Path(f"/proc/{self.pid}/root{self.data_dir}")

    @property
    def database(self) -> Path:
        return self.data_dir / DATABASE

    @property
    def log_of_writes(self) -> Path:
        return self.data_dir / f"{DATABASE}-wal"

    @property
    def worker(self) -> int:
        """The process that serves."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(child)

    def wait_until_nothing_is_sent(self) -> None:
        self.wait_until(lambda: "database" in (self._waiting() or {}).get("reason", ""), 20)
        super().wait_until_nothing_is_sent()

    def _waiting(self) -> dict[str, Any] | None:
        waiting: dict[str, Any] | None = self.job(self.job_id, results=False)["waiting"]
        return waiting

    def assert_only_reads_go_on(self) -> None:
        """Submits are refused as problems, what is stored is told, and no new call is made."""
        asked = len(self.upstream.calls())
        for key in ("one", "two"):
            assert_refused(self.submit(["more"], idempotency_key=key, prefer="respond-async"))
            assert_refused(self.submit(["more"]))
            assert self.job(self.earlier["id"]) == self.earlier
            jsonl = self.get(f"/jobs/{self.job_id}/results?format=jsonl", self.admin)
            assert (jsonl.status_code, jsonl.text.count("\n") > 0) == (200, True)
            assert len(self.get("/jobs", self.admin).json()["data"]) == 2
            assert self.get("/healthz").status_code == 200
            assert self.get("/metrics").status_code == 200
        assert len(self.upstream.calls()) == asked

    def assert_goes_on_and_ends(self) -> None:
        """By itself: everything that was accepted is answered, and nothing was asked twice."""
        self.assert_ends_as_if_nothing_had_been()
        assert self.submit(["more"], idempotency_key="one").status_code == 200
        assert_whole(self.seen_dir / DATABASE)
        assert self.terminate() == 0
        assert "Traceback" not in self.stderr()


def assert_whole(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(KEYS) as upstream:
        yield upstream


@pytest.fixture
def start(tmp_path: Path, upstream: Upstream) -> Iterator[Callable[..., FileStand]]:
    """Makes the test's service, which is not started yet; it ends with the test."""
    made: list[FileStand] = []

    def make(prefix: Sequence[str] = ()) -> FileStand:
        made.append(FileStand(tmp_path, upstream, prefix))
        return made[0]

    yield make
    for stand in made:
        stand.kill()


# A full disk


@dataclass
class Room:
    """How a service's disk is filled, and emptied again."""

    prefix: Sequence[str]
    fill: Callable[[FileStand], None]
    empty: Callable[[FileStand], None]


def limit_files(stand: FileStand) -> None:
    _, hard = resource.prlimit(stand.worker, resource.RLIMIT_FSIZE)
    resource.prlimit(stand.worker, resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))


def unlimit_files(stand: FileStand) -> None:
    _, hard = resource.prlimit(stand.worker, resource.RLIMIT_FSIZE)
    resource.prlimit(stand.worker, resource.RLIMIT_FSIZE, (hard, hard))


def fill_disk(stand: FileStand) -> None:
    with (stand.seen_dir / "ballast").open("wb") as file:
        length = 0
        for step in (1 << 20, 4096):
            with suppress(OSError):  # no room for such a step
                while True:
                    os.posix_fallocate(file.fileno(), length, step)
                    length += step


def empty_disk(stand: FileStand) -> None:
    (stand.seen_dir / "ballast").unlink()


def own_disk() -> Room:
    """A tmpfs over DATA_DIR that the service alone sees; without root by a user namespace."""
    mount = f'mount -t tmpfs -o size={ROOM_BYTES} tmpfs "$DATA_DIR" && exec "$@"'
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        prefix = [*unshare, "sh", "-c", mount, "sh"]
        if shutil.which("unshare") and succeeds([*prefix, "true"], DATA_DIR="/mnt"):
            return Room(prefix, fill_disk, empty_disk)
    pytest.skip(
        "neither root nor a user namespace may mount a tmpfs here; the other way to fill a disk is tested"
    )


def succeeds(command: Sequence[str], **env: str) -> bool:
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture(params=["file size limit", "file system"])
def room(request: pytest.FixtureRequest) -> Room:
    return own_disk() if request.param == "file system" else Room((), limit_files, unlimit_files)


def test_a_full_disk_stops_the_sending_and_loses_nothing(start: Callable[..., FileStand], room: Room) -> None:
    stand = start(room.prefix).begun()

    room.fill(stand)

    stand.wait_until_nothing_is_sent()
    assert "database" in stand.readiness()[1]
    stand.assert_only_reads_go_on()
    room.empty(stand)
    stand.assert_goes_on_and_ends()


# A lock


def test_another_programs_lock_fails_nobody_for_good_and_leaves_health_answering(
    start: Callable[..., FileStand],
) -> None:
    stand = start().begun()
    token = stand.admin
    replies: list[requests.Response] = []

    def submit() -> None:
        replies.append(
            requests.post(
                f"{stand.url}/jobs",
                json={"data": ["crowd"]},
                headers={"Authorization": f"Bearer {token}", "Prefer": "respond-async"},
                timeout=60,
            )
        )

    crowd = [threading.Thread(target=submit) for _ in range(140)]
    with closing(sqlite3.connect(stand.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for thread in crowd:
            thread.start()
        assert stand.get("/healthz", timeout=4).status_code == 200
        assert "database" in stand.wait_unready()
        stand.wait_until_nothing_is_sent()
        stand.assert_only_reads_go_on()
        other.execute("ROLLBACK")
    for thread in crowd:
        thread.join()

    assert {reply.status_code for reply in replies} <= {202, 503}
    assert all(reply.ok or reply.headers["Retry-After"] for reply in replies)
    stand.assert_goes_on_and_ends()


# What fails half-way

MANY = 100_000


@contextmanager
def locked(stand: FileStand) -> Iterator[None]:
    with closing(sqlite3.connect(stand.database, isolation_level=None, timeout=0.0)) as other:
        while not other.in_transaction:  # at once, between two commits: SQLite's own wait would come too late
            with suppress(sqlite3.OperationalError):
                other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def full(stand: FileStand) -> Iterator[None]:
    limit_files(stand)
    yield
    unlimit_files(stand)


def ask(stand: FileStand, statement: str) -> Any:
    """The one value that the statement gives."""
    with closing(sqlite3.connect(stand.database, timeout=30.0)) as other:
        ((value,),) = other.execute(statement).fetchall()
    return value


def in_the_background(send: Callable[[], requests.Response]) -> Callable[[], requests.Response]:
    """Waits for the reply to a request that is sent meanwhile."""
    replies: list[requests.Response] = []
    thread = threading.Thread(target=lambda: replies.append(send()))
    thread.start()

    def reply() -> requests.Response:
        thread.join()
        return replies[0]

    return reply


@pytest.mark.parametrize("trouble", [locked, full])
def test_submit_that_fails_half_way_frees_its_key_and_its_rows_when_the_database_works_again(
    start: Callable[..., FileStand], trouble: Callable[[FileStand], AbstractContextManager[None]]
) -> None:
    stand = start()
    stand.start()
    token = stand.admin
    half = "SELECT count(*) FROM jobs WHERE status = 'receiving'"

    def submit(data: list[str]) -> requests.Response:
        return stand.submit(data, token=token, idempotency_key="once", prefer="respond-async")

    reply = in_the_background(lambda: submit(["x" * 50] * MANY))
    stand.wait_until(lambda: ask(stand, half) == 1, 20)

    with trouble(stand):
        assert_refused(reply())
        assert ask(stand, half) == 1
        assert 0 < ask(stand, "SELECT count(*) FROM tasks") < MANY

    stand.wait_until(lambda: submit(["more"]).status_code == 202, 20)
    stand.wait_until(lambda: ask(stand, "SELECT count(*) FROM jobs") == 1, 20)
    assert ask(stand, "SELECT count(*) FROM tasks") == 1
    assert stand.stderr().count("cleaning up failed") <= 1
    assert "Traceback" not in stand.stderr()


@pytest.mark.parametrize("trouble", [locked, full])
def test_retry_that_fails_half_way_goes_on_when_the_database_works_again(
    start: Callable[..., FileStand], trouble: Callable[[FileStand], AbstractContextManager[None]]
) -> None:
    stand = start()
    for key in stand.upstream.keys:
        stand.upstream.set_key(key, missing_models=("gpt-none",))
    stand.start()
    token = stand.admin
    settings = {"model": "gpt-none"}
    job_id = stand.submit(["x" * 50] * MANY, settings, prefer="respond-async").json()["id"]
    assert stand.wait_finished(job_id)["counts"]["failed"] == MANY
    reply = in_the_background(lambda: stand.post(f"/jobs/{job_id}/retry", token))
    stand.wait_until(lambda: ask(stand, "SELECT run FROM jobs") == 2, 20)

    with trouble(stand):
        assert_refused(reply())
        half = stand.job(job_id, results=False)
        assert (half["run"], half["status"]) == (2, "queued")
        assert 0 < half["counts"]["pending"] < MANY

    job = stand.wait_finished(job_id)
    assert (job["run"], job["counts"]["failed"]) == (2, MANY)
    assert "Traceback" not in stand.stderr()


# Modes


def without_override() -> Sequence[str]:
    """What makes modes count for root too."""
    if os.geteuid():
        return ()
    caps = "-dac_override,-dac_read_search"
    prefix = ("setpriv", "--bounding-set", caps, "--inh-caps", caps)
    if not (shutil.which("setpriv") and succeeds([*prefix, "true"])):
        pytest.skip(
            "root's override of modes can't be dropped here: run it as another user, or install setpriv"
        )
    return prefix


@pytest.mark.parametrize(("place", "mode"), [(DATABASE, 0o400), (".", 0o500)])
def test_a_database_that_cannot_be_written_is_refused_in_one_line(
    start: Callable[..., FileStand], place: str, mode: int
) -> None:
    stand = start(without_override())
    stand.start()
    stand.terminate()
    path = stand.data_dir / place
    usual = path.stat().st_mode

    path.chmod(mode)
    try:
        line = stand.refusal()
    finally:
        path.chmod(usual)

    assert "writable" in line
    stand.start()
    assert stand.submit(["hello"]).json()["status"] == "succeeded"


def test_connections_that_are_opened_while_the_file_is_read_only_do_not_stay_so(
    start: Callable[..., FileStand],
) -> None:
    stand = start(without_override()).begun()
    token = stand.admin
    replies: list[requests.Response] = []

    def submit() -> None:
        replies.append(stand.submit(["crowd"], token=token, prefer="respond-async"))

    def crowd() -> list[int]:
        replies.clear()
        threads = [threading.Thread(target=submit) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [reply.status_code for reply in replies]

    stand.database.chmod(0o400)
    during = crowd()
    stand.database.chmod(0o600)

    assert set(during) <= {202, 503}
    stand.wait_until(lambda: stand.readiness()[0] == 200)
    assert crowd() == [202] * 40
    stand.assert_goes_on_and_ends()


# Damage


def overwrite(path: Path, first_byte: int) -> None:
    """All from this byte on becomes nonsense; the file keeps its length."""
    with path.open("r+b") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(first_byte)
        file.write(b"\xa5" * (length - first_byte))


def test_damage_that_a_start_meets_is_one_plain_line(start: Callable[..., FileStand]) -> None:
    stand = start()
    stand.start()
    assert stand.submit(["hello"]).ok
    stand.terminate()
    overwrite(stand.database, 4096)

    line = stand.refusal()

    assert f"{stand.database} is damaged" in line


@pytest.mark.parametrize("what", ["pages", "log of writes"])
def test_damage_under_a_running_service_is_told_and_no_restart_hides_it(
    start: Callable[..., FileStand], what: str
) -> None:
    stand = start().begun()
    token, worker = stand.admin, stand.worker
    if what == "pages":
        with closing(sqlite3.connect(stand.database)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        overwrite(stand.database, 4096)
    else:
        overwrite(stand.log_of_writes, 32)

    stand.wait_until(lambda: stand.get("/jobs", token).status_code == 503)

    job = f"/jobs/{stand.job_id}"
    paths = ("/jobs", job, f"{job}/results?format=jsonl", "/deliveries", "/me", "/settings")
    assert {stand.get(path, token).status_code for path in paths} <= {200, 503}
    assert_refused(stand.submit(["more"], token=token))
    assert "database" in stand.wait_unready()
    assert stand.get("/healthz").status_code == 200
    assert stand.worker == worker
    for _ in range(3):
        assert stand.get("/metrics").status_code == 200
    assert stand.stderr().count("is damaged: put the backup back") == 1
    assert stand.stderr().count("can't be read for the metrics") <= 1
    assert "Traceback" not in stand.stderr()
    assert stand.terminate() == 0
    if what == "pages":
        assert "is damaged" in stand.refusal()


def test_a_damaged_end_of_the_log_of_writes_costs_no_more_than_that(start: Callable[..., FileStand]) -> None:
    stand = start().begun()
    stand.kill()
    length = stand.log_of_writes.stat().st_size
    assert length < 1000 * 4096, "some of it is in the database already"
    overwrite(stand.log_of_writes, length - 2 * 4096)

    stand.start()

    assert stand.wait_finished(stand.job_id)["status"] == "succeeded"
    assert stand.job(stand.job_id)["results"] == stand.answers
    assert_whole(stand.database)
    assert stand.terminate() == 0


# A DATA_DIR that is gone


def test_a_moved_data_dir_stops_the_work_until_it_is_back(
    start: Callable[..., FileStand], tmp_path: Path
) -> None:
    stand = start().begun()

    stand.data_dir.rename(tmp_path / "elsewhere")

    assert "database" in stand.wait_unready()
    stand.wait_until_nothing_is_sent()
    stand.assert_only_reads_go_on()
    assert not stand.data_dir.exists()
    (tmp_path / "elsewhere").rename(stand.data_dir)
    stand.assert_goes_on_and_ends()


def test_a_deleted_data_dir_takes_nothing_more_in_and_is_not_made_anew(
    start: Callable[..., FileStand],
) -> None:
    stand = start().begun()
    token = stand.admin

    shutil.rmtree(stand.data_dir)

    assert "database" in stand.wait_unready()
    assert_refused(stand.submit(["more"], token=token))
    stand.data_dir.mkdir()
    for _ in range(3):
        assert_refused(stand.submit(["more"], token=token))
    assert list(stand.data_dir.iterdir()) == []
    assert stand.terminate() == 0
    assert "Traceback" not in stand.stderr()
