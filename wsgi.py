"""The WSGI application, for gunicorn and for `flask --app wsgi`; importing it starts nothing."""

import sys

import click
from flask import Flask

from config import Settings, SettingsError
from gpt_worker import create_app

REFUSED = 2


def _app() -> Flask:
    """The service's; a command that can't have it ends here with one line, and makes no secret for it."""
    if click.get_current_context(silent=True) is None:
        return create_app(Settings.from_env())  # gunicorn's worker, which tells of an error by itself
    try:
        return create_app(Settings.from_env(for_command=True))
    except SettingsError as error:
        click.echo(f"gpt-worker: {error}", err=True)
        sys.exit(REFUSED)


app = _app()
