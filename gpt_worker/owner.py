"""One owner of a database that other hosts reach: a row with a token that expires unless it is renewed.

Every writing transaction begins with a look at that row, which it locks: nothing is written by a service that has lost
it, and none loses it between that look and its commit. What guards the processes of one host is the lock in DATA_DIR
(`ownership`); its holder takes the row of an earlier holder over at once. Another DATA_DIR is another host here.
"""

import hashlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from config import SettingsError
from gpt_worker.db import Database, trouble_of
from gpt_worker.errors import StartGivenUp
from gpt_worker.models import OwnerRow
from gpt_worker.ownership import InUse
from gpt_worker.store import owners as owner_store
from gpt_worker.write_gate import DatabaseUnusable

log = logging.getLogger(__name__)

EXPIRES_AFTER_S = 30.0
RENEW_EVERY_S = 10.0
RETRY_EVERY_S = 1.0
LOOK_EVERY_S = 0.25  # while the row is another's
GIVE_BACK_S = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOST = (
    "Ownership: another gpt-worker has taken the database over; start this one anew to have it wait for it."
)
UNSURE = (
    "Ownership: the database has not been reached for so long that another gpt-worker may have taken it over."
)


class Owner:
    """This service's claim; `on_doubt` and `on_sure` tell when it must not send anything, and when it may again."""

    def __init__(
        self, database: Database, lock_file: Path, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._lock_file = lock_file
        self._now_s = now_s
        self._token = secrets.token_hex(16)
        self._renewed_s = 0.0  # when the last renewal that has succeeded was begun
        self._held = False
        self._lost = False
        self._doubted = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owner", daemon=True)
        self.on_doubt: Callable[[], None] = lambda: None
        self.on_sure: Callable[[], None] = lambda: None

    @property
    def trouble(self) -> str | None:
        """Why this service may not write, for people; None while it owns the database."""
        if self._lost:
            return LOST
        return UNSURE if self._held and self._now_s() > self._renewed_s + EXPIRES_AFTER_S else None

    def acquire(self, is_wanted: Callable[[], bool]) -> None:
        """Take the row: a new, an expired or an earlier one of this DATA_DIR at once; without tables, do nothing.

        Another's is waited for until it expires.

        Raises:
            InUse: it was renewed meanwhile, so its owner lives.
            StartGivenUp: this service `is_wanted` no more.
        """
        if self._held:
            return
        with self._database.read() as session:
            if not inspect(session.connection()).has_table(OwnerRow.__tablename__):
                return
        seen: tuple[str, datetime] | None = None
        while True:
            try:
                other = self._try()
            except DBAPIError as error:
                if not trouble_of(error):
                    raise
                raise SettingsError(f"the database can't be used: {trouble_of(error)}") from error
            if other is None:
                self._held = True
                self._database.on_write = self._check
                self._database.why_not_ours = lambda: self.trouble
                return
            if seen is None:
                log.info("the database is another's: waiting for its end", extra={"action": "owner_wait"})
            elif seen != (other.token, other.expires_at):
                raise InUse(
                    f"the database is in use by another gpt-worker (on {other.host}): "
                    "stop that one, or name another database"
                )
            seen = other.token, other.expires_at
            if not is_wanted():
                raise StartGivenUp
            self._stopping.wait(LOOK_EVERY_S)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more, and leave the row to whoever wants it; at the very end of a service."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(GIVE_BACK_S)

    def renew(self) -> float:
        """Have the row for another while; the seconds after which to do so again."""
        begun_s = self._now_s()
        try:
            self._save_alone(EXPIRES_AFTER_S)
        except Exception as error:
            if self.trouble and not self._doubted and not self._lost:
                self._doubted = True
                self.on_doubt()
                log.error("%s (%s)", UNSURE, trouble_of(error), extra={"action": "owner_unsure"})
            elif not trouble_of(error):
                log.exception("The ownership can't be renewed.", extra={"action": "owner_renew"})
            return RETRY_EVERY_S
        self._renewed_s = begun_s
        if self._doubted:
            self._doubted = False
            self.on_sure()
        return RENEW_EVERY_S

    def give_back(self) -> None:
        """Let the row expire now."""
        if not self.trouble:
            try:
                self._save_alone(0.0)
            except Exception as error:  # then it expires by itself
                reason = trouble_of(error) or type(error).__name__
                log.warning("The database was not given back: %s", reason, extra={"action": "owner_stop"})

    def _run(self) -> None:
        wait_s = RENEW_EVERY_S
        while not self._stopping.wait(wait_s) and not self._lost:
            wait_s = self.renew()
        self.give_back()

    def _save_alone(self, lasts_s: float) -> None:
        with self._database.write(urgent=True) as session:
            self._save(session, lasts_s)

    def _try(self) -> OwnerRow | None:
        """The row of another, or None: now it is ours."""
        begun_s = self._now_s()
        try:
            with self._database.write(urgent=True) as session:
                row = owner_store.locked(session)
                is_others = row is not None and row.token != self._token and row.place != self._place
                if row is not None and is_others and row.expires_at > owner_store.now(session):
                    return row
                self._save(session, EXPIRES_AFTER_S)
        except IntegrityError:  # two services have made the row at once
            return self._try()
        self._renewed_s = begun_s
        return None

    def _save(self, session: Session, lasts_s: float) -> None:
        owner_store.save(
            session,
            host=socket.gethostname()[:255],
            place=self._place,
            token=self._token,
            expires_at=owner_store.now(session) + timedelta(seconds=lasts_s),
        )

    @property
    def _place(self) -> str:
        """Names the lock file on this machine, by which one can tell that its earlier holder is dead."""
        status = self._lock_file.stat()
        boot = BOOT_ID.read_text("ascii").strip() if BOOT_ID.exists() else socket.gethostname()
        return hashlib.sha256(f"{boot} {status.st_dev} {status.st_ino}".encode()).hexdigest()

    def _check(self, session: Session) -> None:
        """Lock the row for this transaction. Raises DatabaseUnusable where it is not ours any more."""
        if self._lost or owner_store.locked_token(session) != self._token:
            self._lose()
            raise DatabaseUnusable("another gpt-worker has taken the database over")

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            log.error(LOST, extra={"action": "owner_lost"})
            self.on_doubt()
