"""The rules of accounts, on a real database and a fake clock."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import argon2
import jwt
import pytest

from config import derive
from gpt_worker import accounts as accounts_module
from gpt_worker.accounts import (
    LOGINS_OF_ONE,
    MAX_LOCK_S,
    SETUP_TOKEN_FILE,
    STRANGERS_AT_ONCE,
    Accounts,
    IssuedToken,
    Passwords,
    User,
    lock_s,
)
from gpt_worker.domain import JobStatus, Role, new_id
from gpt_worker.errors import (
    Conflict,
    Forbidden,
    GptWorkerError,
    Invalid,
    NotFound,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from gpt_worker.models import JobRow, LoginFailureRow, TokenRow, UserRow
from tests.unit.small_app import APP_KEY, EMAIL, PASSWORD, FakeClock, SmallApp

OTHER = "bob@example.org"
WRONG = "wrong horse battery staple"
NEW = "another horse battery staple"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path)
    with app.app.app_context():
        yield app
    app.close()


@pytest.fixture
def accounts(small: SmallApp) -> Accounts:
    return small.accounts


@pytest.fixture
def clock(small: SmallApp) -> FakeClock:
    return small.clock


def with_two_users(small: SmallApp) -> tuple[User, User]:
    admin, _ = small.accounts.register(EMAIL, PASSWORD)
    small.modes.change(registration=True)
    user, _ = small.accounts.register(OTHER, PASSWORD)
    return admin, user


def fail(accounts: Accounts, times: int, email: str = EMAIL, network: str = "") -> None:
    for _ in range(times):
        with pytest.raises(Unauthenticated):
            accounts.login(email, WRONG, network=network)


def forbid_hashing(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> bool:
        raise AssertionError("a password was looked at")

    monkeypatch.setattr(Passwords, "match", refuse)
    monkeypatch.setattr(Passwords, "hash", refuse)


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(0, 0), (4, 0), (5, 1), (6, 2), (7, 4), (14, 512), (15, 900), (16, 900), (1000, 900), (10**9, 900)],
)
def test_lock_doubles_from_one_second_to_fifteen_minutes(failures: int, seconds: int) -> None:
    assert lock_s(failures) == seconds


# Registering


def test_first_account_is_the_admin_and_turns_registration_off(small: SmallApp) -> None:
    assert small.modes.current().registration

    user, _ = small.accounts.register(EMAIL, PASSWORD)

    assert user.role is Role.ADMIN
    assert not small.modes.current().registration


def test_registration_that_is_off_refuses_without_hashing(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.register(EMAIL, PASSWORD)
    forbid_hashing(accounts, monkeypatch)

    with pytest.raises(Forbidden):
        accounts.register(OTHER, PASSWORD)


def test_later_account_is_a_users(small: SmallApp) -> None:
    _, user = with_two_users(small)

    assert user.role is Role.USER


def test_race_for_the_first_account_has_one_winner(small: SmallApp) -> None:
    outcomes: list[object] = []
    start = threading.Barrier(50)

    def register(number: int) -> None:
        with small.app.app_context():
            start.wait()
            try:
                outcomes.append(small.accounts.register(f"user{number}@example.org", PASSWORD)[0].role)
            except GptWorkerError as error:
                outcomes.append(type(error))

    threads = [threading.Thread(target=register, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(str, outcomes)) == sorted([str(Role.ADMIN)] + [str(Forbidden)] * 49)


def test_address_is_kept_stripped_and_case_folded(accounts: Accounts) -> None:
    user, _ = accounts.register("  Ada@Example.ORG ", PASSWORD)

    assert user.email == EMAIL
    assert accounts.login("ADA@example.org", PASSWORD).text


def test_taken_address_is_a_conflict(small: SmallApp) -> None:
    with_two_users(small)

    with pytest.raises(Conflict):
        small.accounts.register(OTHER.upper(), PASSWORD)


@pytest.mark.parametrize(
    "email", ["", "ada", "@example.org", "ada@", "a b@example.org", "a@b@c", "x" * 250 + "@b.de"]
)
def test_what_is_no_address_is_invalid(accounts: Accounts, email: str) -> None:
    with pytest.raises(Invalid) as caught:
        accounts.register(email, PASSWORD)

    assert caught.value.errors[0].loc == ("email",)


@pytest.mark.parametrize(("length", "good"), [(11, False), (12, True), (256, True), (257, False)])
def test_password_has_12_to_256_characters(accounts: Accounts, length: int, good: bool) -> None:
    def loc_refused() -> tuple[str | int, ...] | None:
        try:
            accounts.register(EMAIL, "ä" * length)
        except Invalid as error:
            return error.errors[0].loc
        return None

    assert loc_refused() == (None if good else ("password",))


def test_password_is_kept_as_argon2id_of_19_mib(small: SmallApp) -> None:
    user, _ = small.accounts.register(EMAIL, PASSWORD)

    with small.database.read() as session:
        row = session.get_one(UserRow, user.id)

    assert row.password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


# Production's first account


@pytest.fixture
def production(tmp_path: Path) -> Iterator[SmallApp]:
    app = SmallApp(tmp_path, environment="production")
    with app.app.app_context():
        app.accounts.prepare()
        yield app
    app.close()


def setup_token_path(small: SmallApp) -> Path:
    return small.settings.data_dir / SETUP_TOKEN_FILE


def test_production_writes_a_setup_token_for_its_owner_alone(production: SmallApp) -> None:
    path = setup_token_path(production)

    assert len(path.read_text().strip()) >= 32
    assert path.stat().st_mode & 0o777 == 0o600


def test_setup_token_outlives_a_restart(production: SmallApp) -> None:
    before = setup_token_path(production).read_text()

    production.accounts.prepare()

    assert setup_token_path(production).read_text() == before


@pytest.mark.parametrize("setup_token", [None, "", "wrong", "ä"])
def test_production_refuses_a_first_account_without_the_setup_token(
    production: SmallApp, setup_token: str | None
) -> None:
    with pytest.raises(Forbidden):
        production.accounts.register(EMAIL, PASSWORD, setup_token)


def test_empty_setup_token_opens_nothing_when_its_file_is_gone(production: SmallApp) -> None:
    setup_token_path(production).unlink()

    with pytest.raises(Forbidden):
        production.accounts.register(EMAIL, PASSWORD, "")


def test_setup_token_makes_the_admin_once(production: SmallApp) -> None:
    setup_token = setup_token_path(production).read_text().strip()

    user, _ = production.accounts.register(EMAIL, PASSWORD, setup_token)

    assert user.role is Role.ADMIN
    assert not setup_token_path(production).exists()
    with pytest.raises(Forbidden):
        production.accounts.register(OTHER, PASSWORD, setup_token)


def test_left_over_setup_token_goes_once_there_is_a_user(small: SmallApp) -> None:
    small.accounts.register(EMAIL, PASSWORD)
    setup_token_path(small).write_text("left over")

    small.accounts.prepare()

    assert not setup_token_path(small).exists()


def test_admin_email_makes_the_first_admin_once(tmp_path: Path) -> None:
    small = SmallApp(
        tmp_path, environment="production", admin_email="Root@Example.org", admin_password=PASSWORD
    )
    with small.app.app_context():
        small.accounts.prepare()
        small.accounts.prepare()

        users = small.accounts.list_users().items

        assert [(user.email, user.role) for user in users] == [("root@example.org", Role.ADMIN)]
        assert small.accounts.login("root@example.org", PASSWORD).text
        assert not small.modes.current().registration
        assert not setup_token_path(small).exists()
    small.close()


# Logging in


def test_login_gives_a_token_for_24_hours(accounts: Accounts, clock: FakeClock) -> None:
    user, _ = accounts.register(EMAIL, PASSWORD)

    token = accounts.login(EMAIL, PASSWORD)

    assert token.expires_at == (clock.now + timedelta(hours=24)).replace(microsecond=0)
    assert accounts.authenticate(token.text).caller.user_id == user.id


def test_wrong_unknown_and_disabled_get_the_same_answer(small: SmallApp) -> None:
    _, user = with_two_users(small)
    small.accounts.change_user(user.id, disabled=True)

    answers = set()
    for email, password in [(EMAIL, WRONG), ("nobody@example.org", PASSWORD), (OTHER, PASSWORD)]:
        with pytest.raises(Unauthenticated) as caught:
            small.accounts.login(email, password)
        answers.add(str(caught.value))

    assert len(answers) == 1


def watch_hashing(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch, around: Callable[[], object] = lambda: None
) -> list[str]:
    """The parameters of every hash that a password is compared with; `around` is called meanwhile."""
    verified: list[str] = []
    real = accounts._passwords._hasher.verify

    def verify(password_hash: str, password: str) -> bool:
        verified.append(password_hash.rpartition("$")[0].rpartition("$")[0])
        around()
        return real(password_hash, password)

    monkeypatch.setattr(type(accounts._passwords._hasher), "verify", staticmethod(verify))
    return verified


def test_wrong_unknown_and_disabled_cost_the_same_hash(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, user = with_two_users(small)
    small.accounts.change_user(user.id, disabled=True)
    verified = watch_hashing(small.accounts, monkeypatch)

    for email in (EMAIL, "nobody@example.org", OTHER):
        fail(small.accounts, 1, email)

    assert verified == ["$argon2id$v=19$m=19456,t=2,p=1"] * 3


def test_no_more_than_two_passwords_are_hashed_at_once(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    now: set[int] = set()
    pair = threading.Barrier(2)

    def look() -> None:
        now.add(threading.get_ident())
        pair.wait(10)
        at_once.append(len(now))
        pair.wait(10)
        now.discard(threading.get_ident())

    watch_hashing(small.accounts, monkeypatch, look)

    in_parallel(
        small,
        [partial(fail, small.accounts, 1, f"user{number}@example.org", str(number)) for number in range(8)],
    )

    assert len(at_once) == 8
    assert max(at_once) == 2


@pytest.mark.parametrize(
    ("networks", "looked_at"), [(1, LOGINS_OF_ONE), (STRANGERS_AT_ONCE, STRANGERS_AT_ONCE)]
)
def test_logins_that_wait_leave_threads_to_others(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch, networks: int, looked_at: int
) -> None:
    small.accounts.register(EMAIL, PASSWORD)
    go_on = threading.Event()
    refused = threading.Semaphore(0)
    watch_hashing(small.accounts, monkeypatch, lambda: go_on.wait(10))

    def guess(number: int) -> str:
        try:
            small.accounts.login(f"user{number}@example.org", WRONG, network=str(number % networks))
        except Unavailable:
            refused.release()
            return "refused"
        except Unauthenticated:
            return "looked at"
        return "let in"

    def let_go() -> str:
        for _ in range(6):
            refused.acquire(timeout=10)
        go_on.set()
        return "let go"

    outcomes = in_parallel(small, [let_go, *(partial(guess, number) for number in range(looked_at + 6))])

    assert (outcomes.count("refused"), outcomes.count("looked at")) == (6, looked_at)
    assert small.accounts.login(EMAIL, PASSWORD).text


def crowd_of_strangers(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch, networks: int, meanwhile: Callable[[], object]
) -> object:
    """What comes of a call while strangers hold all the places that these networks have, and both hashes."""
    go_on = threading.Event()
    refused = threading.Semaphore(0)
    crowd = 30
    held = min(LOGINS_OF_ONE * networks, STRANGERS_AT_ONCE)
    watch_hashing(small.accounts, monkeypatch, lambda: go_on.wait(10))

    def guess(number: int) -> None:
        with suppress(Unauthenticated):
            try:
                small.accounts.login(
                    f"user{number}@example.org", WRONG, network=f"192.0.2.{number % networks}"
                )
            except Unavailable:
                refused.release()

    def come() -> object:
        for _ in range(crowd - held):
            assert refused.acquire(timeout=10), "the crowd has more places than it should"
        threading.Timer(0.2, go_on.set).start()
        try:
            return meanwhile()
        except GptWorkerError as error:
            return type(error)

    return in_parallel(small, [come, *(partial(guess, number) for number in range(crowd))])[0]


def test_crowd_at_one_network_keeps_nobody_elsewhere_out(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.accounts.register(EMAIL, PASSWORD)

    outcome = crowd_of_strangers(
        small, monkeypatch, 1, lambda: small.accounts.login(EMAIL, PASSWORD, network="198.51.100.7")
    )

    assert isinstance(outcome, IssuedToken)


def test_crowd_at_many_networks_keeps_nobody_out_who_has_an_earlier_token(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, earlier = small.accounts.register(EMAIL, PASSWORD)

    outcome = crowd_of_strangers(
        small,
        monkeypatch,
        networks=20,
        meanwhile=lambda: small.accounts.login(EMAIL, PASSWORD, earlier.text, network="192.0.2.1"),
    )

    assert isinstance(outcome, IssuedToken)


def test_crowd_at_many_networks_keeps_nobody_from_a_new_password(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, mine = small.accounts.register(EMAIL, PASSWORD)

    outcome = crowd_of_strangers(
        small,
        monkeypatch,
        networks=20,
        meanwhile=lambda: small.accounts.change_password(user.id, mine.id, PASSWORD, NEW),
    )

    assert outcome is None


@pytest.fixture
def few_failures(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many failed logins a minute, as each costs a hash."""
    monkeypatch.setattr(accounts_module, "FAILED_LOGINS_PER_MINUTE", 20)
    return 20


def fail_everywhere(accounts: Accounts, times: int, network: str) -> None:
    for number in range(times):
        fail(accounts, 1, f"user{number}@example.org", network)


def test_network_where_logins_keep_failing_is_told_to_wait_without_a_hash(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch, few_failures: int
) -> None:
    _, earlier = small.accounts.register(EMAIL, PASSWORD)
    fail_everywhere(small.accounts, few_failures, "192.0.2.1")

    assert small.accounts.login(EMAIL, PASSWORD, network="198.51.100.7").text
    assert small.accounts.login(EMAIL, PASSWORD, earlier.text, network="192.0.2.1").text
    forbid_hashing(small.accounts, monkeypatch)
    with pytest.raises(TooMany) as refused:
        small.accounts.login(EMAIL, PASSWORD, network="192.0.2.1")
    assert refused.value.retry_after_s == pytest.approx(60 / few_failures)


def test_network_where_logins_failed_has_one_more_in_a_moment(
    accounts: Accounts, clock: FakeClock, few_failures: int
) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail_everywhere(accounts, few_failures, "192.0.2.1")
    clock.advance(60 / few_failures)

    assert accounts.login(EMAIL, PASSWORD, network="192.0.2.1").text
    fail(accounts, 1, "nobody@example.org", "192.0.2.1")
    with pytest.raises(TooMany):
        accounts.login(EMAIL, PASSWORD, network="192.0.2.1")


def test_good_logins_of_a_network_are_not_counted(accounts: Accounts, few_failures: int) -> None:
    accounts.register(EMAIL, PASSWORD)

    for _ in range(few_failures + 1):
        assert accounts.login(EMAIL, PASSWORD, network="192.0.2.1").text


def in_parallel(small: SmallApp, calls: list[Callable[[], object]]) -> list[object]:
    """What each call gives, each in a thread of its own."""

    def run(call: Callable[[], object]) -> object:
        with small.app.app_context():
            return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_after_five_wrong_passwords_even_the_right_one_is_not_looked_at(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail(accounts, 5)
    forbid_hashing(accounts, monkeypatch)

    with pytest.raises(TooMany) as caught:
        accounts.login(EMAIL, PASSWORD)

    assert caught.value.retry_after_s == pytest.approx(1.0)


def test_four_wrong_passwords_lock_nothing(accounts: Accounts) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail(accounts, 4)

    assert accounts.login(EMAIL, PASSWORD).text


def test_lock_doubles_with_each_further_wrong_password(accounts: Accounts, clock: FakeClock) -> None:
    fail(accounts, 5)
    clock.advance(1)
    fail(accounts, 1)

    with pytest.raises(TooMany) as caught:
        accounts.login(EMAIL, PASSWORD)

    assert caught.value.retry_after_s == pytest.approx(2.0)


def test_locked_address_opens_again_for_the_right_password(accounts: Accounts, clock: FakeClock) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail(accounts, 5)
    clock.advance(1)

    assert accounts.login(EMAIL, PASSWORD).text


def test_good_login_forgives_the_wrong_ones(accounts: Accounts) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail(accounts, 4)
    accounts.login(EMAIL, PASSWORD)

    fail(accounts, 4)

    assert accounts.login(EMAIL, PASSWORD).text


@pytest.mark.parametrize(("seconds", "locked"), [(14 * 60, True), (15 * 60, False)])
def test_wrong_passwords_count_for_fifteen_minutes(
    accounts: Accounts, clock: FakeClock, seconds: int, locked: bool
) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail(accounts, 4)
    clock.advance(seconds)
    fail(accounts, 1)

    try:
        accounts.login(EMAIL, PASSWORD)
    except TooMany:
        assert locked
    else:
        assert not locked


def test_one_locked_address_leaves_others_open(small: SmallApp) -> None:
    with_two_users(small)
    fail(small.accounts, 5)

    assert small.accounts.login(OTHER, PASSWORD).text


def test_lock_outlives_a_restart(small: SmallApp) -> None:
    fail(small.accounts, 5)

    restarted = Accounts(small.database, small.settings, small.modes, small.clock)

    with pytest.raises(TooMany):
        restarted.login(EMAIL, PASSWORD)


def test_many_guesses_at_once_are_not_free(small: SmallApp) -> None:
    small.accounts.register(EMAIL, PASSWORD)
    outcomes: list[type] = []

    def guess() -> None:
        with small.app.app_context():
            outcome: type = Unavailable
            while outcome is Unavailable:
                try:
                    small.accounts.login(EMAIL, WRONG)
                except GptWorkerError as error:
                    outcome = type(error)
            outcomes.append(outcome)

    threads = [threading.Thread(target=guess) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outcomes.count(Unauthenticated) == 5
    assert outcomes.count(TooMany) == 15


# The owner, while strangers guess


def keep_locked(accounts: Accounts, clock: FakeClock) -> None:
    """What a stranger does who wants the owner out: the next wrong password at the end of every lock."""
    fail(accounts, 5)
    for failures in range(5, 20):
        clock.advance(lock_s(failures))
        fail(accounts, 1)


def test_strangers_do_not_lock_out_an_owner_who_has_an_earlier_token(
    accounts: Accounts, clock: FakeClock
) -> None:
    user, earlier = accounts.register(EMAIL, PASSWORD)
    accounts.logout(earlier.id, user.id)
    keep_locked(accounts, clock)

    with pytest.raises(TooMany):
        accounts.login(EMAIL, PASSWORD)
    assert accounts.login(EMAIL, PASSWORD, earlier.text).text


def test_earlier_token_counts_also_when_it_has_expired(accounts: Accounts) -> None:
    _, earlier = accounts.register(EMAIL, PASSWORD)
    fail(accounts, 5)

    expired = signed({**claims_of(earlier.text), "exp": 1_000_000_000})

    assert accounts.login(EMAIL, PASSWORD, expired).text


def test_earlier_token_opens_nothing_by_itself(accounts: Accounts) -> None:
    _, earlier = accounts.register(EMAIL, PASSWORD)

    with pytest.raises(Unauthenticated):
        accounts.login(EMAIL, WRONG, earlier.text)


def test_wrong_passwords_with_an_earlier_token_lock_all_who_have_one(accounts: Accounts) -> None:
    _, first = accounts.register(EMAIL, PASSWORD)
    second = accounts.login(EMAIL, PASSWORD)
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            accounts.login(EMAIL, WRONG, first.text)

    with pytest.raises(TooMany):
        accounts.login(EMAIL, PASSWORD, second.text)

    assert accounts.login(EMAIL, PASSWORD).text


def test_login_of_the_owner_forgives_strangers_nothing(accounts: Accounts) -> None:
    _, earlier = accounts.register(EMAIL, PASSWORD)
    fail(accounts, 5)
    accounts.login(EMAIL, PASSWORD, earlier.text)

    with pytest.raises(TooMany):
        accounts.login(EMAIL, WRONG)


def test_token_of_another_user_or_of_nobody_counts_as_a_strangers(small: SmallApp) -> None:
    with_two_users(small)
    others = small.accounts.login(OTHER, PASSWORD)
    forged = signed(claims_of(others.text), b"x" * 32)
    fail(small.accounts, 5)

    for token in (others.text, forged, "no-token", ""):
        with pytest.raises(TooMany):
            small.accounts.login(EMAIL, PASSWORD, token)


def test_strangers_do_not_keep_the_owner_from_a_new_password(accounts: Accounts) -> None:
    user, mine = accounts.register(EMAIL, PASSWORD)
    fail(accounts, 5)

    accounts.change_password(user.id, mine.id, PASSWORD, NEW)

    assert accounts.login(EMAIL, NEW, mine.text).text


def test_strangers_of_one_network_do_not_lock_out_an_owner_in_another(
    accounts: Accounts, clock: FakeClock
) -> None:
    accounts.register(EMAIL, PASSWORD)
    keep_locked(accounts, clock)
    for _ in range(200):  # two days of the next wrong password at the end of every lock
        clock.advance(MAX_LOCK_S)
        fail(accounts, 1)

    with pytest.raises(TooMany):
        accounts.login(EMAIL, PASSWORD)
    assert accounts.login(EMAIL, PASSWORD, network="198.51.100.7").text


def fail_from(accounts: Accounts, networks: range, email: str = EMAIL) -> None:
    for number in networks:
        with pytest.raises(Unauthenticated):
            accounts.login(email, WRONG, network=f"203.0.113.{number}")


def test_guesses_from_many_networks_lock_an_address_for_all(accounts: Accounts) -> None:
    accounts.register(EMAIL, PASSWORD)
    fail_from(accounts, range(49))
    assert accounts.login(EMAIL, PASSWORD, network="198.51.100.7").text

    fail_from(accounts, range(49, 50))

    with pytest.raises(TooMany) as locked:
        accounts.login(EMAIL, PASSWORD, network="198.51.100.7")
    assert 0 < locked.value.retry_after_s <= 1


@pytest.mark.slow
def test_many_networks_that_go_on_lock_an_address_for_half_a_minute_at_a_time(
    accounts: Accounts, clock: FakeClock
) -> None:
    waits_s: list[float] = []
    for number in range(500):
        try:
            accounts.login(EMAIL, WRONG, network=f"192.0.2.{number}")
        except Unauthenticated:
            continue
        except TooMany as locked:
            waits_s.append(locked.retry_after_s)
            clock.advance(locked.retry_after_s)

    assert max(waits_s) == 32


def test_name_of_one_count_is_never_that_of_another(small: SmallApp) -> None:
    small.accounts.register(EMAIL, PASSWORD)

    fail_from(small.accounts, range(50), f"192.0.2.1\n{EMAIL}")

    assert small.accounts.login(EMAIL, PASSWORD, network="192.0.2.1").text


def failure_rows(small: SmallApp) -> list[LoginFailureRow]:
    with small.database.read() as session:
        return session.query(LoginFailureRow).all()


def test_addresses_of_wrong_passwords_are_kept_as_hashes(small: SmallApp) -> None:
    fail(small.accounts, 1)

    names = [row.email_hash for row in failure_rows(small)]
    assert [len(name) for name in names] == [64, 64]
    assert not any("example" in name for name in names)


def test_sweep_drops_wrong_passwords_of_an_hour_ago(small: SmallApp, clock: FakeClock) -> None:
    fail(small.accounts, 1, "nobody@example.org")
    clock.advance(3599)
    small.accounts.sweep()
    assert len(failure_rows(small)) == 2

    clock.advance(2)
    small.accounts.sweep()

    assert failure_rows(small) == []


def test_password_is_hashed_anew_when_the_parameters_have_changed(small: SmallApp) -> None:
    user, _ = small.accounts.register(EMAIL, PASSWORD)
    old_hash = argon2.PasswordHasher(1, 8192, 1).hash(PASSWORD)
    with small.database.write() as session:
        session.get_one(UserRow, user.id).password_hash = old_hash

    small.accounts.login(EMAIL, PASSWORD)

    with small.database.read() as session:
        assert session.get_one(UserRow, user.id).password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert small.accounts.login(EMAIL, PASSWORD).text


# Tokens


def test_logout_ends_that_token_alone(accounts: Accounts) -> None:
    user, first = accounts.register(EMAIL, PASSWORD)
    second = accounts.login(EMAIL, PASSWORD)

    accounts.logout(first.id, user.id)

    with pytest.raises(Unauthenticated):
        accounts.authenticate(first.text)
    assert accounts.authenticate(second.text).token_id == second.id


def test_token_that_the_database_does_not_have_may_be_of_another_one(accounts: Accounts) -> None:
    user, token = accounts.register(EMAIL, PASSWORD)
    accounts.logout(token.id, user.id)

    with pytest.raises(
        Unauthenticated, match=r"not known here: it may .* revoked, or belong to another database"
    ):
        accounts.authenticate(token.text)


def test_token_of_another_database_is_told_where_there_is_no_account_yet(
    accounts: Accounts, tmp_path: Path
) -> None:
    _, token = accounts.register(EMAIL, PASSWORD)
    new = SmallApp(tmp_path / "new")

    with new.app.app_context(), pytest.raises(Unauthenticated, match=r"not known here.* POST /register"):
        new.accounts.authenticate(token.text)
    new.close()


def test_token_ends_by_the_clock(accounts: Accounts, clock: FakeClock) -> None:
    _, token = accounts.register(EMAIL, PASSWORD)
    clock.advance(24 * 3600)

    with pytest.raises(Unauthenticated):
        accounts.authenticate(token.text)


def test_sweep_drops_expired_tokens_alone(small: SmallApp, clock: FakeClock) -> None:
    _, first = small.accounts.register(EMAIL, PASSWORD)
    endless = small.accounts.create_api_token(first.id, "script")
    clock.advance(24 * 3600)
    new = small.accounts.login(EMAIL, PASSWORD)

    small.accounts.sweep()

    with small.database.read() as session:
        kept = {row.id for row in session.query(TokenRow)}

    assert kept == {endless.id, new.id}


def claims_of(token: str) -> dict[str, object]:
    claims: dict[str, object] = jwt.decode(token, options={"verify_signature": False})
    return claims


Forge = Callable[[dict[str, object]], str]


def signed(
    claims: dict[str, object], key: bytes = derive(APP_KEY, "tokens"), algorithm: str = "HS256"
) -> str:
    return jwt.encode(claims, key, algorithm)


def without(claims: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in claims.items() if key != name}


def signed_under(claims: dict[str, object], /, **header: object) -> str:
    """Signed with the right key, under a header that says something else."""
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, claims)]
    signature = hmac.digest(derive(APP_KEY, "tokens"), b".".join(parts), hashlib.sha256)
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


def resigned(claims: dict[str, object], signature: bytes) -> str:
    """A good token with another signature."""
    return f"{signed(claims).rpartition('.')[0]}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


FORGERIES: dict[str, Forge] = {
    "another key": lambda claims: signed(claims, b"x" * 32),
    "the key of another purpose": lambda claims: signed(claims, derive(APP_KEY, "webhook")),
    "another algorithm": lambda claims: signed(claims, derive(APP_KEY, "tokens") * 2, "HS512"),
    "RS256 with the secret as its key": lambda claims: signed_under(claims, alg="RS256", typ="JWT"),
    "HS512 in name": lambda claims: signed_under(claims, alg="HS512", typ="JWT"),
    "an algorithm in other letters": lambda claims: signed_under(claims, alg="hs256", typ="JWT"),
    "no algorithm": lambda claims: jwt.encode(claims, "", "none"),
    "no algorithm, in other letters": lambda claims: signed_under(claims, alg="nOnE"),
    "no algorithm named": lambda claims: signed_under(claims, typ="JWT"),
    "an extension that is not known": lambda claims: signed_under(claims, alg="HS256", crit=["exp"]),
    "APP_KEY itself": lambda claims: signed(claims, APP_KEY.encode()),
    "another APP_KEY": lambda claims: signed(claims, derive(APP_KEY[::-1], "tokens")),
    "an empty signature": lambda claims: resigned(claims, b""),
    "a signature of zeros": lambda claims: resigned(claims, bytes(32)),
    "no signature": lambda claims: signed(claims).rpartition(".")[0],
    "a changed claim": lambda claims: ".".join(
        [*signed({**claims, "sub": new_id()}).split(".")[:2], signed(claims).split(".")[2]]
    ),
    "a claim that is no text": lambda claims: signed({**claims, "jti": [claims["jti"]]}),
    "an end that is no number": lambda claims: signed({**claims, "exp": "never"}),
    "another audience": lambda claims: signed({**claims, "aud": "somebody-else"}),
    "no audience": lambda claims: signed(without(claims, "aud")),
    "no end": lambda claims: signed(without(claims, "exp")),
    "no id": lambda claims: signed(without(claims, "jti")),
    "an empty id": lambda claims: signed({**claims, "jti": ""}),
    "an unknown id": lambda claims: signed({**claims, "jti": new_id()}),
    "somebody else's name": lambda claims: signed({**claims, "sub": new_id()}),
    "no name": lambda claims: signed(without(claims, "sub")),
    "expired": lambda claims: signed({**claims, "exp": 1_000_000_000}),
    "a deep header": lambda claims: jwt.utils.base64url_encode(b"[" * 1400).decode() + ".e30.e30",
    "far too long": lambda claims: signed({**claims, "pad": "x" * 3000}),
    "no token": lambda claims: "no-token",
    "not ASCII": lambda claims: "ä.ö.ü",
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_token_that_is_not_ours_is_refused(accounts: Accounts, forge: Forge) -> None:
    _, token = accounts.register(EMAIL, PASSWORD)
    claims = claims_of(token.text)
    assert accounts.authenticate(signed(claims)).token_id == token.id

    with pytest.raises(Unauthenticated):
        accounts.authenticate(forge(claims))


def test_api_token_ends_when_asked_for(accounts: Accounts, clock: FakeClock) -> None:
    _, login = accounts.register(EMAIL, PASSWORD)
    token = accounts.create_api_token(login.id, "script", 2)
    assert accounts.authenticate(token.text).caller.email == EMAIL

    clock.advance(2 * 86_400)

    with pytest.raises(Unauthenticated):
        accounts.authenticate(token.text)


def test_api_token_without_an_end_works_for_years(accounts: Accounts, clock: FakeClock) -> None:
    _, login = accounts.register(EMAIL, PASSWORD)
    token = accounts.create_api_token(login.id, "script")

    clock.advance(5 * 365 * 86_400)

    assert token.expires_at is None
    assert accounts.authenticate(token.text).token_id == token.id


def test_list_of_tokens_goes_page_by_page_newest_first_without_logins(accounts: Accounts) -> None:
    user, login = accounts.register(EMAIL, PASSWORD)
    ids = sorted((accounts.create_api_token(login.id, f"script {n}").id for n in range(3)), reverse=True)

    first = accounts.list_api_tokens(user.id, limit=2)
    second = accounts.list_api_tokens(user.id, before=first.next_cursor, limit=2)

    assert [token.id for token in first.items] == ids[:2]
    assert [token.id for token in second.items] == ids[2:]
    assert second.next_cursor is None


def test_last_page_that_is_full_has_no_next(accounts: Accounts) -> None:
    user, login = accounts.register(EMAIL, PASSWORD)
    accounts.create_api_token(login.id, "script")

    assert accounts.list_api_tokens(user.id, limit=1).next_cursor is None


def test_token_of_another_user_is_not_found(small: SmallApp) -> None:
    admin, _ = with_two_users(small)
    login = small.accounts.login(OTHER, PASSWORD)
    token = small.accounts.create_api_token(login.id, "script")

    with pytest.raises(NotFound):
        small.accounts.delete_token(admin.id, token.id)

    assert small.accounts.authenticate(token.text).token_id == token.id


def test_deleted_token_ends(accounts: Accounts) -> None:
    user, login = accounts.register(EMAIL, PASSWORD)
    token = accounts.create_api_token(login.id, "script")

    accounts.delete_token(user.id, token.id)

    with pytest.raises(Unauthenticated):
        accounts.authenticate(token.text)


def test_new_password_ends_every_other_token(accounts: Accounts) -> None:
    user, mine = accounts.register(EMAIL, PASSWORD)
    others = [accounts.login(EMAIL, PASSWORD), accounts.create_api_token(mine.id, "script")]

    accounts.change_password(user.id, mine.id, PASSWORD, NEW)

    with pytest.raises(Unauthenticated):  # by a request that came in before the change
        accounts.create_api_token(others[0].id, "a thief's")
    assert accounts.authenticate(mine.text).token_id == mine.id
    for other in others:
        with pytest.raises(Unauthenticated):
            accounts.authenticate(other.text)
    assert accounts.login(EMAIL, NEW).text
    fail(accounts, 1)


def test_wrong_old_password_changes_nothing_and_counts(accounts: Accounts) -> None:
    user, mine = accounts.register(EMAIL, PASSWORD)

    for _ in range(5):
        with pytest.raises(Forbidden):
            accounts.change_password(user.id, mine.id, WRONG, NEW)
    with pytest.raises(TooMany):
        accounts.change_password(user.id, mine.id, PASSWORD, NEW)

    assert accounts.login(EMAIL, PASSWORD).text


# An admin's work


def test_disabled_user_is_out_at_once_and_in_again_when_enabled(small: SmallApp) -> None:
    _, user = with_two_users(small)
    login = small.accounts.login(OTHER, PASSWORD)
    tokens = [login, small.accounts.create_api_token(login.id, "script")]

    small.accounts.change_user(user.id, disabled=True)

    assert_ended(small.accounts, tokens)
    small.accounts.change_user(user.id, disabled=False)
    assert_ended(small.accounts, tokens)
    assert small.accounts.login(OTHER, PASSWORD).text


def assert_ended(accounts: Accounts, tokens: list[IssuedToken]) -> None:
    for token in tokens:
        with pytest.raises(Unauthenticated):
            accounts.authenticate(token.text)
        with pytest.raises(Unauthenticated):  # by a request that came in before
            accounts.create_api_token(token.id, "another")


def test_tokens_of_a_deleted_user_end_and_do_not_come_back_with_the_address(small: SmallApp) -> None:
    admin, user = with_two_users(small)
    login = small.accounts.login(OTHER, PASSWORD)
    tokens = [login, small.accounts.create_api_token(login.id, "script")]

    small.accounts.delete_user(user.id, admin.id)

    assert_ended(small.accounts, tokens)
    small.modes.change(registration=True)
    small.accounts.register(OTHER, PASSWORD)
    assert_ended(small.accounts, tokens)


def test_new_role_counts_with_the_next_request(small: SmallApp) -> None:
    _, user = with_two_users(small)
    token = small.accounts.login(OTHER, PASSWORD)

    small.accounts.change_user(user.id, role=Role.ADMIN)

    assert small.accounts.authenticate(token.text).caller.is_admin


@pytest.mark.parametrize("disabled_other_admin", [False, True])
def test_last_enabled_admin_stays(small: SmallApp, disabled_other_admin: bool) -> None:
    admin, user = with_two_users(small)
    if disabled_other_admin:
        small.accounts.change_user(user.id, role=Role.ADMIN, disabled=True)

    with pytest.raises(Conflict):
        small.accounts.change_user(admin.id, role=Role.USER)
    with pytest.raises(Conflict):
        small.accounts.change_user(admin.id, disabled=True)
    with pytest.raises(Conflict):
        small.accounts.delete_user(admin.id, new_id())

    assert small.accounts.me(admin.id) == admin


def test_admin_may_go_when_there_is_another(small: SmallApp) -> None:
    admin, user = with_two_users(small)
    small.accounts.change_user(user.id, role=Role.ADMIN)

    with pytest.raises(Conflict):
        small.accounts.delete_user(admin.id, admin.id)
    small.accounts.delete_user(admin.id, user.id)

    assert [left.id for left in small.accounts.list_users().items] == [user.id]


def test_deleted_users_jobs_become_the_deleting_admins(small: SmallApp) -> None:
    admin, user = with_two_users(small)
    token = small.accounts.login(OTHER, PASSWORD)
    job = JobRow(
        id=new_id(),
        owner_id=user.id,
        status=JobStatus.QUEUED,
        model="m",
        delivery="inline",
        settings={},
        meta={},
        created_at=small.clock(),
        deadline_at=small.clock(),
    )
    with small.database.write() as session:
        session.add(job)

    small.accounts.delete_user(user.id, admin.id)

    with small.database.read() as session:
        assert session.get_one(JobRow, job.id).owner_id == admin.id
    with pytest.raises(Unauthenticated):
        small.accounts.authenticate(token.text)


def test_unknown_user_is_not_found(accounts: Accounts) -> None:
    with pytest.raises(NotFound):
        accounts.change_user(new_id(), disabled=True)
    with pytest.raises(NotFound):
        accounts.delete_user(new_id(), new_id())
