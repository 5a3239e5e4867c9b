"""Where result files live: a directory of this machine, a bucket or a container, or whatever fsspec knows by a URL.

A file is put whole or not at all, read in pieces and deleted; what goes wrong is a `DriveError`, whose message is for
people and holds no secret (`drive_errors.py`). When a file is put, and what is in it, is decided in `result_files.py`.
"""

import errno
import hashlib
import importlib.util
import io
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from config import DriveSettings, Settings, SettingsError
from gpt_worker.addresses import is_loopback
from gpt_worker.aside import Aside
from gpt_worker.drive_errors import DriveError, NoFile, explain, primed, translated

PIECE_BYTES = 1 << 20
# Small, as a reader waits for it: a slow line is not a drive that fails.
FIRST_PIECE_BYTES = 64 << 10
LOCAL_PIECE_BYTES = 64 << 10
CONNECT_S = 10.0
ANSWER_S = 20.0  # for one small thing: a probe, a piece, a deletion
SLOWEST_BYTES_PER_S = 64 << 10  # of an upload, beyond ANSWER_S
PART_BYTES = 8 << 20  # of an upload in parts, which is what it takes of memory; 10,000 parts are 80 GB
# At a time, those that hang included, of a driver that is not asynchronous.
MAX_CALLS = 16
RESERVE_BYTES = 200 << 20  # of the local disk: less than that is left to the database
LOOK_BYTES = 16 << 20  # between two looks at what is left
NEW = ".new"  # the file that is being made, which nobody reads
DRIVER_PACKAGES = {"s3": "s3fs", "google-cloud": "gcsfs", "azure": "adlfs"}
# Their objects are there whole or not at all, and they have no directories to make.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"})
LOCAL_FILES = ("file", "local")
DRIVER_LOGGERS = (
    "aiobotocore",
    "aiohttp",
    "asyncio",
    "azure",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "s3fs",
)


class Drive(Protocol):
    """A place for files, by names such as `jobs/1/results-1.jsonl.gz`. Every method may raise DriveError."""

    name: str
    """For people: `local`, `s3`."""

    def check(self) -> None:
        """Write a small file, read it back and delete it."""

    def stage(self) -> AbstractContextManager[IO[bytes]]:
        """An empty file on the local disk, to be filled for `put`; the one before is gone."""

    def put(self, name: str) -> int:
        """Make the staged file the file of this name, whole at once; its size in bytes."""

    def read(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """The file in pieces. What is wrong before the first piece is raised at once. Raises NoFile."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there, and the directory that is empty without it."""


def make_drive(settings: Settings) -> "LocalDrive | RemoteDrive":
    """The drive of these settings; nothing is loaded, opened or reached yet."""
    drive = settings.drive
    root = settings.data_dir / "drive"
    if drive.scheme in LOCAL_FILES:
        # Other services may have the same directory.
        owner = hashlib.sha256(f"{socket.gethostname()} {settings.data_dir}".encode()).hexdigest()[:12]
        path = Path(unquote(urlsplit(drive.values["DRIVE_URL"]).path))
        return LocalDrive(path, "custom", new=f"{NEW}-{owner}")
    if drive.disk == "local":
        return LocalDrive(root, "local")
    return RemoteDrive(drive, root)


def check_settings(settings: Settings) -> None:
    """Raise SettingsError where the driver is not installed, or this machine lacks what the settings name."""
    drive = settings.drive
    extra = drive.extra
    name = "DRIVE_URL" if drive.scheme else "DRIVE_DISK"
    if extra is not None and importlib.util.find_spec(DRIVER_PACKAGES[extra]) is None:
        raise SettingsError(
            f"{name}: the driver {DRIVER_PACKAGES[extra]} is not installed: start with `make run`, or run "
            f"`.venv/bin/python -m pip install --require-hashes --requirement requirements-{extra}.txt`"
        )
    if drive.scheme in LOCAL_FILES:
        _check_local_url(drive.values["DRIVE_URL"])
    elif drive.scheme and extra is None:
        _check_scheme(drive.scheme)
    if "GCS_KEY_FILENAME" in drive.values:
        _check_key_file(Path(drive.values["GCS_KEY_FILENAME"]))
    if settings.offline:
        _check_offline(drive)


def hint(drive: DriveSettings) -> str:
    """Where to look when the drive fails."""
    if drive.scheme and drive.extra is not None:
        return "look at DRIVE_URL and at this machine's credentials"
    names = [name for name in drive.values if name != "S3_REGION"]
    return f"look at {', '.join(names)}" if names else ""


def address_for_people(drive: DriveSettings) -> str:
    """`host:port` of the server that the settings name, and nothing of a user or a path; empty if they name none."""
    values = drive.values
    match drive.disk:
        case "azure":
            url = blob_endpoint(values["AZURE_CONNECTION_STRING"])
        case "custom":
            # What stands there for an object store is a bucket.
            url = "" if drive.scheme in OBJECT_STORES else values["DRIVE_URL"]
        case _:
            url = values.get("S3_ENDPOINT", values.get("GCS_ENDPOINT", ""))
    return _host_and_port(url)


def _host_and_port(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if host and port is not None else host


def _check_local_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.netloc or not unquote(parts.path).rstrip("/") or parts.query or parts.fragment:
        raise SettingsError("DRIVE_URL must have an absolute path, such as file:///srv/results")


def _check_scheme(scheme: str) -> None:
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise SettingsError(f"DRIVE_URL: {scheme} is not a scheme that fsspec knows") from error
    except ImportError as error:
        said = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"DRIVE_URL: the driver of {scheme} is not installed ({said}): install it into .venv with pip"
        ) from error


def _check_key_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise SettingsError(
            f"GCS_KEY_FILENAME can't be read ({error.strerror}): name the key's file"
        ) from error


def _check_offline(drive: DriveSettings) -> None:
    """NODE_ENV=test reaches nothing outside: the drive is on this machine, by its address."""
    values = drive.values
    match drive.disk:
        case "s3":
            name, address = "S3_ENDPOINT", values.get("S3_ENDPOINT", "")
        case "google-cloud":
            name, address = "GCS_ENDPOINT", values.get("GCS_ENDPOINT", "")
        case "azure":
            name, address = "AZURE_CONNECTION_STRING", blob_endpoint(values["AZURE_CONNECTION_STRING"])
        case "custom" if drive.scheme not in (*LOCAL_FILES, "memory"):
            name, address = "DRIVE_URL", values["DRIVE_URL"]
        case _:
            return
    if not is_loopback(address):
        raise SettingsError(f"{name} must be on this machine: NODE_ENV=test reaches loopback addresses alone")


def blob_endpoint(connection_string: str) -> str:
    """Where an Azure connection string leads to, if it says so; the emulator's own one is on this machine."""
    if connection_string == "UseDevelopmentStorage=true":
        return "http://127.0.0.1"
    parts = (part.partition("=") for part in connection_string.split(";"))
    return next((value for name, _, value in parts if name == "BlobEndpoint"), "")


# This machine


def _make_directory(path: Path) -> None:
    """With its parents, each of which is the owner's alone if it is made."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


class LocalDrive:
    """A directory: a file is made beside the others, synced and then renamed."""

    def __init__(self, root: Path, name: str, *, new: str = NEW) -> None:
        self.name = name
        self._root = root
        self._new = root / new
        self._was_there = False

    def check(self) -> None:
        said = secrets.token_bytes(16)
        with self.stage() as file:
            file.write(said)
        with translated():
            if self._new.read_bytes() != said:
                raise DriveError("it does not keep what is written")
            self._new.unlink()

    def stage(self) -> AbstractContextManager[IO[bytes]]:
        return _staged(self._new, self._make_root)

    def _make_root(self) -> None:
        """Where what it is in is moved away, no new one is made in its place."""
        if self._was_there and not self._root.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        _make_directory(self._root)
        self._was_there = True

    def put(self, name: str) -> int:
        target = self._root / name
        with translated():
            self._make_root()
            _make_directory(target.parent)
            return self._new.replace(target).stat().st_size

    def read(self, name: str, size_bytes: int) -> Iterator[bytes]:
        with translated():
            return primed(self._pieces(name, size_bytes))

    def _pieces(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        try:
            file = (self._root / name).open("rb")
        except FileNotFoundError as error:
            raise NoFile("the file is not there") from error
        with file:
            if os.fstat(file.fileno()).st_size != size_bytes:
                raise NoFile("the file is another one")
            while piece := file.read(LOCAL_PIECE_BYTES):
                yield piece

    def delete(self, name: str) -> None:
        target = self._root / name
        with translated():
            if not self._root.is_dir():
                raise FileNotFoundError
            target.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or gone already
                target.parent.rmdir()


def _check_room(directory: Path) -> None:
    if shutil.disk_usage(directory).free < RESERVE_BYTES:
        raise DriveError(f"less than 200 MiB of disk are free in {directory}")


class _NewFile(io.FileIO):
    """A file that leaves the database its part of the disk."""

    def __init__(self, descriptor: int, directory: Path) -> None:
        super().__init__(descriptor, "wb")
        self._directory = directory
        self._unseen_bytes = 0

    def write(self, data: Any) -> int:
        self._unseen_bytes += len(data)
        if self._unseen_bytes > LOOK_BYTES:
            self._unseen_bytes = 0
            _check_room(self._directory)
        return super().write(data)


@contextmanager
def _staged(path: Path, make_directory: Callable[[], None]) -> Iterator[IO[bytes]]:
    """A new file, empty, readable by its owner alone, and synced at the end."""
    try:
        make_directory()
        _check_room(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with io.BufferedWriter(_NewFile(os.open(path, flags, 0o600), path.parent)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # what else the caller runs into while the file is open is not the drive's
        raise DriveError(f"{path.parent} can't be written: {explain(error)}") from error


# Elsewhere


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file system of fsspec's, and the path in it that all names are below."""

    filesystem: Any
    root: str
    aside: Aside
    # Of a driver that is not made for many threads.
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def protocols(self) -> frozenset[str]:
        told = self.filesystem.protocol
        return frozenset((told,) if isinstance(told, str) else told)

    @property
    def is_object_store(self) -> bool:
        return bool(self.protocols & OBJECT_STORES)


class RemoteDrive:
    """A place that fsspec reaches; its driver is loaded by the first use, in the process that serves.

    A driver's threads would not outlive a fork. Each call has its end: what hangs must hold neither a request nor the
    shutdown for long.
    """

    def __init__(self, settings: DriveSettings, staging: Path) -> None:
        address = address_for_people(settings)
        self.name = f"{settings.disk} at {address}" if address else settings.disk
        self._settings = settings
        self._aside = Aside(MAX_CALLS)
        self._new = staging / NEW
        self._probe = f"jobs/.probe-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def check(self) -> None:
        said = secrets.token_hex(16)
        with self.stage() as file:
            file.write(said.encode())
        try:
            self.put(self._probe)
            read = b"".join(self.read(self._probe, len(said)))
        except NoFile as error:
            raise DriveError("it does not keep what is written") from error
        self.delete(self._probe)
        if read != said.encode():
            raise DriveError("it does not keep what is written")

    def stage(self) -> AbstractContextManager[IO[bytes]]:
        return _staged(self._new, lambda: _make_directory(self._new.parent))

    def put(self, name: str) -> int:
        source = self._new
        with self._translated():
            size_bytes = source.stat().st_size
            within_s = ANSWER_S + size_bytes / SLOWEST_BYTES_PER_S
            opened = self._open()
            target = f"{opened.root}/{name}"
            if opened.is_object_store:
                parts = _in_parts(opened.protocols)
                _call(opened, "put_file", str(source), target, within_s=within_s, **parts)
            else:
                parent, _, last = target.rpartition("/")
                beside = f"{parent}/{NEW}-{last}"
                _call(opened, "makedirs", parent, exist_ok=True)
                _call(opened, "put_file", str(source), beside, within_s=within_s)
                _call(opened, "mv", beside, target, within_s=within_s)
            source.unlink()
        return size_bytes

    def read(self, name: str, size_bytes: int) -> Iterator[bytes]:
        with self._translated():
            return primed(self._pieces(name, size_bytes), self._settings.extra)

    def _pieces(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        opened = self._open()
        for start in (0, *range(FIRST_PIECE_BYTES, size_bytes, PIECE_BYTES)):
            end = min(size_bytes, start + (PIECE_BYTES if start else FIRST_PIECE_BYTES))
            try:
                piece: bytes = _call(opened, "cat_file", f"{opened.root}/{name}", start=start, end=end)
            except FileNotFoundError as error:
                raise NoFile("the file is not there") from error
            if len(piece) != end - start:
                raise NoFile("the file is another one")
            yield piece

    def delete(self, name: str) -> None:
        with self._translated():
            opened = self._open()
            target = f"{opened.root}/{name}"
            try:
                _call(opened, "rm_file", target)
            except FileNotFoundError:
                pass
            except Exception:
                # Not every driver says by its error that there was nothing to delete.
                if opened.is_object_store or _is_there(opened, target):
                    raise
            if not opened.is_object_store:
                with suppress(Exception):  # not empty, or gone already
                    _call(opened, "rmdir", target.rpartition("/")[0])

    def _open(self) -> _Opened:
        if not self._lock.acquire(timeout=ANSWER_S):
            raise TimeoutError
        try:
            if self._opened is None:
                self._opened = _open_filesystem(self._settings, self._aside)
            return self._opened
        finally:
            self._lock.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """As `translated`; what has failed is opened anew, as it may be a connection that broke."""
        try:
            with translated(self._settings.extra):
                yield
        except NoFile:
            raise
        except DriveError:
            self._opened = None
            raise


def _is_there(opened: _Opened, target: str) -> bool:
    """By the listing of its directory: drivers' own `exists` says no whatever goes wrong."""
    parent, _, last = target.rpartition("/")
    try:
        names = _call(opened, "ls", parent, detail=False)
    except FileNotFoundError:
        return False
    return last in {name.rpartition("/")[2] for name in names}


def _call(opened: _Opened, method: str, *args: Any, within_s: float = ANSWER_S, **options: Any) -> Any:
    """One method of the file system, given up after `within_s`."""
    filesystem = opened.filesystem
    coroutine: Callable[..., Any] | None = getattr(filesystem, f"_{method}", None)
    if filesystem.async_impl and coroutine is not None:
        from fsspec.asyn import sync

        return sync(filesystem.loop, coroutine, *args, timeout=within_s, **options)

    deadline_s = time.monotonic() + within_s

    def in_turn() -> Any:
        if not opened.turn.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TimeoutError
        try:
            if time.monotonic() > deadline_s:  # nobody waits for it any more
                raise TimeoutError
            return getattr(filesystem, method)(*args, **options)
        finally:
            opened.turn.release()

    return opened.aside.within(within_s, in_turn)


def _open_filesystem(settings: DriveSettings, aside: Aside) -> _Opened:
    for name in DRIVER_LOGGERS:  # they tell every failure once more, with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if settings.extra == "google-cloud":
        # gcsfs would load gRPC for zonal buckets, which are not for files such as these.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec.core import url_to_fs

    url, options = address_of(settings)
    filesystem, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    return _Opened(filesystem, root.rstrip("/"), aside)


def address_of(settings: DriveSettings) -> tuple[str, dict[str, Any]]:
    """The URL and the options by which fsspec opens the drive."""
    values = settings.values
    match settings.disk:
        case "s3":
            return f"s3://{values['S3_BUCKET']}", _s3_options(values)
        case "google-cloud":
            options: dict[str, Any] = {"token": values.get("GCS_KEY_FILENAME", "anon")}
            if "GCS_ENDPOINT" in values:
                options["endpoint_url"] = values["GCS_ENDPOINT"]
            return f"gs://{values['GCS_BUCKET']}", options
        case "azure":
            return f"az://{values['AZURE_CONTAINER']}", {
                "connection_string": values["AZURE_CONNECTION_STRING"],
                "connection_timeout": int(CONNECT_S),
                "read_timeout": int(ANSWER_S),
                "max_concurrency": 1,
            }
    url = values["DRIVE_URL"]
    if settings.extra == "s3":
        return url, {"config_kwargs": _s3_config({})}
    return url, {"timeout": int(ANSWER_S)} if settings.scheme in ("ftp", "sftp", "ssh") else {}


def _s3_options(values: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "key": values["S3_KEY"],
        "secret": values["S3_SECRET"],
        "config_kwargs": _s3_config(values),
    }
    if "S3_ENDPOINT" in values:
        options["endpoint_url"] = values["S3_ENDPOINT"]
    if "S3_REGION" in values:
        options["client_kwargs"] = {"region_name": values["S3_REGION"]}
    return options


def _s3_config(values: Mapping[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_S,
        "read_timeout": ANSWER_S,
        "retries": {"max_attempts": 1},
    }
    # What others than Amazon take: no bucket in the host's name, no new check sums.
    if "S3_ENDPOINT" in values:
        config |= {"s3": {"addressing_style": "path"}, "request_checksum_calculation": "when_required"}
    return config


def _in_parts(protocols: frozenset[str]) -> dict[str, Any]:
    """What keeps an upload in constant memory: parts of some size, one after the other."""
    if protocols & {"s3", "s3a"}:
        return {"chunksize": PART_BYTES, "max_concurrency": 1}
    return {"chunksize": PART_BYTES} if protocols & {"gs", "gcs"} else {}
