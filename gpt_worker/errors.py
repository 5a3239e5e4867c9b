"""Everything that can go wrong inside, as a small tree; the HTTP face turns it into problems, once.

GptWorkerError
├── NotFound            no such thing, or not yours
├── Forbidden           known, but not allowed
├── Conflict            not in this state
├── Invalid             input that breaks a rule; carries `errors`
├── TooLarge            over one of the limits; says which
├── Unauthenticated     who are you?
├── TooMany             come back after `retry_after_s`
├── Unavailable         not now; come back after `retry_after_s`
└── DiskLow             not enough disk to accept work
"""

from dataclasses import dataclass


class GptWorkerError(Exception):
    """The root; `str(error)` is a sentence for the caller that holds no secret and no value of theirs."""


class NotFound(GptWorkerError):
    """There is no such thing, or it belongs to somebody else."""


class Forbidden(GptWorkerError):
    """The caller is known and may not do this."""


class Conflict(GptWorkerError):
    """The thing is not in a state in which this can be done."""


class TooLarge(GptWorkerError):
    """The request is over a limit, which the message names."""


class Unauthenticated(GptWorkerError):
    """The caller has shown no token, or not a good one."""


class DiskLow(GptWorkerError):
    """There is too little disk left to accept work."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with the input: where (names and indexes from the outside in) and what."""

    loc: tuple[str | int, ...]
    msg: str


class Invalid(GptWorkerError):
    """The input breaks rules, each told by a FieldError."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, error.loc))}: {error.msg}" for error in errors[:3]))
        self.errors = errors

    @classmethod
    def at(cls, msg: str, *loc: str | int) -> "Invalid":
        """One thing wrong at one place."""
        return cls(FieldError(loc, msg))


class _Later(GptWorkerError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooMany(_Later):
    """This was done too often, or there is too much of it: by the caller, or at a login by whoever guesses too."""


class Unavailable(_Later):
    """The service can't do this now."""


class StartGivenUp(Exception):
    """The service was told to stop while it waited for its database."""
