"""A client that a well-kept generator makes of /openapi.json works against the service as it is."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.service import PASSWORD, Service

PACKAGE = "generated_gpt_worker_client"
ADA = "ada@example.org"


@pytest.fixture(scope="module")
def generated(shared_service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the client's package, which can be imported; generated with no proxy and no network."""
    folder = tmp_path_factory.mktemp("client")
    config = folder / "config.json"
    config.write_text(json.dumps({"package_name_override": PACKAGE, "post_hooks": []}))
    command = ["generate", "--url", f"{shared_service.url}/openapi.json", "--config", str(config)]
    command += ["--meta", "none", "--output-path", str(folder / PACKAGE)]
    done = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", *command],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def part(name: str) -> Any:
    """A module of the generated package, by its name in it."""
    return importlib.import_module(f"{PACKAGE}.{name}")


@pytest.fixture
def client(service: Service, generated: Path) -> Iterator[Any]:
    """The generated client, logged in as a user of its own."""
    service.patch("/settings", service.admin, json={"registration": True})
    models = part("models")
    with part("client").Client(base_url=service.url, raise_on_unexpected_status=True) as stranger:
        account = models.RegisterBody(email=ADA, password=PASSWORD)
        part("api.accounts.register").sync(client=stranger, body=account)
        login = models.LoginBody(email=ADA, password=PASSWORD)
        token = part("api.accounts.login").sync(client=stranger, body=login).token.token
    authenticated = part("client").AuthenticatedClient(
        base_url=service.url, token=token, raise_on_unexpected_status=True
    )
    with authenticated as logged_in:
        yield logged_in


def test_client_has_a_function_for_every_operation(service: Service, generated: Path) -> None:
    paths = service.get("/openapi.json").json()["paths"]
    operations = [it for path in paths.values() for it in path.values()]

    for operation in operations:
        module = part(f"api.{operation['tags'][0]}.{operation['operationId']}")
        assert callable(module.sync_detailed)


def test_generator_misses_only_the_bodies_that_are_files(generated: Path) -> None:
    said = (generated / "said").read_text()
    complaints = {line for line in said.splitlines() if line.startswith(("Unsupported", "Cannot", "Invalid"))}

    assert complaints == {
        f"Unsupported content type {kind}"
        for kind in ("text/csv", "application/jsonl", "application/x-ndjson")
    }


def test_client_knows_who_it_is(client: Any) -> None:
    me = part("api.accounts.get_me").sync(client=client)

    assert (me.email, me.role) == (ADA, "user")


def test_client_submits_a_job_and_reads_the_answers(client: Any) -> None:
    models = part("models")
    body = models.JobBody(
        data=models.JobBodyDataType0.from_dict({"capital": "What is the capital of France?", "hi": "Hello"}),
        settings=models.JobSettingsBody(instructions="Answer in English.", max_output_tokens=40),
    )

    job = part("api.jobs.submit").sync(client=client, body=body)
    found = part("api.jobs.get_job").sync(id=job.id, client=client)
    results = part("api.jobs.get_results").sync(id=job.id, client=client)

    assert (job.status, job.counts.answered) == ("succeeded", 2)
    assert list(job.results.to_dict()) == ["capital", "hi"]
    assert all(job.results.to_dict().values())
    assert found.results.to_dict() == job.results.to_dict() == results.results.to_dict()


def test_client_submits_a_file_as_a_form(client: Any) -> None:
    models = part("models")
    file = part("types").File(BytesIO(b"id,text\nmorning,Good morning\n"), "tasks.csv", "text/csv")
    form = models.JobForm(file=file, settings=models.JobSettingsBody(template="Translate to French: {text}"))

    job = part("api.jobs.submit").sync(client=client, body=form)

    assert list(job.results.to_dict()) == ["morning"]


def test_client_takes_a_job_that_is_not_finished(client: Any) -> None:
    models = part("models")
    body = models.JobBody(data=["Say hello."])

    reply = part("api.jobs.submit").sync_detailed(client=client, body=body, prefer="respond-async")

    assert reply.status_code == 202
    assert reply.headers["Location"] == f"/jobs/{reply.parsed.id}"


def test_client_gets_problems_as_problems(client: Any) -> None:
    problem = part("api.jobs.get_job").sync(id="0" * 32, client=client)

    assert isinstance(problem, part("models").Problem)
    assert problem.status == 404
