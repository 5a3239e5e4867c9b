"""/openapi.json says everything about every route: what is forgotten fails here."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from openapi_spec_validator import validate

from gpt_worker import api
from gpt_worker.api import docs
from gpt_worker.api.access import POLICIES, UNCOUNTED, Access
from gpt_worker.api.description import openapi_path
from tests.openapi_document import Document

BAD = 400
OPEN_TO_STRANGERS = {Access.TASKS, Access.TASKS_OR_LINK, Access.ADMIN_OR_LOCAL}
FOR_ADMINS = {Access.ADMIN, Access.ADMIN_OR_LOCAL}


def whole_app() -> Flask:
    app = api.make_app("1.2.3")
    api.register(app)
    return app


@pytest.fixture(scope="module")
def app() -> Flask:
    return whole_app()


@pytest.fixture(scope="module")
def document(app: Flask) -> Document:
    return Document(json.loads(app.extensions[docs.EXTENSION]()))


def routes(app: Flask) -> dict[tuple[str, str], str]:
    """(method, path) → endpoint of everything that is registered."""
    return {
        (method, openapi_path(rule.rule)): rule.endpoint
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


def forgotten(document: Document, faulty: Any) -> list[str]:
    """The operations of which `faulty` says so."""
    return [f"{method} {path}" for method, path, operation in document.operations() if faulty(operation)]


def test_document_is_valid_openapi_3_1(document: Document) -> None:
    assert document.document["openapi"].startswith("3.1")
    validate(document.document)


def test_document_tells_the_version(document: Document) -> None:
    assert document.document["info"]["version"] == "1.2.3"


def test_servers_are_relative_so_that_any_host_name_does(document: Document) -> None:
    assert [server["url"] for server in document.document["servers"]] == ["/"]


def test_every_route_is_described_and_nothing_else(app: Flask, document: Document) -> None:
    described = {(method, path) for method, path, _ in document.operations()}

    assert described == routes(app).keys()


def test_route_that_is_only_registered_is_found_undescribed() -> None:
    app = api.make_app("0")
    app.add_url_rule("/forgotten", "forgotten", lambda: "")
    api.register(app)

    described = {
        (method, path)
        for method, path, _ in Document(json.loads(app.extensions[docs.EXTENSION]())).operations()
    }

    assert routes(app).keys() - described == {("GET", "/forgotten")}


@pytest.mark.parametrize("member", ["summary", "description", "operationId", "tags", "security"])
def test_every_operation_has(document: Document, member: str) -> None:
    assert forgotten(document, lambda operation: operation.get(member) in (None, "", [""])) == []


def test_operation_ids_are_readable_and_their_own(document: Document) -> None:
    ids = Counter(operation["operationId"] for _, _, operation in document.operations())

    assert max(ids.values()) == 1
    assert all(name.isidentifier() and name.islower() for name in ids)


def test_every_tag_is_described(document: Document) -> None:
    described = {tag["name"] for tag in document.document["tags"] if tag["description"]}

    assert {tag for _, _, operation in document.operations() for tag in operation["tags"]} == described


def test_every_operation_has_a_good_answer_with_its_form(document: Document) -> None:
    def has_none(operation: dict[str, Any]) -> bool:
        good = {status: it for status, it in document.responses(operation).items() if status < BAD}
        return not good or any(status != 204 and not it.get("content") for status, it in good.items())

    assert forgotten(document, has_none) == []


def test_every_answer_is_described_and_has_the_request_id(document: Document) -> None:
    def is_mute(operation: dict[str, Any]) -> bool:
        return not all(
            it["description"] and "X-Request-Id" in it["headers"]
            for it in document.responses(operation).values()
        )

    assert forgotten(document, is_mute) == []


def test_every_failure_is_a_problem(document: Document) -> None:
    problem = {"$ref": "#/components/schemas/Problem"}

    def is_other(operation: dict[str, Any]) -> bool:
        return any(
            it["content"].keys() != {"application/problem+json"}
            or it["content"]["application/problem+json"]["schema"] != problem
            for status, it in document.responses(operation).items()
            if status >= BAD
        )

    assert forgotten(document, is_other) == []


@pytest.mark.parametrize(
    ("status", "name"), [(401, "WWW-Authenticate"), (429, "Retry-After"), (503, "Retry-After")]
)
def test_failures_tell_their_headers(document: Document, status: int, name: str) -> None:
    def is_silent(operation: dict[str, Any]) -> bool:
        response = document.responses(operation).get(status)
        return response is not None and name not in response["headers"]

    assert forgotten(document, is_silent) == []


def test_who_may_come_in_is_what_the_table_says(app: Flask, document: Document) -> None:
    for (method, path), endpoint in routes(app).items():
        operation, access = document.operation(method, path), POLICIES[endpoint]
        statuses, security = document.responses(operation).keys(), operation["security"]

        assert (security == []) == (access is Access.PUBLIC), path
        assert ({} in security) == (access in OPEN_TO_STRANGERS), path
        assert ({"bearer": []} in security) == (access not in (Access.PUBLIC, Access.SIGNED)), path
        assert 401 in statuses or access is Access.PUBLIC, path
        assert 403 in statuses or access not in FOR_ADMINS, path


def test_every_counted_request_may_be_one_too_many(app: Flask, document: Document) -> None:
    assert POLICIES.keys() >= UNCOUNTED
    for (method, path), endpoint in routes(app).items():
        statuses = document.responses(document.operation(method, path)).keys()

        assert (429 in statuses) == (endpoint not in UNCOUNTED), path


def test_operations_with_a_body_tell_what_is_wrong_with_one(document: Document) -> None:
    def is_silent(operation: dict[str, Any]) -> bool:
        bodies = operation.get("requestBody", {}).get("content", {})
        takes_anything = bodies.get("application/json", {}).get("schema") == {}
        expected = {400, 408, 413} if takes_anything else {400, 408, 413, 415, 422}
        return bool(bodies) and not expected <= document.responses(operation).keys()

    assert forgotten(document, is_silent) == []


def test_path_parameters_are_described_and_may_be_unknown(document: Document) -> None:
    for method, path, operation in document.operations():
        named = {it["name"] for it in operation.get("parameters", ()) if it["in"] == "path"}

        assert all(f"{{{name}}}" in path for name in named), path
        assert len(named) == path.count("{"), path
        assert not named or 404 in document.responses(operation), (method, path)


def test_every_parameter_is_described(document: Document) -> None:
    def is_mute(operation: dict[str, Any]) -> bool:
        return any(not parameter.get("description") for parameter in operation.get("parameters", ()))

    assert forgotten(document, is_mute) == []


def test_submit_takes_every_body_and_header_under_both_names(document: Document) -> None:
    submit, task = document.operation("POST", "/jobs"), document.operation("POST", "/task")
    headers = {parameter["name"] for parameter in submit["parameters"] if parameter["in"] == "header"}

    assert set(submit["requestBody"]["content"]) == {
        "application/json",
        "application/jsonl",
        "application/x-ndjson",
        "text/csv",
        "multipart/form-data",
    }
    assert headers == {"Prefer", "Idempotency-Key"}
    assert {"Location", "Idempotency-Replayed"} <= document.responses(submit)[202]["headers"].keys()
    assert {**task, "summary": "", "operationId": ""} == {**submit, "summary": "", "operationId": ""}


def test_results_come_in_three_forms(document: Document) -> None:
    results = document.responses(document.operation("GET", "/jobs/{id}/results"))[200]

    assert set(results["content"]) == {"application/json", "application/jsonl", "text/csv"}


def test_webhook_is_described(document: Document) -> None:
    sent = document.document["webhooks"]["job.finished"]["post"]

    assert {"webhook-id", "webhook-timestamp", "webhook-signature"} == {
        parameter["name"] for parameter in sent["parameters"]
    }


# Shapes and examples


def parts(value: Any) -> Iterator[Any]:
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(part)


def test_every_reference_leads_somewhere(document: Document) -> None:
    references = [part for part in parts(document.document) if isinstance(part, dict) and "$ref" in part]

    assert references
    for reference in references:
        document.resolve(reference)


def test_every_shape_is_used_and_described(document: Document) -> None:
    used = {part["$ref"] for part in parts(document.document) if isinstance(part, dict) and "$ref" in part}
    shapes = document.document["components"]["schemas"]

    assert [name for name in shapes if f"#/components/schemas/{name}" not in used] == []
    assert [name for name, it in shapes.items() if not it.get("description") and "enum" not in it] == []


def test_bodies_are_left_out_and_not_null(document: Document) -> None:
    settings = document.document["components"]["schemas"]["JobSettingsBody"]

    assert document.faults(settings, {}) == []
    assert document.faults(settings, {"model": None}) != []
    assert document.faults(settings, {"temprature": 1}) != []


def test_examples_fit_their_shapes(document: Document) -> None:
    for method, path, operation in document.operations():
        answers = [it.get("content", {}) for it in document.responses(operation).values()]
        for content in [operation.get("requestBody", {}).get("content", {}), *answers]:
            for kind, media in content.items():
                examples = [named["value"] for named in media.get("examples", {}).values()]
                for example in [*examples, *([media["example"]] if "example" in media else [])]:
                    assert document.faults(media["schema"], example) == [], (method, path, kind)


def test_every_json_body_has_an_example(document: Document) -> None:
    def has_none(operation: dict[str, Any]) -> bool:
        media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        return bool(media.get("schema")) and not media.keys() & {"example", "examples"}

    assert forgotten(document, has_none) == []


def test_examples_of_members_fit(document: Document) -> None:
    for name, shape in document.document["components"]["schemas"].items():
        for member, schema in shape.get("properties", {}).items():
            for example in schema.get("examples", ()):
                assert document.faults(schema, example) == [], (name, member)


# The page


def test_page_asks_no_other_host() -> None:
    assert "//" not in docs.PAGE + docs.START


def test_page_names_only_files_that_there_are() -> None:
    named = {part.split('"')[0] for part in docs.PAGE.split('"docs/')[1:]}

    assert named == docs.FILES.keys()
