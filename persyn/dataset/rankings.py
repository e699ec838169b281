"""Write the responses to a prompt in the order of their rewards: as pairs to prefer one of, or as the best ones.

As in `formats`, all rows of a JSONL file have the same keys and types, without nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from persyn.dataset.formats import (
    PARQUET,
    Format,
    ToolForm,
    arrow_turns,
    as_json,
    json_features,
    sharegpt_tools,
    sharegpt_turn,
    text_features,
    text_format,
    turns_feature,
    with_json_calls,
    without_system,
)
from persyn.dataset.parquet_file import Columns
from persyn.llm.protocols import Message, Tools
from persyn.llm.tools import with_objects
from persyn.registry import Registry

if TYPE_CHECKING:
    import pyarrow as pa

_TURN = "response"


@dataclass(frozen=True, slots=True)
class RankedResponse:
    """One response to a prompt, and what it is worth."""

    #: The assistant's turn. It has `reasoning_content` in all rows of a dataset or in none.
    turn: Message
    response_id: int
    teacher: str
    teacher_fingerprint: str
    sample: int
    finish_reason: str | None
    #: Compared with the other responses to the prompt, see `method.rewards.combine`.
    reward: float
    #: In the unit of the run's quality scorer.
    quality: float
    #: In the unit of the run; None where the student did not score the response, at alpha 0.
    learnability: float | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt and responses to it, best first: chosen and rejected, or the best ones."""

    #: The row's id in its file, or the SHA-256 of the conversation; ends in # and a number where a prompt may have
    #: several rows.
    id: str
    prompt_id: int
    prompt: list[Message]
    responses: list[RankedResponse]
    answer: str | None
    source: str
    source_id: str | None
    domain: str
    meta: dict[str, Any]
    #: Whether the prompt only measured the router, and did not help to fit it.
    is_holdout: bool
    #: The tools of the prompt, perhaps none; None in a dataset in which no row has tools or calls.
    tools: Tools | None


#: The fields of a response beside its turn, and their types in a card and in Arrow.
_FACTS = {
    "reward": "float64",
    "quality": "float64",
    "learnability": "float64",
    "teacher": "string",
    "teacher_fingerprint": "string",
    "finish_reason": "string",
    "response_id": "int64",
    "sample": "int64",
}
_ORIGIN = {
    "id": "string",
    "prompt_id": "int64",
    "domain": "string",
    "source": "string",
    "source_id": "string",
    "is_holdout": "bool",
}


def _facts(response: RankedResponse) -> dict[str, Any]:
    facts = {name: getattr(response, name) for name in _FACTS}
    return facts | {"finish_reason": response.finish_reason or ""}


def _pair_facts(row: Ranking) -> dict[str, Any]:
    """The margin and both responses' facts, each in a column of its own, and the origin."""
    chosen, rejected = row.responses
    sides = ("chosen", chosen), ("rejected", rejected)
    facts = {f"{side}_{name}": value for side, of in sides for name, value in _facts(of).items()}
    return {"margin": chosen.reward - rejected.reward, **facts, **_origin(row)}


def _origin(row: Ranking) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _ORIGIN} | {"source_id": row.source_id or ""}


def _tools(row: Ranking) -> dict[str, Any]:
    return {} if row.tools is None else {"tools": row.tools}


def _pair(row: Ranking) -> dict[str, Any]:
    turns = {side: with_objects([of.turn]) for side, of in zip(("chosen", "rejected"), row.responses, strict=True)}
    return {"prompt": with_objects(row.prompt), **turns, **_tools(row), **_pair_facts(row)}


def _sharegpt_pair(row: Ranking) -> dict[str, Any]:
    system, turns = without_system(row.prompt)
    chosen, rejected = row.responses
    return {
        "conversations": [sharegpt_turn(turn) for turn in turns],
        "chosen": sharegpt_turn(chosen.turn),
        "rejected": sharegpt_turn(rejected.turn),
        "system": system,
        **sharegpt_tools(row.tools),
        **_pair_facts(row),
    }


def _alpaca_pair(row: Ranking) -> dict[str, Any]:
    system, (*earlier, prompt) = without_system(row.prompt)
    contents = [turn["content"] for turn in earlier]
    chosen, rejected = row.responses
    return {
        "instruction": prompt["content"],
        "input": "",
        "chosen": chosen.turn["content"],
        "rejected": rejected.turn["content"],
        "system": system,
        "history": list(zip(contents[::2], contents[1::2], strict=True)),
        **_pair_facts(row),
    }


def _best(row: Ranking) -> dict[str, Any]:
    responses = [{_TURN: with_objects([each.turn])[0], **_facts(each)} for each in row.responses]
    return {"prompt": with_objects(row.prompt), "responses": responses, **_tools(row), **_origin(row)}


def _with_provenance(row: Ranking, values: dict[str, Any]) -> dict[str, Any]:
    """A row of a Parquet file, with the reference answer and `meta`; tools and calls as JSON text."""
    return {
        "prompt": with_json_calls(row.prompt),
        **values,
        "tools": as_json(row.tools) if row.tools else None,
        **_origin(row),
        "answer": row.answer,
        "meta": msgspec.json.encode(row.meta, order="sorted").decode(),
    }


def _pair_values(row: Ranking) -> dict[str, Any]:
    turns = {side: with_json_calls([of.turn]) for side, of in zip(("chosen", "rejected"), row.responses, strict=True)}
    return _with_provenance(row, {**turns, **_pair_facts(row)})


def _best_values(row: Ranking) -> dict[str, Any]:
    responses = [{_TURN: with_json_calls([each.turn])[0], **_facts(each)} for each in row.responses]
    return _with_provenance(row, {"responses": responses})


def _pair_schema(first: Ranking | None) -> pa.Schema:
    turns = _turns(first)
    sides = {f"{side}_{name}": kind for side in ("chosen", "rejected") for name, kind in _FACTS.items()}
    return _schema(first, {"chosen": turns, "rejected": turns, "margin": "float64", **sides})


def _best_schema(first: Ranking | None) -> pa.Schema:
    import pyarrow as pa

    fields = {_TURN: _turns(first).value_type, **_arrow(_FACTS)}
    return _schema(first, {"responses": pa.list_(pa.struct(fields))})


def _schema(first: Ranking | None, middle: Mapping[str, Any]) -> pa.Schema:
    import pyarrow as pa

    tools = {} if first is None or first.tools is None else {"tools": "string"}
    last = {**tools, **_ORIGIN, "answer": "string", "meta": "string"}
    prompt = arrow_turns(has_reasoning=False, has_tools=bool(tools))
    return pa.schema({"prompt": prompt, **_arrow({**middle, **last})})


def _turns(first: Ranking | None) -> Any:
    """The type of a list of the assistant's turns."""
    has_reasoning = first is not None and "reasoning_content" in first.responses[0].turn
    return arrow_turns(has_reasoning=has_reasoning, has_tools=first is not None and first.tools is not None)


def _arrow(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Names of types as Arrow types."""
    import pyarrow as pa

    return {name: pa.type_for_alias(kind) if isinstance(kind, str) else kind for name, kind in kinds.items()}


def _features(kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": kind} for name, kind in kinds.items()]


def _pair_features() -> list[dict[str, Any]]:
    sides = {f"{side}_{name}": kind for side in ("chosen", "rejected") for name, kind in _FACTS.items()}
    return _features({"margin": "float64", **sides, **_ORIGIN})


def _responses_feature() -> dict[str, Any]:
    turn = {"name": _TURN, "struct": text_features("role", "content")}
    return {"name": "responses", "list": [turn, *_features(_FACTS)]}


def _struct(name: str) -> dict[str, Any]:
    return {"name": name, "struct": text_features("from", "value")}


def _sharegpt_features(*texts: str) -> list[dict[str, Any]]:
    conversations = {"name": "conversations", "list": text_features("from", "value")}
    return [conversations, _struct("chosen"), _struct("rejected"), *text_features(*texts), *_pair_features()]


def _sharegpt_entry(*texts: str) -> dict[str, Any]:
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    return {"ranking": True, "formatting": "sharegpt", "columns": {**columns, **{name: name for name in texts}}}


#: The columns of pairs, and of best responses, with all provenance.
PAIR_COLUMNS = Columns(_pair_values, _pair_schema)
BEST_COLUMNS = Columns(_best_values, _best_schema)
#: The formats of pairs.
PAIRS = Registry(
    Format,
    Format(
        "messages",
        "preference.jsonl",
        text_format(_pair),
        features=[turns_feature("prompt"), turns_feature("chosen"), turns_feature("rejected"), *_pair_features()],
        reasoning_in=("chosen", "rejected"),
        tools=ToolForm(features=[*json_features("prompt", "chosen", "rejected", "tools"), *_pair_features()]),
    ),
    Format(
        "sharegpt",
        "preference_sharegpt.jsonl",
        text_format(_sharegpt_pair),
        _sharegpt_entry("system"),
        _sharegpt_features("system"),
        tools=ToolForm(_sharegpt_entry("system", "tools"), _sharegpt_features("system", "tools"), is_strict=True),
    ),
    Format(
        "alpaca",
        "preference_alpaca.jsonl",
        text_format(_alpaca_pair),
        {
            "ranking": True,
            "formatting": "alpaca",
            "columns": {
                "prompt": "instruction",
                "query": "input",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "system",
                "history": "history",
            },
        },
        [
            *text_features("instruction", "input", "chosen", "rejected", "system"),
            {"name": "history", "list": {"list": "string"}},
            *_pair_features(),
        ],
    ),
    Format(
        PARQUET,
        "preference.parquet",
        PAIR_COLUMNS.file,
        reasoning_in=("chosen", "rejected"),
        is_text=False,
        tools=ToolForm(),
    ),
    groups=(),
)
#: The formats of the best responses.
BEST = Registry(
    Format,
    Format(
        "messages",
        "best_of.jsonl",
        text_format(_best),
        features=[turns_feature("prompt"), _responses_feature(), *_features(_ORIGIN)],
        reasoning_in="responses",
        tools=ToolForm(),
    ),
    Format(PARQUET, "best_of.parquet", BEST_COLUMNS.file, reasoning_in="responses", is_text=False, tools=ToolForm()),
    groups=(),
)
