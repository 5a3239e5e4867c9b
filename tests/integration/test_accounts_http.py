"""Accounts on the real service: the first admin, logins, lockouts, tokens and modes, also across restarts."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import ADMIN_EMAIL, PASSWORD, Service
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

    threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [201] + [403] * 7


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
    lock(service, at_least_s=8)

    service.restart()

    assert try_login(service, PASSWORD) == 429


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
    assert service.get("/jobs", user).status_code == 200

    service.patch(f"/users/{user_id}", service.admin, json={"disabled": True})

    assert service.get("/jobs", user).status_code == 401
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
