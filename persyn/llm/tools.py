"""Tools that a model may call, and the calls it makes: one canonical form, checked wherever either comes from.

Both are hostile input: they come from files and from models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from persyn import json_text
from persyn.errors import shorten
from persyn.json_schema import flaw_of
from persyn.llm.protocols import Message, Tools

#: No API accepts a longer name.
_LONGEST_NAME = 256
#: Empty values: Parquet gives every object of a column the keys of all objects.
_NOTHING: tuple[Any, ...] = (None, "", [], {})
#: Keys of a call that do not belong to it: its place among the calls of a stream.
_PLACES = frozenset({"index"})


def read_tools(value: Any) -> Tools | None:
    """The tools in a value, also from JSON text; None if there are none.

    Accepts OpenAI's form and the bare function {"name", "description", "parameters"}. Keys without a value are left
    out. Raises `ValueError` for what is not a list of functions.
    """
    value = decoded(value)
    if value in _NOTHING:
        return None
    if not isinstance(value, list):
        raise ValueError(f"must be a list of functions, got {value!r:.50}")
    tools = [_tool(without_nulls(decoded(tool)), f"tool {number}") for number, tool in enumerate(value, 1)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the function {twice[0]!r} occurs twice")
    return tools


def read_calls(value: Any) -> list[dict[str, Any]] | None:
    """The calls in a value, also from JSON text, in the form of a `Message`; None if there are none.

    Accepts OpenAI's form and the bare call {"name", "arguments"}. Raises `ValueError` for a call without a name, for
    arguments that are not a JSON object, and for what would be lost.
    """
    value = decoded(value)
    if value in _NOTHING:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"must be a list of calls, got {value!r:.50}")
    return [_call(decoded(call), f"call {number}") for number, call in enumerate(value, 1)]


def decoded(value: Any) -> Any:
    """A value decoded if it is JSON text; raises `ValueError` for invalid JSON and for an object with a key twice."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(
            value, object_pairs_hook=json_text.unique, parse_constant=_refuse, parse_float=json_text.finite
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): {shorten(value)}") from None


def without_nulls(value: Any) -> Any:
    """A value without the keys of objects that have no value, as Parquet adds them."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def require_sendable(value: dict[str, Any], where: str) -> dict[str, Any]:
    """The value; `ValueError` for a number or a character that no message between processes can hold."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be represented: {error}") from None
    return value


def names(tools: Tools | None) -> list[str]:
    """The names of the functions."""
    return [tool["function"]["name"] for tool in tools or ()]


def with_objects(messages: Sequence[Message]) -> list[Message]:
    """The turns with the arguments of calls as objects, not as JSON text."""
    return [
        {**turn, "tool_calls": [_as_object(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def written(turn: Message) -> str:
    """A turn as plain text: its content, and its calls as lines of JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join(filter(None, [turn["content"], *calls]))


def _as_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def _refuse(constant: str) -> None:
    raise ValueError(f"it contains {constant}")


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise ValueError(f"{where} must be a function, got {tool!r:.50}")
    kind = tool.get("type", "function")
    if "function" not in tool and "name" in tool and kind == "function":
        tool = {"type": "function", "function": {key: said for key, said in tool.items() if key != "type"}}
    if kind != "function" or not isinstance(tool.get("function"), dict):
        raise ValueError(f"{where} is not a function: {tool!r:.80}")
    function = tool["function"]
    name = _name(function.get("name"), where)
    if not isinstance(function.get("description", ""), str):
        raise ValueError(f"{where} ({name!r}): 'description' must be text, got {function['description']!r:.50}")
    parameters = function.get("parameters", {})
    is_object = isinstance(parameters, dict) and parameters.get("type", "object") == "object"
    if why := flaw_of(parameters) if is_object else "it must describe an object":
        raise ValueError(f"{where} ({name!r}): 'parameters' is not a JSON schema: {why}")
    return require_sendable({"type": "function", **tool}, f"{where} ({name!r})")


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be a function's name and arguments, got {call!r:.50}")
    call = {key: said for key, said in call.items() if key not in _PLACES and said not in _NOTHING}
    if (kind := call.pop("type", "function")) != "function":
        raise ValueError(f"{where} has the unknown type {kind!r:.50}")
    function = call.pop("function", None)
    if function is None:
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
    call_id = call.pop("id", None)
    if call:
        raise ValueError(f"{where} has {next(iter(call))!r:.50}, which would be lost")
    if not isinstance(function, dict):
        raise ValueError(f"{where}: 'function' must be a name and arguments, got {function!r:.50}")
    name = _name(function.get("name"), where)
    if more := [key for key, said in function.items() if key not in ("name", "arguments") and said not in _NOTHING]:
        raise ValueError(f"{where} ({name!r}) has {more[0]!r:.50}, which would be lost")
    if not isinstance(call_id, str | None) or "\0" in (call_id or ""):
        raise ValueError(f"{where} ({name!r}): 'id' must be text, got {call_id!r:.50}")
    found = {"type": "function", "function": {"name": name, "arguments": _arguments(function, f"{where} ({name!r})")}}
    return require_sendable(found if call_id is None else {"id": call_id, **found}, where)


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} has no name" if name in _NOTHING else f"{where}: the name {name!r:.50} is not text")
    if len(name) > _LONGEST_NAME or "\0" in name:
        raise ValueError(f"{where}: the name {name!r:.50} has more than {_LONGEST_NAME} characters, or a NUL")
    return name


def _arguments(function: Mapping[str, Any], where: str) -> str:
    """The arguments as JSON text, written as chat templates write them."""
    given = function.get("arguments")
    try:
        # A null in an object may have been added by Parquet; one in a text was written by a model.
        value = decoded(given) if isinstance(given, str) else without_nulls(given)
    except ValueError as error:
        raise ValueError(f"{where}: 'arguments' {error}") from None
    if value in _NOTHING:
        value = {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: 'arguments' must be a JSON object, got {value!r:.50}")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise ValueError(f"{where}: 'arguments' is nested too deeply") from None
    except ValueError:
        raise ValueError(f"{where}: 'arguments' has a number or character that JSON text cannot hold") from None
    return text
