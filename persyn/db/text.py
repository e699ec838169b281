"""What both databases can do with a text, under one name."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class reason(FunctionElement[str]):
    """The first word of a failure, up to its colon: what failures are counted by."""

    type = Text()
    inherit_cache = True


@compiles(reason, "sqlite")
def _sqlite(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    failure = compiler.process(element.clauses, **kwargs)
    return f"substr({failure}, 1, instr({failure} || ':', ':') - 1)"


@compiles(reason, "postgresql")
def _postgresql(element: reason, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kwargs)}, ':', 1)"
