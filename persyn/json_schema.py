"""Check that a value can be a JSON schema, before a model is held to it."""

# By hand: every row may bring schemas of its own, and the library jsonschema takes 3.7 ms to check one (this: 0.03 ms),
# refuses the `items` of older drafts, and exhausts the stack on a deeply nested one.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
#: Well below the limits of JSON encoders and PostgreSQL.
_MAX_DEPTH = 60


def flaw_of(schema: Any, depth: int = _MAX_DEPTH) -> str | None:
    """Why a value is not a JSON schema; None if its structure is that of one."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"{schema!r:.50} is not an object"
    if not depth:
        return f"it is nested deeper than {_MAX_DEPTH} levels"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            return f"unknown type {kind!r:.50}"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"'required' must be a list of names, got {required!r:.50}"
    if "enum" in schema and not (isinstance(schema["enum"], list) and schema["enum"]):
        return f"'enum' must be a list of values, got {schema['enum']!r:.50}"
    return next(filter(None, (why and f"{place}: {why}" for place, why in _flaws_within(schema, depth - 1))), None)


def _flaws_within(schema: dict[str, Any], depth: int) -> Iterator[tuple[str, str | None]]:
    """Yield the place of each schema within a schema, and its flaw."""
    for key in filter(schema.__contains__, _OF_SCHEMAS):
        if not isinstance(schema[key], dict):
            yield key, f"must be an object of schemas, got {schema[key]!r:.50}"
            return
        yield from ((f"{key} {name!r:.50}", flaw_of(part, depth)) for name, part in schema[key].items())
    for key in filter(schema.__contains__, _LISTS):
        if not isinstance(schema[key], list):
            yield key, f"must be a list of schemas, got {schema[key]!r:.50}"
            return
        yield from ((key, flaw_of(part, depth)) for part in schema[key])
    for key in filter(schema.__contains__, _ONE):
        # The items of older drafts may be a list of schemas.
        parts = schema[key] if key == "items" and isinstance(schema[key], list) else [schema[key]]
        yield from ((key, flaw_of(part, depth)) for part in parts)
