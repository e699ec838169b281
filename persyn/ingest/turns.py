"""Parse the turns of a conversation; content that cannot be represented is rejected, never dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from persyn.ingest import strict_json
from persyn.ingest.record import Flaw
from persyn.llm import tools
from persyn.llm.protocols import Message

#: Keys for the speaker and text of a turn, in chat messages and in ShareGPT.
_SPEAKER, _TEXT = ("role", "from"), ("content", "value")
_SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user"}
_SPEAKERS |= dict.fromkeys(("gpt", "chatgpt"), "assistant")
_SPEAKERS |= dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool")
#: ShareGPT's speakers of turns whose text is an assistant's calls as JSON.
_CALLERS = frozenset({"function_call", "tool_call"})
#: What a turn may have besides its speaker and text.
_BESIDES = {"assistant": ("tool_calls", "function_call"), "tool": ("tool_call_id", "name")}
#: Empty values: Parquet gives every turn of a file the keys of all turns.
_NOTHING: tuple[Any, ...] = (None, "", [], {})

Turn: TypeAlias = Mapping[str, Any]


def read(value: Any, name: str) -> list[Message]:
    """Parse the turns in a field, also from JSON text as in CSV files.

    Raises `Flaw` for an invalid turn, and for one with content besides its speaker and text.
    """
    if isinstance(value, str):
        value = _decoded(value, repr(name))
    if not isinstance(value, list):
        raise Flaw(f"{name!r} must be a list of turns, got {value!r:.50}")
    return [_turn(turn, f"{name!r}: turn {number}") for number, turn in enumerate(value, 1)]


def _decoded(text: str, where: str) -> Any:
    try:
        return strict_json.decode(text.encode())
    except Flaw as flaw:
        raise Flaw(f"{where}: {flaw}") from flaw


def _turn(turn: Any, where: str) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = _decoded(turn, where)
    if not isinstance(turn, dict):
        raise Flaw(f"{where} must have a role and a content, got {turn!r:.50}")
    turn = _spelled(turn)
    speaker, content = (next((key for key in of if turn.get(key) is not None), of[0]) for of in (_SPEAKER, _TEXT))
    if speaker == "from" and turn.get(content) is None:
        content = _TEXT[1]
    is_call = isinstance(said := turn.get(speaker), str) and said.strip().lower() in _CALLERS
    role = "assistant" if is_call else _role(turn, speaker, where)
    besides = () if is_call else _BESIDES.get(role, ())
    if more := [key for key, said in turn.items() if key not in (speaker, content, *besides) and _says(said)]:
        raise Flaw(f"{where} has {more[0]!r}, which would be lost; remove it, or drop the row")
    if role == "tool":
        return {"role": role, "content": _content(turn, content, where), **_answered_call(turn, where)}
    field = content if is_call else next((key for key in besides if _says(turn.get(key))), "")
    calls = _calls(turn, field, where) if field else None
    if calls is None:
        return {"role": role, "content": _content(turn, content, where)}
    text = "" if is_call or turn.get(content) is None else _content(turn, content, where)
    return {"role": role, "content": text, "tool_calls": calls}


def _calls(turn: Turn, field: str, where: str) -> list[dict[str, Any]]:
    """The calls in a field of an assistant's turn."""
    if field == "tool_calls" and _says(turn.get("function_call")):
        raise Flaw(f"{where} has both 'tool_calls' and 'function_call'; remove one, or drop the row")
    try:
        calls = tools.read_calls(turn[field])
    except ValueError as error:
        raise Flaw(f"{where}: {field!r}: {error}") from None
    if not calls:
        raise Flaw(f"{where}: {field!r} has no call")
    return calls


def _answered_call(turn: Turn, where: str) -> Message:
    """What a tool's turn has besides its text."""
    found = {key: turn[key] for key in _BESIDES["tool"] if _says(turn.get(key))}
    for key, said in found.items():
        if not isinstance(said, str):
            raise Flaw(f"{where}: {key!r} must be text, got {said!r:.50}")
    return found


def _says(said: Any) -> bool:
    """Whether a value has content; a struct of nulls has none."""
    if isinstance(said, dict):
        return any(map(_says, said.values()))
    return said not in _NOTHING


def _spelled(turn: Turn) -> Turn:
    """Normalise the spelling of known keys, unless the turn already has such a key."""
    known = {*_SPEAKER, *_TEXT}
    names = {key: name for key in turn if key not in known and (name := str(key).strip().lower()) in known - {*turn}}
    return {names.get(key, key): said for key, said in turn.items()} if len({*names.values()}) == len(names) else turn


def _role(turn: Turn, key: str, where: str) -> str:
    role = turn.get(key)
    if role is None:
        raise Flaw(f"{where} has no {key!r}")
    known = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise Flaw(f"{where} has the unknown {key} {role!r:.50}; known: {', '.join([*_SPEAKERS, *sorted(_CALLERS)])}")
    return known


def _content(turn: Turn, key: str, where: str) -> str:
    content = turn.get(key)
    if isinstance(content, str):
        return content
    if content is None:
        said = f"{key!r} is null" if key in turn else f"missing {key!r}"
        raise Flaw(f"{where} has no text: {said}")
    if isinstance(content, list):
        return _only_text(content, where, key)
    raise Flaw(f"{where}: {key!r} must be text, got {content!r:.50}")


def _only_text(parts: list[Any], where: str, key: str) -> str:
    """The text of a content that consists of one text part."""
    match parts:
        case [{"type": "text", "text": str(text), **more}] if not _says(more):
            return text
    kinds = ", ".join(str(part.get("type")) if isinstance(part, dict) else repr(part)[:20] for part in parts[:5])
    raise Flaw(f"{where}: {key!r} must be one text, got {len(parts)} parts ({kinds})")


#: Who may speak after whom.
_AFTER = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def require_order(turns: list[Message], name: str) -> None:
    """Require the order that chat templates expect: an optional system turn, then user and assistant alternating.

    An assistant's calls are answered by the tool turns that follow; an id of a tool turn is one of theirs.
    """
    opening = bool(turns) and turns[0]["role"] == "system"
    before, open_ids, calls = "", set[str](), 0
    for number, turn in enumerate(turns[opening:], opening + 1):
        role = turn["role"]
        expected = ("tool",) if calls else _AFTER[before]
        if role not in expected:
            who = " or ".join(f"the {each}'s" for each in expected)
            raise Flaw(f"{name!r}: turn {number} is the {role}'s, expected {who}")
        if role == "tool":
            calls = 0
            if (answered := turn.get("tool_call_id")) is not None and answered not in open_ids:
                raise Flaw(f"{name!r}: turn {number} answers the call {answered!r:.50}, which was not made before it")
            open_ids.discard(answered or "")
        else:
            calls = len(turn.get("tool_calls") or ())
            open_ids = {call["id"] for call in turn.get("tool_calls") or () if "id" in call}
        before = role
