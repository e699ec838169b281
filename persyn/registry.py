"""Kinds by name: those that are built in, and those that installed packages add through entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from persyn.errors import UsageError, shorten

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class Named(Protocol):
    """A record of a kind."""

    @property
    def name(self) -> str:
        """The name by which users choose it."""


_Kind = TypeVar("_Kind", bound=Named)


@dataclass(frozen=True, slots=True)
class Plugin:
    """An entry point of an installed package, and what is wrong with it if it was left out."""

    group: str
    name: str
    package: str
    flaw: str = ""


class Registry(Mapping[str, _Kind]):
    """Records by name: first the built-in ones in their order, then those of plug-ins by name.

    A plug-in is an entry point whose value is a record of the registry's type. One that cannot be imported, is
    something else, or has a name that is taken is left out and described in `plugins`. Entry points are read when a
    name is looked up that is not built in, or when all records are listed.
    """

    def __init__(self, kind: type[_Kind], *builtin: _Kind, groups: tuple[str, ...]) -> None:
        """Register the built-in records.

        groups: the entry-point groups from which plug-ins are read.
        """
        self.builtin: Mapping[str, _Kind] = {record.name: record for record in builtin}
        self.groups = groups
        self._kind = kind
        self._all: dict[str, _Kind] | None = None
        self._plugins: list[Plugin] = []

    def __getitem__(self, name: str) -> _Kind:
        found = self.builtin.get(name)
        return self._read()[name] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    @property
    def plugins(self) -> list[Plugin]:
        """The plug-ins of the registry's groups, with what is wrong with those that were left out."""
        self._read()
        return self._plugins

    def flaw(self, name: str) -> str:
        """Why a plug-in of this name was left out; empty if there is no such plug-in."""
        found = (plugin for plugin in self.plugins if plugin.flaw and plugin.name == name)
        return next((f"its plug-in in package {plugin.package} was left out: {plugin.flaw}" for plugin in found), "")

    def require(self, name: str, what: str) -> _Kind:
        """The record of a name; raise `UsageError` when there is none.

        what: the readable name of the kind: "engine".
        """
        if name in self:
            return self[name]
        if flaw := self.flaw(name):
            raise UsageError(f"there is no {what} named {name!r}; {flaw}")
        near = difflib.get_close_matches(name, self, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no {what} named {name!r}{hint}; available: {', '.join(self)}")

    def _read(self) -> dict[str, _Kind]:
        if self._all is None:
            from importlib.metadata import entry_points  # an engine needs none, and would import it at each start

            self._all = dict(self.builtin)
            points = (point for group in self.groups for point in entry_points(group=group))
            for point in sorted(points, key=lambda point: (point.name, point.value)):
                flaw = self._add(self._all, point)
                package = point.dist.name if point.dist else point.module
                self._plugins.append(Plugin(point.group, point.name, package, flaw))
        return self._all

    def _add(self, records: dict[str, _Kind], point: EntryPoint) -> str:
        """Add a plug-in's record; return why it was left out, empty if it was not."""
        try:
            record = point.load()
        except Exception as error:  # foreign code, which may raise anything
            return f"{point.value} cannot be imported: {shorten(f'{type(error).__name__}: {error}')}"
        if not isinstance(record, self._kind):
            return f"{point.value} is of type {type(record).__name__}; expected {self._kind.__name__}"
        if record.name in records:
            return f"the name {record.name!r} is taken"
        records[record.name] = record
        return ""
