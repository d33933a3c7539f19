"""Checks requests and answers against an OpenAPI 3.0 description whose references are resolved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft4Validator, FormatChecker

_METHODS = ("get", "post", "put", "patch", "delete")


class Operation:
    """One method of one path."""

    def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._facts = facts
        self._parameters = {(p["in"], p["name"]): p for p in facts.get("parameters", ())}
        self._validators: dict[str, Draft4Validator] = {}

    @property
    def statuses(self) -> set[str]:
        return set(self._facts["responses"])

    def request_errors(self, arguments: Mapping[str, str], query: Mapping[str, str], body: Any) -> Iterator[str]:
        """Yield what is wrong with a request, `body` being None when there is none."""
        given = {("path", name): text for name, text in arguments.items()}
        given |= {("query", name): text for name, text in query.items()}
        for key, parameter in self._parameters.items():
            if key in given:
                yield from self._errors(f"{key[0]} {key[1]}", parameter["schema"], _value(given[key]))
            elif parameter.get("required"):
                yield f"{key[0]} parameter {key[1]} is missing"
        asked = self._facts.get("requestBody")
        if asked is not None and (body is not None or asked.get("required")):
            yield from self._errors("body", asked["content"]["application/json"]["schema"], body)

    def oddities(self, query: Mapping[str, str], body: Any) -> Iterator[str]:
        """Yield what a request has that the description does not speak of, and the API would overlook."""
        for name in query:
            if ("query", name) not in self._parameters:
                yield f"query parameter {name} is not in the description"
        asked = self._facts.get("requestBody")
        if isinstance(body, dict):
            known = set(_properties(asked["content"]["application/json"]["schema"])) if asked else set()
            yield from (f"{name} in the body is not in the description" for name in body if name not in known)

    def answer_errors(self, status: int, headers: Mapping[str, str], body: Any) -> Iterator[str]:
        """Yield what is wrong with an answer, `body` being None when there is none."""
        responses = self._facts["responses"]
        response = responses.get(str(status), responses.get("default") if status >= 400 else None)
        if response is None:
            yield f"status {status} is not in the description"
            return
        for name, header in response.get("headers", {}).items():
            if name not in headers:
                yield f"header {name} is missing"
            else:
                yield from self._errors(f"header {name}", header["schema"], _value(headers[name]))
        content = response.get("content", {}).get("application/json")
        if content is not None:
            yield from self._errors(f"answer {status}", content["schema"], body)
        elif body is not None:
            yield f"answer {status} has a body"

    def _errors(self, what: str, schema: Mapping[str, Any], value: Any) -> Iterator[str]:
        if what not in self._validators:
            self._validators[what] = Draft4Validator(_json_schema(schema), format_checker=FormatChecker())
        for error in self._validators[what].iter_errors(value):
            at = "".join(f"[{step!r}]" for step in error.absolute_path)
            yield f"{what}{at}: {error.message[:300]}"


class Description:
    """The operations of an API."""

    def __init__(self, paths: Mapping[str, Mapping[str, Any]]) -> None:
        self._operations = [
            (re.compile(_pattern(path)), method.upper(), Operation(path, facts))
            for path, methods in paths.items()
            for method, facts in methods.items()
            if method in _METHODS
        ]

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
        """Return the operation that a request is for and the arguments in its path; None when there is none."""
        for pattern, verb, operation in self._operations:
            match = pattern.fullmatch(path)
            if verb == method and match:
                return operation, match.groupdict()
        return None


@lru_cache
def describe(path: Path) -> Description:
    return Description(json.loads(path.read_text())["paths"])


def _pattern(path: str) -> str:
    return re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path))


def _value(text: str) -> Any:
    """Return what a text in an address or header stands for."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _properties(schema: Mapping[str, Any]) -> Iterator[str]:
    yield from schema.get("properties", ())
    for kind in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(kind, ()):
            yield from _properties(part)


def _json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of OpenAPI 3.0 as one of JSON Schema, draft 4, on which it is built."""
    made = dict(schema)
    for kind in ("allOf", "anyOf", "oneOf"):
        if kind in made:
            made[kind] = [_json_schema(part) for part in made[kind]]
    if "properties" in made:
        made["properties"] = {name: _json_schema(part) for name, part in made["properties"].items()}
    for kind in ("items", "additionalProperties", "not"):
        if isinstance(made.get(kind), dict):
            made[kind] = _json_schema(made[kind])
    if made.get("type") == "string" and False in made.get("enum", ()):
        made["enum"] = ["off" if value is False else value for value in made["enum"]]  # what YAML 1.1 makes of `off`
    if made.pop("nullable", False):
        return {"anyOf": [made, {"type": "null"}]}
    return made
