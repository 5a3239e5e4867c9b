"""The real service under test: gunicorn in a process group of its own, and a small client for its HTTP face.

Its environment is clean, so neither the shell nor a developer's `.env` changes a test.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter

from tests.upstream import Upstream

ROOT = Path(__file__).parents[1]
APP_KEY = "kq3V9xZr7TnB2mWc5LpY8dHf4JsG6aEu1oXi0RbQ"
ADMIN_EMAIL = "admin@example.org"
PASSWORD = "correct horse battery staple"

Env = Mapping[str, str | None]
"""Settings on top of the usual ones; None leaves one out."""


class Default(Enum):
    """Stands for "not given" where None means something."""

    ADMIN = auto()


class ServiceExited(Exception):
    """The service ended instead of getting ready; the message is its standard error."""

    def __init__(self, status: int, stderr: str) -> None:
        super().__init__(f"exit status {status}\n{stderr}")
        self.status = status
        self.stderr = stderr


class Service:
    """One service on a free port, with its data under `tmp_path`; keys and endpoint are those of `upstream`.

    A context manager that starts it and, whatever happened, leaves no process behind.
    """

    def __init__(self, tmp_path: Path, env: Env | None = None, upstream: Upstream | None = None) -> None:
        self.data_dir = tmp_path / "data"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._output_path = tmp_path / "service.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = self._usual_env(upstream)
        self.change_env(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._session: requests.Session | None = None
        self._admin: str | None = None

    def _usual_env(self, upstream: Upstream | None) -> dict[str, str]:
        env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        env |= {
            "LANG": "C.UTF-8",
            "NODE_ENV": "test",
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "DATA_DIR": str(self.data_dir),
            "APP_KEY": APP_KEY,
        }
        if upstream is not None:
            env["GPT_BASE_URL"] = upstream.base_url
            env |= {f"GPT_KEY_{number}": key for number, key in enumerate(upstream.keys)}
        return env

    def change_env(self, env: Env) -> None:
        """Takes other settings for the next start."""
        self.env = _merged(self.env, env)

    # The process

    @property
    def pid(self) -> int:
        """The process id of the gunicorn arbiter."""
        return self._running().pid

    @property
    def has_exited(self) -> bool:
        """Whether it has ended by itself; `wait_exit` tells how."""
        return self._running().poll() is not None

    def start(self, timeout_s: float = 30.0) -> None:
        """Returns once `GET /readyz` says 200. Raises ServiceExited, or TimeoutError with the log."""
        self.launch()
        self.wait_ready(timeout_s)

    def launch(self) -> None:
        """Starts the process and does not wait for it."""
        if self._process is not None:
            raise RuntimeError("the service runs already")
        with self._output_path.open("ab") as output:
            self._process = subprocess.Popen(
                _COMMAND,
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        process = self._running()
        while not self.is_ready():
            status = process.poll()
            if status is not None:
                self.kill()
                raise ServiceExited(status, self.stderr())
            if time.monotonic() > deadline_s:
                self.kill()
                raise TimeoutError(f"not ready within {timeout_s} s\n{self.stderr()}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Whether `GET /readyz` says 200 now."""
        try:
            return self.get("/readyz", timeout=5.0).status_code == 200
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """SIGKILL to the whole process group: arbiter, worker and their children, as a crash would."""
        process, self._process = self._process, None
        self._close_session()
        if process is None:
            return
        _kill_group(process)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the arbiter, which does not end the harness's view of it: see `wait_exit`."""
        self._running().send_signal(number)

    def terminate(self, timeout_s: float = 40.0) -> int:
        """SIGTERM to the arbiter; its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout_s)

    def wait_exit(self, timeout_s: float = 40.0) -> int:
        """The exit status, once it has ended. Raises TimeoutError with the log, and kills it."""
        process = self._running()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"still there after {timeout_s} s\n{self.stderr()}") from error
        finally:
            self.kill()

    def restart(self, env: Env | None = None, timeout_s: float = 30.0) -> None:
        """Ends it (by SIGTERM, when it still runs) and starts it again on the same data."""
        if self._process is not None:
            self.terminate()
        self.change_env(env or {})
        self.start(timeout_s)

    def stderr(self) -> str:
        """What all starts so far have logged."""
        return self._output_path.read_text(errors="replace") if self._output_path.exists() else ""

    def run_once(self, env: Env | None = None, timeout_s: float = 30.0) -> tuple[int, str]:
        """Exit status and standard error of a start that must fail, with these settings changed."""
        return run_once(_merged(self.env, env or {}), timeout_s)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the service does not run")
        return self._process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    # The client

    def request(self, method: str, path: str, token: str | None = None, **options: Any) -> requests.Response:
        """One request; `options` are those of `requests`. Redirects are not followed."""
        headers = dict(options.pop("headers", None) or {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        options.setdefault("timeout", 60.0)
        options.setdefault("allow_redirects", False)
        return self._client().request(method, self.url + path, headers=headers, **options)

    def get(self, path: str, token: str | None = None, **options: Any) -> requests.Response:
        return self.request("GET", path, token, **options)

    def post(self, path: str, token: str | None = None, **options: Any) -> requests.Response:
        return self.request("POST", path, token, **options)

    def patch(self, path: str, token: str | None = None, **options: Any) -> requests.Response:
        return self.request("PATCH", path, token, **options)

    def delete(self, path: str, token: str | None = None, **options: Any) -> requests.Response:
        return self.request("DELETE", path, token, **options)

    def register(self, email: str, password: str = PASSWORD) -> str:
        """The token of a new account. Registration must be on, or the account be the first."""
        reply = self.post("/register", json={"email": email, "password": password})
        return str(_expected(reply, 201)["token"]["token"])

    def login(self, email: str, password: str = PASSWORD) -> str:
        reply = self.post("/login", json={"email": email, "password": password})
        return str(_expected(reply, 200)["token"]["token"])

    @property
    def admin(self) -> str:
        """The admin's token: the first account, made when it is first asked for."""
        if self._admin is None:
            reply = self.post("/register", json={"email": ADMIN_EMAIL, "password": PASSWORD})
            if reply.status_code == 201:
                self._admin = str(reply.json()["token"]["token"])
            else:
                self._admin = self.login(ADMIN_EMAIL)
        return self._admin

    def user(self, email: str) -> str:
        """The token of a new account that is no admin; turns registration on for that moment."""
        admin = self.admin
        was = _expected(self.get("/settings", admin), 200)["registration"]
        _expected(self.patch("/settings", admin, json={"registration": True}), 200)
        token = self.register(email)
        _expected(self.patch("/settings", admin, json={"registration": was}), 200)
        return token

    def submit(
        self,
        data: Any,
        settings: Mapping[str, Any] | None = None,
        token: str | Default | None = Default.ADMIN,
        *,
        metadata: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        **headers: str,
    ) -> requests.Response:
        """`POST /jobs` with JSON; a header is named as in Python: `idempotency_key="…"`, `prefer="…"`."""
        body: dict[str, Any] = {"data": data}
        if settings is not None:
            body["settings"] = dict(settings)
        if metadata is not None:
            body["metadata"] = dict(metadata)
        return self.post(
            "/jobs",
            self._token(token),
            json=body,
            params=params,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            timeout=timeout_s,
        )

    def job(
        self, job_id: str, token: str | Default | None = Default.ADMIN, *, results: bool = True
    ) -> dict[str, Any]:
        query = "" if results else "?results=false"
        return _expected(self.get(f"/jobs/{job_id}{query}", self._token(token)), 200)

    def wait_finished(
        self, job_id: str, timeout_s: float = 30.0, token: str | Default | None = Default.ADMIN
    ) -> dict[str, Any]:
        """The finished job, without its results. Raises TimeoutError with the job and the log."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id, token, results=False)
            if job["finished_at"] is not None:  # a cancelled job has calls in flight to wait for
                return job
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"unfinished after {timeout_s} s: {job}\n{self.stderr()[-10_000:]}")
            time.sleep(0.02)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Until something that only can be polled is so. Raises TimeoutError with the log."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not so after {timeout_s} s\n{self.stderr()[-10_000:]}")
            time.sleep(0.02)

    def free_places(self) -> int:
        """How many more requests may be held open now."""
        text = self.get("/metrics").text
        line = next(line for line in text.splitlines() if line.startswith("gpt_worker_held_places_free "))
        return int(float(line.rpartition(" ")[2]))

    def _token(self, token: str | Default | None) -> str | None:
        return self.admin if isinstance(token, Default) else token

    def _client(self) -> requests.Session:
        if self._session is None:
            session = requests.Session()
            session.trust_env = False
            session.mount("http://", HTTPAdapter(pool_connections=4, pool_maxsize=64))
            self._session = session
        return self._session

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


_COMMAND = [sys.executable, "-m", "gunicorn", "wsgi:app"]


def run_once(env: Mapping[str, str], timeout_s: float = 30.0) -> tuple[int, str]:
    """Starts the service with exactly this environment, and waits until it gives up by itself.

    Returns its exit status and standard error. Raises TimeoutError when it serves instead; it is killed then.
    """
    process = subprocess.Popen(
        _COMMAND,
        cwd=ROOT,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        _kill_group(process)
        _, stderr = process.communicate()
        text = stderr.decode(errors="replace")
        raise TimeoutError(f"still running after {timeout_s} s\n{text}") from error
    return process.returncode, stderr.decode(errors="replace")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the group, leader or not, and waits until none of it holds a lock or a port."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline_s = time.monotonic() + 10.0
    while _group_lives(process.pid):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"process group {process.pid} outlives SIGKILL")
        time.sleep(0.005)


def _group_lives(group: int) -> bool:
    """Whether the group has a member that is more than a zombie; zombies stay where nobody reaps them."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    return not stats or any(_is_living_member(stat, group) for stat in stats)


def _is_living_member(stat: Path, group: int) -> bool:
    try:
        state, _, member_of = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(member_of) == group and state not in "ZX"


def _merged(env: Mapping[str, str], changes: Env) -> dict[str, str]:
    merged: dict[str, str | None] = {**env, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _expected(reply: requests.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, (
        f"{reply.request.method} {reply.url}: {reply.status_code} {reply.text}"
    )
    answer: dict[str, Any] = reply.json()
    return answer
