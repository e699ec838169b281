"""What PerSyn's optional packages are needed for, and the extras that install them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional package."""

    package: str
    #: The extra of PerSyn that installs it.
    name: str
    purpose: str


#: Those that no engine names.
_OTHERS = (
    Extra("psycopg", "postgres", "PostgreSQL"),
    Extra("peft", "lora", 'tune = "lora"'),
    Extra("celery", "celery", "persyn worker and persyn dispatch"),
)
#: Packages that come with one of those.
_COMPANIONS = {"kombu": "celery", "prometheus_client": "celery", "redis": "celery", "structlog": "celery"}


def extras() -> list[Extra]:
    """All optional packages."""
    from persyn.llm.engines import ENGINES

    of_engines = [
        Extra(kind.package, kind.extra, f"{' and '.join(sorted(kind.roles))} {kind.name!r}")
        for kind in ENGINES.builtin.values()
        if kind.package and kind.extra
    ]
    return [*of_engines, *_OTHERS]


def extra_of(package: str) -> str | None:
    """The extra that installs a package; None if it is not optional."""
    return _COMPANIONS.get(package) or next((extra.name for extra in extras() if extra.package == package), None)
