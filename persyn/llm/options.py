"""How an engine reads the options of a model spec."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from persyn.errors import EngineError
from persyn.llm.protocols import ModelSpec

Options = TypeVar("Options", bound=Struct)


def decode(spec: ModelSpec, kind: type[Options]) -> Options:
    """The spec's options as the engine's own type; `EngineError` names a wrong option and those there are."""
    try:
        return msgspec.convert(spec.options, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise EngineError(f"wrong options for engine {spec.engine!r}: {error}; it takes {known}") from error
