"""`flask --app wsgi backup`: a whole copy while the service works, what is restored from it, and what is refused."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpt_worker.backup import BackupError, copy_database
from tests.receiver import Receiver, verified
from tests.service import ADMIN_EMAIL, APP_KEY, ROOT, Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

Start = Callable[..., tuple[Service, Upstream]]
DATABASE = "gpt-worker.sqlite3"


def run_backup(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as an operator types it."""
    return run_flask(env, "backup", *arguments)


def run_flask(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", *map(str, arguments)],
        cwd=ROOT,
        env={**env, "FLASK_SKIP_DOTENV": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def offline_env(data_dir: Path) -> dict[str, str]:
    keys = {"GPT_KEY_0": "sk-0", "GPT_KEY_1": "sk-1"}
    return {
        "PATH": os.environ["PATH"],
        "NODE_ENV": "test",
        "APP_KEY": APP_KEY,
        "DATA_DIR": str(data_dir),
        **keys,
    }


def make_database(directory: Path, size_bytes: int = 1 << 20) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / DATABASE
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
        database.executemany("INSERT INTO rows (text) VALUES (?)", [("x" * 1000,)] * (size_bytes // 1000))
    return path


def integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Load:
    """Small jobs, one after the other, for as long as the block lasts."""

    def __init__(self, service: Service, token: str) -> None:
        self.finished: list[dict[str, Any]] = []
        self._service = service
        self._token = token
        self._stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            number = len(self.finished)
            job = self._service.submit(
                {"a": f"small {number} a", "b": f"small {number} b"}, token=self._token
            )
            self.finished.append(job.json())


@pytest.mark.slow
def test_a_copy_made_under_load_is_restored_with_every_answer_and_webhook(
    start: Start, receiver: Receiver, tmp_path: Path
) -> None:
    keys = {f"sk-backup-{number}": KeyRules(latency_s=0.05) for number in range(2)}
    service, upstream = start(keys, {"REQUEST_API": receiver.url, "GPT_THREADS_PER_KEY": "4"})
    upstream.add_fault(Fault(kind=FaultKind.HANG, contains="task 599", times=None))
    user = service.user("ada@example.org")
    secret = service.get("/webhooks/secret", service.admin).json()["secret"]
    receiver.script(500)
    owed = service.submit(["owed"], {"delivery": "webhook"}, user).json()["id"]
    receiver.wait_for(1)
    data = {f"id {number}": f"task {number}" for number in range(600)}
    going_on = service.submit(data, {"delivery": "webhook"}, user).json()["id"]
    upstream.wait_for_calls(20)
    load = Load(service, user)
    copies = tmp_path / "copies"
    copies.mkdir()

    with load.running():
        service.wait_until(lambda: len(load.finished) >= 3)
        before = list(load.finished)
        done = run_backup(service.env, copies / "jobs.sqlite3")
        meanwhile = len(load.finished) - len(before)

    assert (done.returncode, done.stderr) == (0, "")
    assert meanwhile > 0
    service.kill()
    upstream.clear_faults()
    upstream.release()
    assert files_in(copies) == ["jobs.sqlite3"]
    assert (copies / "jobs.sqlite3").stat().st_mode & 0o777 == 0o600
    assert integrity(copies / "jobs.sqlite3") == "ok"
    with Receiver() as another:
        restored = Service(tmp_path / "restored", {"REQUEST_API": another.url}, upstream)
        shutil.copy(copies / "jobs.sqlite3", restored.data_dir / DATABASE)
        with restored:
            assert restored.get("/me", user).json()["email"] == "ada@example.org"
            assert restored.login("ada@example.org")
            assert restored.login(ADMIN_EMAIL)
            for job in before:
                assert restored.job(job["id"], user) == job
            assert restored.wait_finished(going_on, token=user)["status"] == "succeeded"
            results = restored.job(going_on, user)["results"]
            # Where a webhook goes is decided when it is owed.
            delivered = [*receiver.wait_for(2)[1:], *another.wait_for(1)]
            restored.terminate()
        assert results == {id_: f"answer to: {text}" for id_, text in data.items()}
        assert {verified(webhook, secret)["data"]["id"] for webhook in delivered} == {owed, going_on}
        assert integrity(restored.data_dir / DATABASE) == "ok"


# What is refused


def test_each_refusal_is_one_plain_line_and_exit_status_2(tmp_path: Path) -> None:
    make_database(tmp_path / "data")
    (tmp_path / "there").write_text("precious")

    exists = run_backup(offline_env(tmp_path / "data"), tmp_path / "there")
    absent = run_backup(offline_env(tmp_path / "none"), tmp_path / "copy")

    for done, word in ((exists, "--force"), (absent, "there is no database")):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("gpt-worker: ")
        assert done.stderr.count("\n") == 1
        assert word in done.stderr
    assert (tmp_path / "there").read_text() == "precious"
    assert files_in(tmp_path) == ["data", "there"], "DATA_DIR was made"


@pytest.mark.parametrize(
    "arguments", [["backup", "copy"], ["db", "current"], ["--help"]], ids=["backup", "db", "help"]
)
def test_a_bad_setting_is_one_line_and_exit_status_2_for_every_command(
    tmp_path: Path, arguments: list[str]
) -> None:
    done = run_flask({**offline_env(tmp_path / "data"), "PORT": "many"}, *arguments)

    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "gpt-worker: PORT must be a whole number from 1 to 65535\n")


def test_a_backup_makes_no_secret(tmp_path: Path) -> None:
    make_database(tmp_path / "data")
    env = {name: value for name, value in offline_env(tmp_path / "data").items() if name != "APP_KEY"}
    absent = {**env, "DATA_DIR": str(tmp_path / "none")}

    made, none = run_backup(env, tmp_path / "copy"), run_backup(absent, tmp_path / "other")

    assert (made.returncode, none.returncode) == (0, 2)
    assert DATABASE in files_in(tmp_path / "data")
    assert "app-key" not in files_in(tmp_path / "data")
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_there_is_replaced_by_force(tmp_path: Path) -> None:
    database = make_database(tmp_path / "data")
    target = tmp_path / "copies" / "there"
    target.parent.mkdir()
    target.write_text("old")

    copy_database(database, target, force=True)

    assert integrity(target) == "ok"
    assert files_in(target.parent) == ["there"]


@pytest.mark.parametrize("name", [DATABASE, f"{DATABASE}-wal", f"{DATABASE}.lock", "link"])
def test_the_database_is_never_replaced_by_its_copy(tmp_path: Path, name: str) -> None:
    database = make_database(tmp_path / "data")
    (tmp_path / "data" / "link").symlink_to(database)

    with pytest.raises(BackupError, match="belongs to the database"):
        copy_database(database, tmp_path / "data" / name, force=True)

    assert integrity(database) == "ok"


@pytest.mark.parametrize("place", ["missing/copy", "file/copy", "folder"])
def test_a_place_that_takes_no_file_is_named(tmp_path: Path, place: str) -> None:
    database = make_database(tmp_path / "data")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    with pytest.raises(BackupError, match=str(tmp_path / place)):
        copy_database(database, tmp_path / place)


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path: Path) -> None:
    database = make_database(tmp_path / "data", 8 << 20)
    copies = tmp_path / "copies"
    copies.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, hard))
    try:
        with pytest.raises(BackupError, match="can't be copied"):
            copy_database(database, copies / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert files_in(copies) == []


def test_a_stop_in_the_middle_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = make_database(tmp_path / "data", 8 << 20)
    copies = tmp_path / "copies"
    copies.mkdir()

    def stop(_duration_s: float) -> None:
        assert files_in(copies) != []
        sys.exit(1)

    monkeypatch.setattr(time, "sleep", stop)  # between two steps
    with pytest.raises(SystemExit):
        copy_database(database, copies / "copy")

    assert files_in(copies) == []


@pytest.mark.parametrize(("first_byte", "byte"), [(100, b"\xa5"), (0, b"\0")], ids=["tables", "head"])
def test_a_database_that_can_not_be_read_is_told_as_at_a_start(
    tmp_path: Path, first_byte: int, byte: bytes
) -> None:
    database = make_database(tmp_path / "data")
    with database.open("r+b") as file:
        file.seek(first_byte)
        file.write(byte * 3000)

    with pytest.raises(BackupError) as refused:
        copy_database(database, tmp_path / "copy")

    assert str(refused.value) == f"the database {database} is damaged: put the backup back"


def test_a_damaged_database_is_not_taken_for_a_backup(tmp_path: Path) -> None:
    database = make_database(tmp_path / "data")
    with database.open("r+b") as file:
        file.seek(40 * 4096)
        file.write(b"\xa5" * 4096)
    copies = tmp_path / "copies"
    copies.mkdir()

    with pytest.raises(BackupError, match="damaged"):
        copy_database(database, copies / "copy")

    assert files_in(copies) == []
