"""Write a dataset as messages, prompt-completion, ShareGPT or Alpaca (JSONL), or as Parquet with full provenance.

Every row of a JSONL file has the same keys and types, without nulls: readers that infer types from the beginning of a
file (Hugging Face datasets, and LLaMA-Factory through it) reject a type that appears later. For the same reason,
multi-turn conversations are best read as messages or sharegpt: in Alpaca, a history that first appears after many rows
without one may be rejected.

A turn that has `reasoning_content` keeps it in messages, prompt-completion and Parquet; the export gives the other
formats conversations that have the reasoning in the text, see `inlined`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec

from persyn.dataset.parquet_file import Columns
from persyn.llm.protocols import Message, Tools
from persyn.llm.reasoning import COMMON
from persyn.llm.tools import with_objects
from persyn.registry import Registry

if TYPE_CHECKING:
    import pyarrow as pa

#: The format with all provenance.
PARQUET = "parquet"
_SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation that ends with its teacher's response, and the origin of both."""

    #: The row's id in its file; if it had none, the SHA-256 of the conversation. Ends in # and the sample where a
    #: prompt has several rows.
    id: str
    prompt_id: int
    #: Which of the teacher's responses to the prompt.
    sample: int
    #: An optional system turn, then user, assistant and tools; the last is the response. It has `reasoning_content` in
    #: all rows of a dataset or in none, empty where there is no reasoning.
    messages: list[Message]
    #: What the teacher wrote before the answer; None if nothing, or if the dataset was to have no reasoning.
    reasoning: str | None
    answer: str | None
    source: str
    source_id: str | None
    #: The `domain` field of the row; empty if absent.
    domain: str
    meta: dict[str, Any]
    teacher: str
    teacher_fingerprint: str
    finish_reason: str | None
    reason: str
    margin: float | None
    response_tokens: int | None
    #: Of these tokens, those of the reasoning; None if unknown.
    reasoning_tokens: int | None
    #: In the unit of the run's quality scorer, not normalised; None if the response was not scored.
    quality: float | None
    #: The tools of the prompt, perhaps none; None in a dataset in which no row has tools or calls.
    tools: Tools | None = None


def domain_of(meta: Mapping[str, Any]) -> str:
    """The `domain` field of a prompt's row as text; empty if absent."""
    domain = meta.get("domain")
    if domain is None or isinstance(domain, str):
        return domain or ""
    return msgspec.json.encode(domain, order="sorted").decode()


def inlined(response: str, reasoning: str | None) -> str:
    """The reasoning and the answer as one text; without reasoning, the answer alone."""
    return f"{COMMON.opens}\n{reasoning}\n{COMMON.closes}\n\n{response}" if reasoning else response


def is_ambiguous(response: str, reasoning: str | None) -> bool:
    """Whether the text has markers of its own, so that the inlined answer cannot be recognised with certainty."""
    return any(marker in text for text in (response, reasoning or "") for marker in (COMMON.opens, COMMON.closes))


Write: TypeAlias = Callable[[Any], object]
"""Writes one row, such as an `Example`."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolForm:
    """What a format says of a dataset with tools, in place of what it says of others."""

    llama_factory: dict[str, Any] | None = None
    features: list[dict[str, Any]] | None = None
    #: Whether an assistant's turn is either a text or calls, and one tool's turn answers them all.
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """A dataset format: its file, its writer, and its entry for LLaMA-Factory."""

    name: str
    #: The file name without a split.
    file: str
    open: Callable[[Path], AbstractContextManager[Write]]
    #: Its entry in dataset_info.json without the file name; None if it has no entry.
    llama_factory: dict[str, Any] | None = None
    #: Its columns as declared in a dataset card; None where readers infer them correctly.
    features: list[dict[str, Any]] | None = None
    #: The lists, or the one, whose last turn may have `reasoning_content`; None if it has no field for reasoning.
    reasoning_in: str | tuple[str, ...] | None = None
    #: Whether it is text; `datasets` accepts one file type per folder, and reads the text formats by name.
    is_text: bool = True
    #: None if it cannot represent tools and calls.
    tools: ToolForm | None = None

    def described(self, *, has_tools: bool) -> Format | ToolForm:
        """What holds its `llama_factory` and `features` for a dataset."""
        return self.tools if has_tools and self.tools is not None else self

    def file_of(self, split: str | None) -> str:
        """The file name of a split; None means a dataset without splits."""
        stem, dot, ending = self.file.partition(".")
        return self.file if split is None else f"{stem}-{split}{dot}{ending}"


def _messages(example: Example) -> dict[str, Any]:
    return {"messages": with_objects(example.messages), **_tools(example), **_origin(example)}


def _prompt_completion(example: Example) -> dict[str, Any]:
    *prompt, response = with_objects(example.messages)
    return {"prompt": prompt, "completion": [response], **_tools(example), **_origin(example)}


def _tools(example: Example) -> dict[str, Any]:
    return {} if example.tools is None else {"tools": example.tools}


def _origin(example: Example) -> dict[str, Any]:
    return {
        "prompt_id": example.prompt_id,
        "id": example.id,
        "domain": example.domain,
        "source": example.source,
        "source_id": example.source_id or "",
        "teacher": example.teacher,
        "teacher_fingerprint": example.teacher_fingerprint,
        "finish_reason": example.finish_reason or "",
        "reason": example.reason,
        "sample": example.sample,
    }


def _sharegpt(example: Example) -> dict[str, Any]:
    system, turns = without_system(example.messages)
    return {
        "conversations": [sharegpt_turn(turn) for turn in turns],
        "system": system,
        **sharegpt_tools(example.tools),
        **_origin(example),
    }


def sharegpt_tools(tools: Tools | None) -> dict[str, str]:
    """The column of tools as JSON text; no column in a dataset without tools."""
    return {} if tools is None else {"tools": as_json([tool["function"] for tool in tools])}


def sharegpt_turn(turn: Message) -> dict[str, str]:
    """A turn in ShareGPT's form; calls are JSON text, a list if there are several."""
    if not turn.get("tool_calls"):
        return {"from": _SHAREGPT[turn["role"]], "value": turn["content"]}
    (called,) = with_objects([turn])
    calls = [call["function"] for call in called["tool_calls"]]
    return {"from": "function_call", "value": as_json(calls[0] if len(calls) == 1 else calls)}


def as_json(value: Any) -> str:
    """JSON text with all characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def _alpaca(example: Example) -> dict[str, Any]:
    system, (*earlier, prompt, response) = without_system(example.messages)
    contents = [turn["content"] for turn in earlier]
    return {
        "instruction": prompt["content"],
        "input": "",
        "output": response["content"],
        "system": system,
        "history": list(zip(contents[::2], contents[1::2], strict=True)),
        **_origin(example),
    }


def without_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """The text of the system turn, empty if there is none, and the other turns."""
    first, *others = messages
    return (first["content"], others) if first["role"] == "system" else ("", messages)


@contextmanager
def jsonl(path: Path, shape: Callable[[T], dict[str, Any]]) -> Iterator[Callable[[T], object]]:
    """Create a JSONL file and yield a function that writes an item to it, converted by `shape`."""
    encode = msgspec.json.Encoder().encode
    with path.open("xb") as file:
        yield lambda item: file.write(encode(shape(item)) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def text_format(shape: Callable[[T], dict[str, Any]]) -> Callable[[Path], AbstractContextManager[Write]]:
    """What opens a JSONL file for rows converted by `shape`."""
    return lambda path: jsonl(path, shape)


def arrow_turns(*, has_reasoning: bool, has_tools: bool) -> pa.DataType:
    """The type of a list of turns; calls are JSON text.

    has_reasoning, has_tools: whether turns have keys for them.
    """
    import pyarrow as pa

    keys = ["role", "content"]
    keys += ["reasoning_content"] if has_reasoning else []
    keys += ["tool_calls", "tool_call_id", "name"] if has_tools else []
    return pa.list_(pa.struct(dict.fromkeys(keys, pa.string())))


def _schema(first: Example | None) -> pa.Schema:
    """The columns of a row with all provenance; tools and calls are JSON text."""
    import pyarrow as pa

    has_reasoning = first is not None and "reasoning_content" in first.messages[-1]
    has_tools = first is not None and first.tools is not None
    return pa.schema(
        {
            "prompt_id": pa.int64(),
            "messages": arrow_turns(has_reasoning=has_reasoning, has_tools=has_tools),
            "id": pa.string(),
            "domain": pa.string(),
            "answer": pa.string(),
            "reasoning": pa.string(),
            "source": pa.string(),
            "source_id": pa.string(),
            "meta": pa.string(),
            "teacher": pa.string(),
            "teacher_fingerprint": pa.string(),
            "finish_reason": pa.string(),
            "reason": pa.string(),
            "sample": pa.int64(),
            "margin": pa.float64(),
            "response_tokens": pa.int64(),
            "reasoning_tokens": pa.int64(),
            "quality": pa.float64(),
            **({"tools": pa.string()} if has_tools else {}),
        }
    )


def _as_row(example: Example) -> dict[str, Any]:
    row = {name: getattr(example, name) for name in Example.__slots__}
    row["meta"] = msgspec.json.encode(example.meta, order="sorted").decode()
    row["tools"] = as_json(example.tools) if example.tools else None
    row["messages"] = with_json_calls(example.messages)
    return row


def with_json_calls(turns: Iterable[Message]) -> list[Message]:
    """The turns with their calls as JSON text."""
    return [turn | {"tool_calls": as_json(turn["tool_calls"])} if "tool_calls" in turn else turn for turn in turns]


#: The columns of the format with all provenance.
COLUMNS = Columns(_as_row, _schema)


def text_features(*names: str) -> list[dict[str, Any]]:
    """Columns of texts, as a card declares them."""
    return [{"name": name, "dtype": "string"} for name in names]


def turns_feature(name: str) -> dict[str, Any]:
    """A column of turns, as a card declares it."""
    # Built anew each time: YAML would write a shared object as an alias, which `datasets` cannot read.
    return {"name": name, "list": text_features("role", "content")}


def json_features(*names: str) -> list[dict[str, Any]]:
    """Columns that are lists of JSON values, which differ from row to row."""
    return [{"name": name, "list": "json"} for name in names]


def _origins() -> list[dict[str, Any]]:
    # Types are declared because a reader that first sees ids such as 2020-01-31 infers timestamps, and rejects other
    # ids.
    names = "id", "domain", "source", "source_id", "teacher", "teacher_fingerprint", "finish_reason", "reason"
    return [{"name": "prompt_id", "dtype": "int64"}, *text_features(*names), {"name": "sample", "dtype": "int64"}]


FORMATS = Registry(
    Format,
    Format(
        "messages",
        "messages.jsonl",
        text_format(_messages),
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
        [turns_feature("messages"), *_origins()],
        reasoning_in="messages",
        # No entry for LLaMA-Factory: it reads calls in ShareGPT's form.
        tools=ToolForm(features=[*json_features("messages", "tools"), *_origins()]),
    ),
    Format(
        "prompt-completion",
        "prompt_completion.jsonl",
        text_format(_prompt_completion),
        features=[turns_feature("prompt"), turns_feature("completion"), *_origins()],
        reasoning_in="completion",
        tools=ToolForm(features=[*json_features("prompt", "completion", "tools"), *_origins()]),
    ),
    Format(
        "sharegpt",
        "sharegpt.jsonl",
        text_format(_sharegpt),
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
        [{"name": "conversations", "list": text_features("from", "value")}, *text_features("system"), *_origins()],
        tools=ToolForm(
            {
                "formatting": "sharegpt",
                "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
            },
            [
                {"name": "conversations", "list": text_features("from", "value")},
                *text_features("system", "tools"),
                *_origins(),
            ],
            is_strict=True,
        ),
    ),
    Format(
        "alpaca",
        "alpaca.jsonl",
        text_format(_alpaca),
        {
            "formatting": "alpaca",
            "columns": {
                "prompt": "instruction",
                "query": "input",
                "response": "output",
                "system": "system",
                "history": "history",
            },
        },
        # The first rows may all lack a history.
        [
            *text_features("instruction", "input", "output", "system"),
            {"name": "history", "list": {"list": "string"}},
            *_origins(),
        ],
    ),
    Format(PARQUET, "dataset.parquet", COLUMNS.file, reasoning_in="messages", is_text=False, tools=ToolForm()),
    groups=("persyn.formats",),
)
