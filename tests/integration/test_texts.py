"""Whatever people and models write comes back as it was, from every database: odd letters, long texts, many of them."""

import json
from collections.abc import Callable

import pytest

from tests.service import Service
from tests.upstream import Fault, FaultKind, Upstream

pytestmark = pytest.mark.every_database

Start = Callable[..., tuple[Service, Upstream]]
MIB = 1 << 20

ODD = {
    "a": "lower",
    "A": "upper",
    "a ": "a blank at the end",
    "á": "composed",
    "a\u0301": "combined",
    "ß": "one letter",
    "ss": "two",
    "'; DROP TABLE tasks; --": "quotes ' \" ` and \\ at the end \\",
    "%s %(id)s :id ? {} \\N": "%% %d :task ?1 \\x00 \\u0000",
    "👩‍👩‍👧‍👦 𝔘𝔫𝔦": "🦀 𐍈 \U0010ffff",
    "\u202eright to left": "\u2028 \u2029 \x85 \ufeff \x7f \x01",
    "𝔘" * 200: "as long an id as there may be, of the widest letters",
    " ": "\t\r\n only blanks around \r\n\t ",
    "null": "null",
    "": "",
}


def test_odd_ids_and_texts_come_back_as_they_were(service: Service) -> None:
    data = {id_: text for id_, text in ODD.items() if id_}

    job = service.submit(data, metadata={"👋 ' \\ %s": "🦀 '"}).json()

    answers = {id_: f"answer to: {text}" for id_, text in data.items()}
    assert list(job["results"].items()) == list(answers.items())
    assert job["metadata"] == {"👋 ' \\ %s": "🦀 '"}
    lines = service.get(f"/jobs/{job['id']}/results?format=jsonl", service.admin).content.decode()
    told = [json.loads(line) for line in lines.split("\n") if line]
    assert [(line["id"], line["result"]) for line in told] == list(answers.items())


@pytest.mark.parametrize("text", ["", " ", "\ttab \r\n", "a\x00b", "🦀'\\%s:x", "null"])
def test_odd_answer_is_stored_as_it_was(service: Service, upstream: Upstream, text: str) -> None:
    upstream.add_fault(Fault(kind=FaultKind.ANSWER, content=text))

    job = service.submit(["hello"]).json()

    assert job["results"] == {"0": text.replace("\x00", "\ufffd")}


def test_odd_message_of_an_error_is_stored(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, message="no\x00 🦀'\\%s:x" + "é" * 3000))

    job = service.submit(["hello"]).json()

    assert job["errors"]["0"]["message"].startswith("no\ufffd 🦀'\\%s:x")


def test_answers_of_several_mib_are_stored(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HUGE_BODY, size_bytes=5 * MIB, times=3))

    job_id = service.submit(["one", "two", "three"], prefer="respond-async").json()["id"]

    assert service.wait_finished(job_id, 60)["status"] == "succeeded"
    results = service.get(f"/jobs/{job_id}/results?format=json", service.admin).json()["results"]
    assert [len(text) for text in results.values()] == [5 * MIB] * 3


def test_prompts_of_several_mib_are_asked(service: Service, upstream: Upstream) -> None:
    texts = [f"{number} " + "'é\\🦀" * (MIB // 4) for number in range(2)]

    job_id = service.submit(texts, prefer="respond-async").json()["id"]

    # Too long for a model, it may be.
    assert service.wait_finished(job_id, 60)["status"] in ("succeeded", "failed")
    assert {call.user_text for call in upstream.calls()} == set(texts)


def test_long_tasks_by_the_thousand_are_stored(service: Service) -> None:
    text = "'é\\🦀\n" * 500
    lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(5000))

    reply = service.post(
        "/jobs",
        service.admin,
        data=lines.encode(),
        headers={"Content-Type": "application/jsonl", "Prefer": "respond-async"},
    )

    assert reply.status_code == 202, reply.text
    assert service.wait_finished(reply.json()["id"], 60)["counts"]["answered"] == 5000
