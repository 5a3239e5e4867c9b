"""Drives: a file is there whole or not at all, and what goes wrong is told in words without a secret."""

import errno
import ftplib
import socket
import ssl
import stat
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from config import DriveSettings, Settings, SettingsError
from gpt_worker import drives
from gpt_worker.aside import Aside
from gpt_worker.drive_errors import DriveError, NoFile, explain, primed
from gpt_worker.drives import (
    Drive,
    LocalDrive,
    RemoteDrive,
    address_for_people,
    address_of,
    check_settings,
    hint,
    make_drive,
)
from tests import factories

NAME = "jobs/1/results-1.jsonl.gz"
CONNECTION = "AccountName=me;AccountKey=hunter2==;BlobEndpoint=http://127.0.0.1:10000/me"


def remote(folder: Path) -> RemoteDrive:
    """In memory, as all of fsspec's are used; its files are this process's."""
    return RemoteDrive(DriveSettings("custom", {"DRIVE_URL": f"memory://{folder}"}), folder / "staging")


@pytest.fixture(params=["local", "remote"])
def drive(request: pytest.FixtureRequest, tmp_path: Path) -> Drive:
    return LocalDrive(tmp_path / "drive", "local") if request.param == "local" else remote(tmp_path)


def put(drive: Drive, content: bytes, name: str = NAME) -> int:
    with drive.stage() as file:
        file.write(content)
    return drive.put(name)


def test_a_file_comes_back_as_it_was_put(drive: Drive) -> None:
    content = bytes(range(256)) * 10_000

    size_bytes = put(drive, content)

    assert size_bytes == len(content)
    assert b"".join(drive.read(NAME, size_bytes)) == content


def test_a_file_that_is_put_again_takes_the_place_of_the_first(drive: Drive) -> None:
    put(drive, b"one")
    put(drive, b"another")

    assert b"".join(drive.read(NAME, 7)) == b"another"


@pytest.mark.parametrize("size_bytes", [2, 4])
def test_a_file_of_another_size_is_not_the_one_that_was_written(drive: Drive, size_bytes: int) -> None:
    put(drive, b"one" if size_bytes == 4 else b"o")

    with pytest.raises(NoFile):
        drive.read(NAME, size_bytes)


def test_a_file_that_is_not_there_is_told_before_the_first_piece(drive: Drive) -> None:
    put(drive, b"one")

    with pytest.raises(NoFile):
        drive.read("jobs/2/results-1.jsonl.gz", 3)


def test_a_deleted_file_is_gone_and_may_be_deleted_again(drive: Drive) -> None:
    put(drive, b"one")
    put(drive, b"other", "jobs/1/results-2.jsonl.gz")

    for _ in range(2):
        drive.delete(NAME)

    with pytest.raises(NoFile):
        drive.read(NAME, 3)
    assert b"".join(drive.read("jobs/1/results-2.jsonl.gz", 5)) == b"other"


def test_a_driver_that_says_in_its_own_way_that_a_file_is_gone_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = remote(tmp_path)
    put(drive, b"one")
    put(drive, b"other", "jobs/1/results-2.jsonl.gz")
    filesystem = drive._open().filesystem

    def refuse(_path: str) -> None:
        raise ValueError("550 no such file, or is there")

    monkeypatch.setattr(filesystem, "rm_file", refuse)

    drive.delete("jobs/1/results-3.jsonl.gz")
    drive.delete("jobs/2/results-1.jsonl.gz")
    with pytest.raises(DriveError, match="ValueError"):
        drive.delete(NAME)


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    LocalDrive(tmp_path / "drive", "local").check()
    remote(tmp_path).check()

    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_staged_file_that_is_given_up_changes_nothing(drive: Drive) -> None:
    put(drive, b"one")

    with suppress(KeyError), drive.stage() as file:
        file.write(b"half")
        raise KeyError

    assert b"".join(drive.read(NAME, 3)) == b"one"


def test_local_drive_is_not_made_anew_where_its_directory_was_moved_away(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    drive = LocalDrive(data_dir / "drive", "local")
    drive.check()

    with drive.stage() as file:
        file.write(b"one")
    data_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(DriveError):
        drive.put(NAME)
    with pytest.raises(DriveError):
        put(drive, b"two")

    assert not data_dir.exists()


def test_local_files_are_their_owners_alone(tmp_path: Path) -> None:
    drive = LocalDrive(tmp_path / "deep" / "drive", "local")

    put(drive, b"one")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep").rglob("*")}
    assert modes == {"drive": 0o700, "jobs": 0o700, "1": 0o700, "results-1.jsonl.gz": 0o600}
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700


def test_the_folder_of_a_job_goes_with_its_last_file(tmp_path: Path) -> None:
    drive = LocalDrive(tmp_path, "local")
    put(drive, b"one")
    put(drive, b"two", "jobs/1/results-2.jsonl.gz")

    drive.delete(NAME)
    assert (tmp_path / "jobs" / "1").is_dir()
    drive.delete("jobs/1/results-2.jsonl.gz")

    assert not (tmp_path / "jobs" / "1").exists()


def test_a_local_file_that_is_being_read_may_be_deleted(tmp_path: Path) -> None:
    drive = LocalDrive(tmp_path, "local")
    content = b"x" * 300_000
    put(drive, content)
    pieces = drive.read(NAME, len(content))

    drive.delete(NAME)

    assert b"".join(pieces) == content


def test_a_drive_in_the_place_of_which_is_a_file_fails_in_words(tmp_path: Path) -> None:
    (tmp_path / "drive").write_text("")
    drive = LocalDrive(tmp_path / "drive", "local")

    with pytest.raises(DriveError, match="can't be written"):
        drive.check()
    with pytest.raises(DriveError):
        drive.delete(NAME)


def test_what_is_left_of_a_full_disk_is_left_to_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "RESERVE_BYTES", 1 << 60)

    for drive in (LocalDrive(tmp_path / "drive", "local"), remote(tmp_path)):
        with pytest.raises(DriveError, match="200 MiB"):
            drive.check()


def test_a_file_that_would_fill_the_disk_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drives, "LOOK_BYTES", 1000)
    drive = LocalDrive(tmp_path, "local")
    put(drive, b"one")

    def fill() -> None:
        with drive.stage() as file:
            file.write(b"x" * 500)
            monkeypatch.setattr(drives, "RESERVE_BYTES", 1 << 60)
            for _ in range(100):
                file.write(b"x" * 500)

    with pytest.raises(DriveError, match="200 MiB"):
        fill()

    assert b"".join(drive.read(NAME, 3)) == b"one"


def test_services_that_share_a_directory_make_their_files_apart(tmp_path: Path) -> None:
    env = {"DRIVE_DISK": "custom", "DRIVE_URL": f"file://{tmp_path}/shared"}
    one, other = (make_drive(read(tmp_path / name, **env)) for name in ("one", "other"))

    with one.stage() as ours, other.stage() as theirs:
        ours.write(b"ours")
        theirs.write(b"theirs")
    one.put(NAME)

    assert b"".join(one.read(NAME, 4)) == b"ours"


def test_what_breaks_in_the_middle_of_a_file_is_told_without_the_drivers_words(tmp_path: Path) -> None:
    def pieces() -> Generator[bytes, None, None]:
        yield b"first"
        raise ValueError("hunter2")

    with pytest.raises(DriveError, match="it fails with ValueError") as caught:
        b"".join(primed(pieces()))

    assert caught.value.__suppress_context__


def test_a_call_that_hangs_is_left_behind() -> None:
    over = threading.Event()

    with pytest.raises(TimeoutError):
        Aside(1).within(0.05, over.wait)

    over.set()


def test_calls_that_hang_are_bounded_in_number_and_hold_up_no_end_of_the_process() -> None:
    over = threading.Event()
    begun: list[threading.Thread] = []
    aside = Aside(2)

    def hang() -> None:
        begun.append(threading.current_thread())
        over.wait(30)

    for _ in range(4):
        with pytest.raises(TimeoutError):
            aside.within(0.05, hang)

    assert [thread.daemon for thread in begun] == [True, True]
    over.set()
    for thread in begun:
        thread.join(10)
    assert aside.within(1, lambda: "free again") == "free again"


def test_a_call_that_nobody_waits_for_any_more_is_not_begun(tmp_path: Path) -> None:
    drive = remote(tmp_path)
    opened = drive._open()
    begun = threading.Event()
    opened.filesystem.begin = begun.set

    with opened.turn, pytest.raises(TimeoutError):
        drives._call(opened, "begin", within_s=0.05)

    assert not begun.wait(0.2)


def test_a_drive_that_stalls_in_the_middle_of_a_file_cuts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = remote(tmp_path)
    size_bytes = put(drive, b"x" * 300_000)
    filesystem, over = drive._open().filesystem, threading.Event()
    cat_file = filesystem.cat_file

    def stall(path: str, *, start: int, end: int) -> bytes:
        if start:
            over.wait(30)
        piece: bytes = cat_file(path, start=start, end=end)
        return piece

    monkeypatch.setattr(filesystem, "cat_file", stall)
    monkeypatch.setattr(drives._call, "__kwdefaults__", {"within_s": 0.2})
    pieces = drive.read(NAME, size_bytes)
    assert next(pieces)
    began_s = time.monotonic()

    with pytest.raises(DriveError, match="it does not answer in time"):
        next(pieces)

    assert time.monotonic() - began_s < 5
    over.set()


def test_the_first_piece_is_small_as_a_reader_waits_for_it(tmp_path: Path) -> None:
    drive = remote(tmp_path)
    size_bytes = put(drive, bytes(range(256)) * 10_000)

    sizes = [len(piece) for piece in drive.read(NAME, size_bytes)]

    assert sizes == [64 << 10, 1 << 20, 1 << 20, size_bytes - (2 << 20) - (64 << 10)]


def test_a_connection_that_broke_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_filesystem = drives._open_filesystem
    broken = [ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")]

    def open_one(settings: DriveSettings, aside: Aside) -> Any:
        opened.append(settings.disk)
        found = open_filesystem(settings, aside)
        if broken:
            error = broken.pop()
            monkeypatch.setattr(found.filesystem, "makedirs", lambda *_a, **_k: (_ for _ in ()).throw(error))
        return found

    monkeypatch.setattr(drives, "_open_filesystem", open_one)
    drive = remote(tmp_path)

    with pytest.raises(DriveError, match="it breaks the connection off"):
        put(drive, b"one")
    put(drive, b"one")

    assert opened == ["custom", "custom"]


class HttpError(Exception):
    """As drivers raise it, with a message that may hold anything."""

    def __init__(self, **facts: object) -> None:
        super().__init__("hunter2")
        vars(self).update(facts)


def named(name: str, *bases: type[Exception]) -> Exception:
    """An error of a driver that need not be installed."""
    made: Exception = type(name, bases or (Exception,), {})("hunter2")
    return made


def boto(code: str, status: int) -> Exception:
    """As botocore raises what S3 answers."""
    return HttpError(
        response={
            "Error": {"Code": code, "Message": "hunter2"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }
    )


def after(error: Exception, *causes: Exception) -> Exception:
    """The error that these led to, the nearest first."""
    last = error
    for cause in causes:
        last.__cause__, last = cause, cause
    return error


REFUSAL = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed hunter2")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "it does not answer in time"),
        (named("ReadTimeoutError"), "it does not answer in time"),
        (PermissionError(errno.EACCES, "hunter2"), "it refuses access"),
        (OSError("Forbidden: hunter2"), "it refuses access"),
        (FileNotFoundError("hunter2"), "its place is not there"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "its place is not there"),
        (OSError(errno.ENOSPC, "No space left on device"), "it is full"),
        (OSError(errno.EROFS, "hunter2"), "Read-only file system"),
        (HttpError(status_code=403), "it refuses access"),
        (HttpError(code=401), "it does not accept the credentials"),
        (HttpError(status_code=404), "its place is not there"),
        (HttpError(status_code=501), "it answers 501"),
        (HttpError(status_code=None, code=503), "it answers 503"),
        (HttpError(code="AccountIsDisabled"), "it fails with HttpError"),
        (ValueError("hunter2"), "it fails with ValueError"),
        (REFUSAL, "nothing answers at its address"),
        (after(named("EndpointConnectionError"), REFUSAL), "nothing answers at its address"),
        (
            after(TimeoutError(), named("ServiceRequestError"), REFUSAL),
            "nothing answers at its address",
        ),
        (
            after(named("EndpointConnectionError"), socket.gaierror(socket.EAI_NONAME, "hunter2")),
            "the host in its address is not known",
        ),
        (
            after(named("SSLError"), ssl.SSLError(1, "hunter2")),
            "it does not speak TLS, which its https address asks for",
        ),
        (
            after(named("SSLError"), ssl.SSLCertVerificationError(1, "hunter2")),
            "its TLS certificate can't be verified",
        ),
        (named("NoCredentialsError"), "this machine has no credentials for it"),
        (named("DefaultCredentialsError"), "this machine has no credentials for it"),
        (named("RefreshError"), "it does not accept the credentials"),
        (EOFError(), "it breaks the connection off"),
        (ftplib.error_perm("530 hunter2"), "it does not accept the credentials"),
        (ftplib.error_perm("550 hunter2"), "it answers 550"),
    ],
)
def test_what_goes_wrong_is_told_without_the_drivers_words(error: Exception, words: str) -> None:
    assert explain(error) == words


@pytest.mark.parametrize(
    ("store", "error", "words"),
    [
        ("s3", after(FileNotFoundError("hunter2"), boto("NoSuchBucket", 404)), "there is no such bucket"),
        ("google-cloud", FileNotFoundError("hunter2"), "there is no such bucket"),
        ("azure", HttpError(status_code=404), "there is no such container"),
        ("s3", after(PermissionError("hunter2"), boto("AccessDenied", 403)), "it refuses access"),
        (
            "s3",
            after(PermissionError("hunter2"), boto("InvalidAccessKeyId", 403)),
            "it does not accept the credentials",
        ),
        (
            "azure",
            HttpError(error_code="AuthenticationFailed", status_code=403),
            "it does not accept the credentials",
        ),
        (
            "s3",
            after(OSError(errno.EINVAL, "hunter2"), boto("AuthorizationHeaderMalformed", 400)),
            "its bucket is in another region",
        ),
        (
            "s3",
            after(PermissionError("hunter2"), boto("RequestTimeTooSkewed", 403)),
            "its clock and that of this machine differ",
        ),
        (
            "s3",
            after(OSError(errno.ENOSYS, "Not Implemented"), boto("501", 501)),
            "what answers at its address does not speak S3",
        ),
        (
            "s3",
            after(PermissionError(errno.EPERM, "Method Not Allowed"), boto("405", 405)),
            "what answers at its address does not speak S3",
        ),
        (
            "google-cloud",
            named("JSONDecodeError"),
            "what answers at its address does not speak Google Cloud Storage",
        ),
        (
            "azure",
            HttpError(status_code=200),
            "what answers at its address does not speak Azure Blob Storage",
        ),
        ("s3", after(OSError(errno.EBUSY, "hunter2"), boto("SlowDown", 503)), "it answers 503"),
    ],
)
def test_what_a_store_of_objects_has_against_a_call_is_told_in_its_words(
    store: str, error: Exception, words: str
) -> None:
    assert explain(error, store) == words


def test_an_error_that_leads_back_to_itself_is_told_all_the_same() -> None:
    error = ValueError("hunter2")
    error.__context__ = KeyError()
    error.__context__.__context__ = error

    assert explain(error) == "it fails with ValueError"


# Settings

S3 = {"DRIVE_DISK": "s3", "S3_BUCKET": "b-1", "S3_KEY": "k-1", "S3_SECRET": "hunter2"}
AZURE = {"DRIVE_DISK": "azure", "AZURE_CONTAINER": "c-1", "AZURE_CONNECTION_STRING": CONNECTION}
ENDPOINT = {"S3_ENDPOINT": "http://127.0.0.1:9000"}


def read(tmp_path: Path, **env: str) -> Settings:
    """With the rules of production for what may be reached."""
    return factories.settings(data_dir=tmp_path, **{"NODE_ENV": "development", **env})


def test_the_default_drive_is_a_directory_of_data_dir(tmp_path: Path) -> None:
    drive = make_drive(read(tmp_path))
    drive.check()

    assert isinstance(drive, LocalDrive)
    assert (tmp_path / "drive").is_dir()


def test_a_file_url_is_a_directory_too(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/my%20results"
    drive = make_drive(read(tmp_path, DRIVE_DISK="custom", DRIVE_URL=url))

    put(drive, b"one")

    assert (tmp_path / "my results" / NAME).read_bytes() == b"one"


def test_s3_is_opened_by_its_settings_and_with_bounded_waits(tmp_path: Path) -> None:
    url, options = address_of(read(tmp_path, **S3, S3_REGION="eu-central-1").drive)

    assert url == "s3://b-1"
    assert (options["key"], options["secret"]) == ("k-1", "hunter2")
    assert options["client_kwargs"] == {"region_name": "eu-central-1"}
    assert 0 < options["config_kwargs"]["connect_timeout"] <= 30
    assert 0 < options["config_kwargs"]["read_timeout"] <= 30
    assert "endpoint_url" not in options


def test_s3_of_others_is_asked_by_path(tmp_path: Path) -> None:
    _, options = address_of(read(tmp_path, **S3, **ENDPOINT).drive)

    assert options["endpoint_url"] == "http://127.0.0.1:9000"
    assert options["config_kwargs"]["s3"] == {"addressing_style": "path"}


def test_google_cloud_and_azure_are_opened_by_their_settings(tmp_path: Path) -> None:
    google = {"DRIVE_DISK": "google-cloud", "GCS_BUCKET": "b-2", "GCS_KEY_FILENAME": "/etc/key.json"}

    assert address_of(read(tmp_path, **google).drive) == ("gs://b-2", {"token": "/etc/key.json"})
    url, options = address_of(read(tmp_path, **AZURE).drive)
    assert (url, options["connection_string"]) == ("az://c-1", CONNECTION)
    assert 0 < options["connection_timeout"] + options["read_timeout"] <= 30


def test_a_hint_names_settings_and_no_values(tmp_path: Path) -> None:
    assert hint(read(tmp_path).drive) == ""
    assert hint(read(tmp_path, **S3, S3_REGION="eu").drive) == "look at S3_BUCKET, S3_KEY, S3_SECRET"


def test_a_hint_to_a_bucket_by_its_url_names_the_credentials_of_the_machine(tmp_path: Path) -> None:
    drive = read(tmp_path, DRIVE_DISK="custom", DRIVE_URL="s3://bucket").drive

    assert hint(drive) == "look at DRIVE_URL and at this machine's credentials"


@pytest.mark.parametrize(
    ("env", "address"),
    [
        (S3, ""),
        ({**S3, **ENDPOINT}, "127.0.0.1:9000"),
        ({**S3, "S3_ENDPOINT": "https://s3.example.org/hunter2"}, "s3.example.org"),
        (AZURE, "127.0.0.1:10000"),
        ({**AZURE, "AZURE_CONNECTION_STRING": "AccountName=me;AccountKey=hunter2"}, ""),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "sftp://me:hunter2@[::1]:22/hunter2?hunter2"}, "[::1]:22"),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "sftp://me:hunter2@host:hunter2/"}, ""),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "s3://hunter2/results"}, ""),
    ],
)
def test_the_log_names_the_server_and_nothing_else_of_its_address(
    tmp_path: Path, env: dict[str, str], address: str
) -> None:
    drive = read(tmp_path, **env).drive

    assert address_for_people(drive) == address
    assert RemoteDrive(drive, tmp_path).name == (f"{drive.disk} at {address}" if address else drive.disk)


def test_a_driver_that_is_not_installed_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "DRIVER_PACKAGES", {"s3": "s3fs_that_is_not_there"})

    with pytest.raises(SettingsError) as caught:
        check_settings(read(tmp_path, **S3))

    message = str(caught.value)
    assert message.startswith("DRIVE_DISK: the driver s3fs_that_is_not_there is not installed")
    assert "--requirement requirements-s3.txt" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://hunter2", "not a scheme that fsspec knows"),
        ("sftp://hunter2", "is not installed"),
        ("file://host/hunter2", "absolute path"),
        ("file:///", "absolute path"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        check_settings(read(tmp_path, DRIVE_DISK="custom", DRIVE_URL=url))

    assert "DRIVE_URL" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_google_key_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drives, "DRIVER_PACKAGES", dict.fromkeys(drives.DRIVER_PACKAGES, "json"))
    google = {"DRIVE_DISK": "google-cloud", "GCS_BUCKET": "b-2", "GCS_KEY_FILENAME": str(tmp_path / "no")}

    with pytest.raises(SettingsError, match="GCS_KEY_FILENAME can't be read"):
        check_settings(read(tmp_path, **google))


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (S3, "S3_ENDPOINT"),
        ({**S3, "S3_ENDPOINT": "https://s3.example.org"}, "S3_ENDPOINT"),
        ({**S3, **ENDPOINT}, None),
        (AZURE, None),
        (
            {**AZURE, "AZURE_CONNECTION_STRING": "AccountName=me;AccountKey=hunter2"},
            "AZURE_CONNECTION_STRING",
        ),
        ({**AZURE, "AZURE_CONNECTION_STRING": "UseDevelopmentStorage=true"}, None),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "memory://results"}, None),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "ftp://127.0.0.1:21/results"}, None),
        ({"DRIVE_DISK": "custom", "DRIVE_URL": "ftp://example.org/results"}, "DRIVE_URL"),
    ],
)
def test_a_test_service_reaches_no_drive_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], name: str | None
) -> None:
    monkeypatch.setattr(drives, "DRIVER_PACKAGES", dict.fromkeys(drives.DRIVER_PACKAGES, "json"))
    settings = read(tmp_path, **env, NODE_ENV="test")

    if name is None:
        check_settings(settings)
    else:
        with pytest.raises(SettingsError, match=f"{name} must be on this machine"):
            check_settings(settings)
