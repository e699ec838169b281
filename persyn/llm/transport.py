"""Separate what determines a model's results from its transport: how it is reached and how fast it runs.

Transport is a run's, identity a version's: see ADR 45. `gpus` is always transport; an engine's record in the registry
names the options that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct

from persyn.llm.engines import ENGINES

Options = Mapping[str, Any]


def of(engine: str, chosen: Options) -> dict[str, Any]:
    """The options that are transport; of a judge, those of its model's engine, in `options`."""
    kind = ENGINES.require(engine, "engine")
    found = {name: value for name, value in chosen.items() if name in kind.transport}
    if kind.is_nested and (inner := of(chosen["engine"], chosen.get("options", {}))):
        found["options"] = inner
    return found


def decisive(engine: str, chosen: Options, gpus: int) -> dict[str, Any]:
    """The options that determine results, in canonical form: without transport and without defaults.

    gpus: where the engine's default `dtype` depends on the device, the result contains it.
    Raises `msgspec.ValidationError` for options that the engine does not have.
    """
    kind = ENGINES.require(engine, "engine")
    if kind.options is None:
        return {}
    given = without_defaults(msgspec.convert(chosen, kind.options))
    found = {name: value for name, value in given.items() if name not in kind.transport}
    if (dtype := kind.default_dtypes[gpus > 0]) is not None:
        found.setdefault("dtype", dtype)
    if kind.is_nested:
        inner = decisive(found["engine"], found.pop("options", {}), gpus)
        found |= {"options": inner} if inner else {}
    return found


def join(version: Options, engine: str, chosen: Options) -> dict[str, Any]:
    """The options that an engine loads: a version's, and the transport in the options of a run's table."""
    added = of(engine, chosen)
    inner = {**version.get("options", {}), **added.pop("options", {})} if ENGINES[engine].is_nested else None
    return {**version, **added, **({"options": inner} if inner else {})}


def without_defaults(struct: Struct) -> dict[str, Any]:
    """The fields that differ from their defaults, so that a field that is added later changes no version.

    Changing a default therefore changes what stored versions mean, and needs a migration of their fingerprints.
    """
    found = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        default = field.default if field.default_factory is NODEFAULT else field.default_factory()
        if value != default:
            found[field.name] = msgspec.to_builtins(value)
    return found
