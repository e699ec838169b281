"""Functions of texts and calls, with one name on both databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Integer, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class reason(FunctionElement[str]):
    """The text of a failure up to its first colon, by which failures are grouped."""

    type = Text()
    inherit_cache = True


@compiles(reason, "sqlite")
def _reason_on_sqlite(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    failure = compiler.process(element.clauses, **kwargs)
    return f"substr({failure}, 1, instr({failure} || ':', ':') - 1)"


@compiles(reason, "postgresql")
def _reason_on_postgresql(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kwargs)}, ':', 1)"


class call_characters(FunctionElement[int]):
    """The characters of the names and arguments in a response's calls; 0 without calls.

    Counted in the decoded values: only SQLite stores JSON with escapes in place of characters that are not ASCII.
    """

    type = Integer()
    inherit_cache = True


@compiles(call_characters, "sqlite")
def _call_characters_on_sqlite(element: call_characters, compiler: SQLCompiler, **kwargs: Any) -> str:
    calls = compiler.process(element.clauses, **kwargs)
    name, arguments = (f"json_extract(value, '$.function.{key}')" for key in ("name", "arguments"))
    return f"coalesce((SELECT sum(length({name}) + length({arguments})) FROM json_each({calls})), 0)"  # noqa: S608


@compiles(call_characters, "postgresql")
def _call_characters_on_postgresql(element: call_characters, compiler: SQLCompiler, **kwargs: Any) -> str:
    calls = compiler.process(element.clauses, **kwargs)
    name, arguments = (f"value -> 'function' ->> '{key}'" for key in ("name", "arguments"))
    return f"coalesce((SELECT sum(length({name}) + length({arguments})) FROM jsonb_array_elements({calls})), 0)"  # noqa: S608


class json_characters(FunctionElement[int]):
    """The characters of the texts and keys anywhere in a JSON value; 0 for none.

    Counted in the decoded texts, like `call_characters`.
    """

    type = Integer()
    inherit_cache = True


@compiles(json_characters, "sqlite")
def _json_characters_on_sqlite(element: json_characters, compiler: SQLCompiler, **kwargs: Any) -> str:
    value = compiler.process(element.clauses, **kwargs)
    text, key = "CASE WHEN type = 'text' THEN length(atom) END", "CASE WHEN typeof(key) = 'text' THEN length(key) END"
    return f"coalesce((SELECT sum(coalesce({text}, 0) + coalesce({key}, 0)) FROM json_tree({value})), 0)"  # noqa: S608


@compiles(json_characters, "postgresql")
def _json_characters_on_postgresql(element: json_characters, compiler: SQLCompiler, **kwargs: Any) -> str:
    value = compiler.process(element.clauses, **kwargs)
    # In the default mode of a path, what is in a list would be found twice.
    texts, keys = ('? (@.type() == "string")', '? (@.type() == "object").keyvalue().key')
    found = (f"SELECT jsonb_path_query({value}, 'strict $.** {each}') AS found" for each in (texts, keys))
    total = "CAST(sum(length(found #>> '{}')) AS integer)"  # otherwise the sum of several is of type numeric
    return f"coalesce((SELECT {total} FROM ({' UNION ALL '.join(found)}) AS texts), 0)"  # noqa: S608
