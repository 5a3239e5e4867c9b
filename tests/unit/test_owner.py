"""Who owns a database on a server: at most one service, by a row that expires. On SQLite here: the rule is the same."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from config import SettingsError
from gpt_worker.db import Database
from gpt_worker.errors import StartGivenUp
from gpt_worker.models import OwnerRow
from gpt_worker.owner import (
    EXPIRES_AFTER_S,
    GIVE_UP_S,
    LOST,
    RENEW_EVERY_S,
    RETRY_EVERY_S,
    UNSURE,
    Owner,
)
from gpt_worker.ownership import InUse
from gpt_worker.store import owners as owner_store
from gpt_worker.write_gate import DatabaseUnusable
from tests import factories
from tests.clock import FakeClock


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


def make_owner(
    database: Database, tmp_path: Path, *, host: str = "one", clock: FakeClock | None = None
) -> Owner:
    lock_file = tmp_path / f"lock-of-{host}"
    lock_file.touch()
    return Owner(database, lock_file, now_s=clock or FakeClock())


def owned(database: Database, tmp_path: Path, *, host: str = "one", clock: FakeClock | None = None) -> Owner:
    owner = make_owner(database, tmp_path, host=host, clock=clock)
    database.on_write = lambda _session: None  # two services have a Database each
    owner.acquire(wanted)
    return owner


def wanted() -> bool:
    return True


def stored_row(database: Database) -> OwnerRow:
    with database.read() as session:
        row = owner_store.locked(session)
        assert row is not None
        return row


def expire(database: Database) -> None:
    database.on_write = lambda _session: None
    with database.write() as session:
        row = owner_store.locked(session)
        assert row is not None
        row.expires_at = owner_store.now(session)


def test_first_service_gets_the_row_by_the_clock_of_the_database(database: Database, tmp_path: Path) -> None:
    owner = owned(database, tmp_path)

    with database.read() as session:
        left = stored_row(database).expires_at - owner_store.now(session)
    assert timedelta(0) < left <= timedelta(seconds=EXPIRES_AFTER_S)
    assert owner.trouble is None


def test_database_without_tables_is_nobodys_yet(tmp_path: Path, database: Database) -> None:
    with database.write() as session:
        OwnerRow.__table__.drop(session.connection())  # type: ignore[attr-defined]

    make_owner(database, tmp_path).acquire(wanted)

    assert database.on_write.__name__ == "<lambda>"


def test_next_holder_of_the_same_lock_takes_over_at_once(database: Database, tmp_path: Path) -> None:
    owned(database, tmp_path)
    before = stored_row(database)

    owned(database, tmp_path)

    assert stored_row(database).token != before.token


def test_another_host_waits_for_a_row_that_expires(database: Database, tmp_path: Path) -> None:
    owned(database, tmp_path, host="one")
    looks = iter(range(100))

    def expires_at_the_third_look() -> bool:
        if next(looks) == 2:
            expire(database)
        return True

    other = make_owner(database, tmp_path, host="two")
    database.on_write = lambda _session: None
    other.acquire(expires_at_the_third_look)

    assert other.trouble is None
    assert next(looks) == 3


def test_another_host_is_refused_as_soon_as_the_row_is_renewed(database: Database, tmp_path: Path) -> None:
    first = owned(database, tmp_path, host="one")
    check = database.on_write

    def renews() -> bool:
        database.on_write = check
        first.renew()
        database.on_write = lambda _session: None
        return True

    database.on_write = lambda _session: None
    with pytest.raises(InUse, match="in use by another gpt-worker"):
        make_owner(database, tmp_path, host="two").acquire(renews)


def test_waiting_ends_at_once_when_it_is_not_wanted(database: Database, tmp_path: Path) -> None:
    owned(database, tmp_path, host="one")
    database.on_write = lambda _session: None

    with pytest.raises(StartGivenUp):
        make_owner(database, tmp_path, host="two").acquire(lambda: False)


def driver_error(driver: str, *args: Any, sqlstate: str | None = None) -> OperationalError:
    kind = type("OperationalError", (Exception,), {"__module__": f"{driver}.errors", "sqlstate": sqlstate})
    return OperationalError("SELECT …", None, kind(*args))


LOCKED = driver_error("psycopg", "canceling statement due to lock timeout", sqlstate="55P03")
TRANSACTION_IN_THE_WAY = driver_error("pymysql", 1205, "Lock wait timeout exceeded")
CONNECTION_LOST = driver_error("psycopg", "gone", sqlstate="08006")
READ_ONLY = driver_error("psycopg", "read-only", sqlstate="25006")


class LookFails:
    """A look at the row that meets these errors first, the last of them again and again if it is `for_ever`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *errors: OperationalError, for_ever: bool = False
    ) -> None:
        self.looks = 0
        self._errors = errors
        self._for_ever = for_ever
        self._locked = owner_store.locked
        monkeypatch.setattr(owner_store, "locked", self)
        monkeypatch.setattr("gpt_worker.owner.LOOK_EVERY_S", 0.0)

    def __call__(self, session: Session) -> OwnerRow | None:
        self.looks += 1
        if self.looks <= len(self._errors):
            raise self._errors[self.looks - 1]
        if self._for_ever:
            raise self._errors[-1]
        return self._locked(session)


def test_row_that_is_locked_for_a_while_is_waited_for(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = LookFails(monkeypatch, LOCKED, CONNECTION_LOST, TRANSACTION_IN_THE_WAY)

    owner = owned(database, tmp_path)

    assert looks.looks == 4
    assert owner.trouble is None
    assert database.why_not_ours() is None


def test_start_gives_up_a_row_that_stays_locked_with_one_plain_line(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    looks = LookFails(monkeypatch, LOCKED, for_ever=True)

    def passes() -> bool:
        clock.advance(10.0)
        return True

    with pytest.raises(SettingsError, match=r"^the database can't be used: another program holds a lock$"):
        make_owner(database, tmp_path, clock=clock).acquire(passes)

    assert looks.looks == GIVE_UP_S / 10.0 + 2


def test_waiting_for_a_locked_row_ends_at_once_when_it_is_not_wanted(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LookFails(monkeypatch, LOCKED, for_ever=True)

    with pytest.raises(StartGivenUp):
        make_owner(database, tmp_path).acquire(lambda: False)


def test_database_that_refuses_is_not_waited_for(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = LookFails(monkeypatch, READ_ONLY, for_ever=True)

    with pytest.raises(SettingsError, match="the database is read-only"):
        make_owner(database, tmp_path).acquire(wanted)

    assert looks.looks == 1


def test_nothing_is_written_by_a_service_that_has_lost_the_row(database: Database, tmp_path: Path) -> None:
    first = owned(database, tmp_path, host="one")
    check_of_first, why_not_first, doubts = database.on_write, database.why_not_ours, []
    first.on_doubt = lambda: doubts.append(True)
    expire(database)
    second = owned(database, tmp_path, host="two")

    database.on_write = check_of_first
    for _ in range(2):
        with pytest.raises(DatabaseUnusable), database.write():
            pytest.fail("the transaction of the first goes on")

    database.why_not_ours = why_not_first
    with pytest.raises(DatabaseUnusable):  # its webhooks, for one, are the second's to send
        database.check_ours()
    assert database.trouble == first.trouble == LOST
    assert doubts == [True]
    assert second.trouble is None


def test_expired_row_that_nobody_took_is_still_ones_own(database: Database, tmp_path: Path) -> None:
    owner = owned(database, tmp_path)
    check = database.on_write
    expire(database)
    database.on_write = check

    with database.write():
        pass

    assert owner.renew() == RENEW_EVERY_S
    assert owner.trouble is None


def test_owner_who_can_not_renew_is_unsure_until_it_can(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = FakeClock(), []
    owner = owned(database, tmp_path, clock=clock)
    owner.on_doubt, owner.on_sure = lambda: told.append("doubt"), lambda: told.append("sure")
    aside = tmp_path / "aside"
    database._home.opened()
    database.path.rename(aside)

    clock.advance(EXPIRES_AFTER_S)
    waits = [owner.renew()]
    told_early = list(told)
    clock.advance(1.0)
    waits += [owner.renew(), owner.renew()]
    in_doubt = owner.trouble
    aside.rename(database.path)
    waits.append(owner.renew())

    assert waits == [RETRY_EVERY_S] * 3 + [RENEW_EVERY_S]
    assert told_early == []
    assert told == ["doubt", "sure"]
    assert in_doubt == UNSURE
    assert owner.trouble is None


def test_owner_who_was_suspended_for_too_long_is_unsure_at_once_and_sure_by_a_renewal(
    database: Database, tmp_path: Path
) -> None:
    clock, told = FakeClock(), []
    owner = owned(database, tmp_path, clock=clock)
    owner.on_doubt, owner.on_sure = lambda: told.append("doubt"), lambda: told.append("sure")

    clock.advance(EXPIRES_AFTER_S + 1.0)
    at_once = database.why_not_ours()
    wait_s = owner.renew()

    assert at_once == UNSURE
    assert wait_s == RENEW_EVERY_S
    assert database.why_not_ours() is None
    assert told == ["sure"], "who waits for it is not told"


def test_renewal_in_which_the_owner_was_suspended_makes_nothing_sure(
    database: Database, tmp_path: Path
) -> None:
    clock, told = FakeClock(), []
    owner = owned(database, tmp_path, clock=clock)
    owner.on_sure = lambda: told.append("sure")
    check = database.on_write

    def is_suspended(session: Session) -> None:
        clock.advance(EXPIRES_AFTER_S + 1.0)
        check(session)

    database.on_write = is_suspended
    waits = [owner.renew()]
    unsure, told_early = owner.trouble, list(told)
    database.on_write = check
    waits.append(owner.renew())

    assert waits == [RETRY_EVERY_S, RENEW_EVERY_S]
    assert (unsure, told_early) == (UNSURE, [])
    assert (owner.trouble, told) == (None, ["sure"])


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="its CLOCK_MONOTONIC counts the sleep")
def test_sleep_of_the_machine_counts(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = tmp_path / "lock"
    lock_file.touch()
    owner = Owner(database, lock_file)
    owner.acquire(wanted)
    slept_s = EXPIRES_AFTER_S + 1.0
    clock_gettime = time.clock_gettime

    def after_sleep(clock: int) -> float:
        return clock_gettime(clock) + (slept_s if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", after_sleep)

    assert owner.trouble == UNSURE


def test_row_given_back_is_free_at_once(database: Database, tmp_path: Path) -> None:
    owned(database, tmp_path, host="one").give_back()
    database.on_write = lambda _session: None

    make_owner(database, tmp_path, host="two").acquire(lambda: pytest.fail("it waits"))
