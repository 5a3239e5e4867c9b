"""What goes wrong with a drive, told in a few words for people that hold nothing of a secret."""

import errno
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager


class DriveError(Exception):
    """The drive did not do what it was asked for; the message says why, in a few words."""


class NoFile(DriveError):
    """There is no such file, or it is not the one that was written."""


REFUSED = "it refuses access"
CREDENTIALS = "it does not accept the credentials"
NO_CREDENTIALS = "this machine has no credentials for it"
SLOW = "it does not answer in time"
SILENT = "nothing answers at its address"
STATUSES = {401: CREDENTIALS, 403: REFUSED, 530: CREDENTIALS}
NOT_UNDERSTOOD = frozenset((*range(200, 300), 405, 501))  # of what is not a store of objects at all
# What the place of files is called there, and what is spoken, by the driver's extra.
STORES = {
    "s3": ("bucket", "S3"),
    "google-cloud": ("bucket", "Google Cloud Storage"),
    "azure": ("container", "Azure Blob Storage"),
}
# By the names of classes, as the drivers that they come from need not be installed. A cause says more than what it led
# to, so an earlier line counts wherever in the chain of causes it is met.
BY_CLASS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"SSLCertVerificationError", "ClientConnectorCertificateError"}),
        "its TLS certificate can't be verified",
    ),
    (frozenset({"SSLError"}), "it does not speak TLS, which its https address asks for"),
    (frozenset({"gaierror"}), "the host in its address is not known"),
    (
        frozenset(
            {
                "ConnectionRefusedError",
                "EndpointConnectionError",
                "ClientConnectorError",
                "NewConnectionError",
            }
        ),
        SILENT,
    ),
    (
        frozenset(
            {
                "NoCredentialsError",
                "PartialCredentialsError",
                "CredentialRetrievalError",
                "DefaultCredentialsError",
                "CredentialUnavailableError",
            }
        ),
        NO_CREDENTIALS,
    ),
    (frozenset({"RefreshError", "AuthenticationException"}), CREDENTIALS),
    # Python's own, of which asyncio's and fsspec's are; botocore's, requests' and Azure's.
    (
        frozenset(
            {
                "TimeoutError",
                "ConnectTimeoutError",
                "ReadTimeoutError",
                "Timeout",
                "ServiceRequestTimeoutError",
                "ServiceResponseTimeoutError",
            }
        ),
        SLOW,
    ),
    (
        frozenset(
            {
                "ConnectionResetError",
                "ConnectionAbortedError",
                "BrokenPipeError",
                "ServerDisconnectedError",
                "ConnectionClosedError",
                "EOFError",
            }
        ),
        "it breaks the connection off",
    ),
)
# By the codes that S3 and Azure give their errors.
BY_CODE: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset(
            {
                "InvalidAccessKeyId",
                "SignatureDoesNotMatch",
                "InvalidToken",
                "ExpiredToken",
                "AuthenticationFailed",
                "InvalidAuthenticationInfo",
            }
        ),
        CREDENTIALS,
    ),
    (
        frozenset(
            {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
        ),
        "its bucket is in another region",
    ),
    (frozenset({"RequestTimeTooSkewed"}), "its clock and that of this machine differ"),
)
UNREADABLE = frozenset(
    {"JSONDecodeError", "ResponseParserError"}
)  # the answer is nothing that the driver knows
FTP_REPLIES = frozenset({"error_perm", "error_temp"})


def explain(error: BaseException, store: str | None = None) -> str:
    """Why a drive failed, in a few words that hold nothing of a secret: no message of a driver is repeated.

    `store` is the extra of its driver, if it is a store of objects.
    """
    if isinstance(error, DriveError):
        return str(error)
    causes = list(_causes(error))
    classes = frozenset(kind.__name__ for cause in causes for kind in type(cause).__mro__)
    return (
        _first(BY_CODE, frozenset(code for cause in causes for code in _codes(cause)))
        or _first(BY_CLASS, classes)
        or _explain_status(causes, classes, store)
        or _explain_kind(error, store)
        or f"it fails with {type(error).__name__}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _first(table: Iterable[tuple[frozenset[str], str]], names: frozenset[str]) -> str | None:
    return next((words for these, words in table if these & names), None)


def _codes(error: BaseException) -> Iterator[str]:
    """The codes that S3 and Azure put into their errors."""
    response = getattr(error, "response", None)
    said = response.get("Error") if isinstance(response, dict) else None
    for code in (said.get("Code") if isinstance(said, dict) else None, getattr(error, "error_code", None)):
        if isinstance(code, str):
            # Azure's is a member of an enumeration, and a text.
            yield str.__str__(code)


def _explain_status(causes: list[BaseException], classes: frozenset[str], store: str | None) -> str | None:
    """By the status of HTTP, or of FTP, in the error or in one that led to it."""
    status = next((found for cause in causes for found in _statuses(cause)), None)
    if store in STORES and (status in NOT_UNDERSTOOD or classes & UNREADABLE):
        return f"what answers at its address does not speak {STORES[store][1]}"
    if status == 404:
        return _not_there(store)
    return None if status is None else STATUSES.get(status, f"it answers {status}")


def _statuses(error: BaseException) -> Iterator[int]:
    response = getattr(error, "response", None)
    told = response.get("ResponseMetadata") if isinstance(response, dict) else None
    if isinstance(told, dict):
        yield from (found for found in (told.get("HTTPStatusCode"),) if isinstance(found, int))
    for name in ("status_code", "code", "status"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            yield status
    if type(error).__name__ in FTP_REPLIES and str(error)[:3].isdecimal():
        yield int(str(error)[:3])


def _explain_kind(error: BaseException, store: str | None) -> str | None:
    """By Python's own errors; the words are the system's, as drivers put theirs into `strerror`."""
    match error:
        case PermissionError():
            return REFUSED
        case FileNotFoundError() | NotADirectoryError():
            return _not_there(store)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return "it is full"
        case OSError(errno=int(number)):
            return os.strerror(number)
        case OSError() if str(error).startswith("Forbidden"):  # gcsfs tells a 403 in words alone
            return REFUSED
    return None


def _not_there(store: str | None) -> str:
    return f"there is no such {STORES[store][0]}" if store in STORES else "its place is not there"


@contextmanager
def translated(store: str | None = None) -> Iterator[None]:
    try:
        yield
    except DriveError:
        raise
    except Exception as error:  # drivers raise what they like
        raise DriveError(explain(error, store)) from error


def primed(pieces: Generator[bytes, None, None], store: str | None = None) -> Iterator[bytes]:
    """The same pieces; the first one is fetched now, so that its error is the caller's."""
    first = next(pieces)

    def rest() -> Iterator[bytes]:
        with closing(pieces):
            yield first
            try:
                yield from pieces
            except Exception as error:
                raise DriveError(explain(error, store)) from None  # it goes to the log with its traceback

    return rest()
