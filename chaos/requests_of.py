"""Sound requests for every route of a running service, made from what its document shows."""

import json
from collections.abc import Iterator
from typing import Any

from chaos.mangling import Request
from tests.openapi_document import Document
from tests.service import Service

Json = dict[str, Any]

BOUNDARY = b"a-boundary-of-ours"
QUERIES: dict[tuple[str, str], tuple[str, ...]] = {
    ("GET", "/jobs"): ("?limit=2&status=succeeded", "?all=true"),
    ("GET", "/jobs/{id}"): ("?results=false",),
    ("GET", "/jobs/{id}/results"): ("?format=jsonl", "?format=csv", "?expires=1999999999&signature=abc"),
    ("DELETE", "/jobs/{id}"): ("?purge=true",),
    ("GET", "/deliveries"): ("?status=delivered&limit=3",),
    ("POST", "/jobs"): ("?dry_run=true",),
}
FILE_QUERY = "?template=Say%20%7Btext%7D&temperature=1&metadata=%7B%22a%22:%22b%22%7D"


def sound_requests(service: Service, number: int = 0) -> tuple[list[Request], str]:
    """Several of each route, and the token that most bear; no one of them ends what the others need.

    `number` makes other accounts of it: a request that was spoilt may end a token all the same.
    """
    document = Document(service.get("/openapi.json").json())
    spare = Spare(service, number)
    found: list[Request] = []
    for method, path, operation in document.operations():
        headers = spare.headers(method, path)
        for query in ("", *QUERIES.get((method, path), ())):
            target = spare.fill(method, path).encode() + query.encode()
            bodies = list(_bodies(operation)) or [(b"", b"")]
            for kind, body in bodies:
                of_body = ((b"Content-Type", kind),) if kind else ()
                is_file = kind.startswith((b"text/csv", b"application/jsonl", b"application/x-ndjson"))
                found.append(Request(method.encode(), target, (*headers, *of_body), body))
                if is_file:
                    found.append(
                        Request(method.encode(), target + FILE_QUERY.encode(), (*headers, *of_body), body)
                    )
    return found, spare.admin


def _bodies(operation: Json) -> Iterator[tuple[bytes, bytes]]:
    """(content type, body) of every example."""
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        examples = [media["example"]] if "example" in media else []
        examples += [example["value"] for example in media.get("examples", {}).values()]
        for example in examples or [{}]:
            if kind == "multipart/form-data":
                yield b"multipart/form-data; boundary=" + BOUNDARY, form(example)
            elif isinstance(example, str):
                yield kind.encode(), example.encode()
            else:
                yield kind.encode(), json.dumps(example, ensure_ascii=False).encode()


def form(parts: Json) -> bytes:
    """The parts as multipart/form-data; the file is CSV."""
    lines: list[bytes] = []
    for name, part in parts.items():
        is_file = name == "file"
        lines += [
            b"--" + BOUNDARY,
            f'Content-Disposition: form-data; name="{name}"'.encode()
            + (b'; filename="tasks.csv"' if is_file else b""),
            b"Content-Type: " + (b"text/csv" if is_file else b"application/json"),
            b"",
            part.encode() if is_file else json.dumps(part).encode(),
        ]
    return b"\r\n".join([*lines, b"--" + BOUNDARY + b"--", b""])


class Spare:
    """Accounts, tokens and jobs that a request may end; the rest outlives whatever is asked."""

    def __init__(self, service: Service, number: int) -> None:
        self._service = service
        self.admin = service.user(f"second-admin-{number}@example.org")
        self._make_admin(self.admin)
        self._user = service.user(
            f"changes-password-{number}@example.org",
        )
        self._leaver = self._id_of(service.user(f"leaver-{number}@example.org"))
        self._job = self._new_job()
        listed = service.get("/deliveries?limit=1", self.admin).json()["data"]
        self._delivery = str(listed[0]["id"])

    def _make_admin(self, token: str) -> None:
        reply = self._service.patch(
            f"/users/{self._id_of(token)}", self._service.admin, json={"role": "admin"}
        )
        reply.raise_for_status()

    def _id_of(self, token: str) -> str:
        return str(self._service.get("/me", token).json()["id"])

    def _new_job(self) -> str:
        reply = self._service.submit({"a": "Say hello.", "b": "=1+1"}, {"delivery": "webhook"}, self.admin)
        job_id = str(reply.json()["id"])
        self._service.wait_finished(job_id)
        return job_id

    def headers(self, method: str, path: str) -> tuple[tuple[bytes, bytes], ...]:
        token = self.admin
        if path == "/me/password":
            token = self._user
        elif path == "/logout":
            token = self._new_token()[1]
        headers = [(b"Host", b"chaos.example"), (b"Authorization", f"Bearer {token}".encode())]
        if path == "/":
            headers += [
                (b"webhook-id", b"msg_1"),
                (b"webhook-timestamp", b"1999999999"),
                (b"webhook-signature", b"v1,c2lnbmF0dXJl"),
            ]
        if (method, path) == ("POST", "/task"):
            headers += [(b"Prefer", b"respond-async, wait=1"), (b"Idempotency-Key", b"chaos")]
        return tuple(headers)

    def _new_token(self) -> tuple[str, str]:
        made = self._service.post("/tokens", self.admin, json={"name": "spare"}).json()
        return str(made["id"]), str(made["token"])

    def fill(self, method: str, path: str) -> str:
        if path.startswith("/jobs/"):
            return path.replace("{id}", self._new_job() if method == "DELETE" else self._job)
        if path.startswith("/tokens/"):
            return path.replace("{id}", self._new_token()[0])
        if path.startswith("/users/"):
            return path.replace("{id}", self._leaver)
        return path.replace("{id}", self._delivery).replace("{number}", "0").replace("{name}", "start.js")
