"""Clients that do all that can be done with jobs, at random, and note what they were told in the ledger."""

import gzip
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any
from urllib.parse import urlencode

from chaos.client import Client, NoReply, Reply
from chaos.ledger import BAD, CUT, REFUSED, REPLIES, UNANSWERED, WRONG, Ledger, Submit
from tests.service import ADMIN_EMAIL, PASSWORD

THREADS = 6
HASTY_RETRIES = 8
REFUSED_PAUSE_S = 0.02
JSON = {"Content-Type": "application/json"}
BIG_TASKS = 5_001  # one more than a slice of a submit's commits


class Shopper:
    """One client: its operations are methods, each a request or two. They raise NoReply."""

    def __init__(self, client: Client, ledger: Ledger, random: Random, name: str) -> None:
        self._client = client
        self._ledger = ledger
        self._random = random
        self._name = name
        self._number = 0

    def close(self) -> None:
        self._client.close()

    # Submitting

    def inline(self) -> None:
        self._submit(self._tasks(1, 5), headers={"Prefer": "wait=5"})

    def asynchronous(self) -> None:
        self._submit(self._tasks(3, 20), headers={"Prefer": "respond-async"})

    def packed(self) -> None:
        self._submit(self._tasks(10, 30, bad=0), {"pack": True}, {"Prefer": "respond-async"})

    def webhook(self) -> None:
        self._submit(self._tasks(1, 4), {"delivery": "webhook"})

    def hasty(self) -> None:
        """A webhook job with a bad task, run again and again without waiting for its ends: each run owes a webhook."""
        mark = self._mark()
        texts = {"a": f"{mark} a {BAD}", "b": f"{mark} b"}
        body = {"data": texts, "settings": {"delivery": "webhook"}, "metadata": {"mark": mark}}
        submit = Submit(mark, "/jobs", json.dumps(body).encode(), JSON, texts, webhook=True)
        if self._send(submit) is not None:
            for _ in range(HASTY_RETRIES):
                self._retry(submit)

    def keyed(self) -> None:
        settings = {"delivery": "webhook"} if self._random.random() < 0.5 else {}
        key = f"key of {self._name} {self._number}"
        self._submit(
            self._tasks(1, 6), settings, {"Idempotency-Key": key, "Prefer": "respond-async"}, key=True
        )

    def upload(self) -> None:
        """A file, in one of the forms it may have."""
        texts = self._tasks(3, 30)
        mark = self._mark()
        headers = {"Prefer": "respond-async"}
        if self._random.random() < 0.5:
            headers["Idempotency-Key"] = f"file {mark}"
        query = urlencode({"metadata": json.dumps({"mark": mark})})
        form = self._random.choice(("jsonl", "csv", "multipart"))
        lines = "".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in texts.items()).encode()
        if form == "jsonl":
            headers |= {"Content-Type": "application/jsonl", "Content-Encoding": "gzip"}
            body = gzip.compress(lines, mtime=0)
        elif form == "csv":
            headers["Content-Type"] = "text/csv"
            body = ("id,text\n" + "".join(f"{id_},{text}\n" for id_, text in texts.items())).encode()
        else:
            query = ""
            headers["Content-Type"] = 'multipart/form-data; boundary="cut-here"'
            body = _multipart({"metadata": json.dumps({"mark": mark}).encode()}, lines)
        self._send(Submit(mark, f"/jobs?{query}", body, headers, texts, key="Idempotency-Key" in headers))

    def big(self) -> None:
        """A file of several slices, which is cancelled, asked again, cancelled and purged."""
        mark = self._mark()
        texts = {f"t{number}": f"{mark} {number}" for number in range(BIG_TASKS)}
        lines = "".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in texts.items()).encode()
        query = urlencode({"metadata": json.dumps({"mark": mark}), "priority": -100, "deadline_s": 2})
        headers = {"Prefer": "respond-async", "Content-Type": "application/jsonl"}
        submit = Submit(mark, f"/jobs?{query}", lines, headers, texts, expires=True)
        if self._send(submit) is None:
            return
        self._cancel(submit)
        self._retry(submit)
        self._cancel(submit)
        if self._random.random() < 0.7:
            self._purge(submit)

    def refused(self) -> None:
        """A file whose last line is no task: nothing of it stays, and its Idempotency-Key is free again."""
        mark = self._mark()
        lines = b'{"text": "not to be asked"}\n' * 50 + b"{}\n"
        headers = {"Content-Type": "application/jsonl", "Idempotency-Key": f"refused {mark}"}
        reply = self._ask("POST", "/jobs", lines, headers)
        self._expect(reply, "a bad file", 422, 503)

    def resubmit(self) -> None:
        """A submit with an Idempotency-Key once more, perhaps after its reply was lost."""
        keyed = [submit for submit in self._ledger.all() if submit.key]
        if keyed:
            self.again(self._random.choice(keyed[-40:]))

    def again(self, submit: Submit) -> bool:
        """Whether it was accepted."""
        return self._send(submit) is not None

    def _submit(
        self,
        texts: dict[str, str],
        settings: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        *,
        key: bool = False,
    ) -> None:
        mark = self._mark()
        body = json.dumps({"data": texts, "settings": settings or {}, "metadata": {"mark": mark}}).encode()
        is_webhook = (settings or {}).get("delivery") == "webhook"
        all_headers = {**JSON, **(headers or {})}
        self._send(Submit(mark, "/jobs", body, all_headers, texts, webhook=is_webhook, key=key))

    def _send(self, submit: Submit) -> Submit | None:
        """The submit, if it was accepted now."""
        self._ledger.add(submit)
        self._ledger.count("submits")
        reply = self._ask("POST", submit.path, submit.body, submit.headers)
        if reply.status not in (200, 202):
            self._expect(reply, "submit", *((409, 503) if submit.key else (503,)))
            return None
        job = reply.json()
        self._ledger.accepted(submit, job)
        self._ledger.count("accepted")
        if reply.status == 200:
            self._check_finished(submit, job)
        return submit

    def _check_finished(self, submit: Submit, job: dict[str, Any]) -> None:
        if job["finished_at"] is None or job["counts"]["pending"]:
            self._ledger.breach(WRONG, f"{submit.mark}: a 200 with {job['status']}, {job['counts']}")
        submit.told_run = max(submit.told_run, job["run"])
        if job["results"] is not None:
            if list(job["results"]) != list(submit.texts):
                self._ledger.breach(WRONG, f"{submit.mark}: other ids, or in another order")
            self._ledger.check_shown(submit, job["results"])

    # With jobs that are there

    def cancel(self) -> None:
        submit = self._one(lambda submit: not submit.purge_asked)
        if submit is not None:
            self._cancel(submit)

    def retry(self) -> None:
        submit = self._one(
            lambda submit: (
                not submit.purge_asked
                and (submit.cancel_asked or any(BAD in text for text in submit.texts.values()))
            )
        )
        if submit is not None:
            self._retry(submit)

    def purge(self) -> None:
        submit = self._one(lambda submit: not submit.key)
        if submit is not None:
            self._purge(submit)

    def read(self) -> None:
        submit = self._one(lambda _: True)
        if submit is None:
            return
        reply = self._ask("GET", f"/jobs/{submit.job_id}")
        if self._found(reply, submit, "read"):
            self._ledger.check_shown(submit, reply.json()["results"] or {})
        reply = self._ask("GET", f"/jobs/{submit.job_id}/results?format=jsonl")
        if self._found(reply, submit, "results"):
            lines = [json.loads(line) for line in reply.body.splitlines()]
            self._ledger.check_shown(submit, {line["id"]: line["result"] for line in lines})

    def redeliver(self) -> None:
        reply = self._ask("GET", "/deliveries?limit=20")
        self._expect(reply, "deliveries", 200, 503)
        deliveries = reply.json()["data"] if reply.status == 200 else []
        if deliveries:
            chosen = self._random.choice(deliveries)
            again = self._ask("POST", f"/deliveries/{chosen['id']}/redeliver")
            self._expect(again, "redeliver", 202, 409, 503)

    def test_webhook(self) -> None:
        reply = self._ask("POST", "/webhooks/test")
        self._expect(reply, "test", 202, 503)
        if reply.status == 202:
            self._ledger.tests_owed.add(reply.json()["id"])

    def account(self) -> None:
        """A token is made, perhaps revoked; a log-in; a setting."""
        body = json.dumps({"name": self._mark()}).encode()
        reply = self._ask("POST", "/tokens", body, JSON)
        self._expect(reply, "token", 201, 503)
        if reply.status == 201:
            made = reply.json()
            self._ledger.tokens[made["token"]] = True
            if self._random.random() < 0.5:
                self._ledger.tokens[made["token"]] = None
                revoked = self._ask("DELETE", f"/tokens/{made['id']}")
                self._expect(revoked, "revoke", 204, 503)
                if revoked.status == 204:
                    self._ledger.tokens[made["token"]] = False
        body = json.dumps({"email": ADMIN_EMAIL, "password": PASSWORD}).encode()
        self._expect(self._ask("POST", "/login", body, JSON), "login", 200, 503)
        self._expect(self._ask("PATCH", "/settings", b'{"registration": false}', JSON), "settings", 200, 503)

    def _cancel(self, submit: Submit) -> None:
        submit.cancel_asked = True
        reply = self._ask("DELETE", f"/jobs/{submit.job_id}")
        if self._found(reply, submit, "cancel"):
            submit.cancelled = True

    def _retry(self, submit: Submit) -> None:
        submit.retries_asked += 1
        submit.cancelled = False
        reply = self._ask("POST", f"/jobs/{submit.job_id}/retry")
        self._found(reply, submit, "retry", 202, 409)

    def _purge(self, submit: Submit) -> None:
        submit.purge_asked = True
        reply = self._ask("DELETE", f"/jobs/{submit.job_id}?purge=true")
        self._found(reply, submit, "purge", 204)
        if reply.status == 204:
            submit.purged = True

    # The rest

    def look(self) -> None:
        """Whether anybody listens."""
        self._client.request("GET", "/healthz")

    def operations(self) -> list[tuple[Callable[[], None], float]]:
        """What there is to do, and how often of all."""
        return [
            (self.inline, 3),
            (self.asynchronous, 3),
            (self.packed, 0.5),
            (self.webhook, 4),
            (self.hasty, 0.3),
            (self.keyed, 3),
            (self.resubmit, 2),
            (self.upload, 2),
            (self.cancel, 1),
            (self.retry, 1),
            (self.purge, 0.5),
            (self.read, 2),
            (self.redeliver, 0.3),
            (self.test_webhook, 0.3),
            (self.refused, 0.5),
            (self.account, 0.3),
            (self.big, 0.05),
        ]

    def tour(self) -> list[Callable[[], None]]:
        """Everything, in an order in which each has what it needs."""
        return [
            self.keyed,
            self.resubmit,
            self.webhook,
            self.inline,
            self.test_webhook,
            self.redeliver,
            self.asynchronous,
            self.cancel,
            self.retry,
            self.upload,
            self.packed,
            self.purge,
            self.read,
            self.refused,
            self.account,
            self.hasty,
            self.big,
        ]

    def _ask(self, method: str, path: str, body: bytes | None = None, headers: Any = None) -> Reply:
        try:
            return self._client.request(method, path, body, headers)
        except NoReply as failure:
            self._ledger.count(REFUSED if failure.refused else CUT if failure.cut else UNANSWERED)
            raise

    def _expect(self, reply: Reply, what: str, *statuses: int) -> None:
        if reply.status not in statuses:
            self._ledger.breach(
                REPLIES, f"{what}: {reply.status} {reply.body[:200].decode(errors='replace')}"
            )
        elif reply.status == 503:
            self._ledger.count("503s")
            if "retry-after" not in reply.headers:
                self._ledger.breach(REPLIES, f"{what}: a 503 without Retry-After")

    def _found(self, reply: Reply, submit: Submit, what: str, *statuses: int) -> bool:
        gone = (404,) if submit.purge_asked else ()
        self._expect(reply, f"{what} {submit.mark}", 200, 503, *gone, *statuses)
        return reply.status == 200

    def _one(self, fits: Callable[[Submit], bool]) -> Submit | None:
        fitting = [submit for submit in self._ledger.all()[-60:] if submit.accepted and fits(submit)]
        return self._random.choice(fitting) if fitting else None

    def _mark(self) -> str:
        self._number += 1
        return f"{self._name}.{self._number}"

    def _tasks(self, least: int, most: int, bad: float = 0.15) -> dict[str, str]:
        mark = f"{self._name}.{self._number + 1}"
        texts = {f"id {n}": f"{mark} {n}" for n in range(self._random.randint(least, most))}
        if self._random.random() < bad:
            texts["id 0"] += f" {BAD}"
        return texts


class Traffic:
    """Some shoppers, each a thread, from `start` to `stop`.

    `tour_from`: each begins with everything once, the first of them with this part, the others spread over it.
    """

    def __init__(
        self,
        port: int,
        token: str,
        ledger: Ledger,
        random: Random,
        name: str,
        *,
        threads: int = THREADS,
        tour_from: int | None = None,
    ) -> None:
        self._stopping = threading.Event()
        self._tour_from = tour_from
        self._ledger = ledger
        self._randoms = [Random(random.getrandbits(64)) for _ in range(threads)]
        self._shoppers = [
            Shopper(Client(port, token), ledger, own, f"{name}.{number}")
            for number, own in enumerate(self._randoms)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(shopper, own, number / threads), daemon=True)
            for number, (shopper, own) in enumerate(zip(self._shoppers, self._randoms, strict=True))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 70.0) -> None:
        """Nothing new; returns when the last has its reply, or knows that it gets none."""
        self._stopping.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                self._ledger.breach(REPLIES, f"a client still waits after {timeout_s:g} s")

    def _run(self, shopper: Shopper, random: Random, share: float) -> None:
        operations, weights = zip(*shopper.operations(), strict=True)
        tour = shopper.tour()
        begin = (self._tour_from or 0) + int(share * len(tour))
        left = [] if self._tour_from is None else [tour[(begin + n) % len(tour)] for n in range(len(tour))]
        while not self._stopping.is_set():
            try:
                if left:
                    left[0]()
                    left.pop(0)
                else:
                    random.choices(operations, weights)[0]()
            except NoReply as failure:
                if failure.refused:
                    self._wait_for(shopper)
        shopper.close()

    def _wait_for(self, shopper: Shopper) -> None:
        while not self._stopping.wait(REFUSED_PAUSE_S):
            with suppress(NoReply):
                shopper.look()
                return


def _multipart(parts: dict[str, bytes], file: bytes) -> bytes:
    body = b""
    for name, value in parts.items():
        body += (
            b'--cut-here\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n'
            b"Content-Type: application/json\r\n\r\n" + value + b"\r\n"
        )
    return (
        body + b'--cut-here\r\nContent-Disposition: form-data; name="file"; filename="tasks.jsonl"\r\n'
        b"Content-Type: application/jsonl\r\n\r\n" + file + b"\r\n--cut-here--\r\n"
    )
