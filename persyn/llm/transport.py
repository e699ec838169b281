"""Separate what determines a model's results from its transport: how it is reached and how fast it runs.

Transport is a run's, identity a version's: see ADR 45. `gpus` is always transport; an engine's record in the registry
names the options that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct

from persyn.llm.engines import ENGINES, EngineKind

Options = Mapping[str, Any]


def of(engine: str, chosen: Options) -> dict[str, Any]:
    """The options that are transport; of a judge, those of its model's engine, in `options`."""
    kind = ENGINES.require(engine, "engine")
    found = _parted(kind, chosen)[1]
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
    found = _parted(kind, without_defaults(msgspec.convert(chosen, kind.options)))[0]
    if (dtype := kind.default_dtypes[gpus > 0]) is not None:
        found.setdefault("dtype", dtype)
    if kind.is_nested:
        inner = decisive(found["engine"], found.pop("options", {}), gpus)
        found |= {"options": inner} if inner else {}
    return found


def join(version: Options, engine: str, chosen: Options) -> dict[str, Any]:
    """The options that an engine loads: a version's, and the transport in the options of a run's table."""
    return _merged(version, of(engine, chosen))


def _merged(some: Options, others: Options) -> dict[str, Any]:
    """Two tables as one, and tables within them likewise."""
    found = dict(some)
    for name, value in others.items():
        found[name] = _merged(some.get(name, {}), value) if isinstance(value, dict) else value
    return found


def _parted(kind: EngineKind, chosen: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that determine results, and those that are transport; a table may have keys of both."""
    decisive: dict[str, Any] = {}
    transport: dict[str, Any] = {}
    tables = {name.partition(".")[0] for name in kind.transport if "." in name}
    for name, value in chosen.items():
        if name not in tables or not isinstance(value, dict):
            (transport if name in kind.transport else decisive)[name] = value
            continue
        for key, part in value.items():
            (transport if f"{name}.{key}" in kind.transport else decisive).setdefault(name, {})[key] = part
    return decisive, transport


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
