"""What counts as an error in a service's log."""

from chaos import log

QUIET = """06:40:32.906 INFO    gpt_worker.jobs: job accepted action=submit tasks=2
06:40:33.906 WARNING gpt_worker.lanes: a key was refused ERROR
"""
LOUD = """06:40:32.906 ERROR   gpt_worker.api.problems: A request failed: GET jobs.get_job.
Traceback (most recent call last):
  File "x.py", line 1, in f
ValueError: no
"""


def test_only_errors_and_tracebacks_count() -> None:
    assert log.faults(QUIET) == []
    assert [line.split()[0] for line in log.faults(LOUD)] == ["06:40:32.906", "Traceback", "ValueError:"]
