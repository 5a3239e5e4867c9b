"""The test stand: the service with a fake endpoint and a webhook receiver beside it, and a ledger over its lives.

A life lasts from a start to its end, of whatever kind; at each end the database is read and judged.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

import requests
from standardwebhooks import WebhookVerificationError

from chaos import hooks, snapshot
from chaos.client import Client
from chaos.hooks import Hook
from chaos.ledger import BAD, KEYS, LOG, STUCK, TOKENS, Ledger
from chaos.snapshot import Snapshot
from chaos.traffic import THREADS, Shopper, Traffic
from tests.receiver import Cut, Hang, Received, Receiver, Scripted, verified
from tests.service import ADMIN_EMAIL, PASSWORD, Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

LATENCY_S, SIGMA = 0.03, 0.5
T = TypeVar("T")

API_KEYS = 3
RESUBMITS = 100  # at the end
REST_S = 60.0  # in which everything must have come to rest
LOOK_S = 0.1


STANDS = 2  # at once: a life is mostly waiting


def side_by_side(work: Callable[[int, threading.Event], T]) -> list[T]:
    """What `work(number, stopping)` gives on each of the stands; an interrupt sets `stopping` and waits for them."""
    stopping = threading.Event()
    with ThreadPoolExecutor(STANDS) as pool:
        futures = [pool.submit(work, number, stopping) for number in range(STANDS)]
        try:
            return [future.result() for future in futures]
        finally:
            stopping.set()


class MoodyReceiver(Receiver):
    """Refuses some webhooks the first time they come, so that they come again a few seconds later."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self._moods = threading.Lock()
        self._known: set[str] = set()
        self.answers: list[Scripted] = []
        """To each request, in the order in which they came."""

    def take(self, request: Received) -> Scripted:
        with self._moods:
            super().take(request)
            id_ = request.headers.get("webhook-id", "")
            fresh = id_ not in self._known
            self._known.add(id_)
            mood = self._random.random() if fresh else 1.0
            answer: Scripted = (
                500 if mood < 0.04 else Cut.RESET if mood < 0.06 else Hang(0.3) if mood < 0.1 else 200
            )
            self.answers.append(answer)
            return answer


class Stand:
    """A context manager; nothing of it is left behind."""

    def __init__(self, random: Random, env: Mapping[str, str] | None = None) -> None:
        self._stack = ExitStack()
        self._random = random
        self._env = dict(env or {})
        self.ledger = Ledger()
        self.lives = 0
        self._launched_s = 0.0
        self._noted = 0  # webhooks that were looked at

    def __enter__(self) -> Self:
        stack = self._stack
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="chaos-"))
            stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
            self.receiver = stack.enter_context(MoodyReceiver(Random(self._random.getrandbits(64))))
            rules = KeyRules(latency_s=LATENCY_S, latency_sigma=SIGMA)
            self.upstream = stack.enter_context(
                Upstream(
                    {f"sk-chaos-{number}": rules for number in range(API_KEYS)},
                    log_size=100_000,
                    seed=self._random.getrandbits(30),
                )
            )
            self._forget_calls()
            env = {"REQUEST_API": self.receiver.url, "GPT_THREADS_PER_KEY": "8", **self._env}
            self.service = Service(self._directory, env, self.upstream)
            stack.callback(self.service.kill)
        except BaseException:
            stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def register(self) -> None:
        """The first account, whose token serves all clients for all lives. The service runs."""
        self.token = self.service.admin
        self.secret = str(self.service.get("/webhooks/secret", self.token).json()["secret"])

    def try_to_register(self) -> None:
        """The same while the service may die of it, or is not there yet."""
        while os.waitid(os.P_PID, self.service.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            try:
                self.service.post("/register", json={"email": ADMIN_EMAIL, "password": PASSWORD}, timeout=5.0)
            except requests.RequestException:
                time.sleep(0.02)
            else:
                return

    def launch(self) -> None:
        """Begin a life, and do not wait for it."""
        self._launched_s = time.monotonic()
        self.lives += 1
        self.service.launch()

    def start(self) -> None:
        self.launch()
        self.service.wait_ready()

    def traffic(self, *, threads: int = THREADS, tour_from: int | None = None) -> Traffic:
        """Clients for this life; not started."""
        random = Random(self._random.getrandbits(64))
        name = f"l{self.lives}"
        return Traffic(
            self.service.port, self.token, self.ledger, random, name, threads=threads, tour_from=tour_from
        )

    def shopper(self, name: str) -> Shopper:
        """A single client, for this thread."""
        return Shopper(Client(self.service.port, self.token), self.ledger, self._random, name)

    def end(self) -> Snapshot:
        """The service has ended: judge what it left behind."""
        time.sleep(0.02)  # what it sent last may still be on its way to the endpoint
        self.upstream.wait_until_idle()
        calls = [call.user_text for call in self.upstream.calls() if call.started_at >= self._launched_s]
        self._forget_calls()
        received = self.receiver.received()
        hooks.note(self.ledger, (request.body for request in received[self._noted :]))
        self._noted = len(received)
        now = snapshot.take(self.service.data_dir)
        self.ledger.check_life(now, calls)
        return now

    def dies(self, timeout_s: float) -> bool:
        """Whether the service is killed by itself within this time; it is dead afterwards in any case."""
        try:
            return self.service.wait_exit(timeout_s) == -signal.SIGKILL
        except TimeoutError:
            return False

    def kill(self) -> Snapshot:
        self.service.kill()
        return self.end()

    def rest(self) -> None:
        """Wait, while the service runs, until no job is unfinished; breaches where one does not end."""
        deadline_s = time.monotonic() + REST_S
        while unfinished := self._unfinished():
            if time.monotonic() > deadline_s:
                self.ledger.breach(STUCK, f"{unfinished} after {REST_S:g} s in one life")
                return
            time.sleep(LOOK_S)

    def _unfinished(self) -> list[Any]:
        jobs: list[Any] = []
        for status in ("queued", "running"):
            jobs += self.service.get(f"/jobs?status={status}&limit=3", self.token).json()["data"]
        cancelled = self.service.get("/jobs?status=cancelled&limit=100", self.token).json()["data"]
        jobs += [job for job in cancelled if job["finished_at"] is None]
        return [(job["id"], job["status"], job["counts"], job["waiting"]) for job in jobs]

    def rest_of_webhooks(self) -> None:
        """Wait, while the service runs, until nothing is owed; what never comes is told by `Ledger.check_rest`."""
        deadline_s = time.monotonic() + REST_S
        while self._undelivered() and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)

    def _undelivered(self) -> bool:
        return any(
            self.service.get(f"/deliveries?status={status}&limit=1", self.token).json()["data"]
            for status in ("preparing", "pending")
        )

    def finish(self) -> None:
        """A last life without traffic, until everything has come to rest; then judge it whole."""
        self.start()
        self.come_to_rest()

    def come_to_rest(self) -> None:
        """The same in the life that runs."""
        self._check_keys()
        self.rest()
        self.rest_of_webhooks()
        self._check_tokens()
        status = self.service.terminate()
        if status != 0:
            self.ledger.breach(STUCK, f"exit status {status} at the last end")
        now = self.end()
        self.ledger.check_rest(now)
        hooks.check(self.ledger, now, self._hooks())
        for trace in self.service.stderr().split("\nTraceback ")[1:]:
            last = next((line for line in trace.split("\n")[1:] if line[:1] not in (" ", "")), "?")
            self.ledger.breach(LOG, last)

    def _check_keys(self) -> None:
        """The latest submits with an Idempotency-Key once more, whatever became of them: each gives its one job."""
        shopper = self.shopper("last")
        for submit in [submit for submit in self.ledger.all() if submit.key][-RESUBMITS:]:
            if not shopper.again(submit):
                self.ledger.breach(KEYS, f"{submit.mark} is not accepted again")
        shopper.close()

    def _check_tokens(self) -> None:
        for token, works in self.ledger.tokens.items():
            status = self.service.get("/me", token).status_code
            if works is not None and status != (200 if works else 401):
                self.ledger.breach(TOKENS, f"{status} for one that {'was made' if works else 'was revoked'}")

    def _hooks(self) -> list[Hook]:
        return [
            Hook(
                request.headers["webhook-id"],
                request.body,
                self._verifies(request),
                answer not in (500, Cut.RESET),
            )
            for request, answer in zip(self.receiver.received(), self.receiver.answers, strict=True)
        ]

    def _verifies(self, request: Received) -> bool:
        # The library also refuses what is old; that was not so when it came.
        sent = dict(request.headers)
        try:
            verified(Received(request.method, request.path, sent, request.body, request.at), self.secret)
        except WebhookVerificationError as error:
            return "too old" in str(error)
        return True

    def _forget_calls(self) -> None:
        self.upstream.reset()
        self.upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, times=None, contains=BAD))
