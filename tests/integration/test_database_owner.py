"""One owner of a database that several hosts reach: who else comes is refused, and who is gone is followed."""

import signal

import pytest

from tests.link import Link
from tests.servers import Server, query
from tests.stand import Stand, asked_otherwise, assert_refused
from tests.upstream import Fault, FaultKind

pytestmark = pytest.mark.services

TAKE_OVER_S = 75.0
"""In which a row of 30 s has expired, on a machine that has much else to do."""


def test_second_service_on_the_database_is_refused(stand: Stand, elsewhere: Stand) -> None:
    stand.start()

    assert "another gpt-worker" in elsewhere.refusal(TAKE_OVER_S)

    assert stand.submit(["hello"]).json()["status"] == "succeeded"
    assert stand.readiness()[0] == 200
    stand.assert_ends_well()


def test_service_that_stopped_leaves_the_database_to_others_at_once(stand: Stand, elsewhere: Stand) -> None:
    stand.start()
    done = stand.submit(["hello"]).json()
    stand.assert_ends_well()

    elsewhere.start()

    assert "another's" not in elsewhere.stderr(), "it had to wait"
    assert elsewhere.job(done["id"]) == done
    assert elsewhere.submit(["more"]).json()["status"] == "succeeded"


def test_killed_services_work_is_taken_over_by_another_host(
    stand: Stand, server: Server, elsewhere: Stand
) -> None:
    stand.begin()

    stand.kill()

    stand.upstream.wait_until_idle()
    elsewhere.wait_until(lambda: not server.connections())  # a last commit may have been on its way
    stored = {id_ for (id_,) in query(stand, "SELECT id FROM tasks WHERE state = 1")}
    sent = {call.user_text for call in stand.upstream.calls()}
    elsewhere.start(TAKE_OVER_S)
    assert elsewhere.wait_finished(stand.job_id)["status"] == "succeeded"
    assert elsewhere.job(stand.job_id)["results"] == stand.answers
    asked = asked_otherwise(stand.upstream, stand.data.values())
    assert asked == {text: 2 for id_, text in stand.data.items() if text in sent and id_ not in stored}


def test_service_whose_database_was_taken_over_sends_and_stores_nothing_more(
    linked: Stand, link: Link, server: Server, elsewhere: Stand
) -> None:
    linked.upstream.add_fault(Fault(kind=FaultKind.HANG, times=2))
    linked.start()
    job_id = linked.submit(["slow"], prefer="respond-async").json()["id"]
    linked.upstream.wait_for_calls(1)
    link.silence()  # the first is cut off from the database, and does not end
    server.cut_all()  # as the server does after a while: it is not told of it
    query(elsewhere, "UPDATE owners SET expires_at = '2001-01-01 00:00:00'")
    elsewhere.start(TAKE_OVER_S)
    linked.upstream.wait_for_calls(2)

    link.restore()

    linked.wait_until(lambda: "owner" in linked.readiness()[1].lower(), 60)
    assert linked.readiness()[0] == 503
    linked.upstream.release()
    assert elsewhere.wait_finished(job_id)["status"] == "succeeded"
    assert_refused(linked.submit(["more"], token=elsewhere.admin))
    job = elsewhere.job(job_id)
    assert job["results"] == {"0": "answer to: slow"}
    assert job["usage"]["requests"] == 1, "the other answer was stored too"
    assert len(linked.upstream.calls()) == 2
    assert elsewhere.readiness()[0] == 200
    assert "Traceback" not in linked.stderr()


def test_two_that_start_at_once_on_an_empty_database_make_one_owner(stand: Stand, elsewhere: Stand) -> None:
    both = [stand, elsewhere]

    for each in both:
        each.launch()

    stand.wait_until(lambda: any(each.has_exited for each in both), TAKE_OVER_S)
    refused, serving = sorted(both, key=lambda each: not each.has_exited)
    assert refused.wait_exit() == 2
    lines = [line for line in refused.stderr().splitlines() if line.startswith("gpt-worker: the database")]
    assert len(lines) == 1, refused.stderr()
    assert "Traceback" not in refused.stderr()
    serving.wait_ready()
    assert serving.submit(["hello"]).json()["status"] == "succeeded"
    serving.assert_ends_well()


def test_reload_keeps_the_database_and_asks_nothing_twice(stand: Stand) -> None:
    stand.begin()

    stand.signal(signal.SIGHUP)

    stand.wait_until(lambda: stand.stderr().count("action=started") == 2, 60)
    stand.assert_ends_as_if_nothing_had_been()
    stand.assert_ends_well()
