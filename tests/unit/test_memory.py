"""What a resting service does not keep in memory: libraries that few need, and what a hashed password took."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factories import APP_KEY

ROOT = Path(__file__).parents[2]

DRIVERS = {"fsspec", "s3fs", "gcsfs", "adlfs"}
ARBITER = "import runpy; runpy.run_path('gunicorn.conf.py')"
SERVICE = """
from wsgi import app
service = app.extensions["gpt_worker"]
service.database.migrate()
service.result_files.start()
service.result_files.stop()
assert app.test_client().get("/healthz").status_code == 200
"""
HASHES = """
import threading
from pathlib import Path
from gpt_worker.accounts import Passwords
from gpt_worker.web_worker import return_large_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

return_large_memory()
passwords = Passwords()
before = resident_mib()
for _ in range(4):
    thread = threading.Thread(target=passwords.hash, args=("correct horse battery staple",))
    thread.start()
    thread.join()
print(resident_mib() - before)
"""

SMALL_FILES = """
from pathlib import Path
from gpt_worker.api.seen_ids import SeenIds

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

before = resident_mib()
kept = [SeenIds() for _ in range(40)]
assert all(seen.add_all(str(number) for number in range(20)) is None for seen in kept)
print(resident_mib() - before)
"""

THREADS = """
import threading
from pathlib import Path
from gpt_worker.web_worker import return_large_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

def hold():
    together.wait()
    for _ in range(3):
        pieces = [bytes(2 << 20) for _ in range(2)]
        pieces = [piece + b"x" for piece in pieces]

return_large_memory()
before = resident_mib()
together = threading.Barrier(128)
threads = [threading.Thread(target=hold) for _ in range(128)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident_mib() - before)
"""


def run(code: str, data_dir: Path) -> str:
    """What a new Python prints that runs this as the service would."""
    env = {"NODE_ENV": "test", "DATA_DIR": str(data_dir), "APP_KEY": APP_KEY, "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout


def modules(code: str, data_dir: Path) -> set[str]:
    """What this code loads, by full names."""
    return set(json.loads(run(f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))", data_dir)))


def libraries(code: str, data_dir: Path) -> set[str]:
    """The packages that this code loads."""
    return {module.partition(".")[0] for module in modules(code, data_dir)}


def test_the_arbiter_loads_no_application(tmp_path: Path) -> None:
    loaded = libraries(ARBITER, tmp_path)

    assert "gunicorn" in loaded
    assert "gpt_worker.embedded" not in modules(ARBITER, tmp_path)
    assert not loaded & {"flask", "jinja2", "openai", "pydantic", "requests", "sqlalchemy", "werkzeug"}
    assert not loaded & DRIVERS


def test_the_service_loads_what_few_need_when_it_is_needed(tmp_path: Path) -> None:
    for _ in ("an empty database", "one that is up to date"):
        loaded = libraries(SERVICE, tmp_path)

        assert "sqlalchemy" in loaded
        assert not loaded & {"alembic", "flask_migrate", "httpx2", "mako", "openai"}
        assert not loaded & DRIVERS


def test_a_service_with_sqlite_loads_no_dialect_of_others(tmp_path: Path) -> None:
    # But MySQL's, by which SQLAlchemy checks the tables' options.
    loaded = modules(SERVICE, tmp_path)

    assert "sqlalchemy.dialects.sqlite" in loaded
    assert not loaded & {f"sqlalchemy.dialects.{name}" for name in ("mssql", "oracle", "postgresql")}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it is told in /proc")
def test_many_small_files_at_once_take_little(tmp_path: Path) -> None:
    assert int(run(SMALL_FILES, tmp_path)) < 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give memory back by themselves")
def test_the_memory_of_a_hashed_password_is_given_back(tmp_path: Path) -> None:
    assert int(run(HASHES, tmp_path)) < 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give memory back by themselves")
def test_the_memory_of_many_threads_at_once_is_given_back(tmp_path: Path) -> None:
    assert int(run(THREADS, tmp_path)) < 120
