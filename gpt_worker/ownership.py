"""One owner of DATA_DIR and of the database: file locks that one process at a time holds for as long as it serves.

The worker takes them after the fork and before it opens anything, so that two servers never share a queue of jobs.
A lock ends with the process, however that ends. It guards one host; a database on a server has an owner's row besides.
"""

import fcntl
import importlib.util
import os
import stat
import time
from pathlib import Path

from config import DATABASE_SERVERS, DatabaseSettings, Settings, SettingsError

RETRY_EVERY_S = 0.1
LOCK_NAME = "lock"  # in DATA_DIR
SQLITE_HEADER = b"SQLite format 3\0"


class InUse(Exception):
    """Another process owns what a lock guards; the message is one line that says which and what to do."""


class FileLock:
    """A lock file; `what` is the setting and the path that it guards. Not held until `acquire` returns."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._descriptor: int | None = None

    def acquire(self, wait_s: float) -> None:
        """Take the lock, trying for `wait_s`; with 0 it is tried once. Its directory is made if it is missing.

        Raises:
            InUse: it was held all the while.
            SettingsError: the lock file can't be made.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"{self.what} can't be used ({error.strerror}): its directory must be a writable one"
            raise SettingsError(message) from error
        try:
            self._lock(descriptor, time.monotonic() + wait_s)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; the file stays, because unlinking it would let two processes lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int, deadline_s: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
                    message = (
                        f"{self.what} is in use by another gpt-worker (process {owner}): "
                        "stop that one, or set another path"
                    )
                    raise InUse(message) from error
                time.sleep(min(RETRY_EVERY_S, left_s))


class DataDirLock(FileLock):
    """The lock of one DATA_DIR."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir / LOCK_NAME, f"DATA_DIR {data_dir}")


class DatabaseLock(FileLock):
    """The lock beside the database file, which another server may reach from another DATA_DIR or by a link."""

    def __init__(self, path: Path, setting: str) -> None:
        database = Path(os.path.realpath(path))
        what = f"{setting}: the database {database}"
        super().__init__(database.with_name(f"{database.name}.lock"), what)


class Ownership:
    """DATA_DIR and the database file of these settings, both owned or neither; a database on a server has its row."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._data_dir = DataDirLock(settings.data_dir)
        database = settings.database
        self._database = None if database.path is None else DatabaseLock(database.path, database.setting)

    def acquire(self, wait_s: float) -> None:
        """Take both locks, trying for `wait_s`. Raises InUse, or SettingsError for what can't be used at all."""
        deadline_s = time.monotonic() + wait_s
        self._data_dir.acquire(wait_s)
        try:
            check_database(self._settings.database)
            if self._database is not None:
                self._database.acquire(deadline_s - time.monotonic())
        except BaseException:
            self._data_dir.release()
            raise

    def release(self) -> None:
        """Give both back."""
        if self._database is not None:
            self._database.release()
        self._data_dir.release()


def check_database(database: DatabaseSettings) -> None:
    """Raise SettingsError where a driver is not installed, or the path leads to something that is no SQLite file.

    Not for a process that has the database open: closing a second descriptor of the file drops SQLite's locks.
    """
    path = database.path
    if path is None:
        check_driver(database)
        return
    what = f"{database.setting}: the database {path}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SettingsError(f"{what} is not a file: name one")
        if not os.access(path, os.W_OK):
            raise SettingsError(f"{what} is not writable by this user: change its mode, or name another")
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except FileNotFoundError:
        return  # it is made
    except OSError as error:
        raise SettingsError(f"{what} can't be read ({error.strerror}): name another path") from error
    if header not in (b"", SQLITE_HEADER):
        raise SettingsError(f"{what} is not a SQLite database: name another path, or a new one")


def check_driver(database: DatabaseSettings) -> None:
    """Raise SettingsError where the driver of the database's server is not installed."""
    package = DATABASE_SERVERS[database.connection].package
    if importlib.util.find_spec(package) is None:
        raise SettingsError(
            f"{database.setting}: the driver {package} is not installed: start with `make run`, or run "
            f"`.venv/bin/python -m pip install --require-hashes --requirement requirements-{database.connection}.txt`"
        )


def is_still_owner(data_dir: Path) -> bool:
    """Whether the lock file still names this process: it may have been deleted, and taken anew by another."""
    try:
        return (data_dir / LOCK_NAME).read_text("ascii").strip() == str(os.getpid())
    except (OSError, UnicodeDecodeError):
        return False
