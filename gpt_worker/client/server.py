"""One gpt-worker over HTTP: requests go out with the token, replies come back as values or as `ClientError`s."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import requests
from urllib3.exceptions import NameResolutionError, NewConnectionError

from gpt_worker.client.credentials import Credentials
from gpt_worker.client.errors import (
    BadInput,
    Broken,
    Busy,
    ClientError,
    Conflict,
    NotFound,
    NotLoggedIn,
    ServerError,
    Unreachable,
)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
JOB_MEMBERS = {"id", "status", "counts"}
COUNTS = {"total", "answered", "failed"}
AWAY = {HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}  # a proxy speaks for a server that is not there
MAX_SHOWN = 2000

Json = dict[str, Any]
Sent = bytes | Iterable[bytes]


class Server:
    """A gpt-worker at `credentials.url`."""

    def __init__(self, credentials: Credentials) -> None:
        self.url = credentials.url
        self.has_answered = False  # whatever it said, there is somebody
        self._token = credentials.token
        self._session = requests.Session()

    def request(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        data: Sent | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> requests.Response:
        """A 2xx reply. Raises a ClientError for everything else; `timeout_s` is of silence, not of the whole."""
        with self._translated():
            reply = self._session.request(
                method,
                self.url + path,
                json=json,
                data=data,
                params=params,
                headers=headers,
                stream=stream,
                timeout=(CONNECT_TIMEOUT_S, timeout_s),
                allow_redirects=False,
                auth=self._authorize,
            )
            self.has_answered = self.has_answered or reply.status_code not in AWAY
            if not reply.ok or reply.is_redirect:
                raise refusal(self.url, reply, has_token=self._token is not None)
        return reply

    def ask(self, method: str, path: str, **options: Any) -> Json:
        """The JSON object of a 2xx reply."""
        return self._object(self.request(method, path, **options))

    def job(self, job_id: str, timeout_s: float = READ_TIMEOUT_S) -> Json:
        """The job as it stands, without its results."""
        return self.as_job(self.ask("GET", f"{job_path(job_id)}?results=false", timeout_s=timeout_s))

    def as_job(self, value: Json) -> Json:
        """`value`, which must look like a job."""
        counts = value.get("counts")
        if not value.keys() >= JOB_MEMBERS or not isinstance(counts, dict) or not counts.keys() >= COUNTS:
            raise self._stranger()
        return value

    def listed(
        self, path: str, params: Mapping[str, str] | None = None, timeout_s: float = READ_TIMEOUT_S
    ) -> list[Json]:
        """The first page of a list."""
        data = self.ask("GET", path, params=params, timeout_s=timeout_s).get("data")
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise self._stranger()
        return data

    def pieces(self, reply: requests.Response) -> Iterator[bytes]:
        """The body of a streamed reply, as it comes."""
        with self._translated():
            yield from reply.iter_content(64 << 10)

    def lines(self, reply: requests.Response) -> Iterator[str]:
        """The lines of a streamed reply, each as soon as it has come."""
        with self._translated():
            for line in reply.iter_lines(chunk_size=1):
                yield line.decode("utf-8", "replace")

    def close(self) -> None:
        self._session.close()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Given as `auth`, since requests would else put a password from ~/.netrc in its place."""
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _object(self, reply: requests.Response) -> Json:
        try:
            value = reply.json()
        except ValueError as error:
            raise self._stranger() from error
        if not isinstance(value, dict):
            raise self._stranger()
        return value

    def _stranger(self) -> Unreachable:
        return Unreachable(f"{self.url} does not answer like a gpt-worker: is the address right?")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise Unreachable(
                f"{self.url} has no certificate that can be trusted, or speaks no TLS"
            ) from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise BadInput(f"{self.url} is not the address of a server") from error
        except requests.exceptions.RequestException as error:
            raise Broken(f"no gpt-worker answers at {self.url}: {_reason(error)}") from error


def job_path(job_id: str) -> str:
    """`/jobs/<id>`. Raises BadInput for what can't be an id."""
    if not JOB_ID.fullmatch(job_id):
        raise BadInput(f"{job_id!r} is not the id of a job")
    return f"/jobs/{quote(job_id)}"


def refusal(url: str, reply: requests.Response, *, has_token: bool) -> ClientError:
    """The error that a reply without success stands for."""
    status, detail = reply.status_code, _detail(reply)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        wait_s = retry_after_s(reply)
        when = "now" if wait_s is None else f"the next {wait_s:.0f} s"
        return Busy(f"refused for {when}: {detail or HTTPStatus(status).phrase}", wait_s)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Busy(f"the server is busy: {detail or HTTPStatus(status).phrase}", retry_after_s(reply))
    if status in AWAY:
        return Broken(f"no gpt-worker answers at {url}: the proxy before it says {status}")
    if reply.is_redirect:
        return Unreachable(f"{url} redirects to {_plain(reply.headers['Location'])}: log in there instead")
    if detail is None:
        return Unreachable(f"{url} does not answer like a gpt-worker ({status}): is the address right?")
    if status == HTTPStatus.UNAUTHORIZED:
        said = f"the token is refused: {detail}" if has_token else f"{url} wants a token."
        return NotLoggedIn(f"{said} Log in with: gpt-worker login {url}")
    return _problem(status, detail)


def _problem(status: int, detail: str) -> ClientError:
    match status:
        case HTTPStatus.FORBIDDEN:
            return NotLoggedIn(f"not allowed: {detail}")
        case HTTPStatus.NOT_FOUND:
            return NotFound(f"not found: {detail}")
        case HTTPStatus.CONFLICT:
            return Conflict(detail)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ServerError(f"the server failed ({status}): {detail}")
    return BadInput(f"the server refuses this ({status}): {detail}")


def retry_after_s(reply: requests.Response) -> float | None:
    """`Retry-After` in seconds; its other form, a date, counts as none."""
    value = reply.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d{1,6}", value, re.ASCII) else None


def _detail(reply: requests.Response) -> str | None:
    """The sentence of an RFC 9457 problem, or None for another kind of reply."""
    if not reply.headers.get("Content-Type", "").startswith("application/problem+json"):
        return None
    try:
        problem = reply.json()
    except ValueError:
        return None
    return _plain(str(problem.get("detail") or problem.get("title"))) if isinstance(problem, dict) else None


def _plain(text: str) -> str:
    """A server's text for a terminal: one line, nothing that moves the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MAX_SHOWN])


def _reason(error: requests.exceptions.RequestException) -> str:
    """Why there was no reply, in a few words."""
    if isinstance(error, requests.exceptions.Timeout):
        return "no answer in time"
    cause: object = error
    while isinstance(cause, BaseException):
        if isinstance(cause, NameResolutionError):
            return "there is no such host"
        if isinstance(cause, NewConnectionError):
            return "nothing listens there"
        cause = getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)
    return "the connection broke"
