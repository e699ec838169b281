"""Text functions with one name on both databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class reason(FunctionElement[str]):
    """The text of a failure up to its first colon, by which failures are grouped."""

    type = Text()
    inherit_cache = True


@compiles(reason, "sqlite")
def _sqlite(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    failure = compiler.process(element.clauses, **kwargs)
    return f"substr({failure}, 1, instr({failure} || ':', ':') - 1)"


@compiles(reason, "postgresql")
def _postgresql(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kwargs)}, ':', 1)"
