"""What every test gets: a process without the developer's proxies and settings."""

import os
import signal

import pytest

# What a script starts in the background ignores SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SETTINGS = frozenset(
    {
        "ADMIN_EMAIL",
        "ADMIN_PASSWORD",
        "APP_ENV",
        "APP_KEY",
        "DATABASE_URL",
        "DATA_DIR",
        "HOST",
        "INLINE_WAIT_S",
        "MODEL_PATH",
        "NODE_ENV",
        "PORT",
        "PUBLIC_URL",
        "REQUEST_API",
        "WEBHOOK_SECRET",
        "WEB_CONCURRENCY",
    }
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests give their settings themselves; those of the shell must not reach them."""
    for name in list(os.environ):
        if (
            name.startswith(("GPT_", "GUNICORN_", "DB_", "DRIVE_", "S3_", "GCS_", "AZURE_"))
            or name in SETTINGS
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
