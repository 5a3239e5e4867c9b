"""What one does with jobs: submit, wait, look, fetch, cancel, retry; and the operator's look at the keys.

What a command tells goes to standard output, progress and remarks to standard error.
"""

import shlex
import sys
from functools import partial
from pathlib import Path

import click

from gpt_worker.client import following, results, submitting, tables
from gpt_worker.client.bodies import Body, make_body, open_tasks
from gpt_worker.client.console import NAME, checked_out, open_display, say, server_in_use, tell, tell_wait
from gpt_worker.client.errors import (
    BadInput,
    Conflict,
    ExitStatus,
    Interrupted,
    NotWritten,
    Passing,
    status_of_job,
)
from gpt_worker.client.options import INPUT_FORMS, FileForm, Form, input_form, read_metadata, read_settings
from gpt_worker.client.progress import Display, render_figures
from gpt_worker.client.server import Json, Server, job_path

job_id_argument = click.argument("job_id", metavar="ID")
out_option = click.option(
    "--out", metavar="FILE", help="Write the results here: .csv, .jsonl or .json, each also with .gz."
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON, the way the server says it.")


@click.command()
@click.argument("file", metavar="FILE|-")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(INPUT_FORMS)),
    help="The form of FILE, if its name does not tell.",
)
@click.option("--model", help="The model; without it, the server's.")
@click.option("--instructions", help="The system message of every task.")
@click.option(
    "--template", help='The prompt, with a {column} for each variable: "Translate to {lang}: {text}".'
)
@click.option(
    "--setting", "pairs", metavar="KEY=VALUE", multiple=True, help="Any other setting; JSON, or a text."
)
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="A text of your own that the job keeps.")
@out_option
@click.option("--no-wait", is_flag=True, help="Print the job's id, and don't wait for the answers.")
def submit(
    file: str,
    form: str | None,
    model: str | None,
    instructions: str | None,
    template: str | None,
    pairs: tuple[str, ...],
    metadata: tuple[str, ...],
    out: str | None,
    no_wait: bool,
) -> ExitStatus:
    """Submit a file of tasks, wait for its answers, and write them.

    FILE is JSON (a whole job), JSONL or CSV, each also with .gz; - is standard input. A CSV has a column text, or with
    --template a column for each variable; a column id names the tasks. Without --out the answers go to standard
    output, as JSONL. Settings given here win over those in a JSON job.
    """
    if form is None and file == "-":
        raise BadInput("standard input has no name that tells its form: use --format")
    if no_wait and out:
        raise BadInput(
            "--out needs the answers: leave --no-wait out, or fetch them later with gpt-worker results"
        )
    named = {"model": model, "instructions": instructions, "template": template}
    settings = read_settings(pairs, named)
    told = read_metadata(metadata)
    wanted = checked_out(out)
    with open_tasks(file, INPUT_FORMS[form] if form else input_form(file), sys.stdin.buffer) as tasks:
        body = make_body(tasks, settings, told)
        server = server_in_use()
        with open_display(server) as display:
            job = _submit(server, body, display)
    if no_wait:
        click.echo(job["id"])
        return ExitStatus.SUCCEEDED
    ended = _watch(server, job["id"], wanted)
    if wanted is None:
        _print_results(server, job["id"], Form.JSONL)
    return ended


def _submit(server: Server, body: Body, display: Display) -> Json:
    try:
        job = submitting.submit(server, body, tell_wait(display))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped while sending: {NAME} jobs tells whether the job was accepted") from None
    total = job["counts"]["total"]
    display.note(f"Job {job['id']}: {total} {'task' if total == 1 else 'tasks'}")
    return job


@click.command()
@job_id_argument
@out_option
def wait(job_id: str, out: str | None) -> ExitStatus:
    """Wait for a job, however it was submitted."""
    return _watch(server_in_use(), job_id, checked_out(out))


def _watch(server: Server, job_id: str, out: tuple[Path, FileForm] | None) -> ExitStatus:
    """Shows the job's progress to its end, and writes its results; the job's own exit status."""
    come_back = f"{NAME} wait {job_id}" + (f" --out {shlex.quote(str(out[0]))}" if out else "")
    try:
        with open_display(server) as display:
            for progress in following.follow(server, job_id, tell_wait(display)):
                display.show(progress)
            if out:
                results.save(server, job_id, *out, tell_wait(display))
            where = f" -> {out[0]}" if out else ""
            display.note(f"Job {job_id} {progress.status}: {render_figures(progress)}{where}")
            if progress.failed:
                display.note(f"Ask those that failed again with: {NAME} retry {job_id}")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped watching, the job goes on; come back with: {come_back}") from None
    except (Passing, NotWritten) as error:
        raise type(error)(f"{error}; come back with: {come_back}") from error
    return status_of_job(progress.status)


@click.command()
@job_id_argument
@json_option
def status(job_id: str, as_json: bool) -> None:
    """Tell how a job is."""
    job = server_in_use().job(job_id)
    tell(job, tables.render_job, as_json=as_json)


@click.command("results")
@job_id_argument
@out_option
@click.option(
    "--format", "form", type=click.Choice([form.value for form in Form]), help="On standard output (jsonl)."
)
def fetch_results(job_id: str, out: str | None, form: str | None) -> None:
    """Fetch a job's results, also while it runs: then what is there so far."""
    if out and form:
        raise BadInput("--format is for standard output: the name after --out tells the form")
    wanted = checked_out(out)
    server = server_in_use()
    job = server.job(job_id)
    if wanted:
        with open_display(server) as display:
            results.save(server, job_id, *wanted, tell_wait(display))
    else:
        _print_results(server, job_id, Form(form or Form.JSONL))
    if not following.is_over(job):
        say(f"Job {job_id} is {job['status']}: these are its results so far.")


def _print_results(server: Server, job_id: str, form: Form) -> None:
    with open_display(server) as display:
        results.write_to(sys.stdout.buffer, server, job_id, form, tell_wait(display))


@click.command()
@job_id_argument
def cancel(job_id: str) -> None:
    """Cancel a job: nothing new is sent, what is in flight still lands."""
    server = server_in_use()
    job = server.as_job(server.ask("DELETE", job_path(job_id)))
    say(tables.render_cancelled(job))


@click.command()
@job_id_argument
@click.option(
    "--code", "codes", multiple=True, help="Only tasks with this error, such as timeout; repeatable."
)
def retry(job_id: str, codes: tuple[str, ...]) -> None:
    """Ask the tasks of a finished job that have no answer again."""
    server = server_in_use()
    body = {"codes": list(codes)} if codes else {}
    try:
        reply = server.request("POST", f"{job_path(job_id)}/retry", json=body)
    except Conflict as error:
        raise Conflict(f"job {job_id} can't be retried: {error}") from error
    if reply.status_code == 200:
        why = "has no such task" if codes else "has an answer to every task"
        say(f"Job {job_id} {why}: nothing to retry.")
    else:
        say(f"Job {job_id} goes again. Wait for it with: {NAME} wait {job_id}")


@click.command()
@click.option(
    "--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many, newest first."
)
@click.option("--status", "only", help="Only jobs of this status.")
@click.option("--all", "everyone", is_flag=True, help="Everyone's (admin).")
@json_option
def jobs(limit: int, only: str | None, everyone: bool, as_json: bool) -> None:
    """List jobs."""
    params = {"limit": str(limit), "all": "true" if everyone else "false"}
    if only:
        params["status"] = only
    server = server_in_use()
    listed = [server.as_job(job) for job in server.listed("/jobs", params)]
    tell(listed, tables.render_jobs, as_json=as_json)


@click.command()
@json_option
def keys(as_json: bool) -> None:
    """Show how each API key fares (admin)."""
    server = server_in_use()
    listed = server.listed("/keys")
    # The keys of the embedded model look like any others: only the health page tells.
    embedded = not as_json and server.ask("GET", "/healthz").get("embedded") is True
    tell(listed, partial(tables.render_keys, embedded=embedded), as_json=as_json)
