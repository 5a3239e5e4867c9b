"""Requests that are spoilt on purpose: the same seed spoils them the same way, and a sound one is rendered soundly."""

from random import Random

from chaos.mangling import MUTATIONS, Request, mangle, send_chunks

FORM = Request(
    b"POST",
    b"/jobs?dry_run=true",
    ((b"Host", b"x"), (b"Content-Type", b"multipart/form-data; boundary=b")),
    b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n',
)
JSON = Request(b"POST", b"/jobs", ((b"Content-Type", b"application/json"),), b'{"data": {"a": ["b", 1]}}')
BARE = Request(b"GET", b"/me")
ALL = (FORM, JSON, BARE)


def test_sound_request_tells_the_length_of_its_body() -> None:
    assert JSON.render() == (
        b"POST /jobs HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 25\r\n\r\n"
        b'{"data": {"a": ["b", 1]}}'
    )
    assert BARE.render() == b"GET /me HTTP/1.1\r\n\r\n"


def test_same_seed_makes_the_same_requests() -> None:
    first, second = (
        [mangle(request, Random(seed), ALL) for request in ALL for seed in range(200)] for _ in "ab"
    )

    assert first == second
    assert len(set(first)) > 500


def test_every_mutation_takes_every_request() -> None:
    for mutation in MUTATIONS:
        for request in ALL:
            for seed in range(50):
                assert mutation(request, Random(seed), ALL).render()


def test_chunks_hold_the_whole_body() -> None:
    for seed in range(20):
        sent = send_chunks(JSON, Random(seed), ALL).sent_body or b""
        body, size_and_rest = b"", sent
        while not size_and_rest.startswith(b"0"):
            size, _, rest = size_and_rest.partition(b"\r\n")
            body, size_and_rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]

        assert body == JSON.body
