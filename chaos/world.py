"""One real service with all that surrounds it, and a small model of what the contract says must be so after each step.

A `World` takes steps: what a client, an operator or bad luck does. Each is checked where it is known what must come of
it, and `settle` checks the whole once everything is well again. A `Breach` says what was not so.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from chaos import log
from tests.receiver import Answer, Cut, Hang, Receiver, Scripted, verified
from tests.service import Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

Json = dict[str, Any]

KEYS = 3
MISSING_MODEL = "gpt-missing"
CONTEXT_TOKENS = 2_000
LONG = " long" * CONTEXT_TOKENS
LARGE_TASKS = 400  # more than the service keeps in memory before it lets later jobs in
FINISHED_WITHIN_S = 90.0
DELIVERED_WITHIN_S = 60.0
UNFINISHED = ("queued", "running")
# Only where the endpoint was troubled.
TRIED_OUT = {"upstream_error", "connection", "bad_response", "rate_limited"}
STORMS = (
    Fault(kind=FaultKind.STATUS, status=500),
    Fault(kind=FaultKind.STATUS, status=503, retry_after_s=0.2),
    Fault(kind=FaultKind.STATUS, status=429, code="rate_limit_exceeded", retry_after_s=0.1),
    Fault(kind=FaultKind.RESET),
    Fault(kind=FaultKind.CLOSE),
    Fault(kind=FaultKind.CUT_BODY),
    Fault(kind=FaultKind.HTML),
)
REFUSALS: tuple[Scripted, ...] = (
    500,
    Answer(302, {"Location": "http://127.0.0.1:9/"}),
    Answer(429, {"Retry-After": "1"}),
    Hang(0.3),
    Cut.RESET,
    Cut.CLOSE,
    410,
)


class Breach(AssertionError):
    """Something is not as the contract says."""


def demand(holds: bool, what: str, *facts: object) -> None:
    if not holds:
        raise Breach(f"{what}: {' '.join(str(fact)[:600] for fact in facts)}")


@dataclass(slots=True)
class JobModel:
    """What is known of one job."""

    id: str
    data: dict[str, str]
    body: Json
    key: str | None
    webhook: bool
    run: int = 1
    cancelled: bool = False  # in this run
    ever_cancelled: bool = False
    purged: bool = False
    finished: dict[int, Json] = field(default_factory=dict)  # run → the job as it ended, without results
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Json:
        settings: Json = self.body["settings"]
        return settings

    def may_fail_with(self, id_: str, *, troubled: bool) -> set[str]:
        """The codes that a task may end with."""
        codes = set(TRIED_OUT) if troubled else set()
        if self.ever_cancelled:
            codes.add("cancelled")
        if "deadline_s" in self.settings:
            codes.add("expired")
        if self.settings.get("model") == MISSING_MODEL:
            codes.add("model_unavailable")
        if self.data[id_].endswith(LONG):
            codes.add("context_length")
        return codes

    def may_be_answered(self, id_: str) -> bool:
        return not self.data[id_].endswith(LONG) and self.settings.get("model") != MISSING_MODEL


class World:
    """Everything at its start: no jobs, all well."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        keys = {
            f"sk-chaos-{number}": KeyRules(latency_s=0.005, missing_models=(MISSING_MODEL,))
            for number in range(KEYS)
        }
        self.upstream = Upstream(keys, context_tokens=CONTEXT_TOKENS, log_size=100_000)
        self.receiver = Receiver()
        self.jobs: list[JobModel] = []
        self.by_key: dict[str, JobModel] = {}
        self.modes = {"delivery": "inline"}
        self.kills = self.purges = self.submits = 0
        self.held = self.troubled = self.gone = False
        self._stack = contextlib.ExitStack()
        self.service: Service

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.upstream)
            stack.enter_context(self.receiver)
            env = {"REQUEST_API": self.receiver.url, "GPT_DEADLINE_S": "120", "GPT_THREADS_PER_KEY": "4"}
            self.service = stack.enter_context(Service(self._folder, env, self.upstream))
            self._secret = self.service.get("/webhooks/secret", self.service.admin).json()["secret"]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.upstream.release()
        self._stack.close()

    # Submits, each a step

    def submit(self, count: int, mode: int, flavour: int, wait: int) -> None:
        """A job, small or large, inline, by webhook or as the mode says; plain, packed, hopeless, late, with a key."""
        many = LARGE_TASKS if flavour % 9 == 7 else 0
        body = self._body(1 + count % 12 + many, mode % 4, flavour % 9)
        key = f"key {self.submits}" if flavour % 2 else None
        prefer = "respond-async" if self.held or wait % 2 else "wait=1"
        reply = self._post(body, key, prefer)
        job = self._accept(reply, body, key)
        if reply.status_code == 200:
            demand(not job.webhook, "200 for a webhook job", reply.text)
            self._check(job, reply.json(), ended=True)

    def submit_at_once(self, count: int, clients: int) -> None:
        """Several clients send the same request with the same key at the same moment."""
        body, key = self._body(1 + count % 12, 0, 0), f"key {self.submits}"
        replies: list[requests.Response] = []
        threads = [
            threading.Thread(target=lambda: replies.append(self._post(body, key, "respond-async")))
            for _ in range(2 + clients % 7)
        ]
        _run_all(threads)
        accepted = [reply for reply in replies if reply.status_code != 409]
        demand(bool(accepted), "every submit with one key was a conflict", [reply.text for reply in replies])
        demand({reply.status_code for reply in accepted} == {202}, "submits with one key", replies)
        demand(len({reply.json()["id"] for reply in accepted}) == 1, "one key, several jobs", replies)
        fresh = [reply for reply in accepted if "Idempotency-Replayed" not in reply.headers]
        demand(len(fresh) == 1, "so many submits with one key say that they are the first", len(fresh))
        self._accept(fresh[0], body, key)

    def submit_and_kill(self, count: int, after_ms: int) -> None:
        """The service dies while a submit with a key is on its way; the client sends it again."""
        body, key = self._body(1 + count % 2_000, 1, 0), f"key {self.submits}"

        def send() -> None:
            with contextlib.suppress(requests.RequestException):
                self._post(body, key, "respond-async")

        client = threading.Thread(target=send)
        client.start()
        time.sleep(after_ms % 40 / 1000)
        self.kill()
        client.join()
        reply = self._post(body, key, "respond-async")
        self._accept(reply, body, key)
        alike = [job for job in self._list() if job["metadata"] == body["metadata"]]
        demand(len(alike) == 1, "a submit that was sent again after a crash made so many jobs", len(alike))

    def replay(self, which: int) -> None:
        """The same request under the same key."""
        if job := _pick([*self.by_key.values()], which):
            reply = self._post(job.body, job.key, "respond-async")
            demand(reply.status_code == 202, "replay", reply.status_code, reply.text)
            demand(reply.json()["id"] == job.id, "replay gave another job", reply.text)
            demand(reply.headers.get("Idempotency-Replayed") == "true", "replay is not told", reply.headers)

    def clash(self, which: int) -> None:
        """Another request under a key that is used."""
        if job := _pick([*self.by_key.values()], which):
            reply = self._post({**job.body, "data": {"other": "other"}}, job.key, "respond-async")
            demand(
                reply.status_code == 422, "another request under the same key", reply.status_code, reply.text
            )

    def refused_submit(self, kind: int) -> None:
        """A submit that is refused frees its key at once."""
        body, key = self._body(2, 0, 0), f"key {self.submits}"
        bad = ({**body, "data": {}}, {**body, "data": {"a": 1}}, {**body, "surplus": 1})[kind % 3]
        reply = self._post(bad, key, "respond-async") if kind % 4 else self._post_bad_file(key)
        demand(reply.status_code == 422, "a bad submit", reply.status_code, reply.text)
        self._accept(self._post(body, key, "respond-async"), body, key)

    def _body(self, count: int, mode: int, flavour: int) -> Json:
        self.submits += 1
        data = {f"t{number}": f"task {self.submits}-{number}." for number in range(count)}
        settings: Json = {}
        match flavour:
            case 1 | 2:
                data["t0"] += LONG
            case 3:
                settings["pack"] = True
            case 4:
                settings["pack"] = True
                data[f"t{count - 1}"] += LONG
            case 5:
                settings["model"] = MISSING_MODEL
            case 6:
                settings["deadline_s"] = 1
        if mode in (1, 2):
            settings["delivery"] = ("inline", "webhook")[mode - 1]
        return {"data": data, "settings": settings, "metadata": {"submit": str(self.submits)}}

    def _post(self, body: Json, key: str | None, prefer: str) -> requests.Response:
        headers = {"Prefer": prefer} | ({"Idempotency-Key": key} if key else {})
        return self.service.post("/jobs", self.service.admin, json=body, headers=headers)

    def _post_bad_file(self, key: str) -> requests.Response:
        """A file whose last line is wrong: it is found when all before it is stored."""
        lines = ['{"text": "never asked"}'] * 200 + ['{"text": 1}']
        headers = {"Content-Type": "application/jsonl", "Idempotency-Key": key}
        return self.service.post("/jobs", self.service.admin, data="\n".join(lines), headers=headers)

    def _accept(self, reply: requests.Response, body: Json, key: str | None) -> JobModel:
        demand(reply.status_code in (200, 202), "submit", reply.status_code, reply.text)
        shown = reply.json()
        webhook = body["settings"].get("delivery", self.modes["delivery"]) == "webhook"
        job = JobModel(shown["id"], body["data"], body, key, webhook)
        demand(shown["delivery"] == ("webhook" if webhook else "inline"), "delivery", shown)
        self.jobs.append(job)
        if key is not None:
            self.by_key[key] = job
        return job

    # What is done to jobs

    def look(self, which: int) -> None:
        if job := _pick(self.jobs, which):
            self._look(job)

    def cancel(self, which: int) -> None:
        if job := _pick(self.jobs, which):
            reply = self.service.delete(f"/jobs/{job.id}", self.service.admin)
            if job.purged:
                demand(reply.status_code == 404, "cancel of a purged job", reply.status_code)
                return
            demand(reply.status_code == 200, "cancel", reply.status_code, reply.text)
            shown = reply.json()
            demand(shown["status"] not in UNFINISHED, "not cancelled at once", shown)
            if shown["status"] == "cancelled":
                demand(job.run not in job.finished or job.cancelled, "a finished job was cancelled", shown)
                job.cancelled = job.ever_cancelled = True
            self._check(job, shown)

    def retry(self, which: int, narrow: int) -> None:
        if job := _pick(self.jobs, which):
            codes = [None, ["cancelled"], ["context_length", "expired"]][narrow % 3]
            body = {} if codes is None else {"codes": codes}
            known = job.finished.get(job.run)
            reply = self.service.post(f"/jobs/{job.id}/retry", self.service.admin, json=body)
            if job.purged:
                demand(reply.status_code == 404, "retry of a purged job", reply.status_code)
                return
            demand(reply.status_code in (200, 202, 409), "retry", reply.status_code, reply.text)
            if known is not None:
                failed = [error["code"] for error in self._errors(job, known).values()]
                due = [code for code in failed if codes is None or code in codes]
                demand(
                    reply.status_code == (202 if due else 200), "retry of", failed, codes, reply.status_code
                )
            if reply.status_code == 202:
                job.run += 1
                job.cancelled = False
            if reply.status_code != 409:
                self._check(job, reply.json())

    def _errors(self, job: JobModel, ended: Json) -> Json:
        errors: Json = ended["errors"]
        return errors

    def purge(self, which: int) -> None:
        if job := _pick(self.jobs, which):
            reply = self.service.delete(f"/jobs/{job.id}?purge=true", self.service.admin)
            demand(reply.status_code == (404 if job.purged else 204), "purge", reply.status_code, reply.text)
            self._forget(job)

    def _forget(self, job: JobModel) -> None:
        if not job.purged:
            self.purges += 1
        job.purged = True
        if job.key is not None:
            self.by_key.pop(job.key, None)

    def race(self, which: int, what: int) -> None:
        """Two or three clients do different things to one job at once; whatever the order, the job stays whole."""
        job = _pick([job for job in self.jobs if not job.purged], which)
        if job is None:
            return
        service, path, admin = self.service, f"/jobs/{job.id}", self.service.admin
        acts: dict[str, Callable[[], requests.Response]] = {
            "cancel": lambda: service.delete(path, admin),
            "retry": lambda: service.post(f"{path}/retry", admin),
            "purge": lambda: service.delete(f"{path}?purge=true", admin),
        }
        names = (
            ("cancel", "retry"),
            ("retry", "purge"),
            ("cancel", "purge"),
            ("retry", "retry"),
            tuple(acts),
        )[what % 5]
        statuses: list[tuple[str, int]] = []

        def act(name: str) -> None:
            statuses.append((name, acts[name]().status_code))

        _run_all([threading.Thread(target=act, args=(name,)) for name in names])
        demand(all(status in (200, 202, 204, 404, 409) for _, status in statuses), "race", statuses)
        if "purge" in names:
            demand(("purge", 204) in statuses, "race without a purge", statuses)
            self._forget(job)
            return
        # Twice, if the first one's run had ended before the second came.
        retried = statuses.count(("retry", 202))
        job.run += retried
        shown = self.service.job(job.id)
        if "cancel" in names or retried:
            job.cancelled = shown["status"] == "cancelled"
            job.ever_cancelled = job.ever_cancelled or "cancel" in names
        self._check(job, shown)

    def list_jobs(self, status: int) -> None:
        """The list shows every job that is not purged, the newest first."""
        wanted = ("succeeded", "partial", "failed", "cancelled", None, None, None)[status % 7]
        shown = self._list(wanted)
        known = [job.id for job in reversed(self.jobs) if not job.purged]
        if wanted is None:
            demand([job["id"] for job in shown] == known, "the list", [job["id"] for job in shown], known)
        else:
            demand({job["status"] for job in shown} <= {wanted}, "the list of", wanted, shown)
            demand({job["id"] for job in shown} <= {*known}, "the list shows purged jobs", shown)

    def _list(self, status: str | None = None) -> list[Json]:
        listed: list[Json] = []
        cursor = ""
        while True:
            query = f"?limit=7{cursor}" + (f"&status={status}" if status else "")
            page = self.service.get(f"/jobs{query}", self.service.admin).json()
            listed += page["data"]
            if page["next_cursor"] is None:
                return listed
            cursor = f"&cursor={page['next_cursor']}"

    # What befalls the service, and what surrounds it

    def toggle(self, mode: int) -> None:
        modes = {"delivery": ("inline", "webhook")[mode % 2]}
        reply = self.service.patch("/settings", self.service.admin, json=modes)
        demand(reply.status_code == 200, "modes", reply.text)
        self.modes = modes

    def kill(self) -> None:
        """kill -9, and a new start."""
        self.kills += 1
        self.service.kill()
        self.service.start()
        shown = self.service.get("/settings", self.service.admin).json()
        demand(shown["delivery"] == self.modes["delivery"], "the mode did not outlive the restart", shown)

    def restart(self) -> None:
        """SIGTERM, and a new start; with calls held it would take their grace."""
        if not self.held:
            status = self.service.terminate()
            demand(status == 0, "exit status", status)
            self.service.start()

    def hold(self) -> None:
        """The endpoint answers nothing from now on."""
        self.held = True
        self.upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))

    def let_go(self) -> None:
        self.held = False
        self.upstream.clear_faults()
        self.upstream.release()

    def storm(self, kind: int, times: int) -> None:
        """The next calls fail."""
        self.troubled = True
        fault = STORMS[kind % len(STORMS)]
        for _ in range(1 + times % 4):
            self.upstream.add_fault(fault)

    def refuse(self, kind: int, times: int) -> None:
        """The receiver takes the next webhooks badly."""
        refusal = REFUSALS[kind % len(REFUSALS)]
        self.receiver.script(*[refusal] * (1 + times % 6))

    def pause(self, ms: int) -> None:
        time.sleep(ms % 150 / 1000)

    def wait(self, which: int) -> None:
        """For a job to end."""
        job = _pick([job for job in self.jobs if not job.purged], which)
        if job is not None and not self.held:
            self._wait(job)

    # What must be so

    def _look(self, job: JobModel) -> None:
        reply = self.service.get(f"/jobs/{job.id}", self.service.admin)
        if job.purged:
            demand(reply.status_code == 404, "a purged job is there", reply.text)
            return
        demand(reply.status_code == 200, "a job is not there", job.id, reply.status_code, reply.text)
        self._check(job, reply.json())

    def _wait(self, job: JobModel) -> Json:
        deadline_s = time.monotonic() + FINISHED_WITHIN_S
        while (shown := self.service.job(job.id))["finished_at"] is None:
            demand(time.monotonic() < deadline_s, "a job does not end", shown)
            time.sleep(0.05)
        self._check(job, shown, ended=True)
        return shown

    def _check(self, job: JobModel, shown: Mapping[str, Any], *, ended: bool = False) -> None:
        """One look at a job, held to all that is known of it."""
        counts, status = shown["counts"], shown["status"]
        demand(shown["id"] == job.id, "another job", shown)
        demand(shown["run"] == job.run, "run", job.run, shown)
        demand(shown["metadata"] == job.body["metadata"], "metadata", shown)
        demand(counts["total"] == len(job.data), "total", shown)
        demand(counts["answered"] + counts["failed"] + counts["pending"] == counts["total"], "counts", shown)
        demand(min(counts.values()) >= 0, "counts", shown)
        demand((status == "cancelled") == job.cancelled, "cancelled", job.cancelled, shown)
        known = job.finished.get(job.run)
        demand(not (known or ended) or shown["finished_at"] is not None, "a job is unfinished again", shown)
        if shown["finished_at"] is not None:
            demand(counts["pending"] == 0, "finished and pending", shown)
            if not job.cancelled:
                demand(status == _status_of(counts), "status", shown)
        elif not job.cancelled:
            demand(status in UNFINISHED, "status", shown)
        if shown["results"] is not None:
            self._check_results(job, shown)
        if shown["finished_at"] is not None and shown["results"] is not None:
            ending = {name: value for name, value in shown.items() if name not in ("usage", "results_url")}
            demand(known in (None, ending), "a finished job has changed", known, ending)
            job.finished[job.run] = ending

    def _check_results(self, job: JobModel, shown: Mapping[str, Any]) -> None:
        results, errors, counts = shown["results"], shown["errors"], shown["counts"]
        demand(list(results) == list(job.data), "ids or their order", list(results))
        for id_, answer in results.items():
            if answer is None:
                demand(id_ not in job.answers, "an answer is lost", id_, shown)
                continue
            demand(answer == f"answer to: {job.data[id_]}", "another answer", id_, answer)
            demand(job.may_be_answered(id_), "an answer to what has none", id_, answer)
            demand(id_ not in errors, "answered and failed", id_, shown)
            job.answers[id_] = answer
        for id_, error in errors.items():
            may_be = job.may_fail_with(id_, troubled=self.troubled)
            demand(error["code"] in may_be, "a failure of a code that can't be", id_, error, may_be)
            if error["code"] in TRIED_OUT:
                demand(error["attempts"] == 5, "given up too early or too late", error)
        if shown["finished_at"] is not None:
            answered = sum(answer is not None for answer in results.values())
            demand(answered == counts["answered"] and len(errors) == counts["failed"], "counts", shown)

    # The end

    def settle(self) -> None:
        """All is well again: every job ends, every webhook arrives, and all that was seen fits together."""
        self.let_go()
        for job in self.jobs:
            if job.purged:
                self._look(job)
            else:
                self._wait(job)
        self.list_jobs(4)
        for job in self.jobs:
            if not job.purged:
                self._wait_delivered(job)
        self._check_received()
        self._check_calls()
        errors = log.faults(self.service.stderr())
        demand(not errors, "an error in the log", *errors[:20])

    def _wait_delivered(self, job: JobModel) -> None:
        """Each run's webhook; one that the receiver has refused is asked for, since its next try may be hours away."""
        deadline_s = time.monotonic() + DELIVERED_WITHIN_S
        asked: dict[str, int] = {}  # for another delivery, after so many attempts
        while True:
            deliveries = self._deliveries(job)
            runs = sorted(delivery["run"] for delivery in deliveries)
            wanted = list(range(1, job.run + 1)) if job.webhook else []
            demand(runs == wanted, "deliveries of the runs", runs, wanted, job.id)
            undelivered = [delivery for delivery in deliveries if delivery["status"] != "delivered"]
            if not undelivered:
                return
            demand(time.monotonic() < deadline_s, "a webhook does not arrive", undelivered)
            for delivery in undelivered:
                if len(delivery["attempts"]) > asked.get(delivery["id"], 0):
                    asked[delivery["id"]] = len(delivery["attempts"])
                    self.service.post(f"/deliveries/{delivery['id']}/redeliver", self.service.admin)
            time.sleep(0.1)

    def _deliveries(self, job: JobModel) -> list[Json]:
        path = f"/deliveries?job_id={job.id}&limit=100"
        deliveries: list[Json] = self.service.get(path, self.service.admin).json()["data"]
        return deliveries

    def _check_received(self) -> None:
        """Signed, one id a run, the same body each time, and telling the run as it ended."""
        jobs = {job.id: job for job in self.jobs}
        bodies: dict[str, bytes] = {}
        ids: dict[tuple[str, int], str] = {}
        for request in self.receiver.received():
            message = verified(request, self._secret)
            shown, id_ = message["data"], request.headers["webhook-id"]
            demand(message["type"] == "job.finished", "a webhook of another type", message)
            demand(bodies.setdefault(id_, request.body) == request.body, "one webhook with two bodies", id_)
            run = (shown["id"], shown["run"])
            demand(ids.setdefault(run, id_) == id_, "one run with two webhooks", run, ids[run], id_)
            demand(shown["id"] in jobs, "a webhook of an unknown job", shown)
            job = jobs[shown["id"]]
            demand(job.webhook, "a webhook of an inline job", shown)
            demand(shown["finished_at"] is not None, "a webhook of an unfinished run", shown)
            ending = job.finished.get(shown["run"])
            told = {name: value for name, value in shown.items() if name in (ending or {})}
            demand(ending is None or told == ending, "a webhook tells another end", told, ending)
        for job in self.jobs:
            if job.webhook and not job.purged:
                told_runs = {run for id_, run in ids if id_ == job.id}
                demand(told_runs == {*range(1, job.run + 1)}, "webhooks of the runs", told_runs, job.run)

    def _check_calls(self) -> None:
        """An answered task is not asked again, but for what was in flight at a kill; and every call is counted."""
        self.upstream.wait_until_idle()
        calls = self.upstream.calls()
        answered = Counter(
            call.user_text for call in calls if call.status == 200 and call.fault != FaultKind.HTML
        )
        plain = [job for job in self.jobs if not job.settings.get("pack")]
        for text in (text for job in plain for text in job.data.values()):
            demand(
                answered[text] <= 1 + self.kills, "asked again after its answer", text[:50], answered[text]
            )
        if not (self.kills or self.purges):
            counted = sum(self.service.job(job.id, results=False)["usage"]["requests"] for job in self.jobs)
            demand(counted == len(calls), "usage.requests", counted, "calls", len(calls))


def _status_of(counts: Mapping[str, int]) -> str:
    if counts["answered"] == counts["total"]:
        return "succeeded"
    return "partial" if counts["answered"] else "failed"


def _pick(jobs: list[JobModel], which: int) -> JobModel | None:
    return jobs[which % len(jobs)] if jobs else None


def _run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
