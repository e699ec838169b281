"""Run tests in one process against code in another one: only the values that it returns come here.

A name that the tests use and do not define is the code's, unless it is built in or a module of the standard library.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import symtable
import types
from collections.abc import Callable
from functools import partialmethod
from typing import Any

from persyn.llm.sandbox import names
from persyn.llm.sandbox.exchange import ARITHMETIC, BINARY, UNARY, Channel, Gone, Peer

#: The module that tests may import the code from.
_CODE_MODULE = "solution"
_LONGEST = 2_000
_ENDED = "the code ended its process"


class Unsupported(BaseException):
    """The tests do what cannot be done across processes. No `except Exception` of a test catches it."""


class Undecidable(BaseException):
    """Only the code could say whether a test passes, which therefore fails. No `except Exception` of a test catches it.

    A test of a class may do this by itself, and then no response passes it. It is not left out instead, because code
    could then escape its tests with an object in place of a plain value.
    """


class Unreadable(Exception):
    """There is nothing to test, or the tests cannot be parsed."""


class Remote:
    """An object of the code under test; see `exchange.OPERATIONS`."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    # What every object has, and `__getattr__` therefore does not see. Not `__class__`: `isinstance` would believe it.
    __dict__ = property(lambda self: self.__getattr__("__dict__"))
    __doc__ = property(lambda self: self.__getattr__("__doc__"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return self._peer.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise Undecidable("the test copies an object of the code")

    def __enter__(self) -> Any:
        return self.__getattr__("__enter__")()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        """The code may end an exception, but not the failure of a test."""
        if isinstance(error, AssertionError | Gone | Unsupported | Undecidable):
            return False
        return self.__getattr__("__exit__")(kind, error, trace)

    def __contains__(self, item: object) -> bool:
        """What is in a built-in container, or in what can only be iterated over, shows without asking the code."""
        if isinstance(item, Remote):
            return self._peer.ask("contains", self, item) is True
        if self._peer.ask("definer", self, "__contains__") not in (None, "builtins", "collections"):
            raise _undecidable("__contains__")
        return any(each is item or each == item for each in self._peer.ask("iter", self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote) and self._number == other._number:
            return True
        return _between_objects(self, "eq", other)  # type: ignore[no-any-return]

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and self._peer.ask("isinstance", instance, self) is True


def _special(name: str) -> str:
    return f"__{name.rstrip('_')}__"


def _undecidable(method: str) -> Undecidable:
    return Undecidable(f"the test applies {method} of an object of the code to a plain value")


def _between_objects(mine: Remote, name: str, other: object) -> Any:
    """Only between two objects of the code does the code decide; else only that it has no such method."""
    if isinstance(other, Remote):
        return mine._peer.ask(name, mine, other)
    if mine._peer.ask("definer", mine, _special(name)) is not None:
        raise _undecidable(_special(name))
    return NotImplemented


def _ask(mine: Remote, name: str, *args: Any) -> Any:
    return mine._peer.ask(name, mine, *args)


for _name in UNARY:
    setattr(Remote, _special(_name), partialmethod(_ask, _name))
for _name in set(BINARY) - {"eq", "contains"}:  # written out above
    setattr(Remote, _special(_name), partialmethod(_between_objects, _name))
for _name in ARITHMETIC:
    setattr(Remote, _special(f"r{_name}"), partialmethod(_between_objects, f"r{_name}"))


class Tests:
    """The tests of a job: what they need, what runs before them, and each of them.

    Raises `Unreadable` and `Unsupported`.
    """

    def __init__(self, preamble: str, setup: str, tests: list[str] | str, entry_point: str | None) -> None:
        try:
            parsed = [_without_code_imports(text) for text in ([tests] if isinstance(tests, str) else tests)]
            before = _without_code_imports(setup)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if isinstance(tests, str):
            before, parsed = _cases(before, parsed[0], entry_point)
        imported = names.read([before, *parsed]).imported
        helpers = _helpers(preamble, [before, *parsed])
        before.body = [*helpers, *before.body]
        before.body.sort(key=lambda node: not _is_future(node))
        used = names.read([before, *parsed])
        self.names, self.modules = used.of_code(entry_point), used.modules
        if not self.names:
            raise Unreadable("the tests use nothing of the code")
        if missing := sorted(filter(_is_missing, imported | _imported_for(used.read, helpers))):
            raise Unsupported(f"the tests import {missing[0]}, which is not in the standard library")
        if caught := sorted(used.caught & self.names):
            raise Unsupported(f"the tests catch {caught[0]}, an exception of the code's own")
        self.setup, *self.cases = map(_compiled, [before, *parsed])


def _compiled(tree: ast.Module) -> types.CodeType:
    try:
        return compile(tree, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_missing(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is None


def _imported_for(read: frozenset[str], helpers: list[ast.stmt]) -> set[str]:
    """The modules that helpers import under names that are read."""
    imports = [node for each in helpers for node in ast.walk(each) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        module
        for node in imports
        if names.read([node]).defined & {*read, "*"}
        for module in names.read([node]).imported
    }


def _without_code_imports(text: str) -> ast.Module:
    """Parse tests; what they import from the code's module is not theirs."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == _CODE_MODULE)]
    return tree


def _helpers(preamble: str, tests: list[ast.Module]) -> list[ast.stmt]:
    """What the preamble defines and imports, if the tests use any of it.

    Of the code they would be what the code makes of them. Its classes are left to the code, which gets their objects.
    """
    body = [node for node in ast.parse(preamble).body if not isinstance(node, ast.ClassDef)]
    used = names.read(tests)
    try:
        return body if _bound(body) & {*(used.read - used.defined), "*"} else []
    except SyntaxError:  # which the code's process says
        return []


def _bound(body: list[ast.stmt]) -> set[str]:
    """The names that statements define or import; `*` for those that are not known."""
    table = symtable.symtable(ast.unparse(ast.Module(body, [])), "preamble", "exec")
    found = {each.get_name() for each in table.get_symbols() if each.is_assigned() or each.is_imported()}
    is_starred = any(isinstance(node, ast.alias) and node.name == "*" for each in body for node in ast.walk(each))
    return found | {"*"} if is_starred else found


def _cases(before: ast.Module, tests: ast.Module, entry_point: str | None) -> tuple[ast.Module, list[ast.Module]]:
    """A text of tests is a function `check(candidate)`, functions `test_...()`, or statements that are one test."""
    functions = [node.name for node in tests.body if isinstance(node, ast.FunctionDef)]
    if "check" in functions:
        if not entry_point:
            raise Unreadable("the tests define check(candidate), but the row has no entry_point")
        calls = [f"check({entry_point})"]
    else:
        calls = [f"{name}()" for name in functions if name.startswith("test_")]
    if calls:
        before.body += tests.body
        return before, [ast.parse(call) for call in calls]
    if not any(isinstance(node, ast.Assert) for node in tests.body):
        raise Unreadable("the tests contain no assert, no function check and no function test_...")
    return before, [tests]


def work(job: dict[str, Any], missing: dict[str, str]) -> None:
    """Run the tests from `job["first"]` on and report their number, then the failure of each; None if it passed."""
    code, verdicts = Channel(*job["pipes"]), Channel(-1, job["verdicts"])
    try:
        _report(job, code, verdicts)
    except Unreadable as error:
        verdicts.send({"unreadable_tests": str(error)[:_LONGEST]})
    except Unsupported as error:
        verdicts.send({"unsupported_tests": str(error)[:_LONGEST]})


def _report(job: dict[str, Any], code: Channel, verdicts: Channel) -> None:
    tests = Tests(job["preamble"], job["setup"], job["tests"], job["entry_point"])
    try:
        code.receive()  # the code's process has started
    except Gone:
        verdicts.send({"no_start": True})
        return
    verdicts.send({"tests": len(tests.cases)})
    try:
        if flaw := code.receive():
            raise Unsupported(f"the code in the prompt cannot be loaded: {flaw}")
        namespace = _Namespace(tests, code, flaw=code.receive())
    except Gone:
        verdicts.send({"failure": _ENDED})
        return
    if "unsupported_tests" in namespace.setup:
        verdicts.send(namespace.setup)
    for case in tests.cases[job["first"] :]:
        outcome = namespace.outcome_of(case)
        verdicts.send(outcome)
        if not code.is_open:
            return


class _Namespace:
    """Where tests run.

    flaw: why the code could not be loaded; empty if it was.
    """

    def __init__(self, tests: Tests, code: Channel, flaw: str) -> None:
        self._code = code
        self._functions: list[Callable[..., Any]] = []
        self._peer = Peer(code, self._refer, self._resolve, {"function": self._call})
        self._names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        self._names |= {name: importlib.import_module(name) for name in tests.modules}
        self._flaw = f"the code cannot be loaded: {flaw}" if flaw else ""
        for name in () if flaw else tests.names:
            with contextlib.suppress(KeyError):  # the test then says that the name is not defined
                self._names[name] = self._peer.ask("name", name)
        self.setup = self.outcome_of(tests.setup)
        self._flaw = self.setup.get("failure") or ""

    def outcome_of(self, case: types.CodeType) -> dict[str, Any]:
        """Run one test; a test passes if nothing is raised."""
        said: str | None = self._flaw or None
        try:
            if not self._flaw:
                exec(case, self._names)  # noqa: S102 - behind walls
        except Unsupported as error:
            return {"unsupported_tests": str(error)[:_LONGEST]}
        except Undecidable as error:
            said = str(error)
        except SystemExit:
            return {"unsupported_tests": "the tests end their process"}
        except Gone:
            said = _ENDED
        except Exception as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if said is None and not self._code.is_open:  # a test that catches everything
            said = _ENDED
        return {"failure": said and said[:_LONGEST]}

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["object", value._number]
        if not isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            raise Unsupported(f"the tests pass an object of type {type(value).__name__} to the code")
        self._functions.append(value)
        return ["function", len(self._functions) - 1]

    def _resolve(self, kind: str, number: int) -> Any:
        return Remote(self._peer, number) if kind == "object" else self._functions[number]

    def _call(self, number: int, args: Any, kwargs: Any) -> Any:
        return self._functions[number](*args, **kwargs)
