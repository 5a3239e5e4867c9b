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
from typing import TypeVar

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from config import SettingsError
from gpt_worker import db_servers
from gpt_worker.db import Database, trouble_of
from gpt_worker.db_servers import LOCK_TIMEOUT_S, what_happened
from gpt_worker.errors import StartGivenUp
from gpt_worker.models import OwnerRow
from gpt_worker.ownership import InUse
from gpt_worker.store import owners as owner_store
from gpt_worker.write_gate import DatabaseUnusable

T = TypeVar("T")
log = logging.getLogger(__name__)

EXPIRES_AFTER_S = 30.0
RENEW_EVERY_S = 10.0
RETRY_EVERY_S = 1.0
LOOK_EVERY_S = 0.25  # while the row is another's
GIVE_BACK_S = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Trouble that time may mend: for one, a suspended owner's transaction keeps the row locked until the server ends it,
# which takes no longer than the row's expiry. A look waits for a lock by itself, and may begin just before that.
PASSING = (db_servers.LOST, db_servers.BUSY)
GIVE_UP_S = EXPIRES_AFTER_S + LOCK_TIMEOUT_S
# On Linux the clock of `time.monotonic` stands still while the machine sleeps; and on macOS, but not CLOCK_MONOTONIC.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
LOST = (
    "Ownership: another gpt-worker has taken the database over; start this one anew to have it wait for it."
)
UNSURE = (
    "Ownership: the database has not been reached for so long that another gpt-worker may have taken it over."
)


def awake_or_asleep_s() -> float:
    """Monotonic seconds, those in which the machine sleeps among them."""
    return time.clock_gettime(CLOCK)


class Owner:
    """This service's claim; nothing may be sent or written while there is `trouble` with it.

    `on_doubt` tells that the renewals have failed for too long, or that it is lost: later than `trouble`, which is
    asked before anything is sent. `on_sure` tells that a renewal has ended the trouble.
    """

    def __init__(
        self, database: Database, lock_file: Path, now_s: Callable[[], float] = awake_or_asleep_s
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
        return UNSURE if self._held and self._may_have_expired(self._renewed_s) else None

    def acquire(self, is_wanted: Callable[[], bool]) -> None:
        """Take the row: a new, an expired or an earlier one of this DATA_DIR at once; without tables, do nothing.

        Another's is waited for until it expires; one that can't be looked at, as its owner was suspended in a
        transaction for one, until that must have ended.

        Raises:
            InUse: it was renewed meanwhile, so its owner lives.
            SettingsError: the database can't be used.
            StartGivenUp: this service `is_wanted` no more.
        """
        if self._held or not self._at_last(self._has_table, is_wanted):
            return
        seen: tuple[str, datetime] | None = None
        while (other := self._at_last(self._try, is_wanted)) is not None:
            if seen is None:
                log.info("the database is another's: waiting for its end", extra={"action": "owner_wait"})
            elif seen != (other.token, other.expires_at):
                raise InUse(
                    f"the database is in use by another gpt-worker (on {other.host}): "
                    "stop that one, or name another database"
                )
            seen = other.token, other.expires_at
            self._pause(is_wanted)
        self._held = True
        self._database.on_write = self._check
        self._database.why_not_ours = lambda: self.trouble

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
        begun_s, renewed_s = self._now_s(), self._renewed_s
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
        if self.trouble:  # this process was suspended meanwhile
            return RETRY_EVERY_S
        # Asked now, since other threads may have found trouble until a moment ago.
        if self._doubted or self._may_have_expired(renewed_s):
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
        # The row was taken a while ago, if the tables had to be changed since.
        wait_s = max(0.0, self._renewed_s + RENEW_EVERY_S - self._now_s())
        while not self._stopping.wait(wait_s) and not self._lost:
            wait_s = self.renew()
        self.give_back()

    def _at_last(self, look: Callable[[], T], is_wanted: Callable[[], bool]) -> T:
        """What `look` returns once the database lets it: it is tried again while that may come to pass."""
        give_up_s, is_told = self._now_s() + GIVE_UP_S, False
        while True:
            try:
                return look()
            except DBAPIError as error:
                kind, words = what_happened(error) or (None, trouble_of(error))
                if words is None:
                    raise
                if kind not in PASSING or self._now_s() > give_up_s:
                    raise SettingsError(f"the database can't be used: {words}") from error
                if not is_told:
                    is_told = True
                    message = "the database can't be used yet: %s"
                    log.warning(message, words, extra={"action": "owner_wait"})
            self._pause(is_wanted)

    def _pause(self, is_wanted: Callable[[], bool]) -> None:
        if not is_wanted():
            raise StartGivenUp
        self._stopping.wait(LOOK_EVERY_S)

    def _may_have_expired(self, renewed_s: float) -> bool:
        return self._now_s() > renewed_s + EXPIRES_AFTER_S

    def _has_table(self) -> bool:
        with self._database.read() as session:
            return inspect(session.connection()).has_table(OwnerRow.__tablename__)

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
