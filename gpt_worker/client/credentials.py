"""Where the server is and which token it gets: the environment, then a file that only its owner can read.

A token is only ever sent to the server that gave it.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gpt_worker.client.errors import BadInput, NotLoggedIn, NotWritten

URL_VARIABLE = "GPT_WORKER_URL"
TOKEN_VARIABLE = "GPT_WORKER_TOKEN"
TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A server, and the token for it; None: it wants none, or has not been asked for one."""

    url: str
    token: str | None = None
    email: str | None = None


def credentials_path(environ: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/gpt-worker/credentials.json`; `~/.config` where that is not set to an absolute path."""
    config_home = environ.get("XDG_CONFIG_HOME", "")
    home = Path(config_home) if config_home.startswith("/") else Path.home() / ".config"
    return home / "gpt-worker" / "credentials.json"


def normal_url(text: str) -> str:
    """The address of a server in one form: with a scheme, without a slash at its end.

    Raises BadInput for what is no http(s) address.
    """
    url = text.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        usable = False
    if (
        not usable
        or parts.query
        or parts.fragment
        or parts.username is not None
        or not url.isprintable()
        or " " in url
    ):
        raise BadInput(
            f"{text!r} is not the address of a server: give one such as https://gpt-worker.example.org"
        )
    return url


def find_credentials(environ: Mapping[str, str]) -> Credentials:
    """The server to use and its token. Raises NotLoggedIn where no server is known."""
    url, token = environ.get(URL_VARIABLE, ""), environ.get(TOKEN_VARIABLE, "").strip()
    stored = None if url and token else load(credentials_path(environ))
    if token and not TOKEN.fullmatch(token):
        raise NotLoggedIn(f"{TOKEN_VARIABLE} is not a token: it holds characters that no token has")
    if url:
        url = normal_url(url)
        theirs = stored.token if stored is not None and stored.url == url else None
        return Credentials(url, token or theirs)
    if stored is None:
        raise NotLoggedIn(f"not logged in: run gpt-worker login, or set {URL_VARIABLE} and {TOKEN_VARIABLE}")
    return Credentials(stored.url, token, None) if token else stored


def load(path: Path) -> Credentials | None:
    """What is stored, or None. Raises NotLoggedIn for a file that is broken or can't be read."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        url, token, email = stored["url"], stored["token"], stored.get("email")
        if not isinstance(url, str) or not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise ValueError("of another shape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotLoggedIn(f"{path} can't be read: run gpt-worker login again") from error
    return Credentials(normal_url(url), token, email if isinstance(email, str) else None)


def store(path: Path, credentials: Credentials) -> None:
    """Keeps them with 0600, in a directory with 0700; the file is complete at every moment."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.parent.chmod(0o700)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps(asdict(credentials)) + "\n")
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise NotWritten(f"the token can't be stored in {path}: {error.strerror}") from error


def forget(path: Path) -> None:
    """Removes what is stored, if anything is."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NotWritten(f"{path} can't be removed: {error.strerror}") from error
