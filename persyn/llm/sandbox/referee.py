"""Run tests in one process against code in another one: only the values that it returns come here.

A name that the tests use and do not define is the code's, unless it is built in or a module of the standard library.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import Any

from persyn.llm.sandbox import names
from persyn.llm.sandbox.exchange import Channel, Gone, Peer

#: The module that tests may import the code from.
_CODE_MODULE = "solution"
_LONGEST = 2_000
_ENDED = "the code ended its process"


class Unsupported(BaseException):
    """The tests do what cannot be done across processes. No `except Exception` of a test catches it."""


class Unreadable(Exception):
    """There is nothing to test, or the tests cannot be parsed."""


class Remote:
    """An object of the code under test; see `exchange.OPERATIONS`."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return self._peer.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return int(self._peer.ask("len", self))

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self._peer.ask("iter", self)
        return iterator

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __str__(self) -> str:
        return str(self._peer.ask("str", self))

    def __repr__(self) -> str:
        return str(self._peer.ask("repr", self))

    def __bool__(self) -> bool:
        return True

    def __hash__(self) -> int:
        return int(self._peer.ask("hash", self))

    def __eq__(self, other: object) -> bool:
        """Only between two objects of the code does the code decide."""
        if not isinstance(other, Remote):
            return False
        return self._number == other._number or self._peer.ask("eq", self, other) is True

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and self._peer.ask("isinstance", instance, self) is True


class Tests:
    """The tests of a job: what they need, what runs before them, and each of them.

    Raises `Unreadable` and `Unsupported`.
    """

    def __init__(self, setup: str, tests: list[str] | str, entry_point: str | None) -> None:
        try:
            parsed = [_without_code_imports(text) for text in ([tests] if isinstance(tests, str) else tests)]
            before = _without_code_imports(setup)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if isinstance(tests, str):
            before, parsed = _cases(before, parsed[0], entry_point)
        used = names.read([before, *parsed])
        self.names, self.modules = used.of_code(entry_point), used.modules
        if not self.names:
            raise Unreadable("the tests use nothing of the code")
        if missing := sorted(
            name for name in used.imported if importlib.util.find_spec(name.partition(".")[0]) is None
        ):
            raise Unsupported(f"the tests import {missing[0]}, which is not in the standard library")
        if caught := sorted(used.caught & self.names):
            raise Unsupported(f"the tests catch {caught[0]}, an exception of the code's own")
        self.setup = compile(before, "tests.py", "exec", dont_inherit=True)
        self.cases = [compile(tree, "tests.py", "exec", dont_inherit=True) for tree in parsed]


def _without_code_imports(text: str) -> ast.Module:
    """Parse tests; what they import from the code's module is not theirs."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == _CODE_MODULE)]
    return tree


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
        tests = Tests(job["setup"], job["tests"], job["entry_point"])
    except Unreadable as error:
        verdicts.send({"unreadable_tests": str(error)[:_LONGEST]})
        return
    except Unsupported as error:
        verdicts.send({"unsupported_tests": str(error)[:_LONGEST]})
        return
    try:
        code.receive()  # the code's process has started
    except Gone:
        verdicts.send({"no_start": True})
        return
    verdicts.send({"tests": len(tests.cases)})
    try:
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
        if not isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type):
            raise Unsupported(f"the tests pass an object of type {type(value).__name__} to the code")
        self._functions.append(value)
        return ["function", len(self._functions) - 1]

    def _resolve(self, kind: str, number: int) -> Any:
        return Remote(self._peer, number) if kind == "object" else self._functions[number]

    def _call(self, number: int, args: Any, kwargs: Any) -> Any:
        return self._functions[number](*args, **kwargs)
