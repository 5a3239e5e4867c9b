"""urllib3 in threads and nothing else: no service, no database, no retries but of 429s. A yardstick, and no ceiling.

Our service connects by urllib3 too, but its own exchange takes less CPU a call than urllib3's. Where keys have limits
this one is told them, and paces itself exactly: what one could reach by knowing everything.
"""

import json
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import peer
import urllib3

MARGIN_S = 0.02
"""Later than allowed by so much: the clock of the endpoint starts with the first call, not with ours."""


class Pace:
    """One key's bucket: full at first, refilled all the time."""

    def __init__(self, per_minute: int | None, bucket_s: float) -> None:
        self._per_s = per_minute / 60 if per_minute else None
        self._level = max(1.0, int(self._per_s * bucket_s)) if self._per_s else 0.0
        self._told_s: float | None = None

    def wait_s(self) -> float:
        """Takes one request, and says how long to wait before it is sent."""
        if self._per_s is None:
            return 0.0
        now_s = time.monotonic()
        if self._told_s is None:
            self._told_s = now_s + MARGIN_S
        elif now_s > self._told_s:
            self._level += (now_s - self._told_s) * self._per_s
            self._told_s = now_s
        self._level -= 1.0
        return max(0.0, -self._level / self._per_s)


def work(told: peer.Told) -> peer.Done:
    waiting = deque(told.tasks.items())
    threads = max(1, told.in_flight // len(told.keys))
    pool = urllib3.PoolManager(num_pools=1, maxsize=told.in_flight, retries=False)
    url = told.base_url + "/chat/completions"
    done = peer.Done()
    timeout = urllib3.Timeout(told.deadline_s)

    def serve(key: str, pace: Pace, lock: threading.Lock) -> None:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        while True:
            with lock:
                wait_s = pace.wait_s() if waiting else 0.0
                if wait_s:
                    time.sleep(wait_s)  # holding the lock: the others of this key come later anyway
            try:
                task_id, text = waiting.popleft()
            except IndexError:
                return
            body = json.dumps({"model": told.model, "messages": told.messages(text)}).encode()
            reply = pool.request("POST", url, body=body, headers=headers, timeout=timeout)
            if reply.status == 200:
                done.answers[task_id] = reply.json()["choices"][0]["message"]["content"]
            elif reply.status == 429:
                waiting.append((task_id, text))
            else:
                done.errors[task_id] = str(reply.status)

    with ThreadPoolExecutor(threads * len(told.keys)) as threads_pool:
        done.begin()
        for key in told.keys:
            pace, lock = Pace(key["requests_per_minute"], told.bucket_s), threading.Lock()
            for _ in range(threads):
                threads_pool.submit(serve, key["api_key"], pace, lock)
        threads_pool.shutdown(wait=True)
        done.end()
    return done


peer.main(work)
