"""`login` and `logout`: how a token comes to this machine, and how it ends."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import click

from gpt_worker.client.credentials import Credentials, credentials_path, forget, load, normal_url, store
from gpt_worker.client.errors import BadInput, ClientError, NotLoggedIn, Unreachable
from gpt_worker.client.server import Server

DEFAULT_URL = "http://localhost:3333"
HEALTH_MEMBERS = {"status", "upstream", "version"}


@click.command()
@click.argument("url", default="", metavar="[URL]")
@click.option("--email", help="The account's address; asked for without it.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
def login(url: str, email: str | None, password_stdin: bool) -> None:
    """Log in at a server and keep the token.

    URL is the server's address, by default the last one, or http://localhost:3333.
    """
    path = credentials_path(os.environ)
    url = normal_url(url or os.environ.get("GPT_WORKER_URL", "") or _last_url(path) or DEFAULT_URL)
    server = Server(Credentials(url))
    if not server.ask("GET", "/healthz").keys() >= HEALTH_MEMBERS:
        raise Unreachable(f"{url} does not answer like a gpt-worker: is the address right?")
    if not sys.stdin.isatty() and not (email and password_stdin):
        raise BadInput("there is no terminal to ask on: give --email and --password-stdin")
    email = email or click.prompt("Email", err=True)
    password = _read_password() if password_stdin else click.prompt("Password", hide_input=True, err=True)
    token = _log_in(Server(Credentials(url, _earlier_token(path, url))), email, password)
    store(path, Credentials(url, token, email))
    click.echo(f"Logged in at {url} as {email}.", err=True)


def _last_url(path: Path) -> str:
    stored = _stored(path)
    return stored.url if stored else ""


def _earlier_token(path: Path, url: str) -> str | None:
    """The last token of this server, ended or not: with it, strangers who guess at the address lock nobody out here."""
    stored = _stored(path)
    return stored.token if stored and stored.url == url else None


def _stored(path: Path) -> Credentials | None:
    with suppress(ClientError):  # broken: a login mends it
        return load(path)
    return None


def _read_password() -> str:
    try:
        return sys.stdin.readline().rstrip("\r\n")
    except ValueError as error:
        raise BadInput("the password on standard input is not UTF-8") from error


def _log_in(server: Server, email: str, password: str) -> str:
    try:
        reply = server.ask("POST", "/login", json={"email": email, "password": password})
    except NotLoggedIn as error:
        raise NotLoggedIn("the address or the password is wrong") from error
    token = reply.get("token")
    if not isinstance(token, dict) or not isinstance(token.get("token"), str):
        raise Unreachable(f"{server.url} does not answer like a gpt-worker: is the address right?")
    return str(token["token"])


@click.command()
def logout() -> None:
    """End the stored token, here and at its server."""
    path = credentials_path(os.environ)
    try:
        stored = load(path)
    except NotLoggedIn:
        stored = None  # broken: it can still be removed
    forget(path)
    if stored is None:
        click.echo("Was not logged in.", err=True)
        return
    try:
        Server(stored).request("POST", "/logout")
    except NotLoggedIn:
        pass  # it had ended already
    except ClientError as error:
        raise type(error)(
            f"the token is forgotten here; it ends by itself within a day, but {error}"
        ) from error
    click.echo(f"Logged out of {stored.url}.", err=True)
