"""The service's OpenAPI document, and whether a reply is one that it describes."""

import json
import re
from typing import Any, cast
from urllib.parse import urlsplit

import requests
from openapi_schema_validator import OAS31Validator

Json = dict[str, Any]


class Document:
    """A document, as /openapi.json gives it."""

    def __init__(self, document: Json) -> None:
        self.document = document

    def operations(self) -> list[tuple[str, str, Json]]:
        """(method, path, operation), in the document's order."""
        return [
            (method.upper(), path, operation)
            for path, item in self.document["paths"].items()
            for method, operation in item.items()
        ]

    def operation(self, method: str, path: str) -> Json:
        return cast("Json", self.document["paths"][path][method.lower()])

    def resolve(self, part: Json) -> Json:
        """The part itself, or what it refers to. Raises KeyError for a reference to nothing."""
        while "$ref" in part:
            found = self.document
            for name in part["$ref"].removeprefix("#/").split("/"):
                found = found[name]
            part = found
        return part

    def responses(self, operation: Json) -> dict[int, Json]:
        return {int(status): self.resolve(response) for status, response in operation["responses"].items()}

    def faults(self, schema: Json, value: Any) -> list[str]:
        """What is wrong with a value by this schema."""
        validator = OAS31Validator({**schema, "components": self.document["components"]})
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

    def path_of(self, url: str) -> str:
        """The path of the document that an address belongs to."""
        asked = urlsplit(url).path
        paths: dict[str, Json] = self.document["paths"]
        if asked in paths:
            return asked
        return next(
            path for path in paths if "{" in path and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), asked)
        )

    def undescribed(self, reply: requests.Response) -> list[str]:
        """What the document does not say of this reply, or says otherwise."""
        path = self.path_of(reply.request.url or "")
        where = f"{reply.request.method} {path} {reply.status_code}"
        response = self.responses(self.operation(reply.request.method or "", path)).get(reply.status_code)
        if response is None:
            return [f"{where}: the status"]
        faults = [
            f"{where}: the header {name} is missing"
            for name in response["headers"]
            if name not in reply.headers and (reply.status_code >= 400 or name == "X-Request-Id")
        ]
        content = response.get("content", {})
        if not content:
            return faults + ([f"{where}: a body"] if reply.content else [])
        kind = reply.headers["Content-Type"].partition(";")[0]
        if kind not in content:
            return [*faults, f"{where}: {kind}"]
        value = json.loads(reply.text) if kind.endswith("json") else reply.text
        return faults + [f"{where}: {fault}" for fault in self.faults(content[kind]["schema"], value)]
