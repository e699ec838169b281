"""Which names in a text of tests are the code's, which are modules, and which are the tests' own."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_BUILT_IN = frozenset(dir(builtins))


class Names(NamedTuple):
    """Names by use; one name may have several.

    called:    as a function.
    qualified: before a dot.
    other:     read in any other way.
    defined:   assigned, imported, a parameter, a function or a class.
    caught:    after `except`.
    imported:  modules.
    """

    called: frozenset[str]
    qualified: frozenset[str]
    other: frozenset[str]
    defined: frozenset[str]
    caught: frozenset[str]
    imported: frozenset[str]

    @property
    def read(self) -> frozenset[str]:
        """All names that are read."""
        return self.called | self.qualified | self.other

    @property
    def modules(self) -> frozenset[str]:
        """The modules of the standard library that the tests use and do not import, as `math` in `math.isclose`."""
        return (self.qualified & sys.stdlib_module_names) - self.called - self.other - self.defined

    def of_code(self, entry_point: str | None) -> frozenset[str]:
        """The names that the code must define; if there is no other, built-in ones that are called, as a `sum`."""
        used = self.read - self.defined - self.modules
        found = used - _BUILT_IN | frozenset([entry_point] if entry_point else ())
        return found or used & self.called


def read(trees: Iterable[ast.AST]) -> Names:
    """Collect the names in some trees."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    called = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    qualified = [node.value for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    read = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    special = {id(node) for node in (*called, *qualified)}
    handlers = [node.type for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is not None]
    return Names(
        called=frozenset(node.id for node in called),
        qualified=frozenset(node.id for node in qualified),
        other=frozenset(node.id for node in read if id(node) not in special),
        defined=frozenset(name for node in nodes for name in _defined(node)),
        caught=frozenset(part.id for node in handlers for part in ast.walk(node) if isinstance(part, ast.Name)),
        imported=frozenset(name for node in nodes for name in _imported(node)),
    )


def _defined(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.ExceptHandler(name=str(name)):
            yield name
        case ast.alias(name=name, asname=other):
            yield (other or name).partition(".")[0]


def _imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (each.name for each in names)
        case ast.ImportFrom(module=module):
            yield module or "."
