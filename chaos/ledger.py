"""What the clients know: every submit and what was answered to it, and the judgement of what the service holds.

A breach is a sentence under the name of the promise that it breaks. Nothing here asks the service.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos.report import Row, none_of
from chaos.snapshot import ANSWERED, EMPTY, FAILED, PENDING, Job, Snapshot, Task

BAD = "[bad]"  # a task with this in its text is refused by the endpoint, whenever it is asked

LOST = "accepted jobs lost"
STUCK = "accepted jobs stuck"
TWICE = "jobs that one submit made twice"
ANSWERS = "committed answers and ends of jobs lost or changed"
WRONG = "jobs with wrong results or counts"
DATABASE = "faults of the database (integrity_check, foreign keys)"
KEYS = "idempotent resubmits that gave another job"
AGAIN = "calls made again though their answer was committed, or twice in one life"
WEBHOOKS = "owed webhooks never delivered"
BYTES = "webhooks with other bytes, a bad signature or wrong contents"
REPLIES = "replies that should not be"
TOKENS = "tokens that were made and do not work, or were revoked and do"
LOG = "tracebacks in the service's log"
ASKED_AGAIN = "calls asked again"
UNCOMMITTED = "calls sent and not committed at an end"
REFUSED = "requests refused a connection"
CUT = "requests whose reply was cut"
UNANSWERED = "requests without a reply"
PROMISES = (LOST, STUCK, TWICE, ANSWERS, WRONG, DATABASE, KEYS, AGAIN, WEBHOOKS, BYTES, REPLIES, TOKENS, LOG)


@dataclass(slots=True)
class Submit:
    """One submit, which a client may repeat only where it has an Idempotency-Key; `mark` finds its job."""

    mark: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    texts: Mapping[str, str]
    webhook: bool = False
    key: bool = False
    expires: bool = False
    job_ids: set[str] = field(default_factory=set)
    """Every id that a 2xx told."""
    shown: set[str] = field(default_factory=set)
    """The tasks whose answers a client has seen."""
    told_run: int = 0
    """The latest run that a reply or a webhook told as ended."""
    cancel_asked: bool = False
    cancelled: bool = False
    purge_asked: bool = False
    purged: bool = False
    retries_asked: int = 0

    @property
    def accepted(self) -> bool:
        return bool(self.job_ids)

    @property
    def job_id(self) -> str:
        return next(iter(self.job_ids))

    def is_right(self, task: Task) -> bool:
        """Whether a decided task holds what it must."""
        if task.state == ANSWERED:
            return task.answer == expected(task.text)
        allowed = {"bad_request"} if BAD in task.text else set()
        allowed |= {"cancelled"} if self.cancel_asked else set()
        allowed |= {"expired"} if self.expires else set()
        return task.error_code in allowed


def expected(text: str) -> str | None:
    return None if BAD in text else f"answer to: {text}"


def texts_of(user_text: str) -> list[str]:
    """The tasks of one call, packed or not."""
    if user_text.startswith('{"tasks"'):
        return [task["text"] for task in json.loads(user_text)["tasks"]]
    return [user_text]


class Ledger:
    """Shared by the clients' threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.submits: dict[str, Submit] = {}
        self.breaches: dict[str, list[str]] = {promise: [] for promise in PROMISES}
        self.counts: Counter[str] = Counter()
        self.tests_owed: set[str] = set()
        """Ids of webhooks that were asked for outright."""
        self.tokens: dict[str, bool | None] = {}
        """Whether each works; None: it was to be revoked, and nobody heard whether it was."""
        self._before = EMPTY
        self._calls: Counter[str] = Counter()
        self._deliveries: dict[str, str | None] = {}

    # By the clients

    def add(self, submit: Submit) -> None:
        with self._lock:
            self.submits[submit.mark] = submit

    def all(self) -> list[Submit]:
        with self._lock:
            return list(self.submits.values())

    def breach(self, promise: str, told: str) -> None:
        with self._lock:
            self.breaches[promise].append(told)

    def count(self, what: str, by: int = 1) -> None:
        with self._lock:
            self.counts[what] += by

    def accepted(self, submit: Submit, job: Mapping[str, Any]) -> None:
        """A 2xx told of this job."""
        with self._lock:
            submit.job_ids.add(str(job["id"]))
        if len(submit.job_ids) > 1:
            self.breach(KEYS, f"{submit.mark}: {sorted(submit.job_ids)}")
        if (found := job.get("metadata", {}).get("mark")) != submit.mark:
            self.breach(WRONG, f"{submit.mark}: the reply is of {found}")

    def check_shown(self, submit: Submit, results: Mapping[str, str | None]) -> None:
        """Answers that a client was shown, of a job that may still run."""
        submit.shown |= {id_ for id_, answer in results.items() if answer is not None}
        for id_, answer in results.items():
            if answer is not None and answer != expected(submit.texts.get(id_, "")):
                self.breach(WRONG, f"{submit.mark} {id_}: shown {answer[:60]!r}")

    # At the end of each life

    def check_life(self, now: Snapshot, user_texts: Iterable[str]) -> None:
        """After a kill: what was accepted and committed before still stands, and only the rest was asked again."""
        calls = Counter(text for user_text in user_texts for text in texts_of(user_text))
        self._check_calls(calls, now)
        self._check_kept(now)
        for promise_fault in now.faults:
            self.breach(DATABASE, promise_fault)
        by_mark = now.by_mark
        for submit in self.all():
            self._check_stored(submit, by_mark.get(submit.mark, []))
        self.counts["ends of a life"] += 1
        self._deliveries |= {
            delivery.id: delivery.body or self._deliveries.get(delivery.id)
            for delivery in now.deliveries.values()
        }
        self._before = now

    def _check_calls(self, calls: Counter[str], now: Snapshot) -> None:
        before = self._before.by_text
        submits = {text: submit for submit in self.all() for text in submit.texts.values()}
        for text, times in calls.items():
            submit = submits.get(text)
            if submit is None:
                self.breach(AGAIN, f"nobody asked for {text[:60]!r}")
                continue
            known = before.get(text)
            if known is not None and known[1].state == ANSWERED:
                self.breach(AGAIN, f"{text[:60]!r} was answered already")
            elif times > 1 + submit.retries_asked:
                self.breach(AGAIN, f"{text[:60]!r} was sent {times} times in one life")
            if not submit.retries_asked:
                self.counts[ASKED_AGAIN] += times if self._calls[text] else times - 1
                stored = now.by_text.get(text)
                self.counts[UNCOMMITTED] += stored is not None and stored[1].state == PENDING
        self._calls += calls
        self.counts["calls"] += sum(calls.values())

    def _check_kept(self, now: Snapshot) -> None:
        for job in self._before.jobs.values():
            submit = self.submits.get(job.mark)
            kept = now.jobs.get(job.id)
            if kept is not None:
                self._check_same(job, kept)
            elif submit is not None and not submit.purge_asked:
                self.breach(LOST, f"{job.mark} {job.id} was {job.status} and is gone")
        for id_, body in self._deliveries.items():
            delivery = now.deliveries.get(id_)
            if delivery is None:
                self.breach(WEBHOOKS, f"the delivery {id_} is gone")
            elif body is not None and delivery.body not in (None, body):
                self.breach(BYTES, f"the frozen body of {id_} changed")

    def _check_same(self, job: Job, kept: Job) -> None:
        if job.finished and not kept.finished and kept.run == job.run:
            self.breach(ANSWERS, f"{job.mark} was {job.status} and is {kept.status}")
        for was, held in zip(job.tasks, kept.tasks, strict=False):
            if was.state == ANSWERED and held != was:
                self.breach(ANSWERS, f"{job.mark} {was.id} was answered and is {held.state}")
            if was.state == FAILED and held.state != FAILED and kept.run == job.run:
                self.breach(ANSWERS, f"{job.mark} {was.id} had failed and is {held.state}")

    def _check_stored(self, submit: Submit, jobs: list[Job]) -> None:
        if len(jobs) > 1:
            self.breach(TWICE, f"{submit.mark}: {[job.id for job in jobs]}")
        if submit.accepted and not submit.purge_asked:
            if not jobs:
                self.breach(LOST, f"{submit.mark} was accepted as {sorted(submit.job_ids)}")
            elif jobs[0].id not in submit.job_ids:
                self.breach(KEYS, f"{submit.mark} is {jobs[0].id}, the client heard {submit.job_ids}")
        if submit.purged and jobs:
            self.breach(WRONG, f"{submit.mark} was purged and is there")
        for job in jobs:
            self._check_job(submit, job)

    def _check_job(self, submit: Submit, job: Job) -> None:
        if {task.id: task.text for task in job.tasks} != submit.texts or job.total != len(submit.texts):
            self.breach(WRONG, f"{submit.mark}: {len(job.tasks)} of {len(submit.texts)} tasks are stored")
        states = Counter(task.state for task in job.tasks)
        if (job.answered, job.failed) != (states[ANSWERED], states[FAILED]):
            self.breach(WRONG, f"{submit.mark}: counts {job.answered}, {job.failed}; stored {states}")
        wrong = [task for task in job.tasks if task.state != PENDING and not submit.is_right(task)]
        if wrong:
            self.breach(WRONG, f"{submit.mark}: {wrong[0]}")
        unsaid = [task.id for task in job.tasks if task.state != ANSWERED and task.id in submit.shown]
        if unsaid:
            self.breach(ANSWERS, f"{submit.mark} {unsaid[0]}: a client has seen an answer that is not there")
        if submit.told_run >= job.run and not job.finished:
            self.breach(ANSWERS, f"{submit.mark} was told as ended and is {job.status}")
        may_run = job.finished or job.status == "cancelled" or not submit.cancelled or submit.retries_asked
        if not may_run:
            self.breach(ANSWERS, f"{submit.mark} was cancelled and is {job.status}")

    def untold(self, now: Snapshot) -> list[str]:
        """What was done and never answered: jobs of submits and purges without a reply."""
        told = []
        for submit in self.all():
            stored = submit.mark in now.by_mark
            if stored and not submit.accepted:
                told.append(f"{submit.mark} is stored")
            if submit.accepted and submit.purge_asked and not submit.purged and not stored:
                told.append(f"{submit.mark} is purged")
        return told

    # When all has come to rest

    def check_rest(self, now: Snapshot) -> None:
        """Every job has ended as it must."""
        for submit in self.all():
            for job in now.by_mark.get(submit.mark, []):
                self._check_ended(submit, job)

    def _check_ended(self, submit: Submit, job: Job) -> None:
        pending = sum(task.state == PENDING for task in job.tasks)
        if not job.finished or pending:
            self.breach(STUCK, f"{submit.mark} is {job.status} with {pending} tasks pending")
            return
        by_counts = "succeeded" if job.answered == job.total else "partial" if job.answered else "failed"
        allowed = {by_counts} | ({"cancelled"} if submit.cancel_asked else set())
        if job.status not in allowed:
            self.breach(WRONG, f"{submit.mark} is {job.status}, its counts say {by_counts}")

    def absorb(self, other: "Ledger") -> None:
        """Take over another stand's breaches, counts and submits, for the table."""
        self.submits |= {f"{len(self.submits)} {mark}": submit for mark, submit in other.submits.items()}
        self.counts += other.counts
        for promise, told in other.breaches.items():
            self.breaches[promise] += told

    def again(self) -> Row:
        again, lost = self.counts[ASKED_AGAIN], self.counts[UNCOMMITTED]
        return Row(ASKED_AGAIN, "≤ sent and not committed", f"{again} ≤ {lost}", again <= lost)

    def rows(self) -> list[Row]:
        """The promises, with how many breaches of each."""
        accepted = sum(submit.accepted for submit in self.submits.values())
        return [
            none_of(promise, told, accepted if promise in (LOST, STUCK) else None)
            for promise, told in self.breaches.items()
        ]
