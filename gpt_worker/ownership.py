"""One owner of DATA_DIR: a file lock that one process at a time holds for as long as it serves.

The worker takes it after the fork and before it opens anything, so that two servers never share a queue of jobs.
The lock ends with the process, however that ends. It guards one host; it does not reach a database that others share.
"""

import fcntl
import os
import time
from pathlib import Path

from config import SettingsError

RETRY_EVERY_S = 0.1


class DataDirBusy(Exception):
    """Another process owns DATA_DIR; the message is one line that says which and what to do."""


class DataDirLock:
    """The lock file of one DATA_DIR; not held until `acquire` returns."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.path = data_dir / "lock"
        self._descriptor: int | None = None

    def acquire(self, wait_s: float) -> None:
        """Take the lock, trying for `wait_s`; with 0 it is tried once. DATA_DIR is made if it is missing.

        Raises:
            DataDirBusy: it was held all the while.
            SettingsError: DATA_DIR can't be used at all.
        """
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = (
                f"DATA_DIR can't be used ({error.strerror}): {self.data_dir} must be a writable directory"
            )
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
                        f"DATA_DIR {self.data_dir} is in use by another gpt-worker (process {owner}): "
                        "stop that one, or set another DATA_DIR"
                    )
                    raise DataDirBusy(message) from error
                time.sleep(min(RETRY_EVERY_S, left_s))


def is_still_owner(data_dir: Path) -> bool:
    """Whether the lock file still names this process: it may have been deleted, and taken anew by another."""
    try:
        return (data_dir / "lock").read_text("ascii").strip() == str(os.getpid())
    except (OSError, UnicodeDecodeError):
        return False
