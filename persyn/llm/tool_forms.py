"""Read the calls in a generated text: the forms in which models write calls of tools.

A form is used only where a model's own chat template writes it, or where the run file names it; any other text is left
as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from jinja2 import TemplateError

from persyn.llm import tools
from persyn.llm.protocols import Tools
from persyn.llm.tool_template import SAMPLE_CALL, SAMPLE_CALLED, ToolTemplate


class Said(NamedTuple):
    """What a model wrote: a text, and its calls."""

    text: str
    calls: list[dict[str, Any]]


Form: TypeAlias = Callable[[str], Said | None]
"""Reads a generated text with its special tokens; None if it has no call, `ValueError` for one that is malformed."""

ReadCalls: TypeAlias = Callable[[str, Tools], Said | None]
"""A `Form` that may depend on the tools of the request."""

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\s*([\w-]+)\s*)?\[ARGS\](.*)", re.DOTALL)
_BEGINS_CALLS = "[TOOL_CALLS]"


def _hermes(text: str) -> Said | None:
    """Calls as JSON within <tool_call> and </tool_call>: Hermes, Qwen, and others."""
    if "<tool_call>" not in text:
        return None
    calls = [_one(block) for block in _BLOCK.findall(text)]
    rest = _BLOCK.sub("", text)
    if "<tool_call>" in rest:
        raise ValueError("a call is not complete")
    return Said(rest.strip(), calls)


def _mistral(text: str) -> Said | None:
    """Calls after [TOOL_CALLS]: a list of JSON objects, or each call's name and [ARGS] with its arguments."""
    before, begin, rest = text.partition(_BEGINS_CALLS)
    if not begin:
        return None
    if rest.lstrip().startswith("["):
        return Said(before.strip(), tools.read_calls(rest.strip()) or [])
    calls = []
    for part in rest.split(_BEGINS_CALLS):
        found = _NAMED.fullmatch(part)
        if found is None:
            raise ValueError(f"a call has no name and arguments: {part.strip()!r:.80}")
        name, call_id, arguments = found.groups()
        calls.append({"id": call_id, "function": {"name": name, "arguments": arguments.strip()}})
    return Said(before.strip(), tools.read_calls(calls) or [])


def _llama(text: str) -> Said | None:
    """A call as the whole text: the JSON object {"name", "parameters"}, several separated by semicolons: Llama 3."""
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"(type|name|function)"', rest):
        return None
    calls, place, decoder = [], 0, json.JSONDecoder()
    while place < len(rest):
        try:
            found, end = decoder.raw_decode(rest, place)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError("a call is not complete, or not JSON") from None
        if not (isinstance(found, dict) and isinstance(found.get("parameters"), dict)):
            return None  # an answer that happens to be JSON
        calls.append(_one(json.dumps({"name": found.get("name"), "arguments": found["parameters"]})))
        place = end + len(rest[end:]) - len(rest[end:].lstrip("; \n"))
    return Said("", calls)


def _one(text: str) -> dict[str, Any]:
    calls = tools.read_calls(text.strip())
    if not calls or len(calls) != 1:
        raise ValueError("a call is empty")
    return calls[0]


#: The forms by name, as vLLM names its parsers of them.
FORMS: Mapping[str, Form] = {"hermes": _hermes, "mistral": _mistral, "llama3_json": _llama}


def written_by(template: ToolTemplate | None) -> Form | None:
    """The form in which a chat template writes calls; None if it is not known, or the template writes none."""
    if template is None:
        return None
    try:
        answered = template.answered(SAMPLE_CALLED)
    except TemplateError:
        return None
    return next((form for form in FORMS.values() if _reads(form, answered.response)), None)


def _reads(form: Form, text: str) -> bool:
    """Whether a form reads the sample call in a text."""
    try:
        found = form(text)
    except ValueError:
        return False
    return found is not None and not found.text and [c["function"] for c in found.calls] == [SAMPLE_CALL["function"]]
