"""`gpt-worker`, the command line: which commands there are, and how each ends.

The commands stand in `gpt_worker.client`; they talk HTTP to a gpt-worker on this machine or another one.
"""

import sys
from collections.abc import Sequence

import click

from gpt_worker.client import job_commands, login_commands
from gpt_worker.client.console import NAME, say
from gpt_worker.client.errors import ClientError, ExitStatus

EPILOG = """\b
Exit status:
  0    done; of a job that was waited for: every task is answered
  1    the job failed, or was cancelled
  2    wrong usage, a bad file, or something the server calls invalid
  3    the job is partial: some tasks have no answer
  4    no gpt-worker answers there
  5    not logged in, or not allowed
  6    the server failed, or is too busy
  7    the results or the token could not be written
  130  stopped by Ctrl-C; a job that was accepted goes on

\b
Environment:
  GPT_WORKER_URL    the server, before the one that was logged in at
  GPT_WORKER_TOKEN  the token for it
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Sends lists of prompts to a gpt-worker, watches them being answered, and brings the answers."""


for command in (
    login_commands.login,
    login_commands.logout,
    job_commands.submit,
    job_commands.wait,
    job_commands.status,
    job_commands.fetch_results,
    job_commands.cancel,
    job_commands.retry,
    job_commands.jobs,
    job_commands.keys,
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. Every failure is one sentence on standard error."""
    try:
        status = cli.main(args, prog_name=NAME, standalone_mode=False)
    except ClientError as error:
        say(f"{NAME}: {error}")
        return error.status
    except click.ClickException as error:
        error.show()
        return ExitStatus.BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        return ExitStatus.INTERRUPTED
    except SystemExit:  # click's answer to a broken pipe
        return ExitStatus.READER_LEFT
    return int(status or ExitStatus.SUCCEEDED)


if __name__ == "__main__":
    sys.exit(main())
