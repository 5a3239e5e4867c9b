"""Settings in a query: texts as they are, everything else as in JSON."""

from typing import Any

import pytest
from pydantic import ValidationError

from gpt_worker.api.upload_query import UploadQuery


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", "gpt-x", "gpt-x"),
        ("instructions", "5", "5"),
        ("template", "{text}", "{text}"),
        ("delivery", "webhook", "webhook"),
        ("temperature", "0.5", 0.5),
        ("temperature", "1", 1.0),
        ("max_chunk_tokens", "100", 100),
        ("maxTokenCount", "100", 100),
        ("priority", "-5", -5),
        ("pack", "false", False),
        ("pack", "true", True),
        ("metadata", '{"a": "b"}', {"a": "b"}),
    ],
)
def test_setting_is_read_by_its_kind(name: str, text: str, value: Any) -> None:
    query = UploadQuery.model_validate({name: text})

    assert getattr(query, name) == value


def test_response_format_is_read_as_json() -> None:
    query = UploadQuery.model_validate({"response_format": '{"type": "json_schema", "json_schema": {}}'})

    assert query.response_format is not None
    assert query.response_format.model_dump() == {"type": "json_schema", "json_schema": {}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "s3cr3t"),
        ("temperature", ""),
        ("temperature", "3"),
        ("temperature", "NaN"),
        ("temperature", '"1"'),
        ("temperature", "1_0"),
        ("priority", "0.5"),
        ("priority", "5.0"),
        ("priority", "null"),
        ("pack", "yes"),
        ("pack", "1"),
        ("response_format", "s3cr3t"),
        ("response_format", "{}"),
        ("response_format", '{"type": "text", "type": "text"}'),
        ("metadata", "s3cr3t"),
        ("delivery", "s3cr3t"),
        ("instructions", "\0"),
        ("model", ""),
        ("modell", "s3cr3t"),
    ],
)
def test_bad_setting_is_named(name: str, text: str) -> None:
    with pytest.raises(ValidationError) as refused:
        UploadQuery.model_validate({name: text})

    errors = refused.value.errors(include_input=False, include_url=False, include_context=False)
    assert [error["loc"][0] for error in errors] == [name]
    assert "s3cr3t" not in str(errors)
