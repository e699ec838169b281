"""Parse the turns of a conversation; content that cannot be represented is rejected, never dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from persyn.ingest import strict_json
from persyn.ingest.record import Flaw
from persyn.llm.protocols import Message

#: Keys for the speaker and text of a turn, in chat messages and in ShareGPT.
_SPEAKER, _TEXT = ("role", "from"), ("content", "value")
_SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user"}
_SPEAKERS |= dict.fromkeys(("gpt", "chatgpt"), "assistant")
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
    if more := [key for key, said in turn.items() if key not in (speaker, content) and _says(said)]:
        raise Flaw(f"{where} has {more[0]!r}, which would be lost; remove it, or drop the row")
    return {"role": _role(turn, speaker, where), "content": _content(turn, content, where)}


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
        raise Flaw(f"{where} has the unknown {key} {role!r:.50}; known: {', '.join(_SPEAKERS)}")
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


def require_order(turns: list[Message], name: str) -> None:
    """Require the order that chat templates expect: an optional system turn, then user and assistant alternating."""
    opening = bool(turns) and turns[0]["role"] == "system"
    for number, turn in enumerate(turns[opening:]):
        expected = "assistant" if number % 2 else "user"
        if turn["role"] != expected:
            raise Flaw(f"{name!r}: turn {number + opening + 1} is the {turn['role']}'s, expected the {expected}'s")
