"""Accounts on the real service: the first admin, logins, lockouts, tokens and modes, also across restarts."""

import hashlib
import hmac
import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from requests.adapters import HTTPAdapter

from config import derive
from gpt_worker.accounts import FAILED_LOGINS_PER_MINUTE
from tests.service import ADMIN_EMAIL, APP_KEY, PASSWORD, Service
from tests.upstream import Upstream

USER_EMAIL = "bob@example.org"
NEW_PASSWORD = "another horse battery staple"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture
def service(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    with Service(tmp_path, upstream=upstream) as running:
        yield running


def try_login(service: Service, password: str, email: str = ADMIN_EMAIL) -> int:
    return service.post("/login", json={"email": email, "password": password}).status_code


def test_race_for_the_first_account_has_one_winner(service: Service) -> None:
    statuses: list[int] = []

    def register(number: int) -> None:
        body = {"email": f"user{number}@example.org", "password": PASSWORD}
        statuses.append(service.post("/register", json=body).status_code)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [201] + [403] * 49


def lock(service: Service, at_least_s: int) -> None:
    """Guess wrong, waiting out each short lock, until one of this length stands."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        reply = service.post("/login", json={"email": ADMIN_EMAIL, "password": "wrong password"})
        if reply.status_code == 429:
            retry_after_s = int(reply.headers["Retry-After"])
            if retry_after_s >= at_least_s:
                return
            time.sleep(retry_after_s)
    raise TimeoutError(f"no lock of {at_least_s} s came")


def test_address_locks_after_five_wrong_passwords(service: Service) -> None:
    assert service.admin

    statuses = [try_login(service, "wrong password") for _ in range(6)]

    assert statuses == [401] * 5 + [429]


def test_lock_outlives_a_restart(service: Service) -> None:
    assert service.admin
    lock(service, at_least_s=1)
    service.terminate()
    with closing(sqlite3.connect(service.data_dir / "gpt-worker.sqlite3")) as database:
        # so that it stands however long the start takes
        later = "UPDATE login_failures SET locked_until = datetime(locked_until, '+10 minutes')"
        assert database.execute(later).rowcount == 2  # of this network, and of all
        database.commit()

    service.start()

    assert try_login(service, PASSWORD) == 429


def test_owner_with_an_earlier_token_gets_in_while_strangers_guess(service: Service) -> None:
    earlier = service.admin
    assert service.post("/logout", earlier).status_code == 204
    lock(service, at_least_s=4)
    body = {"email": ADMIN_EMAIL, "password": PASSWORD}

    assert service.post("/login", json=body).status_code == 429
    assert service.post("/login", earlier, json=body).status_code == 200


def test_owner_without_a_token_gets_in_from_another_network_than_the_strangers(service: Service) -> None:
    assert service.admin
    lock(service, at_least_s=4)
    body = {"email": ADMIN_EMAIL, "password": PASSWORD}

    with requests.Session() as elsewhere:
        elsewhere.mount("http://", From("127.0.0.2"))
        mine = elsewhere.post(f"{service.url}/login", json=body, timeout=60)

    assert service.post("/login", json=body).status_code == 429
    assert mine.status_code == 200


class From(HTTPAdapter):
    """Connects from this address."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, source_address=(self._address, 0))


@pytest.mark.slow
def test_strangers_who_keep_logging_in_at_one_address_keep_nobody_out(service: Service) -> None:
    earlier = service.admin
    stop = threading.Event()
    crowd: Counter[int] = Counter()

    def log_in_as_anybody(number: int) -> None:
        with requests.Session() as elsewhere:
            elsewhere.mount("http://", From("127.0.0.2"))
            while not stop.is_set():
                body = {"email": f"{number}-{crowd.total()}@example.org", "password": "wrong password"}
                crowd[elsewhere.post(f"{service.url}/login", json=body, timeout=60).status_code] += 1

    threads = [threading.Thread(target=log_in_as_anybody, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    try:
        service.wait_until(lambda: crowd.total() >= 60)
        without = [try_login(service, PASSWORD) for _ in range(10)]
        body = {"email": ADMIN_EMAIL, "password": PASSWORD}
        with requests.Session() as among_them:
            among_them.mount("http://", From("127.0.0.2"))
            headers = {"Authorization": f"Bearer {earlier}"}
            with_token = [
                among_them.post(f"{service.url}/login", json=body, headers=headers, timeout=60).status_code
                for _ in range(10)
            ]
        service.wait_until(lambda: crowd[429] > 0, timeout_s=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert (without, with_token) == ([200] * 10, [200] * 10)
    assert crowd[401] < 2 * FAILED_LOGINS_PER_MINUTE


def test_forged_tokens_open_nothing(service: Service) -> None:
    good = service.admin
    claims = jwt.decode(good, options={"verify_signature": False})
    key = derive(APP_KEY, "tokens")
    without = {name: {k: v for k, v in claims.items() if k != name} for name in ("exp", "jti", "sub", "aud")}
    forged = {
        "another APP_KEY": jwt.encode(claims, derive(APP_KEY[::-1], "tokens"), "HS256"),
        "APP_KEY itself": jwt.encode(claims, APP_KEY, "HS256"),
        "none": jwt.encode(claims, "", "none"),
        "HS512": jwt.encode(claims, key * 2, "HS512"),
        "RS256, signed with the secret": resign({"alg": "RS256", "typ": "JWT"}, claims, key),
        "expired": jwt.encode({**claims, "exp": 1_000_000_000}, key, "HS256"),
        "another audience": jwt.encode({**claims, "aud": "another"}, key, "HS256"),
        "another user": jwt.encode({**claims, "sub": "0" * 32}, key, "HS256"),
        "an unknown id": jwt.encode({**claims, "jti": "0" * 32}, key, "HS256"),
        **{f"no {name}": jwt.encode(claims, key, "HS256") for name, claims in without.items()},
    }
    assert service.get("/me", jwt.encode(claims, key, "HS256")).status_code == 200

    statuses = {name: service.get("/me", token).status_code for name, token in forged.items()}

    assert statuses == dict.fromkeys(forged, 401)


def resign(header: dict[str, str], claims: dict[str, object], key: bytes) -> str:
    """Signed by HMAC-SHA256, whatever the header says."""
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, claims)]
    signature = hmac.digest(key, b".".join(parts), hashlib.sha256)
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


def test_another_app_key_ends_tokens_and_leaves_passwords(service: Service) -> None:
    token = service.admin
    script = service.post("/tokens", token, json={"name": "script"}).json()["token"]

    service.restart({"APP_KEY": APP_KEY[::-1]})

    assert [service.get("/me", old).status_code for old in (token, script)] == [401, 401]
    assert try_login(service, PASSWORD) == 200


def test_modes_and_tokens_outlive_a_restart(service: Service) -> None:
    token = service.admin
    changed = service.patch("/settings", token, json={"delivery": "webhook", "auth": False}).json()

    service.restart()

    assert changed == {"delivery": "webhook", "registration": False, "auth": False}
    assert service.get("/settings").json() == changed
    assert service.get("/me", token).json()["email"] == ADMIN_EMAIL


def test_disabled_user_is_out_with_the_next_request(service: Service) -> None:
    user = service.user(USER_EMAIL)
    user_id = service.get("/me", user).json()["id"]
    script = service.post("/tokens", user, json={"name": "script"}).json()["token"]
    assert [service.get("/jobs", token).status_code for token in (user, script)] == [200, 200]

    service.patch(f"/users/{user_id}", service.admin, json={"disabled": True})

    assert [service.get("/jobs", token).status_code for token in (user, script)] == [401, 401]
    assert try_login(service, PASSWORD, USER_EMAIL) == 401


def test_new_password_ends_every_other_token(service: Service) -> None:
    mine, other = service.admin, service.login(ADMIN_EMAIL)

    reply = service.post("/me/password", mine, json={"old": PASSWORD, "new": NEW_PASSWORD})

    assert reply.status_code == 204
    assert service.get("/me", mine).status_code == 200
    assert service.get("/me", other).status_code == 401
    assert (try_login(service, PASSWORD), try_login(service, NEW_PASSWORD)) == (401, 200)


def test_deleted_users_job_becomes_the_admins(service: Service) -> None:
    user = service.user(USER_EMAIL)
    user_id = service.get("/me", user).json()["id"]
    job_id = service.submit({"a": "hello"}, token=user, prefer="respond-async").json()["id"]

    assert service.delete(f"/users/{user_id}", service.admin).status_code == 204

    assert service.job(job_id)["owner"] == ADMIN_EMAIL


def test_production_takes_its_first_account_by_the_setup_token(tmp_path: Path, upstream: Upstream) -> None:
    with Service(tmp_path, {"NODE_ENV": "production"}, upstream) as service:
        path = service.data_dir / "setup-token"
        body = {"email": ADMIN_EMAIL, "password": PASSWORD}

        refused = service.post("/register", json=body)
        taken = service.post("/register", json={**body, "setup_token": path.read_text().strip()})

        assert (refused.status_code, taken.status_code) == (403, 201)
        assert taken.json()["user"]["role"] == "admin"
        assert str(path) in service.stderr()
        assert not path.exists()


def test_admin_email_makes_the_admin_at_the_first_start_alone(tmp_path: Path, upstream: Upstream) -> None:
    env = {"ADMIN_EMAIL": ADMIN_EMAIL, "ADMIN_PASSWORD": PASSWORD}
    with Service(tmp_path, env, upstream) as service:
        assert try_login(service, PASSWORD) == 200
        assert service.get("/settings", service.login(ADMIN_EMAIL)).json()["registration"] is False

        service.restart({"ADMIN_EMAIL": "other@example.org"})

        assert try_login(service, PASSWORD, "other@example.org") == 401


def test_log_holds_no_password_and_no_token(service: Service) -> None:
    token = service.admin
    service.login(ADMIN_EMAIL)
    script = service.post("/tokens", token, json={"name": "script"}).json()["token"]

    log = service.stderr()

    assert not re.search("|".join(map(re.escape, (PASSWORD, token, script))), log)
