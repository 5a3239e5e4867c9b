"""Minutes of everything at once, with faults on both sides: memory, threads, files and the WAL stay where they are.

Inline jobs, large uploads (some cut in the middle), events, webhooks to a receiver that often fails, logins right and
wrong, cancels, retries and purges, results in every form; one request in a dozen to the endpoint fails.
"""

import gzip
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import requests

from chaos import log
from chaos.options import Options
from chaos.report import Row, fact, none_of
from chaos.watching import MIB, Sample, Watch, look, slope_per_s
from tests.receiver import Answer, Cut, Hang, Received, Receiver, Scripted
from tests.service import ADMIN_EMAIL, PASSWORD, Service
from tests.upstream import KeyRules, Upstream

NAME = "soak"
Json = dict[str, Any]

SECONDS, SECONDS_SHORT = 600.0, 30.0
KEYS, THREADS_PER_KEY = 3, 16
RULES = KeyRules(latency_s=0.02, latency_sigma=0.5, p_500=0.05, p_reset=0.02, p_hang=0.005)
REFUSED_SHARE = 0.3
CALMED_WITHIN_S = 90.0
MOST_MIB_A_MINUTE = 1.0
MOST_MIB_SHORT = 60.0  # in all of a short run, whose beginning is most of it
MOST_THREADS = KEYS * THREADS_PER_KEY + 128 + 24
MOST_FILES = 400
MOST_WAL_BYTES = 128 * MIB  # journal_size_limit is 64, and a large commit may go beyond it for a while
MOST_TEMPORARY = 16
UPLOAD_LINES = (1_000, 6_000)
TIMEOUT_S = 60.0


class FailingReceiver(Receiver):
    """Takes most webhooks."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self.taken = 0

    def take(self, request: Received) -> Scripted:
        self.taken += 1  # and not kept: this process is not what is looked at, but it should last too
        refusals: tuple[Scripted, ...] = (500, Answer(429, {"Retry-After": "2"}), Hang(0.5), Cut.RESET)
        return self._random.choice(refusals) if self._random.random() < REFUSED_SHARE else 200


def run(options: Options) -> list[Row]:
    seconds = options.seconds_or(SECONDS, SECONDS_SHORT)
    keys = {f"sk-chaos-{number}": RULES for number in range(KEYS)}
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Upstream(keys, log_calls=False, seed=options.seed) as upstream,
        FailingReceiver(options.random("receiver")) as receiver,
        Service(Path(folder), _env(receiver), upstream) as service,
    ):
        load = Load(service, options)
        with Watch(service) as watch:
            began_s = time.monotonic()
            load.run(seconds)
            samples = list(watch.samples)
        upstream.release()
        unfinished = _calm(service)
        now = look(service)
        assert now is not None
        return [
            *_use_rows(samples, began_s, seconds, now),
            none_of("replies that should not be", [*load.unexpected], load.done.total()),
            Row("jobs without an end", "0", str(unfinished), unfinished == 0),
            none_of("errors in the log", log.faults(service.stderr())),
            fact("done", dict(load.done.most_common())),
            fact("webhooks that came", receiver.taken),
        ]


def _env(receiver: Receiver) -> dict[str, str]:
    return {
        "REQUEST_API": receiver.url,
        "GPT_DEADLINE_S": "2",
        "GPT_THREADS_PER_KEY": str(THREADS_PER_KEY),
        "INLINE_WAIT_S": "10",
    }


def _use_rows(samples: list[Sample], began_s: float, seconds: float, now: Sample) -> list[Row]:
    later = [sample for sample in samples if sample.at_s >= began_s + seconds / 3]
    slope = slope_per_s([(sample.at_s, sample.rss_bytes / MIB) for sample in later]) * 60
    first, last = (
        sum(sample.rss_bytes for sample in part) / len(part) / MIB for part in (later[:5], later[-5:])
    )
    peak = max(sample.rss_bytes for sample in samples) / MIB
    long = seconds >= SECONDS / 2
    told = f"{slope:+.2f} MiB a minute; {first:.0f} to {last:.0f}, {peak:.0f} MiB at most"
    memory = (
        Row(
            "memory over the last two thirds",
            f"< {MOST_MIB_A_MINUTE:g} MiB a minute",
            told,
            slope < MOST_MIB_A_MINUTE,
        )
        if long
        else Row(
            "memory over the last two thirds",
            f"< {MOST_MIB_SHORT:g} MiB",
            told,
            last - first < MOST_MIB_SHORT,
        )
    )
    threads, files = (max(getattr(sample, name) for sample in samples) for name in ("threads", "files"))
    temporary, wal = max(sample.temporary for sample in samples), max(sample.wal_bytes for sample in samples)
    return [
        memory,
        Row("threads", f"≤ {MOST_THREADS}", f"{threads}; {now.threads} afterwards", threads <= MOST_THREADS),
        Row("open files", f"≤ {MOST_FILES}", f"{files}; {now.files} afterwards", files <= MOST_FILES),
        Row("WAL", f"≤ {MOST_WAL_BYTES / MIB:g} MiB", f"{wal / MIB:.1f} MiB", wal <= MOST_WAL_BYTES),
        Row(
            "temporary files",
            f"≤ {MOST_TEMPORARY}; 0 afterwards",
            f"{temporary}; {now.temporary} afterwards",
            temporary <= MOST_TEMPORARY and now.temporary == 0,
        ),
    ]


def _calm(service: Service) -> int:
    """How many jobs are unfinished though nobody has asked for anything for long."""

    def unfinished() -> int:
        pages = (
            service.get(f"/jobs?all=true&limit=100&status={s}", service.admin) for s in ("queued", "running")
        )
        return sum(len(page.json()["data"]) for page in pages)

    with suppress(TimeoutError):
        service.wait_until(lambda: unfinished() == 0, CALMED_WITHIN_S)
    return unfinished()


# The load


@dataclass(slots=True)
class Client:
    """One thread's way to the service."""

    session: requests.Session
    url: str
    token: str
    random: Random

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"} | options.pop("headers", {})
        return self.session.request(
            method, self.url + path, headers=headers, timeout=TIMEOUT_S, allow_redirects=False, **options
        )

    def texts(self, least: int, most: int) -> list[str]:
        return [f"{self.random.getrandbits(64):x} " * 8 for _ in range(self.random.randint(least, most))]


class Load:
    """Every kind of client, each in a thread of its own, one request after the other."""

    def __init__(self, service: Service, options: Options) -> None:
        self._service = service
        self._options = options
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.done: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._jobs: list[str] = []
        kinds = (
            self._inline,
            self._upload,
            self._follow,
            self._webhook,
            self._log_in,
            self._change,
            self._read,
        )
        self._loops = [self._inline, self._inline, *kinds]

    def run(self, seconds: float) -> None:
        admin = self._service.admin
        users = {
            loop.__name__: self._service.user(f"{loop.__name__}@example.org") for loop in self._loops[2:]
        }
        users["_read"] = admin
        threads = [
            threading.Thread(
                target=self._loop, args=(loop, f"{loop.__name__} {number}", users[loop.__name__])
            )
            for number, loop in enumerate(self._loops)
        ]
        for thread in threads:
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        for thread in threads:
            thread.join()

    def _loop(self, turn: Callable[[Client], None], name: str, token: str) -> None:
        with requests.Session() as session:
            session.trust_env = False
            client = Client(session, self._service.url, token, self._options.random(name))
            while not self._over.is_set():
                try:
                    turn(client)
                except Exception as error:  # told, and the others go on
                    self._note(name, f"{type(error).__name__}: {str(error)[:200]}")
                self._over.wait(client.random.random() * 0.05)

    def _note(self, what: str, unexpected: str | None = None) -> None:
        with self._lock:
            self.done[what.partition(" ")[0].strip("_")] += 1
            if unexpected is not None:
                self.unexpected.append(f"{what}: {unexpected}")

    def _take(self, what: str, reply: requests.Response, *wanted: int) -> bool:
        """Whether a reply is a good one; "too busy, come back" is none and no surprise either."""
        busy = reply.status_code == 503 and "Retry-After" in reply.headers
        surprise = None if busy or reply.status_code in wanted else f"{reply.status_code} {reply.text[:200]}"
        self._note(what, surprise)
        return reply.status_code in wanted and not busy

    def _remember(self, reply: requests.Response) -> str:
        job_id = str(reply.json()["id"])
        with self._lock:
            self._jobs.append(job_id)
            del self._jobs[:-200]
        return job_id

    def _inline(self, client: Client) -> None:
        reply = client.ask(
            "POST", "/jobs", json={"data": client.texts(1, 3), "settings": {"delivery": "inline"}}
        )
        if self._take("inline", reply, 200, 202):
            self._remember(reply)

    def _upload(self, client: Client) -> None:
        """A file in one of its forms, which is cancelled and deleted after a while: the keys could not keep up."""
        lines = [json.dumps({"text": text}) for text in client.texts(*UPLOAD_LINES)]
        body = "\n".join(lines).encode()
        headers = {"Content-Type": "application/jsonl", "Prefer": "respond-async"}
        kind = client.random.randrange(5)
        if kind == 0:
            self._cut(client, body, headers)
            return
        if kind == 1:
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        if kind == 2:
            headers["Idempotency-Key"] = f"{client.random.getrandbits(64):x}"
        if kind == 3:
            files = {"file": ("tasks.jsonl", body, "application/jsonl")}
            reply = client.ask("POST", "/jobs", files=files, headers={"Prefer": "respond-async"})
        else:
            reply = client.ask(
                "POST", "/jobs", data=body, headers=headers, params={"pack": "true"} if kind == 4 else {}
            )
        if self._take("upload", reply, 202):
            job_id = reply.json()["id"]
            self._over.wait(client.random.random() * 3)
            self._take("cancel", client.ask("DELETE", f"/jobs/{job_id}"), 200)
            self._take("purge", client.ask("DELETE", f"/jobs/{job_id}?purge=true"), 204)

    def _cut(self, client: Client, body: bytes, headers: dict[str, str]) -> None:
        """The client leaves in the middle."""

        def pieces() -> Iterator[bytes]:
            yield body[: len(body) // 2]
            raise ConnectionAbortedError

        with suppress(ConnectionAbortedError, requests.RequestException):
            client.ask("POST", "/jobs", data=pieces(), headers=headers)
        client.session.close()
        self._note("upload_cut")

    def _follow(self, client: Client) -> None:
        """Events, to their end or for a moment."""
        body = {"data": client.texts(20, 200), "settings": {"delivery": "inline"}}
        reply = client.ask("POST", "/jobs", json=body, headers={"Prefer": "respond-async"})
        if not self._take("async", reply, 202):
            return
        lines = client.random.choice((3, 1_000_000))
        with client.ask("GET", f"/jobs/{self._remember(reply)}/events", stream=True) as stream:
            if self._take("events", stream, 200):
                for number, _ in enumerate(stream.iter_lines()):
                    if number > lines or self._over.is_set():
                        break

    def _webhook(self, client: Client) -> None:
        reply = client.ask(
            "POST", "/jobs", json={"data": client.texts(1, 5), "settings": {"delivery": "webhook"}}
        )
        if self._take("webhook", reply, 202):
            self._remember(reply)

    def _log_in(self, client: Client) -> None:
        body = {"email": ADMIN_EMAIL, "password": PASSWORD}
        reply = client.ask("POST", "/login", json=body)
        if self._take("login", reply, 200):
            token = reply.json()["token"]["token"]
            self._take("me", client.ask("GET", "/me", headers={"Authorization": f"Bearer {token}"}), 200)
            self._take(
                "logout", client.ask("POST", "/logout", headers={"Authorization": f"Bearer {token}"}), 204
            )
        wrong = {"email": f"nobody{client.random.randrange(50)}@example.org", "password": "not the right one"}
        self._take("wrong_login", client.ask("POST", "/login", json=wrong), 401, 429)
        self._over.wait(0.3)

    def _change(self, client: Client) -> None:
        body = {
            "data": client.texts(50, 400),
            "settings": {"delivery": client.random.choice(("inline", "webhook"))},
        }
        reply = client.ask("POST", "/jobs", json=body, headers={"Prefer": "respond-async"})
        if not self._take("async", reply, 202):
            return
        job_id = reply.json()["id"]
        self._over.wait(client.random.random() * 0.3)
        self._take("cancel", client.ask("DELETE", f"/jobs/{job_id}"), 200)
        self._take("retry", client.ask("POST", f"/jobs/{job_id}/retry"), 200, 202, 409)
        self._over.wait(client.random.random() * 0.3)
        if client.random.random() < 0.7:
            self._take("purge", client.ask("DELETE", f"/jobs/{job_id}?purge=true"), 204)

    def _read(self, client: Client) -> None:
        with self._lock:
            job_id = client.random.choice(self._jobs) if self._jobs else None
        paths = ["/jobs?limit=50", "/keys", "/metrics", "/deliveries?limit=50", "/healthz", "/openapi.json"]
        if job_id is not None:
            paths += [
                f"/jobs/{job_id}",
                *(f"/jobs/{job_id}/results?format={form}" for form in ("json", "jsonl", "csv")),
            ]
        self._take("read", client.ask("GET", client.random.choice(paths)), 200)
