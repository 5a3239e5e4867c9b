"""The WSGI application, for gunicorn and for `flask --app wsgi`; importing it starts nothing."""

from config import Settings
from gpt_worker import create_app

app = create_app(Settings.from_env())
