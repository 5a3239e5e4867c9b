"""What the commands share: the server in use, where progress is shown, and how things are said."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from gpt_worker.client import results
from gpt_worker.client.credentials import find_credentials
from gpt_worker.client.options import FileForm, output_form
from gpt_worker.client.patience import OnWait
from gpt_worker.client.progress import Display, KeyWatch, LiveBar, PlainLines
from gpt_worker.client.server import Server

T = TypeVar("T")

NAME = "gpt-worker"


def server_in_use() -> Server:
    """The server of the environment, or the one that was logged in at."""
    return Server(find_credentials(os.environ))


def open_display(server: Server) -> Display:
    """A live bar where standard error is a terminal that can draw one, else plain lines."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveBar(sys.stderr, KeyWatch(server).resting)
    return PlainLines(sys.stderr)


def tell_wait(display: Display) -> OnWait:
    """Says on the display why nothing moves, and for how long."""
    return lambda error, wait_s: display.note(f"{NAME}: {error}; trying again in {wait_s:.1f} s")


def checked_out(out: str | None) -> tuple[Path, FileForm] | None:
    """Where the results go and in which form; a place that is none is refused before anything is sent."""
    if out is None:
        return None
    form = output_form(out)
    results.check_out(Path(out))
    return Path(out), form


def say(text: str) -> None:
    """A remark, beside what a command tells."""
    click.echo(text, err=True)


def tell(value: T, render: Callable[[T], str], *, as_json: bool) -> None:
    """What a command was asked for, on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2) if as_json else render(value))
