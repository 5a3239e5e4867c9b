"""`flask --app wsgi backup`: a whole copy of the database, made while the service runs or not, and looked through.

It reads one snapshot, page by page: a reader keeps no writer out (WAL), and what is committed meanwhile is not in the
copy. It stands beside the service: it takes none of its locks, brings no table up to date and makes no DATA_DIR.
"""

import os
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import quote

import click

from gpt_worker.sqlite import DAMAGED, DAMAGED_REASON, error_code

FAILED = 2
LOCK_WAIT_S = 30.0
STEP_PAGES = 1000  # 4 MB
BREATH = 0.5  # of the time of each step: so the disk is not ours alone
BESIDE_DATABASE = ("", "-wal", "-shm", "-journal", ".lock")


class BackupError(Exception):
    """There is no copy; the message is one line that says why."""


def make_command(database: Path | None) -> click.Command:
    """The command, for the database of these settings; None: it is on a server."""

    @click.command("backup", short_help="Copy the database, also while the service runs.")
    @click.argument("path", type=click.Path(path_type=Path))
    @click.option("--force", is_flag=True, help="Put the copy in the place of a file that is there.")
    def backup(path: Path, force: bool) -> None:
        """Write a whole copy of the database to PATH, readable by you alone.

        The service may run meanwhile. The copy is checked before it gets its name; if there is none, the exit status
        is 2. Keep APP_KEY with it.
        """
        signal.signal(signal.SIGTERM, _leave)
        try:
            if database is None:
                raise BackupError(
                    "the database is on a server: copy it with the server's own pg_dump or mysqldump"
                )
            size_bytes = copy_database(database, path, force=force)
        except BackupError as error:
            click.echo(f"gpt-worker: {error}", err=True)
            sys.exit(FAILED)
        click.echo(f"{path}: {size_bytes / 1e6:.1f} MB, checked")

    return backup


def copy_database(database: Path, target: Path, *, force: bool = False) -> int:
    """Copy it, check the copy, and give it its name; its size in bytes.

    Raises BackupError, and leaves nothing behind then.
    """
    _check_target(database, target, force=force)
    try:
        with _temporary(target) as temporary:
            _copy(database, temporary, target)
            _check(temporary)
            _sync(temporary)
            size_bytes = temporary.stat().st_size
            _name(temporary, target, force=force)
            _sync(target.parent)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise BackupError(f"{target} can't be written: {error.strerror}") from error
    return size_bytes


def _check_target(database: Path, target: Path, *, force: bool) -> None:
    if not database.is_file():
        raise BackupError(f"there is no database {database}: set DATA_DIR as the service has it")
    real = Path(os.path.realpath(database))
    if Path(os.path.realpath(target)) in [real.with_name(real.name + end) for end in BESIDE_DATABASE]:
        raise BackupError(f"{target} belongs to the database itself: name another file")
    if target.is_dir():
        raise BackupError(f"{target} is a directory: name a file in it")
    if not force and os.path.lexists(target):
        raise _exists(target)


def _exists(target: Path) -> BackupError:
    return BackupError(f"{target} is there already: name another file, or add --force")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """An empty file beside the target, readable by its owner alone; gone afterwards, unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=".backup-", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        for end in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                temporary.with_name(temporary.name + end).unlink()


def _copy(database: Path, temporary: Path, target: Path) -> None:
    try:
        with closing(_open(database)) as source, closing(_open(temporary)) as copy:
            source.execute("BEGIN")
            # Takes the snapshot: else the copy would begin anew with every commit of the service.
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
            stepped_s = time.monotonic()

            def breathe(_status: int, _left: int, _pages: int) -> None:
                nonlocal stepped_s
                time.sleep(BREATH * (time.monotonic() - stepped_s))
                stepped_s = time.monotonic()

            source.backup(copy, pages=STEP_PAGES, progress=breathe)
            copy.execute("PRAGMA journal_mode=DELETE").fetchone()  # one file, with nothing beside it
    except sqlite3.Error as error:
        if error_code(error) in DAMAGED:
            raise BackupError(f"the database {database} {DAMAGED_REASON}") from error
        raise BackupError(f"{database} can't be copied to {target}: {error}") from error


def _check(copy: Path) -> None:
    try:
        with closing(_open(copy)) as connection:
            [found] = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise BackupError(f"the copy is damaged, and so the database may be: {' '.join(found.split())}")


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a file that is there."""
    address = f"file:{quote(str(path.absolute()))}?mode=rw"
    return sqlite3.connect(address, uri=True, timeout=LOCK_WAIT_S, isolation_level=None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(temporary: Path, target: Path, *, force: bool) -> None:
    """Give the finished file its name. Raises FileExistsError."""
    if not force:
        try:
            os.link(temporary, target)  # unlike a rename, it never replaces a file that has come meanwhile
        except FileExistsError:
            raise
        except OSError as error:  # a file system without links
            if os.path.lexists(target):
                raise FileExistsError from error
        else:
            return
    temporary.replace(target)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM: end by an exception, which takes the temporary file with it."""
    sys.exit(128 + signal.SIGTERM)
