"""Tables of keys, as a reference page has them: type, default and meaning of each, from the class it is a field of.

A key's meaning is the `#:` comment above its field.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from persyn import config
from persyn.llm import options, vllm_arguments
from persyn.llm.engines import ENGINES, EngineRole
from persyn.llm.litellm_options import LiteLLMOptions
from persyn.method.learnability import LEARNABILITIES
from persyn.method.strategies import STRATEGIES
from persyn.router import inputs
from persyn.router.kinds.registry import ROUTERS
from persyn.settings import Settings

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS: dict[object, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    dict: "table",
    datetime: "date and time",
}


def of_struct(kind: type[Struct], *, beyond: type[Struct] | None = None) -> str:
    """The keys of a table of the run file, or of an engine's options; without those of another table, if given."""
    known = beyond.__struct_fields__ if beyond else ()
    types, said = typing.get_type_hints(kind, include_extras=True), _meanings(kind)
    rows = [
        (f"`{each.name}`", _type(types[each.name]), _default(each), said[each.name])
        for each in sorted(msgspec.structs.fields(kind), key=lambda field: not field.required)
        if each.name not in known
    ]
    return _table(("key", "type", "default", "meaning"), rows)


def of_environment() -> str:
    """The variables that `Settings` is read from; the folder of the default store is one of them."""
    settings, said = Settings.from_environment({}), _meanings(Settings)
    store = settings.database_url.replace(str(settings.home), "PERSYN_HOME")
    plain = {"home": f"./{settings.home.name}", "database_url": store}
    rows = [
        (f"`PERSYN_{name.upper()}`", _value(plain.get(name, value)), said[name])
        for name, value in dataclasses.asdict(settings).items()
    ]
    return _table(("variable", "default", "meaning"), rows)


def _meanings(kind: type) -> dict[str, str]:
    """What the comment above each field says, base classes' included; `ValueError` when one has none."""
    said: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if "__annotations__" in vars(each):
            said |= _comments(each)
    if silent := [name for name in typing.get_type_hints(kind) if name not in said]:
        raise ValueError(f"{kind.__module__}.{kind.__name__} has no #: comment above {', '.join(silent)}")
    return said


def _comments(kind: type) -> dict[str, str]:
    """The comments above a class's own fields."""
    said: dict[str, str] = {}
    held: list[str] = []
    for line in map(str.strip, inspect.getsource(kind).splitlines()):
        if line.startswith("#:"):
            held.append(line.removeprefix("#:").strip())
            continue
        if held and (field := re.match(r"(\w+):", line)):
            said[field[1]] = " ".join(held)
        held = []
    return said


def _type(hint: Any) -> str:
    """A field's type in words; None is a key that is left out, and no type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(arguments[0], [each for each in arguments[1:] if isinstance(each, Meta)])
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in arguments if each is not NoneType)
    if origin is list:
        item = _type(arguments[0])
        return f"list of {item}" if item.endswith("`") else f"list of {item}s"
    if inspect.isclass(hint) and issubclass(hint, Struct):
        return "table"
    return _WORDS[origin or hint]


def _bounded(kind: Any, metas: Sequence[Meta]) -> str:
    """A type by its title or with its bounds: `number >= 0 and < 1`."""
    for meta in metas:
        if meta.extra:
            return ", ".join(f"`{name}`" for name in _kinds(meta.extra["kinds"]))
    said = {name: getattr(meta, name) for meta in metas for name in ("title", *_SIGNS)}
    said = {name: value for name, value in said.items() if value is not None}
    bounds = " and ".join(f"{sign} {said[name]}" for name, sign in _SIGNS.items() if name in said)
    return said.get("title") or f"{_type(kind)} {bounds}".strip()


def _kinds(role: str) -> list[str]:
    """The built-in names that a key takes."""
    if role == "strategy":
        return list(STRATEGIES.builtin)
    if role == "learnability":
        return list(LEARNABILITIES)
    if role == "router kind":
        return [inputs.AUTO, *ROUTERS.builtin]
    return [name for name, kind in ENGINES.builtin.items() if role in kind.roles]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) + "."


def of_engines() -> str:
    """The engines that users choose."""
    rows = [
        (f"`{kind.name}`", ", ".join(_ROLES[role] for role in _ROLES if role in kind.roles), kind.summary)
        for kind in ENGINES.builtin.values()
        if kind.roles
    ]
    return _table(("engine", "chosen by", "what it does"), rows)


def of_learnabilities() -> str:
    """The definitions of learnability."""
    rows = [(f"`{kind.name}`", kind.summary, kind.unit or "none", kind.source) for kind in LEARNABILITIES.values()]
    return _table(("learnability", "definition", "unit", "source"), rows)


def of_strategies() -> str:
    """The strategies and what they need."""
    grids = {"none": "", "calibration": "the calibration grid", "all": "every teacher's response to every prompt"}
    rows = []
    for kind in STRATEGIES.builtin.values():
        student = "the student's `family`" if kind.needs_family else ""
        fields = (f"`{field}` of each teacher" for field in kind.needs)
        needs = ", ".join(each for each in (grids[kind.grid], *fields, student) if each)
        rows.append((f"`{kind.name}`", kind.summary, needs or "nothing"))
    return _table(("kind", "who answers a prompt", "what it needs"), rows)


def of_routers() -> str:
    """The kinds of routers and what they can read."""
    rows = [
        (f"`{kind.name}`", kind.summary, ", ".join(f"`{name}`" for name in inputs.readable(kind.name)) or "nothing")
        for kind in ROUTERS.builtin.values()
    ]
    return _table(("kind", "how it predicts", "what it can read"), rows)


def _default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default in words."""
    if field.required:
        return "required"
    return _value(field.default if field.default_factory is NODEFAULT else field.default_factory())


def _value(value: Any) -> str:
    """A value as a TOML file would have it, or the word for what it is."""
    if isinstance(value, Struct):
        return "see below"
    if value in (None, ""):
        return "none"
    if value in ([], {}):
        return "empty"
    if isinstance(value, str):
        return json.dumps(value) if " " in value else f"`{value}`"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


#: The keys of the run file by which engines are chosen.
_ROLES: dict[EngineRole, str] = {
    "teacher": "`[[teachers]]` `engine`",
    "judge": "a judge's `engine`",
    "student": "`[student]` `engine`",
    "quality": "`[quality]` `kind`",
    "router": "`[router]` `engine`",
}
#: The tables of docs/run-file.md.
RUN_FILE: dict[str, Callable[[], str]] = {
    "run": partial(of_struct, config.RunTable),
    "prompts": partial(of_struct, config.PromptsTable),
    "student": partial(of_struct, config.StudentTable),
    "quality": partial(of_struct, config.QualityTable),
    "quality part": partial(of_struct, config.QualityPart, beyond=config.QualityTable),
    "router": partial(of_struct, config.RouterTable),
    "strategy": partial(of_struct, config.StrategyTable),
    "generation": partial(of_struct, config.GenerationTable),
    "fallback": partial(of_struct, config.FallbackTable),
    "budget": partial(of_struct, config.BudgetTable),
    "routers": of_routers,
    "strategies": of_strategies,
    "engines": of_engines,
    "teachers": partial(of_struct, config.TeacherTable),
    "sampling": partial(of_struct, config.Sampling),
    "speed arguments": lambda: "\n" + textwrap.fill(_names(vllm_arguments.SPEED), 120) + "\n\n",
    "repetition detection": partial(of_struct, config.RepetitionDetection),
    "vllm": partial(of_struct, options.VllmOptions),
    "transformers": partial(of_struct, options.TransformersOptions),
    "openai": partial(of_struct, options.OpenAIOptions),
    "litellm": partial(of_struct, LiteLLMOptions),
    "server": partial(of_struct, options.ServerOptions),
    "scorers": partial(of_struct, options.LogLikelihoodOptions),
    "judge": partial(of_struct, options.JudgeOptions),
    "math": partial(of_struct, options.MathOptions),
    "instructions": partial(of_struct, options.InstructionsOptions),
    "code": partial(of_struct, options.CodeOptions),
    "router_fit": partial(of_struct, options.RouterFitOptions),
    "routing": partial(of_struct, options.RouteOptions),
    "fake": partial(of_struct, options.FakeOptions),
    "environment": of_environment,
}
