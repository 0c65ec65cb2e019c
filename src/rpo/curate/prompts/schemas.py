"""The JSON schemas that a server is asked to hold a model to: every field required, none unknown, every string and list bounded."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from rpo.data.schema import Critique, Instructions

Schema = Mapping[str, Any]
_SAID_BY_US = ("agreement", "instructions")
_DROPPED = ("title", "description", "default", "$defs")


def _flat(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_flat(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _flat(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    kept = {key: value for key, value in node.items() if key not in _DROPPED}
    if "properties" in kept:
        properties = {name: _flat(value, definitions) for name, value in kept["properties"].items()}
        rest = {key: value for key, value in kept.items() if key not in ("properties", "required", "additionalProperties")}
        return {**rest, "properties": properties, "required": list(properties), "additionalProperties": False}
    return {key: _flat(value, definitions) for key, value in kept.items()}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    whole = model.model_json_schema()
    return _flat(whole, whole.get("$defs", {}))


@cache
def critique_schema() -> Schema:
    schema = _schema(Critique)
    properties = {name: value for name, value in schema["properties"].items() if name not in _SAID_BY_US}
    return {**schema, "properties": properties, "required": list(properties)}


@cache
def instructions_schema(max_instructions: int) -> Schema:
    schema = _schema(Instructions)
    schema["properties"]["instructions"]["maxItems"] = max_instructions
    return schema


@cache
def one_call_schema(max_instructions: int) -> Schema:
    properties = {"critique": critique_schema(), "instructions": instructions_schema(max_instructions)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
