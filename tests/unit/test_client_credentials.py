"""Which server and token the client uses, and how it keeps them."""

from pathlib import Path

import pytest

from gpt_worker.client.credentials import (
    Credentials,
    credentials_path,
    find_credentials,
    forget,
    load,
    normal_url,
    store,
)
from gpt_worker.client.errors import BadInput, NotLoggedIn, NotWritten

STORED = Credentials("https://a.example", "stored-token", "me@example.org")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment in which STORED was logged in at."""
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    store(credentials_path(environ), STORED)
    return environ


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://a.example/", "https://a.example"),
        ("localhost:3333", "http://localhost:3333"),
        (" http://a.example/gpt/ ", "http://a.example/gpt"),
        ("http://[::1]:3333", "http://[::1]:3333"),
    ],
)
def test_address_has_one_form(text: str, url: str) -> None:
    assert normal_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        "ftp://a.example",
        "a b",
        "http://a:x",
        "http://a:0",
        "http://u:p@a",
        "http://a?b=c",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not the address of a server"):
        normal_url(text)


def test_file_is_for_its_owner_alone(home: dict[str, str]) -> None:
    path = credentials_path(home)

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert load(path) == STORED


def test_stored_credentials_are_used_without_an_environment(home: dict[str, str]) -> None:
    assert find_credentials(home) == STORED


def test_environment_wins(home: dict[str, str]) -> None:
    both = {"GPT_WORKER_URL": "b.example/", "GPT_WORKER_TOKEN": " theirs\n"}

    assert find_credentials({**home, **both}) == Credentials("http://b.example", "theirs")
    assert find_credentials({**home, "GPT_WORKER_TOKEN": "t"}) == Credentials("https://a.example", "t")


def test_stored_token_goes_to_no_other_server(home: dict[str, str]) -> None:
    other = find_credentials({**home, "GPT_WORKER_URL": "https://b.example"})
    same = find_credentials({**home, "GPT_WORKER_URL": "https://a.example/"})

    assert (other.token, same.token) == (None, "stored-token")


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "käse"])
def test_token_that_no_header_can_carry_is_refused(home: dict[str, str], token: str) -> None:
    with pytest.raises(NotLoggedIn, match="GPT_WORKER_TOKEN"):
        find_credentials({**home, "GPT_WORKER_TOKEN": token})


def test_nobody_is_logged_in_at_first(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedIn, match="gpt-worker login"):
        find_credentials({"XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "5", '{"url": 1, "token": "t"}', '{"url": "http://a", "token": "a b"}', "\0"]
)
def test_broken_file_asks_for_a_new_login(home: dict[str, str], content: str) -> None:
    credentials_path(home).write_text(content)

    with pytest.raises(NotLoggedIn, match="login again"):
        find_credentials(home)


def test_relative_config_home_is_ignored() -> None:
    path = credentials_path({"XDG_CONFIG_HOME": "relative"})

    assert path == Path.home() / ".config" / "gpt-worker" / "credentials.json"


def test_forgetting_twice_is_no_mistake(home: dict[str, str]) -> None:
    path = credentials_path(home)

    forget(path)
    forget(path)

    assert load(path) is None


def test_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(NotWritten, match="can't be stored"):
        store(credentials_path({"XDG_CONFIG_HOME": f"{tmp_path}/file"}), STORED)
