import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from config import ServerKind, Settings, SettingsError
from gpt_worker import ownership
from gpt_worker.ownership import (
    DataDirLock,
    InUse,
    Ownership,
    check_database,
    is_still_owner,
)


def test_lock_makes_a_private_data_dir(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path / "deep" / "data")

    lock.acquire(wait_s=0)

    assert stat.S_IMODE((tmp_path / "deep" / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE(lock.path.stat().st_mode) == 0o600
    lock.release()


def test_second_owner_is_refused_with_one_line_that_names_the_first(tmp_path: Path) -> None:
    first, second = DataDirLock(tmp_path), DataDirLock(tmp_path)
    first.acquire(wait_s=0)

    with pytest.raises(InUse) as refusal:
        second.acquire(wait_s=0)

    assert str(tmp_path) in str(refusal.value)
    assert f"process {os.getpid()}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    first.release()


def test_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    first, second = DataDirLock(tmp_path), DataDirLock(tmp_path)
    first.acquire(wait_s=0)

    first.release()

    second.acquire(wait_s=0)
    second.release()


def test_release_without_the_lock_does_nothing(tmp_path: Path) -> None:
    owner, other = DataDirLock(tmp_path), DataDirLock(tmp_path)
    owner.acquire(wait_s=0)

    other.release()

    with pytest.raises(InUse):
        other.acquire(wait_s=0)
    owner.release()


def test_waiting_owner_gets_the_lock_when_the_first_lets_go(tmp_path: Path) -> None:
    first, second = DataDirLock(tmp_path), DataDirLock(tmp_path)
    first.acquire(wait_s=0)
    waiter = threading.Thread(target=second.acquire, args=(30.0,))
    waiter.start()

    first.release()
    waiter.join(10.0)

    assert not waiter.is_alive()
    second.release()


def test_wait_ends_when_its_time_is_up(tmp_path: Path) -> None:
    first, second = DataDirLock(tmp_path), DataDirLock(tmp_path)
    first.acquire(wait_s=0)
    began_s = time.monotonic()

    with pytest.raises(InUse):
        second.acquire(wait_s=0.3)

    assert 0.3 <= time.monotonic() - began_s < 5.0
    first.release()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from gpt_worker.ownership import DataDirLock;"
        "lock = DataDirLock(Path(sys.argv[1])); lock.acquire(0); print('owned', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"owned\n"

    owner.kill()
    owner.wait()
    owner.stdout.close()

    lock = DataDirLock(tmp_path)
    lock.acquire(wait_s=0)
    lock.release()


def test_lock_is_not_inherited_by_a_child(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    lock.acquire(wait_s=0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.release()

        # The kernel closes a child's files a moment after its start.
        DataDirLock(tmp_path).acquire(wait_s=5.0)

        child.communicate(b"\n")


def test_data_dir_that_is_a_file_is_a_settings_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("not a directory")

    with pytest.raises(SettingsError, match=r"DATA_DIR .* can't be used"):
        DataDirLock(path).acquire(wait_s=0)


def test_owner_notices_that_its_lock_file_is_gone_or_another_s(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    lock.acquire(0)
    owned_at_first = is_still_owner(tmp_path)

    (tmp_path / "lock").write_text("1\n")
    owned_with_another_s_name = is_still_owner(tmp_path)
    (tmp_path / "lock").unlink()
    owned_without_file = is_still_owner(tmp_path)

    lock.release()
    assert (owned_at_first, owned_with_another_s_name, owned_without_file) == (True, False, False)


def settings_for(data_dir: Path, **env: str) -> Settings:
    return Settings.from_env({"NODE_ENV": "test", "DATA_DIR": str(data_dir), **env})


def test_one_database_has_one_owner_whatever_the_data_dir(tmp_path: Path) -> None:
    shared = tmp_path / "one" / "gpt-worker.sqlite3"
    first = Ownership(settings_for(tmp_path / "one"))
    second = Ownership(settings_for(tmp_path / "two", DATABASE_URL=f"sqlite:///{shared}"))
    first.acquire(wait_s=0)

    with pytest.raises(InUse) as refusal:
        second.acquire(wait_s=0)

    assert f"DATABASE_URL: the database {shared}" in str(refusal.value)
    assert f"process {os.getpid()}" in str(refusal.value)
    first.release()
    second.acquire(wait_s=0)
    second.release()


def test_database_behind_a_link_is_the_same_database(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    first = Ownership(settings_for(tmp_path / "one", DB_DATABASE=str(tmp_path / "real.db")))
    second = Ownership(settings_for(tmp_path / "two", DB_DATABASE=str(tmp_path / "link.db")))
    first.acquire(wait_s=0)

    with pytest.raises(InUse):
        second.acquire(wait_s=0)

    first.release()


def test_refused_database_leaves_the_data_dir_free(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database")

    with pytest.raises(SettingsError, match="not a SQLite database"):
        Ownership(settings_for(tmp_path / "data", DB_DATABASE=str(tmp_path / "text"))).acquire(wait_s=0)

    lock = DataDirLock(tmp_path / "data")
    lock.acquire(wait_s=0)
    lock.release()
    assert not (tmp_path / "text.lock").exists()


@pytest.mark.parametrize(
    "path", ["{tmp}", "/dev/null", "/dev/null/jobs.db", "{tmp}/text", "{tmp}/" + "x" * 300]
)
def test_path_that_is_no_database_is_refused_by_the_name_of_its_setting(tmp_path: Path, path: str) -> None:
    (tmp_path / "text").write_text("this is not a database")
    settings = settings_for(tmp_path / "data", DATABASE_URL=f"sqlite:///{path.format(tmp=tmp_path)}")

    with pytest.raises(SettingsError, match=r"^DATABASE_URL: the database .*/"):
        check_database(settings.database)


@pytest.mark.parametrize("content", [None, b"", b"SQLite format 3\0 and more"])
def test_database_may_be_missing_or_empty_or_begun(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "gpt-worker.sqlite3").write_bytes(content)

    check_database(settings_for(tmp_path).database)


def test_driver_that_is_not_installed_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ServerKind(frozenset(), "oracle+none", "no_such_driver", 1521)
    monkeypatch.setattr(ownership, "DATABASE_SERVERS", {"oracle": kind})
    settings = settings_for(tmp_path, DATABASE_URL="oracle://me@127.0.0.1/?service_name=jobs")

    with pytest.raises(SettingsError) as refusal:
        Ownership(settings).acquire(wait_s=0)

    assert str(refusal.value).startswith("DATABASE_URL: the driver no_such_driver is not installed")
    assert "requirements-oracle.txt" in str(refusal.value)
    DataDirLock(tmp_path).acquire(wait_s=0)  # it was not kept
