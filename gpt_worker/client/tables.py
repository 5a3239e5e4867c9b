"""Jobs and keys as text for people: plain functions from the API's objects to lines."""

from collections.abc import Sequence
from typing import Any

from gpt_worker.client.following import is_over, read_progress
from gpt_worker.client.progress import render_figures

Json = dict[str, Any]

JOB_COLUMNS = ("JOB", "STATUS", "ANSWERED", "FAILED", "MODEL", "CREATED")
KEY_COLUMNS = (
    "KEY",
    "TAIL",
    "STATE",
    "UNTIL",
    "IN FLIGHT",
    "BOUND BY",
    "REQUESTS",
    "TOKENS",
    "429S",
    "LAST ERROR",
)
EMBEDDED = "embedded"


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def render_jobs(jobs: Sequence[Json]) -> str:
    """A line for each job."""
    return render_table(JOB_COLUMNS, [_job_row(job) for job in jobs])


def _job_row(job: Json) -> list[str]:
    counts = job["counts"]
    return [
        _cell(job["id"]),
        _cell(job["status"]),
        f"{counts['answered']}/{counts['total']}",
        _cell(counts["failed"]),
        _cell(job.get("model")),
        _time(job.get("created_at")),
    ]


def render_keys(keys: Sequence[Json], *, embedded: bool = False) -> str:
    """A line for each API key; those of an embedded model have no tail that anybody has set."""
    return render_table(
        KEY_COLUMNS, [_key_row({**key, "tail": EMBEDDED} if embedded else key) for key in keys]
    )


def _key_row(key: Json) -> list[str]:
    error = key.get("last_error") or {}
    return [
        _cell(key.get("name")),
        _cell(key.get("tail")),
        _cell(key.get("state")),
        _time(key.get("until")),
        f"{_cell(key.get('in_flight'))}/{_cell(key.get('threads'))}",
        _cell(key.get("bound_by")),
        _cell(key.get("requests")),
        _cell(key.get("tokens")),
        _cell(key.get("rate_limited")),
        _cell(error.get("code")),
    ]


def render_job(job: Json) -> str:
    """The job in a few lines."""
    waiting = job.get("waiting") or {}
    usage = job.get("usage") or {}
    lines = [
        ("job", _cell(job["id"])),
        ("status", _cell(job["status"])),
        ("progress", render_figures(read_progress(job))),
        ("waiting", _waiting(waiting) if waiting else ""),
        ("run", _cell(job.get("run"))),
        ("model", _cell(job.get("model"))),
        (
            "usage",
            ", ".join(f"{_cell(count)} {_cell(name).replace('_', ' ')}" for name, count in usage.items()),
        ),
        ("metadata", ", ".join(f"{_cell(k)}={_cell(v)}" for k, v in (job.get("metadata") or {}).items())),
        ("created", _time(job.get("created_at"))),
        ("finished", _time(job.get("finished_at")) if job.get("finished_at") else ""),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in lines if value)


def render_cancelled(job: Json) -> str:
    """A job that was just told to end: how it ended, or what has landed of it so far and what may still."""
    progress = read_progress(job)
    said = f"Job {_cell(job['id'])} is {_cell(progress.status)}: "
    if is_over(job):
        return f"{said}{render_figures(progress)}."
    more = f", and up to {progress.pending} more are in flight" if progress.pending else ""
    return f"{said}{progress.answered}/{progress.total} answered so far{more}."


def _waiting(waiting: Json) -> str:
    until = waiting.get("until")
    return _cell(waiting.get("reason")) + (f", until {_time(until)}" if until else "")


def _time(value: Any) -> str:
    """`2026-01-31 12:00:00` of `2026-01-31T12:00:00.000Z`: UTC, to the second."""
    return _cell(value)[:19].replace("T", " ")


def _cell(value: Any) -> str:
    """A text that takes one line and moves no cursor."""
    text = "-" if value is None else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)
