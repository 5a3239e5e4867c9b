"""How a command ends: the exit statuses, and everything that can go wrong as a small tree.

ClientError
├── BadInput            the caller's to mend: a file, an option, an id; what the server calls invalid
│   ├── NotFound        the server has no such thing
│   └── Conflict        the thing is not in a state for this
├── Unreachable         nothing answers, or it is no gpt-worker
├── NotLoggedIn         no token, or one that is refused
├── ServerError         the server failed, or does not want to
├── NotWritten          the results can't be stored here
├── Interrupted         Ctrl-C
└── Passing             may be gone when tried again: `Broken` (the connection), `Busy` (the server says when)
"""

from enum import IntEnum


class ExitStatus(IntEnum):
    """What a shell learns; `gpt-worker --help` lists them."""

    SUCCEEDED = 0
    """Done; of a job that was waited for: every task is answered."""
    FAILED = 1
    """The job failed, or was cancelled."""
    BAD_INPUT = 2
    """Usage, a file, an option, or what the server calls invalid."""
    PARTIAL = 3
    """Some tasks have no answer."""
    UNREACHABLE = 4
    """No gpt-worker answers there."""
    REFUSED = 5
    """Not logged in, or not allowed (401, 403)."""
    SERVER_ERROR = 6
    """The server failed or is too busy."""
    NOT_WRITTEN = 7
    """The results could not be written."""
    INTERRUPTED = 130
    """Ctrl-C; a job that was accepted goes on."""
    READER_LEFT = 141
    """Whoever read our output has gone, as in `| head`."""


_OF_JOB = {"succeeded": ExitStatus.SUCCEEDED, "partial": ExitStatus.PARTIAL}


def status_of_job(status: str) -> ExitStatus:
    """How a command ends that waited for a job, now finished with this status."""
    return _OF_JOB.get(status, ExitStatus.FAILED)


class ClientError(Exception):
    """The root; `str(error)` is the one sentence that the user reads."""

    status = ExitStatus.SERVER_ERROR


class BadInput(ClientError):
    """What the caller gave can't be used."""

    status = ExitStatus.BAD_INPUT


class NotFound(BadInput):
    """The server has no such thing, or not for this user."""


class Conflict(BadInput):
    """The thing is not in a state in which this can be done."""


class Unreachable(ClientError):
    """No gpt-worker answers there, and trying again would not help."""

    status = ExitStatus.UNREACHABLE


class NotLoggedIn(ClientError):
    """There is no token, or the server refuses it or what it was used for."""

    status = ExitStatus.REFUSED


class ServerError(ClientError):
    """The server failed."""


class NotWritten(ClientError):
    """The results can't be written where they should go."""

    status = ExitStatus.NOT_WRITTEN


class Interrupted(ClientError):
    """The user has stopped this command, not the job."""

    status = ExitStatus.INTERRUPTED


class Passing(ClientError):
    """Trouble that may pass; `retry_after_s` is the server's word on when, if it said so."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Broken(Passing):
    """No connection, or it broke."""

    status = ExitStatus.UNREACHABLE


class Busy(Passing):
    """The server is there and can't do this now."""
