"""A service that is stopped for longer than its claim on the database lasts, and one that comes in its place."""

import os
import signal
import time

import pytest

from gpt_worker.owner import EXPIRES_AFTER_S
from tests.servers import Server
from tests.stand import KEYS, Stand, asked_otherwise
from tests.upstream import Fault, FaultKind

pytestmark = pytest.mark.services

TAKE_OVER_S = 75.0
"""In which a row of 30 s has expired, on a machine that has much else to do."""


def test_service_that_was_suspended_sends_nothing_before_the_database_is_surely_its_own(
    stand: Stand, server: Server
) -> None:
    calls = len(KEYS)  # one a key, of which nothing is known yet
    stand.upstream.add_fault(Fault(kind=FaultKind.HANG, times=calls))
    stand.start()
    job_id = stand.submit(stand.data, prefer="respond-async").json()["id"]
    stand.upstream.wait_for_calls(calls)
    assert in_flight(stand) == calls

    os.killpg(stand.pid, signal.SIGSTOP)
    time.sleep(EXPIRES_AFTER_S + 1.0)
    with server.table_locked(stand, "owners"):  # so that neither a renewal nor a commit tells it
        stand.upstream.release()
        os.killpg(stand.pid, signal.SIGCONT)
        stand.wait_until(lambda: in_flight(stand) == 0)
        status, reason = stand.readiness()
        stand.wait_until_nothing_is_sent()
        sent = len(stand.upstream.calls())

    assert (status, "owner" in reason.lower()) == (503, True)
    assert sent == calls
    assert stand.wait_finished(job_id, 60)["status"] == "succeeded"
    assert asked_otherwise(stand.upstream, stand.data.values()) == {}
    assert stand.readiness()[0] == 200
    stand.assert_ends_well()


def test_start_waits_for_a_transaction_in_which_the_owner_was_suspended(
    stand: Stand, server: Server, elsewhere: Stand
) -> None:
    stand.start()
    done = stand.submit(["hello"]).json()
    stand.assert_ends_well()

    with server.table_locked(stand, "owners"):
        elsewhere.launch()
        elsewhere.wait_until(lambda: "can't be used yet" in elsewhere.stderr() or elsewhere.has_exited)

    elsewhere.wait_ready(TAKE_OVER_S)
    assert elsewhere.job(done["id"]) == done
    elsewhere.assert_ends_well()


def in_flight(service: Stand) -> int:
    keys = service.get("/keys", service.admin).json()["data"]
    return sum(key["in_flight"] for key in keys)
