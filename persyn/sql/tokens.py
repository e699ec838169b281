"""Tokenise SQL like the scanner of PostgreSQL, which for common queries agrees with SQLite's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from persyn.errors import UsageError

_TOKEN = re.compile(
    r"""
      (?P<blank> [ \t\n\r\f\v]+ | --[^\n\r]* )
    | (?P<comment> /\* )
    | (?P<text> ' (?: [^'] | '' )* ' )
    | (?P<dollar> \$ (?P<tag> (?: [A-Za-z_\x80-\U0010ffff] [A-Za-z0-9_\x80-\U0010ffff]* )? ) \$
                  .*? \$ (?P=tag) \$ )
    | (?P<quoted> " (?: [^"] | "" )+ " )
    | (?P<name> [A-Za-z_\x80-\U0010ffff] [A-Za-z0-9_$\x80-\U0010ffff]* )
    | (?P<number> (?: [0-9]+ (?: \.[0-9]+ )? | \.[0-9]+ ) (?: [eE][+-]?[0-9]+ )? )
    | (?P<cast> :: )
    | (?P<parameter> : [A-Za-z_][A-Za-z0-9_]* )
    | (?P<sign> [-+*/<>=~!@\#%^&|`?.,()\[\];] )
    """,
    re.VERBOSE | re.DOTALL,
)
_KINDS = ("blank", "comment", "text", "dollar", "quoted", "name", "number", "cast", "parameter", "sign")


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a statement; the concatenated tokens are the statement."""

    kind: str
    text: str

    @property
    def name(self) -> str | None:
        """The name as PostgreSQL resolves it; None for other tokens."""
        if self.kind == "name":
            return self.text.lower()
        return self.text[1:-1].replace('""', '"') if self.kind == "quoted" else None


def scan(statement: str) -> Iterator[Token]:
    """Yield the tokens in order; raise `UsageError` at the first invalid one."""
    place = 0
    while place < len(statement):
        match = _TOKEN.match(statement, place)
        if match is None:
            raise UsageError(f"cannot parse the query from here on: {statement[place : place + 40]!r}")
        kind = next(name for name in _KINDS if match.group(name) is not None)
        end = _end_of_comment(statement, place) if kind == "comment" else match.end()
        yield Token(kind, statement[place:end])
        place = end


def parameters(statement: str) -> list[str]:
    """The names of a statement's parameters in order, up to the first invalid token."""
    found: dict[str, None] = {}
    try:
        for token in scan(statement):
            if token.kind == "parameter":
                found[token.text[1:]] = None
    except UsageError:
        pass  # reported when the query is run
    return list(found)


def _end_of_comment(statement: str, begin: int) -> int:
    """The end of a comment, which may contain nested comments."""
    depth = 0
    for match in re.compile(r"/\*|\*/").finditer(statement, begin):
        depth += 1 if match.group() == "/*" else -1
        if not depth:
            return match.end()
    raise UsageError("a comment is not closed")
