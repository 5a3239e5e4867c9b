"""The query of a submit: the settings of a job whose body is a file."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from werkzeug.exceptions import BadRequest

from gpt_worker.api.job_schemas import JobSettingsBody, ResponseFormat, SubmitQuery
from gpt_worker.api.parsing import parse_json
from gpt_worker.errors import Invalid

JsonText = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})


def _without_examples(schema: dict[str, Any]) -> None:
    """OpenAPI's parameters have an `examples` of another shape, on which flask-openapi3 stumbles."""
    for member in schema["properties"].values():
        member.pop("examples", None)


class UploadQuery(SubmitQuery, JobSettingsBody):
    """With a file as the body: the settings too, those that are no text written as in JSON."""

    model_config = ConfigDict(json_schema_extra=_without_examples)

    response_format: Annotated[ResponseFormat | None, JsonText] = Field(
        None, description="OpenAI's form, as up to 64 KiB of JSON; the answer stays a text"
    )
    metadata: Annotated[Any, JsonText] = Field(
        None, description='Up to 16 texts by name, as JSON: {"batch": "42"}'
    )

    @field_validator(
        "temperature",
        "max_chunk_tokens",
        "maxTokenCount",
        "max_output_tokens",
        "response_format",
        "pack",
        "priority",
        "deadline_s",
        "max_total_tokens",
        "metadata",
        mode="before",
    )
    @classmethod
    def _parse(cls, text: str) -> Any:
        try:
            return parse_json(text.encode())
        except (BadRequest, Invalid) as error:
            raise PydanticCustomError("json", "must be written as in JSON") from error

    @field_validator("model", "gpt_type", "instructions", "template", "delivery", mode="before")
    @classmethod
    def _refuse_nul(cls, text: str) -> str:
        if "\0" in text:
            raise PydanticCustomError("nul", "must not hold a NUL character")
        return text
