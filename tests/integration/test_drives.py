"""Drives under the real service: each kind by the same tests, emulated where it is a cloud; and a drive that fails."""

import base64
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from config import DriveSettings
from gpt_worker.drives import address_of
from tests import emulators
from tests.receiver import Receiver, verified
from tests.servers import query
from tests.service import ROOT, Service, free_port
from tests.upstream import Fault, FaultKind, Upstream

Start = Callable[..., tuple[Service, Upstream]]
BUCKET = "results"
SHUTDOWN_S = 30.0
# Done by a process of its own: drivers warn of much, and warnings are errors here.
DO = """
import base64, json, os, sys
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
from fsspec.core import url_to_fs
verb, url, options = json.loads(sys.argv[1])
fs, root = url_to_fs(url, **options)
if verb == "make":
    fs.mkdir(root)
else:
    files = fs.find(root)
    print(json.dumps({f[len(root):].strip("/"): base64.b64encode(fs.cat_file(f)).decode() for f in files}))
"""


@dataclass
class Disk:
    """A drive: the settings of a service that has it, and a look at its files from outside of the service."""

    name: str
    env: dict[str, str]
    folder: Path | None = None

    def files(self) -> dict[str, bytes] | None:
        """Every file by its name; None where no other process can look."""
        if self.folder is not None:
            found = (path for path in self.folder.rglob("*") if path.is_file())
            return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}
        if self.name == "memory":
            return None
        return {name: base64.b64decode(text) for name, text in json.loads(self._do("list")).items()}

    def make_bucket(self) -> None:
        self._do("make")

    def _do(self, verb: str) -> str:
        values = {name: value for name, value in self.env.items() if name != "DRIVE_DISK"}
        url, options = address_of(DriveSettings(self.env["DRIVE_DISK"], values))
        command = [sys.executable, "-c", DO, json.dumps([verb, url, options])]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def cloud(name: str, url: str, bucket: str = BUCKET) -> Disk:
    match name:
        case "s3":
            env = {"S3_BUCKET": bucket, "S3_KEY": "key-of-tests", "S3_SECRET": "secret-of-tests"}
            env |= {"S3_REGION": "eu-central-1", "S3_ENDPOINT": url}
        case "google-cloud":
            env = {"GCS_BUCKET": bucket, "GCS_ENDPOINT": url}
        case _:
            env = {"AZURE_CONTAINER": bucket, "AZURE_CONNECTION_STRING": emulators.azure_connection(url)}
    return Disk(name, {"DRIVE_DISK": name, **env})


EMULATORS = {"s3": emulators.s3, "google-cloud": emulators.google_cloud, "azure": emulators.azure}
CLOUDS = [pytest.param(name, marks=pytest.mark.services) for name in EMULATORS]


@pytest.fixture(scope="module", params=["local", "memory", "file", *CLOUDS])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    match request.param:
        case "local":
            yield Disk("local", {}, tmp_path_factory.mktemp("local") / "data" / "drive")
        case "memory":
            yield Disk("memory", {"DRIVE_DISK": "custom", "DRIVE_URL": "memory://results"})
        case "file":
            folder = tmp_path_factory.mktemp("elsewhere") / "my results"
            url = f"file://{str(folder).replace(' ', '%20')}"
            yield Disk("file", {"DRIVE_DISK": "custom", "DRIVE_URL": url}, folder)
        case name:
            with EMULATORS[name]() as url:
                found = cloud(name, url)
                found.make_bucket()
                yield found


@pytest.fixture(scope="module")
def hook() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def stored(
    disk: Disk, hook: Receiver, shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service with this drive."""
    home = disk.folder.parents[1] if disk.name == "local" and disk.folder else tmp_path_factory.mktemp("home")
    env = {**disk.env, "REQUEST_API": hook.url}
    with Service(home, env, shared_upstream) as service:
        yield service


def count(service: Service, metric: str) -> int:
    lines = service.get("/metrics", service.admin).text.splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith(f"gpt_worker_{metric} "))))


def files(service: Service, state: str) -> int:
    return count(service, f'result_files{{state="{state}"}}')


def wait_written(service: Service, count: int) -> None:
    service.wait_until(lambda: (files(service, "written"), files(service, "pending")) == (count, 0))


def degraded(service: Service) -> list[str]:
    reply = service.get("/readyz")
    assert reply.status_code == 200, reply.text
    found: list[str] = reply.json()["degraded"]
    return found


def warnings(service: Service) -> list[str]:
    """What the log says of drives, as a warning or worse."""
    lines = service.stderr().splitlines()
    return [line for line in lines if "drive" in line and (" WARNING " in line or " ERROR " in line)]


# Every drive, by the same tests


def test_a_run_becomes_a_file_that_its_link_gives_and_a_purge_deletes(
    disk: Disk, stored: Service, hook: Receiver
) -> None:
    data = {f"id {number}": f"{number} " + "say this and that " * 60 for number in range(500)}
    job_id = stored.submit(data, {"delivery": "webhook"}).json()["id"]
    received = hook.wait_for(len(hook.received()) + 1, 30)[-1]
    told = verified(received, stored.get("/webhooks/secret", stored.admin).json()["secret"])["data"]
    wait_written(stored, 1)
    assert degraded(stored) == []

    parts = urlsplit(told["results_url"])
    path = f"{parts.path}?{parts.query}"
    packed = stored.get(path)
    plain = stored.get(path, headers={"Accept-Encoding": "identity"})

    assert packed.headers["Content-Encoding"] == "gzip"
    assert int(packed.headers["Content-Length"]) > 0, "it is not the file"
    assert "Content-Encoding" not in plain.headers
    assert plain.headers["Content-Type"] == packed.headers["Content-Type"] == "application/jsonl"
    assert packed.content == plain.content
    assert hashlib.sha256(plain.content).hexdigest() == told["results_sha256"]
    lines = [json.loads(line) for line in plain.content.decode().splitlines()]
    assert {line["id"]: line["result"] for line in lines} == {
        id_: f"answer to: {text}" for id_, text in data.items()
    }
    name = f"jobs/{job_id}/results-1.jsonl.gz"
    found = disk.files()
    if found is not None:
        assert set(found) == {name}
        assert gzip.decompress(found[name]) == plain.content
    assert stored.delete(f"/jobs/{job_id}?purge=true", stored.admin).status_code == 204
    stored.wait_until(lambda: files(stored, "written") + files(stored, "deleting") == 0)
    assert disk.files() in ({}, None)
    assert warnings(stored) == []


def test_a_retry_makes_a_file_of_its_own(disk: Disk, stored: Service, shared_upstream: Upstream) -> None:
    refusal = Fault(kind=FaultKind.STATUS, status=400, code="bad", contains="odd", times=None)
    shared_upstream.add_fault(refusal)
    job_id = stored.submit({"a": "even", "b": "odd"}).json()["id"]
    wait_written(stored, 1)
    shared_upstream.clear_faults()

    assert stored.post(f"/jobs/{job_id}/retry", stored.admin).status_code == 202

    stored.wait_finished(job_id)
    wait_written(stored, 2)
    reply = stored.get(f"/jobs/{job_id}/results?format=jsonl", stored.admin)
    assert "Content-Length" in reply.headers, "it is not the file"
    assert [json.loads(line)["result"] for line in reply.text.splitlines()] == [
        "answer to: even",
        "answer to: odd",
    ]
    found = disk.files()
    if found is not None:
        assert set(found) == {f"jobs/{job_id}/results-{run}.jsonl.gz" for run in (1, 2)}
        first = gzip.decompress(found[f"jobs/{job_id}/results-1.jsonl.gz"]).decode().splitlines()
        assert [json.loads(line)["result"] for line in first] == ["answer to: even", None]
        assert gzip.decompress(found[f"jobs/{job_id}/results-2.jsonl.gz"]) == reply.content
    stored.delete(f"/jobs/{job_id}?purge=true", stored.admin)
    stored.wait_until(lambda: files(stored, "written") + files(stored, "deleting") == 0)
    assert disk.files() in ({}, None)


def test_other_forms_and_unfinished_jobs_come_from_the_database(disk: Disk, stored: Service) -> None:
    job_id = stored.submit({"a": "one"}).json()["id"]
    wait_written(stored, 1)

    for form in ("json", "csv"):
        reply = stored.get(f"/jobs/{job_id}/results?format={form}", stored.admin)
        assert (reply.status_code, "Content-Length" in reply.headers) == (200, False)
        assert "answer to: one" in reply.text
    stored.delete(f"/jobs/{job_id}?purge=true", stored.admin)
    stored.wait_until(lambda: files(stored, "written") + files(stored, "deleting") == 0)


# Clouds that fail


@pytest.mark.parametrize("name", CLOUDS)
def test_a_bucket_that_is_missing_is_told_and_used_once_it_is_there(start: Start, name: str) -> None:
    with EMULATORS[name]() as url:
        disk = cloud(name, url, "missing-one")
        service, _ = start(env=disk.env)
        kind = "container" if name == "azure" else "bucket"
        service.wait_until(lambda: degraded(service) == [f"drive: there is no such {kind}"])
        job_id = service.submit({"a": "one"}).json()["id"]
        assert service.get(f"/jobs/{job_id}/results?format=jsonl", service.admin).status_code == 200
        assert len(warnings(service)) == 1

        disk.make_bucket()

        wait_written(service, 1)
        assert degraded(service) == []
        assert set(disk.files() or {}) == {f"jobs/{job_id}/results-1.jsonl.gz"}
        assert_says_no_secret(service, disk)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_that_refuses_access_is_told_in_one_line(start: Start, name: str) -> None:
    with emulators.refusing() as url:
        disk = cloud(name, url)
        service, _ = start(env=disk.env)

        service.wait_until(lambda: degraded(service) == ["drive: it refuses access"])

        assert service.submit({"a": "one"}).json()["status"] == "succeeded"
        assert len(warnings(service)) == 1
        assert_says_no_secret(service, disk)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_that_hangs_holds_up_neither_jobs_nor_the_shutdown(start: Start, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        service, _ = start(env=cloud(name, f"http://127.0.0.1:{silent.getsockname()[1]}").env)

        assert_nobody_waits(service)


def assert_says_no_secret(service: Service, disk: Disk) -> None:
    assert "Traceback" not in service.stderr()
    for setting in ("S3_KEY", "S3_SECRET", "AZURE_CONNECTION_STRING"):
        assert setting not in disk.env or disk.env[setting] not in service.stderr()
    assert emulators.AZURITE_KEY not in service.stderr()


def assert_nobody_waits(service: Service) -> None:
    began_s = time.monotonic()
    job = service.submit({"a": "one"}).json()
    assert service.get(f"/jobs/{job['id']}/results?format=jsonl", service.admin).text.count("\n") == 1
    assert time.monotonic() - began_s < 10
    began_s = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - began_s < SHUTDOWN_S
    assert query(service, "SELECT state FROM result_files") == [("pending",)]


def test_a_drive_that_hangs_holds_up_neither_jobs_nor_the_shutdown(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ftp://me:hunter2hunter2@127.0.0.1:{silent.getsockname()[1]}/results"
        service, _ = start(env={"DRIVE_DISK": "custom", "DRIVE_URL": url})

        assert_nobody_waits(service)
    assert "hunter2hunter2" not in service.stderr()


def test_no_reader_waits_for_a_drive_that_accepts_and_never_answers(start: Start) -> None:
    service, _ = start()
    job_id = service.submit({"a": "one"}).json()["id"]
    wait_written(service, 1)
    assert service.terminate() == 0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ftp://127.0.0.1:{silent.getsockname()[1]}/results"
        service.change_env({"DRIVE_DISK": "custom", "DRIVE_URL": url})
        service.start()
        began_s = time.monotonic()

        reply = service.get(f"/jobs/{job_id}/results?format=jsonl", service.admin)

        assert time.monotonic() - began_s < 5
        assert json.loads(reply.text)["result"] == "answer to: one"


def test_a_drive_where_nothing_answers_is_told_by_its_address_in_the_log_alone(start: Start) -> None:
    port = free_port()
    url = f"ftp://me:hunter2hunter2@127.0.0.1:{port}/hunter2?hunter2"
    service, _ = start(env={"DRIVE_DISK": "custom", "DRIVE_URL": url})

    service.wait_until(lambda: degraded(service) == ["drive: nothing answers at its address"])

    (said,) = warnings(service)
    assert f"the drive (custom at 127.0.0.1:{port}) can't be used: nothing answers at its address" in said
    assert "(look at DRIVE_URL)" in said
    assert "hunter2" not in service.stderr()


# The local drive


def drive_of(service: Service) -> Path:
    return service.data_dir / "drive"


def test_a_drive_that_can_not_be_written_is_told_and_written_to_once_it_can(start: Start) -> None:
    service, _ = start()
    shutil.rmtree(drive_of(service), ignore_errors=True)
    drive_of(service).write_text("a file where the drive should be")

    jobs = [service.submit({"a": f"text {number}"}).json() for number in range(3)]

    assert {job["status"] for job in jobs} == {"succeeded"}
    service.wait_until(lambda: degraded(service) != [])
    assert degraded(service)[0].startswith("drive: ")
    assert files(service, "pending") == 3
    assert count(service, "drive_failures_total") > 0
    assert count(service, "drive_healthy") == 0
    assert service.get(f"/jobs/{jobs[0]['id']}/results?format=jsonl", service.admin).status_code == 200
    drive_of(service).unlink()
    wait_written(service, 3)
    assert degraded(service) == []
    assert len(warnings(service)) == 1
    assert "Traceback" not in service.stderr()
    assert len(list(drive_of(service).rglob("results-1.jsonl.gz"))) == 3


def test_kill_9_between_the_end_of_a_job_and_its_file_loses_neither(start: Start) -> None:
    service, _ = start()
    shutil.rmtree(drive_of(service), ignore_errors=True)
    drive_of(service).write_text("a file where the drive should be")
    job_id = service.submit({"a": "hello"}).json()["id"]
    service.kill()
    assert query(service, "SELECT job_id, state FROM result_files") == [(job_id, "pending")]
    drive_of(service).unlink()

    service.start()

    wait_written(service, 1)
    content = gzip.decompress((drive_of(service) / f"jobs/{job_id}/results-1.jsonl.gz").read_bytes())
    assert json.loads(content)["result"] == "answer to: hello"


def test_kill_9_between_a_file_and_the_note_of_it_loses_neither(start: Start, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(ROOT / "chaos" / "failing"), "CHAOS_LOG": str(tmp_path / "points")}
    service, _ = start(env=env)
    assert service.submit({"a": "find the points"}).json()["status"] == "succeeded"
    wait_written(service, 1)
    passed = (tmp_path / "points").read_text().splitlines()
    (deadly,) = {found for found in passed if found.startswith("before commit result_files")}
    admin = service.admin
    service.kill()
    service.change_env({"CHAOS_POINT": deadly, "CHAOS_LOG": None})
    service.start()
    with contextlib.suppress(OSError):  # the reply that the death took along
        service.submit({"a": "hello"}, token=admin, prefer="respond-async")
    service.wait_exit()
    owed = "SELECT job_id, run FROM result_files WHERE state = 'pending'"
    assert len(query(service, owed)) == 1
    (job_id, run) = query(service, owed)[0]

    service.change_env({"CHAOS_POINT": None, "PYTHONPATH": None})
    service.start()

    wait_written(service, 2)
    content = gzip.decompress((drive_of(service) / f"jobs/{job_id}/results-{run}.jsonl.gz").read_bytes())
    assert json.loads(content)["result"] == "answer to: hello"


def change_database(service: Service, *statements: str) -> None:
    """Kills the service, and does this to what it leaves behind."""
    service.kill()
    (path,) = service.data_dir.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def test_the_link_gives_the_file_and_the_database_when_that_is_lost(start: Start) -> None:
    service, _ = start()
    job_id = service.submit({"a": "one"}).json()["id"]
    wait_written(service, 1)
    change_database(service, "UPDATE tasks SET answer = 'of the database'")
    service.start()

    def result() -> Any:
        text = service.get(f"/jobs/{job_id}/results?format=jsonl", service.admin).text
        return json.loads(text)["result"]

    # Until the drive has answered, the database does.
    service.wait_until(lambda: result() == "answer to: one")
    next(drive_of(service).rglob("results-1.jsonl.gz")).unlink()
    assert result() == "of the database"
    service.wait_until(lambda: bool(list(drive_of(service).rglob("results-1.jsonl.gz"))))


def test_retention_deletes_files_and_folders(start: Start) -> None:
    service, _ = start(env={"RETAIN_DAYS": "1"})
    old = service.submit({"a": "old"}).json()["id"]
    new = service.submit({"a": "new"}).json()["id"]
    wait_written(service, 2)
    service.kill()
    (path,) = service.data_dir.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE jobs SET finished_at = '2020-01-01 00:00:00.000000' WHERE id = ?", (old,))
        database.commit()

    service.start()

    service.wait_until(lambda: not (drive_of(service) / "jobs" / old).exists())
    service.wait_until(lambda: query(service, "SELECT job_id FROM result_files") == [(new,)])
    assert (drive_of(service) / "jobs" / new / "results-1.jsonl.gz").is_file()


def test_files_and_folders_are_their_owners_alone_whatever_the_umask(start: Start) -> None:
    before = os.umask(0)
    try:
        service, _ = start()
        service.submit({"a": "one"})
        wait_written(service, 1)
    finally:
        os.umask(before)

    modes = {stat.S_IMODE(path.stat().st_mode) for path in drive_of(service).rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in drive_of(service).rglob("*") if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})


def test_a_driver_that_is_not_installed_is_refused_in_one_line(tmp_path: Path, upstream: Upstream) -> None:
    env = {"DRIVE_DISK": "custom", "DRIVE_URL": "sftp://me:hunter2hunter2@127.0.0.1/results"}

    status, stderr = Service(tmp_path, upstream=upstream).run_once(env)

    assert status == 2
    assert stderr.startswith("gpt-worker: DRIVE_URL: the driver of sftp is not installed")
    assert stderr.count("\n") == 1
    assert "hunter2" not in stderr


def test_a_table_of_files_comes_to_a_database_that_has_none(start: Start) -> None:
    service, _ = start()
    earlier = service.submit({"a": "earlier"}).json()["id"]
    wait_written(service, 1)
    change_database(
        service,
        "DROP TABLE result_files",
        "DROP TABLE owners",
        "DROP INDEX ix_jobs_owner_status",
        "UPDATE alembic_version SET version_num = '0002'",
    )

    service.start()

    assert "answer to: earlier" in service.get(f"/jobs/{earlier}/results?format=jsonl", service.admin).text
    service.submit({"a": "later"})
    wait_written(service, 1)
