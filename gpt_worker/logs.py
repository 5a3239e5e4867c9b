"""How log records look on standard error: one line a record, readable in development, JSON in production.

`configure` is called once a process, by the server's configuration; nothing here decides what is logged.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

NOISY_LOGGERS = ("alembic", "httpcore2", "httpx2", "openai", "urllib3", "werkzeug")
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(environment: str) -> None:
    """Send every record of this process to standard error, in the form of `environment`."""
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if environment == "production" else ReadableFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("gpt_worker").setLevel(logging.DEBUG if environment == "development" else logging.INFO)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It tells with a traceback of a connection that dies as it comes back: whoever needed it tells that in a line.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    logging.captureWarnings(capture=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, the record's `extra`, and the exception as a string."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _written_at(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class ReadableFormatter(logging.Formatter):
    """Time, level, logger, message and `extra` on one line; a traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        text = f"{_written_at(record):%H:%M:%S.%f}"[:-3]
        text += f" {record.levelname:<7} {record.name}: {_on_one_line(record.getMessage() + extra)}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at that moment, so that a replaced stream is never written to."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _written_at(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}


def _on_one_line(text: str) -> str:
    """The text with its control characters escaped, so that no value can forge a second record."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
