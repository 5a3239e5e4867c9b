"""Hands a job to the server, once: every try carries the same idempotency key, so one that broke off is found again."""

import uuid
from contextlib import suppress

from gpt_worker.client.bodies import Body
from gpt_worker.client.errors import Busy, Conflict
from gpt_worker.client.patience import OnWait, patiently
from gpt_worker.client.server import Json, Server

PATIENCE_S = 120.0
REPLY_TIMEOUT_S = 300.0  # a large file takes its time to be checked and stored
STILL_STORED_RETRY_AFTER_S = 1.0


def submit(server: Server, body: Body, on_wait: OnWait) -> Json:
    """The accepted job. Raises a ClientError, after PATIENCE_S for trouble that might have passed."""
    # That is waited for below; nobody there, or a token that is no good, is told at once.
    with suppress(Busy):
        server.listed("/jobs", {"limit": "1"})
    headers = {**body.headers, "Idempotency-Key": str(uuid.uuid4()), "Prefer": "respond-async"}

    def send() -> Json:
        try:
            reply = server.ask("POST", "/jobs", data=body, headers=headers, timeout_s=REPLY_TIMEOUT_S)
        except Conflict as error:  # the try before this one has arrived, and is being stored
            raise Busy(str(error), STILL_STORED_RETRY_AFTER_S) from error
        return server.as_job(reply)

    return patiently(send, PATIENCE_S, on_wait)
