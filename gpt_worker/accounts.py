"""Users, their passwords and their tokens: who may come in, and as whom.

Passwords are hashed with argon2id. A token is a JWT that counts only while the database has a row for it, so
that revoking one, disabling a user or changing a password takes effect with the next request. Wrong passwords are
counted in the database, per address and network they come from, and per address alone; those of whoever brings a
token of the account are counted apart. So strangers who keep guessing don't keep its owner out; nor do those who
keep many logins going, since places and hashes are shared out by network, and some are kept for who has a token.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Generic, TypeVar

import argon2
import jwt
from flask import Flask
from flask_jwt_extended import JWTManager, create_access_token, decode_token
from flask_jwt_extended.exceptions import JWTExtendedException
from sqlalchemy.orm import Session

from config import PASSWORD_LENGTHS, Settings, derive
from gpt_worker.db import Database
from gpt_worker.domain import Caller, Role, new_id, utc_now
from gpt_worker.errors import (
    Conflict,
    FieldError,
    Forbidden,
    Invalid,
    NotFound,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from gpt_worker.models import LoginFailureRow, TokenRow, UserRow
from gpt_worker.modes import ModeBoard, close_registration, read_modes
from gpt_worker.store import accounts as store
from gpt_worker.user_limits import Party, PartyPlaces, PartyTurns, RequestBuckets

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_EMAIL_LENGTH = 254  # RFC 5321, section 4.5.3.1.3, less the angle brackets
EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+")

AUDIENCE = "gpt-worker"
MAX_TOKEN_LENGTH = 2048
LOGIN_LIFETIME = timedelta(hours=24)
ENDLESS_LIFETIME = timedelta(days=3650)  # of a token "without an end": the JWT must have one

FREE_FAILURES = 5  # from one network, or with a token
FREE_FAILURES_ANYWHERE = 50  # more than one network has in its window, so that it alone locks nobody else out
FAILURE_WINDOW = timedelta(minutes=15)
MAX_LOCK_S = 15 * 60
KEEP_FAILURES = timedelta(hours=1)  # longer than any lock and the window after it

ARGON2_MEMORY_KIB = 19 * 1024  # with the two below: OWASP's least for argon2id
ARGON2_PASSES = 2
ARGON2_LANES = 1
HASHES_AT_ONCE = 2
# Those that wait for a hash too; together fewer than the threads kept for short requests.
STRANGERS_AT_ONCE = 16
KNOWN_AT_ONCE = 8
LOGINS_OF_ONE = 4  # network of strangers, or user who is known
FAILED_LOGINS_PER_MINUTE = 240  # of the strangers of one network
MAX_HASH_WAIT_S = 10

SETUP_TOKEN_FILE = "setup-token"


@dataclass(frozen=True, slots=True)
class User:
    """An account, without its password."""

    id: str
    email: str
    role: Role
    disabled: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Token:
    """A token that counts; `expires_at` None is a script's token without an end."""

    id: str
    name: str | None
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class IssuedToken(Token):
    """A token at the one moment its `text` is known."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authenticated:
    """Who a token stands for, and which token it was."""

    caller: Caller
    token_id: str


@dataclass(frozen=True, slots=True)
class FailureCount:
    """One count of wrong passwords; its name tells nobody whose they are."""

    name: str
    free: int = FREE_FAILURES
    drains: bool = False
    """As many as are free are forgiven in each window, evenly; else all together, after a window without any."""

    def so_far(self, failure: LoginFailureRow | None, now: datetime) -> int:
        """Those that still count."""
        if failure is None:
            return 0
        if self.drains:
            elapsed = max(now - failure.last_failed_at, timedelta(0))  # a clock may be set back
            return max(0, failure.failures - int(elapsed * self.free / FAILURE_WINDOW))
        return 0 if _is_forgiven(failure, now) else failure.failures


@dataclass(frozen=True, slots=True)
class Comer(Party):
    """Whoever shows a password: with whom they share places and turns, and the counts of their wrong ones."""

    counts: Sequence[FailureCount]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, newest first, and the cursor of the next."""

    items: Sequence[T]
    next_cursor: str | None


def normalise_email(email: str) -> str:
    """The one spelling under which an address is kept."""
    return email.strip().casefold()


def lock_s(failures: int, free: int = FREE_FAILURES) -> int:
    """Seconds that an address is locked for after so many wrong passwords: from 1 s to 15 min, doubling."""
    if failures < free:
        return 0
    return min(1 << min(failures - free, 30), MAX_LOCK_S)


def install_tokens(app: Flask, settings: Settings) -> None:
    """Tell flask-jwt-extended how our tokens are made; making and reading one needs this app's context."""
    app.config.update(
        JWT_SECRET_KEY=derive(settings.app_key, "tokens"),
        JWT_ALGORITHM="HS256",
        JWT_DECODE_ALGORITHMS=["HS256"],
        JWT_ENCODE_AUDIENCE=AUDIENCE,
        JWT_DECODE_AUDIENCE=AUDIENCE,
        JWT_ENCODE_NBF=False,
        JWT_TOKEN_LOCATION=["headers"],
        JWT_ACCESS_TOKEN_EXPIRES=LOGIN_LIFETIME,
    )
    JWTManager(app)


class Passwords:
    """argon2id, at most two hashes at once: each takes 19 MiB and a core."""

    def __init__(self) -> None:
        self._hasher = argon2.PasswordHasher(ARGON2_PASSES, ARGON2_MEMORY_KIB, ARGON2_LANES)
        self._turns = PartyTurns(HASHES_AT_ONCE)
        self._nobodys_hash = self._hasher.hash(secrets.token_urlsafe())

    def hash(self, password: str, party: Party) -> str:
        with self._turns.take(party, MAX_HASH_WAIT_S):
            return self._hasher.hash(password)

    def match(self, password_hash: str | None, password: str, party: Party) -> bool:
        """Whether it is the password; without a hash (there is no such user) no, but after the same work."""
        with self._turns.take(party, MAX_HASH_WAIT_S):
            try:
                self._hasher.verify(password_hash or self._nobodys_hash, password)
            except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
                return False
        return password_hash is not None

    def outdated(self, password_hash: str) -> bool:
        return self._hasher.check_needs_rehash(password_hash)


class Accounts:
    """The rules of who may come in. Methods that make or read a token run within the app's context."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        modes: ModeBoard,
        clock: Callable[[], datetime] = utc_now,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._settings = settings
        self._modes = modes
        self._clock = clock
        self._passwords = Passwords()
        self._address_key = derive(settings.app_key, "login failures")
        self._network_key = derive(settings.app_key, "login failures of one network")
        self._user_key = derive(settings.app_key, "login failures of those who have a token")
        # By whether they are known: who has a token waits for nothing that a stranger holds.
        self._counter_locks = {known: [threading.Lock() for _ in range(64)] for known in (True, False)}
        self._places = {
            True: PartyPlaces(KNOWN_AT_ONCE, LOGINS_OF_ONE),
            False: PartyPlaces(STRANGERS_AT_ONCE, LOGINS_OF_ONE),
        }
        self._failed_logins = RequestBuckets(now_s=now_s)  # of the strangers of a network

    # Starting

    def prepare(self) -> None:
        """At start, while there is no user: add ADMIN_EMAIL's account, or in production a set-up token."""
        with self._database.read() as session:
            empty = not store.any_user(session)
        if not empty:
            self._setup_token_path.unlink(missing_ok=True)
        elif self._settings.admin_email and self._settings.admin_password:
            self._add_first_admin(self._settings.admin_email, self._settings.admin_password)
        elif self._settings.production:
            self._write_setup_token()
            logger.warning(
                "There is no account yet: register the first with the set-up token in %s.",
                self._setup_token_path,
                extra={"action": "setup_token_written"},
            )

    def _add_first_admin(self, email: str, password: str) -> None:
        password_hash = self._passwords.hash(password, Party("", is_known=True))
        with self._database.write() as session:
            if store.any_user(session):
                return
            user = self._add_user(session, normalise_email(email), password_hash, Role.ADMIN)
        self._modes.forget()
        logger.info("ADMIN_EMAIL's account was created.", extra={"action": "registered", "user_id": user.id})

    def sweep(self) -> None:
        """Delete tokens that have expired and wrong passwords that are forgiven; for the janitor."""
        now = self._clock()
        with self._database.write() as session:
            store.delete_expired_tokens(session, now)
            store.delete_old_login_failures(session, now - KEEP_FAILURES)

    @property
    def _setup_token_path(self) -> Path:
        return self._settings.data_dir / SETUP_TOKEN_FILE

    def _write_setup_token(self) -> None:
        path = self._setup_token_path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if self._read_setup_token():  # of an earlier start: somebody may have copied it already
                return
            path.unlink()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_setup_token(self) -> str:
        try:
            return self._setup_token_path.read_text("ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    # Coming in and going out

    def register(
        self, email: str, password: str, setup_token: str | None = None, network: str = ""
    ) -> tuple[User, IssuedToken]:
        """Open an account and log it in; the first one is the admin's and turns registration off.

        Raises:
            Unavailable: too many logins at once, of this `network` or of all.
            Invalid: not an e-mail address, or a password of a wrong length.
            Forbidden: registration is off, or production's first account lacks the set-up token.
            Conflict: the address has an account.
        """
        address = normalise_email(email)
        _check_email(address)
        _check_password("password", password)
        role = self._look_whether_to_admit(address, setup_token)
        # Many may come for the first account at once: they wait, and learn that they are late.
        stranger = Party(network, is_known=False)
        with self._places[False].hold(stranger, MAX_HASH_WAIT_S if role is Role.ADMIN else 0):
            self._look_whether_to_admit(address, setup_token)
            password_hash = self._passwords.hash(password, stranger)
        with self._database.write() as session:
            role = self._admit(session, address, setup_token)
            user = self._add_user(session, address, password_hash, role)
            token = self._issue(session, user.id, None, LOGIN_LIFETIME)
        if role is Role.ADMIN:
            self._modes.forget()
            self._setup_token_path.unlink(missing_ok=True)
        logger.info("An account was registered.", extra={"action": "registered", "user_id": user.id})
        return user, token

    def _look_whether_to_admit(self, address: str, setup_token: str | None) -> Role:
        """Before the costly hash; what counts is the look in the transaction that adds the account."""
        with self._database.read() as session:
            return self._admit(session, address, setup_token)

    def _admit(self, session: Session, address: str, setup_token: str | None) -> Role:
        if not store.any_user(session):
            if self._settings.production and not self._is_setup_token(setup_token):
                raise Forbidden("The first account needs the set-up token: the log names its file.")
            return Role.ADMIN
        if not read_modes(session).registration:
            raise Forbidden("Registration is off; an admin can turn it on.")
        if store.find_user_by_email(session, address) is not None:
            raise Conflict("This address has an account.")
        return Role.USER

    def _is_setup_token(self, setup_token: str | None) -> bool:
        expected, given = self._read_setup_token(), setup_token or ""
        return bool(expected) and hmac.compare_digest(expected.encode(), given.encode())

    def _add_user(self, session: Session, address: str, password_hash: str, role: Role) -> User:
        row = UserRow(
            id=new_id(),
            email=address,
            password_hash=password_hash,
            role=role.value,
            disabled=False,
            created_at=self._clock(),
        )
        store.add_user(session, row)
        if role is Role.ADMIN:
            close_registration(session)
        return _user(row)

    def login(
        self, email: str, password: str, earlier_token: str | None = None, network: str = ""
    ) -> IssuedToken:
        """A token for 24 hours.

        Args:
            earlier_token: of the account, even one that has ended. It opens nothing: it shows that its bearer is no
                stranger, and must not be locked out by them (OWASP, "Slow Down Online Guessing Attacks with Device
                Cookies").
            network: where the request comes from. Wrong passwords from elsewhere lock it only when they are many, and
                logins from elsewhere take only their own places and turns.

        Raises:
            Unauthenticated: wrong, unknown or disabled, which can't be told apart.
            TooMany: locked after wrong passwords, or too many logins of strangers have failed from this network; even
                the right one is not looked at.
            Unavailable: too many logins at once.
        """
        address = normalise_email(email)
        known_id = self._user_of_earlier(earlier_token, address) if earlier_token else None
        comer = self._holder(known_id) if known_id else self._stranger(address, network)
        with self._proven(address, password, comer) as (session, user):
            return self._issue(session, user.id, None, LOGIN_LIFETIME)

    def _user_of_earlier(self, token: str, address: str) -> str | None:
        """The user of this address, if the token was ever theirs."""
        try:
            _, user_id = _read_claims(token, allow_expired=True)
        except Unauthenticated:
            return None
        with self._database.read() as session:
            user = store.find_user_by_email(session, address)
        return user_id if user is not None and user.id == user_id else None

    def logout(self, token_id: str, user_id: str) -> None:
        with self._database.write() as session:
            store.delete_token(session, user_id, token_id)

    def authenticate(self, token: str) -> Authenticated:
        """Whose token this is.

        Raises:
            Unauthenticated: not ours, expired, not known here, or its user is disabled.
        """
        token_id, user_id = _read_claims(token)
        with self._database.read() as session:
            user = self._bearer(session, token_id)
        if user.id != user_id:
            raise _revoked()
        return Authenticated(Caller(user.id, user.email, Role(user.role)), token_id)

    def admit_again(self, token_id: str | None, session: Session) -> None:
        """Whether who was let in with this token, or with None as the anonymous user, would be now.

        Asked in the transaction that stores what they have sent since, so that nothing comes of it when it has ended.
        Raises Unauthenticated.
        """
        if token_id is not None:
            self._bearer(session, token_id)
        elif read_modes(session).auth:
            raise Unauthenticated("This needs a token by now: Authorization: Bearer …")

    def _bearer(self, session: Session, token_id: str) -> UserRow:
        """The user of a token that counts. Raises Unauthenticated."""
        found = store.find_token(session, token_id)
        if found is None:
            raise _unknown(is_empty=not store.any_user(session))
        row, user = found
        if user.disabled:
            raise _revoked()
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("The token has expired.")
        return user

    # One's own account

    def me(self, user_id: str) -> User:
        with self._database.read() as session:
            return _user(_present(store.find_user(session, user_id)))

    def change_password(self, user_id: str, token_id: str, old: str, new: str) -> None:
        """Set a new password, and end every token but the one in use.

        Raises:
            Invalid: the new password has a wrong length.
            Forbidden: the old password is wrong.
            TooMany: locked after wrong passwords of those who have a token.
            Unavailable: too many logins at once.
        """
        _check_password("new", new)
        address = self.me(user_id).email
        try:
            with self._proven(address, old, self._holder(user_id), hash_instead=new) as (session, user):
                store.delete_tokens(session, user.id, but=token_id)
        except Unauthenticated as error:
            raise Forbidden("The old password is wrong.") from error
        logger.info("A password was changed.", extra={"action": "password_changed", "user_id": user_id})

    def create_api_token(self, token_id: str, name: str, expires_in_days: int | None = None) -> IssuedToken:
        """A long-lived token for scripts, of the user whose token `token_id` is; its text is never shown again.

        Raises Unauthenticated when that token has been revoked: a new one must not outlive a change of the password.
        """
        lifetime = None if expires_in_days is None else timedelta(days=expires_in_days)
        with self._database.write() as session:
            user_id = self._bearer(session, token_id).id
            token = self._issue(session, user_id, name, lifetime)
        logger.info("A token was created.", extra={"action": "token_created", "user_id": user_id})
        return token

    def list_api_tokens(self, user_id: str, *, before: str | None = None, limit: int = 20) -> Page[Token]:
        with self._database.read() as session:
            rows = store.list_api_tokens(session, user_id, before=before, limit=limit + 1)
        return _page([_token(row) for row in rows], limit, lambda token: token.id)

    def delete_token(self, user_id: str, token_id: str) -> None:
        with self._database.write() as session:
            deleted = store.delete_token(session, user_id, token_id)
        if not deleted:
            raise NotFound("There is no such token.")

    # An admin's work

    def list_users(self, *, before: str | None = None, limit: int = 20) -> Page[User]:
        with self._database.read() as session:
            rows = store.list_users(session, before=before, limit=limit + 1)
        return _page([_user(row) for row in rows], limit, lambda user: user.id)

    def change_user(self, user_id: str, *, role: Role | None = None, disabled: bool | None = None) -> User:
        """Give a role, disable or enable; disabling ends the user's tokens at once.

        Raises:
            NotFound: there is no such user.
            Conflict: it would leave the service without an enabled admin.
        """
        with self._database.write() as session:
            user = _present(store.find_user(session, user_id))
            if role is Role.USER or disabled:
                _keep_an_admin(session, user)
            if role is not None:
                user.role = role.value
            if disabled is not None:
                user.disabled = disabled
            if disabled:
                store.delete_tokens(session, user_id)
        logger.info("An account was changed.", extra={"action": "user_changed", "user_id": user_id})
        return _user(user)

    def delete_user(self, user_id: str, heir_id: str) -> None:
        """Delete the account and its tokens; its jobs and deliveries become the heir's, so that nobody else sees them.

        Raises:
            NotFound: there is no such user.
            Conflict: it would leave the service without an enabled admin.
        """
        with self._database.write() as session:
            user = _present(store.find_user(session, user_id))
            _keep_an_admin(session, user)
            if user_id == heir_id:
                raise Conflict("Another admin has to delete this account: its jobs would have no owner.")
            store.delete_user(session, user_id, heir_id)
        logger.info("An account was deleted.", extra={"action": "user_deleted", "user_id": user_id})

    # Passwords and tokens

    @contextmanager
    def _proven(
        self, address: str, password: str, comer: Comer, *, hash_instead: str | None = None
    ) -> Iterator[tuple[Session, UserRow]]:
        """A writing transaction for the user whose password this is; `hash_instead` becomes the new password.

        One look at a time for a count of wrong passwords, so that a hundred guesses at once aren't a hundred free
        ones. The last of the counts is the widest; a good password forgives those of the first.
        """
        locks = self._counter_locks[comer.is_known]
        lock = locks[int(comer.counts[-1].name, 16) % len(locks)]
        with self._places[comer.is_known].hold(comer), _held(lock, MAX_HASH_WAIT_S):
            self._take_from_network(comer)
            user = self._check(comer, address, password)
            self._give_back_to_network(comer)
            new_hash = None
            if hash_instead is not None:
                new_hash = self._passwords.hash(hash_instead, comer)
            elif self._passwords.outdated(user.password_hash):
                new_hash = self._passwords.hash(password, comer)
            with self._database.write() as session:
                current = store.find_user(session, user.id)
                if current is None or current.disabled or current.password_hash != user.password_hash:
                    raise _wrong()  # changed while we were hashing
                store.clear_login_failures(session, comer.counts[0].name)
                if new_hash is not None:
                    current.password_hash = new_hash
                yield session, current

    def _stranger(self, address: str, network: str) -> Comer:
        """Counted for this network, and for all, so that many networks have no more than a few guesses each."""
        here = hmac.new(self._network_key, f"{network}\n{address}".encode(), hashlib.sha256).hexdigest()
        anywhere = hmac.new(self._address_key, address.encode(), hashlib.sha256).hexdigest()
        counts = FailureCount(here), FailureCount(anywhere, FREE_FAILURES_ANYWHERE, drains=True)
        return Comer(network, False, counts)

    def _holder(self, user_id: str) -> Comer:
        """Counted for all who bring a token of this user, since one a token would give five more guesses with each."""
        name = hmac.new(self._user_key, user_id.encode(), hashlib.sha256).hexdigest()
        return Comer(user_id, True, (FailureCount(name),))

    def _take_from_network(self, comer: Comer) -> None:
        """Count a login of strangers as failed, until it is known. Raises TooMany when that is one too many."""
        if comer.is_known:
            return
        wait_s = self._failed_logins.take(comer.name, FAILED_LOGINS_PER_MINUTE)
        if wait_s > 0:
            raise TooMany("Too many logins from this network have failed.", wait_s)

    def _give_back_to_network(self, comer: Comer) -> None:
        if not comer.is_known:
            self._failed_logins.give_back(comer.name, FAILED_LOGINS_PER_MINUTE)

    def _check(self, comer: Comer, address: str, password: str) -> UserRow:
        counts = comer.counts
        with self._database.read() as session:
            failures = [store.find_login_failure(session, count.name) for count in counts]
            user = store.find_user_by_email(session, address)
        now = self._clock()
        locked_s = max(_locked_s(failure, now) for failure in failures)
        if locked_s > 0:
            raise TooMany("Too many wrong passwords for this address.", locked_s)
        matches = self._passwords.match(
            user.password_hash if user else None, password[: max(PASSWORD_LENGTHS) + 1], comer
        )
        if user is None or user.disabled or not matches:
            self._count_failure(counts)
            raise _wrong()
        return user

    def _count_failure(self, counts: Sequence[FailureCount]) -> None:
        now = self._clock()
        longest_s = 0
        with self._database.write() as session:
            for count in counts:
                failures = count.so_far(store.find_login_failure(session, count.name), now) + 1
                duration_s = lock_s(failures, count.free)
                longest_s = max(longest_s, duration_s)
                row = LoginFailureRow(
                    email_hash=count.name,
                    failures=failures,
                    last_failed_at=now,
                    locked_until=now + timedelta(seconds=duration_s) if duration_s else None,
                )
                store.save_login_failure(session, row)
        if longest_s:
            logger.info(
                "An address is locked for %d s after wrong passwords.",
                longest_s,
                extra={"action": "login_locked"},
            )

    def _issue(
        self, session: Session, user_id: str, name: str | None, lifetime: timedelta | None
    ) -> IssuedToken:
        token_id, now = new_id(), self._clock()
        expires_at = None if lifetime is None else (now + lifetime).replace(microsecond=0)
        text = create_access_token(
            user_id, additional_claims={"jti": token_id, "exp": expires_at or now + ENDLESS_LIFETIME}
        )
        store.add_token(
            session, TokenRow(id=token_id, user_id=user_id, name=name, created_at=now, expires_at=expires_at)
        )
        return IssuedToken(token_id, name, now, expires_at, text)


def _check_email(address: str) -> None:
    if len(address) > MAX_EMAIL_LENGTH or not EMAIL.fullmatch(address):
        raise Invalid(
            FieldError(("email",), f"must be an e-mail address of at most {MAX_EMAIL_LENGTH} characters")
        )


def _check_password(name: str, password: str) -> None:
    if len(password) not in PASSWORD_LENGTHS:
        shortest, longest = min(PASSWORD_LENGTHS), max(PASSWORD_LENGTHS)
        raise Invalid(FieldError((name,), f"must have {shortest} to {longest} characters"))


def _read_claims(token: str, *, allow_expired: bool = False) -> tuple[str, str]:
    """The ids of the token and of its user, once its signature, audience and end are found good."""
    if len(token) > MAX_TOKEN_LENGTH:
        raise _not_ours()
    try:
        claims = decode_token(token, allow_expired=allow_expired)
    except jwt.ExpiredSignatureError as error:
        raise Unauthenticated("The token has expired.") from error
    except (jwt.PyJWTError, JWTExtendedException) as error:
        raise _not_ours() from error
    token_id, user_id = claims.get("jti"), claims.get("sub")
    # flask-jwt-extended takes a token without `jti` or `exp`
    if not claims.get("exp") or not isinstance(token_id, str) or not isinstance(user_id, str):
        raise _not_ours()
    return token_id, user_id


def _revoked() -> Unauthenticated:
    return Unauthenticated("The token was revoked.")


def _unknown(*, is_empty: bool) -> Unauthenticated:
    """Of our signature, and not in the database: nothing tells one that was revoked from one of another database."""
    if is_empty:
        return Unauthenticated(
            "The token is not known here, where there is no account yet: POST /register makes the first."
        )
    return Unauthenticated(
        "The token is not known here: it may have been revoked, or belong to another database."
    )


def _not_ours() -> Unauthenticated:
    return Unauthenticated("The token is not one of ours.")


def _wrong() -> Unauthenticated:
    return Unauthenticated("The e-mail address or the password is wrong.")


def _locked_s(failure: LoginFailureRow | None, now: datetime) -> float:
    if failure is None or failure.locked_until is None:
        return 0.0
    # the upper bound is for a clock that was set back
    return min((failure.locked_until - now).total_seconds(), MAX_LOCK_S)


def _is_forgiven(failure: LoginFailureRow, now: datetime) -> bool:
    """Whether 15 minutes have passed since the last wrong password, or since the end of its lock."""
    return now >= max(failure.last_failed_at, failure.locked_until or failure.last_failed_at) + FAILURE_WINDOW


def _keep_an_admin(session: Session, user: UserRow) -> None:
    if user.role == Role.ADMIN and not user.disabled and not store.count_other_admins(session, user.id):
        raise Conflict("This is the last enabled admin: make another one first.")


def _present(user: UserRow | None) -> UserRow:
    if user is None:
        raise NotFound("There is no such user.")
    return user


def _user(row: UserRow) -> User:
    return User(row.id, row.email, Role(row.role), row.disabled, row.created_at)


def _token(row: TokenRow) -> Token:
    return Token(row.id, row.name, row.created_at, row.expires_at)


def _page(items: Sequence[T], limit: int, cursor: Callable[[T], str]) -> Page[T]:
    """The first `limit` items of one more than that, if there are so many."""
    kept = items[:limit]
    return Page(kept, cursor(kept[-1]) if len(items) > limit else None)


@contextmanager
def _held(lock: threading.Lock, wait_s: float) -> Iterator[None]:
    """Hold a lock, but don't queue for it without end."""
    if not lock.acquire(timeout=wait_s):
        raise Unavailable("Too many logins at once.", retry_after_s=1)
    try:
        yield
    finally:
        lock.release()
