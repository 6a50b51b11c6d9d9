"""JSON schemas without references, which chat templates show as they stand."""

from __future__ import annotations

import json
from typing import Any


def without_references(schema: dict[str, Any]) -> dict[str, Any]:
    """References to definitions replaced by what they point at.

    A schema that holds itself, or that refers to something else, stays as it is.
    """
    if "definitions" in schema and "$defs" not in schema:
        text = json.dumps(schema).replace("#/definitions/", "#/$defs/")
        schema = json.loads(text)
        schema["$defs"] = schema.pop("definitions")
    if holds_itself(schema):
        return schema
    definitions = schema.get("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(item) for item in value]
        if not isinstance(value, dict):
            return value
        rest = {key: inlined(item) for key, item in value.items()}
        if (name := _target(value)) in definitions:
            del rest["$ref"]
            return inlined(definitions[name]) | rest  # what stands beside a reference counts
        return rest

    whole: dict[str, Any] = inlined({k: v for k, v in schema.items() if k != "$defs"})
    return schema if '"$ref"' in json.dumps(whole) else whole


def holds_itself(schema: dict[str, Any]) -> bool:
    """Whether one of a schema's definitions refers to itself, through others too."""
    definitions = schema.get("$defs", {})
    return any(_leads_back(definitions, name) for name in definitions)


def _leads_back(definitions: dict[str, Any], name: str) -> bool:
    seen: set[str] = set()
    ahead = [definitions[name]]
    while ahead:
        value = ahead.pop()
        if isinstance(value, list):
            ahead += value
        elif isinstance(value, dict):
            target = _target(value)
            if target == name:
                return True
            if target in definitions and target not in seen:
                seen.add(target)
                ahead.append(definitions[target])
            ahead += value.values()
    return False


def _target(value: dict[str, Any]) -> str:
    """The definition that a schema refers to; empty where it refers to none."""
    reference = value.get("$ref")
    return reference.removeprefix("#/$defs/") if isinstance(reference, str) else ""
