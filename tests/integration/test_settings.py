"""Settings that only this machine can judge: each is refused in one line that names it, before anything is logged."""

import errno
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import SettingsError
from gpt_worker.embedded import find_packaged_model
from gpt_worker.web_worker import check_address, explain_bind_error
from tests.receiver import Receiver
from tests.service import Service
from tests.upstream import Upstream


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


def assert_refused(outcome: tuple[int, str], *words: str) -> None:
    status, stderr = outcome
    assert status == 2, stderr
    assert stderr.startswith("gpt-worker: ")
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOST", "999.1.1.1"),
        ("HOST", "not a host"),
        ("HOST", "unix:/x"),
        ("HOST", "unix"),
        ("HOST", "8.8.8.8"),
        ("HOST", "2001:db8::1"),
        ("DATABASE_URL", "sqlite:////"),
        ("DATABASE_URL", "sqlite:////dev/null/jobs.sqlite3"),
        ("DATABASE_URL", "sqlite:///relative.sqlite3"),
        ("DATABASE_URL", f"sqlite:///{__file__}"),
        ("DB_DATABASE", ".."),
        ("DB_DATABASE", "jobs.sqlite3?mode=ro"),
        ("DB_DATABASE", __file__),
        ("DATA_DIR", "/dev/null/data"),
        ("GPT_MODEL", "gpt of mine"),
        ("S3_BUCKET", "jobs"),
    ],
)
def test_bad_setting_is_refused_in_one_line(
    tmp_path: Path, upstream: Upstream, name: str, value: str
) -> None:
    outcome = Service(tmp_path, upstream=upstream).run_once({name: value})

    assert_refused(outcome, name)


def test_embedded_model_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    outcome = Service(tmp_path).run_once({"MODEL_PATH": str(tmp_path / "no.gguf")})

    assert_refused(outcome, "MODEL_PATH", "no.gguf")


def test_port_in_use_is_refused_in_one_line(tmp_path: Path, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        outcome = Service(tmp_path, upstream=upstream).run_once({"PORT": str(port)})

    assert_refused(outcome, f"PORT {port} is in use")


def test_worker_class_is_refused_by_the_name_it_was_given(tmp_path: Path, upstream: Upstream) -> None:
    outcome = Service(tmp_path, upstream=upstream).run_once({"GUNICORN_CMD_ARGS": "-k sync"})

    assert_refused(outcome, "the worker class sync is not supported")


def test_second_server_on_the_same_database_is_refused_in_one_line(
    tmp_path: Path, upstream: Upstream
) -> None:
    with Service(tmp_path / "one", upstream=upstream) as first:
        database = first.data_dir / "gpt-worker.sqlite3"

        outcome = Service(tmp_path / "two", upstream=upstream).run_once({"DB_DATABASE": str(database)})

        assert_refused(outcome, "DB_DATABASE", str(database), "in use by another gpt-worker")
        assert first.get("/readyz").status_code == 200


@pytest.mark.parametrize("mode", [None, 0o644])
def test_database_is_where_the_setting_says_and_its_owners_alone(
    tmp_path: Path, upstream: Upstream, mode: int | None
) -> None:
    path = tmp_path / "else where" / "100%.db"
    if mode is not None:
        path.parent.mkdir()
        path.touch(mode)
    url = f"sqlite:///{path.parent}/100%25.db"

    with Service(tmp_path, {"DATABASE_URL": url}, upstream) as service:
        assert service.admin

    assert path.read_bytes().startswith(b"SQLite format 3")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not (service.data_dir / "gpt-worker.sqlite3").exists()


@pytest.mark.parametrize("host", ["localhost", pytest.param("::", marks=needs_ipv6)])
def test_service_listens_on_a_name_and_on_ipv6(tmp_path: Path, upstream: Upstream, host: str) -> None:
    with Service(tmp_path, {"HOST": host}, upstream) as service:
        assert service.get("/healthz").status_code == 200


def test_webhook_goes_to_the_very_address_that_was_set(tmp_path: Path, upstream: Upstream) -> None:
    with Receiver() as receiver:
        env = {"REQUEST_API": f"{receiver.url}/in/?code=abc"}
        with Service(tmp_path, env, upstream) as service:
            service.submit({"a": "hello"}, {"delivery": "webhook"})
            received = receiver.wait_for(1)

    assert received[0].path == "/hook/in/?code=abc"


def test_reload_to_a_model_that_is_gone_is_refused_and_the_service_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(find_packaged_model())
    with Service(tmp_path, {"MODEL_PATH": str(model)}) as service:
        model.unlink()

        service.signal(signal.SIGHUP)

        service.wait_until(lambda: "The reload was refused" in service.stderr())
        assert service.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_address_is_free_until_somebody_listens_there(host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]

        with pytest.raises(SettingsError, match=f"PORT {port} is in use on {host}"):
            check_address(host, port)

    check_address(host, port)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "PORT 80 is not permitted"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "PORT 80 is in use on ::1"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign"), "HOST ::1 is not an address of this machine"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "HOST ::1 is not known (Name"),
        (OSError(errno.EAFNOSUPPORT, "Not supported"), "HOST ::1 can't be listened on (Not supported)"),
    ],
)
def test_address_that_cannot_be_bound_is_explained_by_its_setting(error: OSError, says: str) -> None:
    assert explain_bind_error(error, "::1", 80).startswith(says)
