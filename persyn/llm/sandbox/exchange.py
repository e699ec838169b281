"""Calls between two processes that do not trust each other: the tests in one, the code under test in the other.

Only plain values cross: numbers, texts, containers of them, and a few types of the standard library. Anything else
stays where it is and crosses as a reference, on which the other side can call a few operations. The code under test can
therefore neither see what the tests expect nor return an object that claims to equal everything.

A message is its length in 4 bytes and JSON. Used in child processes that import nothing but the standard library.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

LENGTH = struct.Struct("!I")
_LONGEST = 2**26

_PLAIN: tuple[type, ...] = (bool, int, float, str, type(None))
_Parts = Callable[[Any], list[Any]]


def _items(value: Any) -> list[Any]:
    return [list(value)]


#: Types whose values cross as a name with arguments: how to get these, and what makes an equal value of them.
#: Subclasses are not among them: an object with methods of its own crosses as a reference.
_MADE: dict[type, tuple[str, _Parts, Callable[..., Any]]] = {
    tuple: ("tuple", _items, tuple),
    set: ("set", _items, set),
    frozenset: ("frozenset", _items, frozenset),
    deque: ("deque", lambda value: [list(value), value.maxlen], deque),
    dict: ("dict", lambda value: [list(value.items())], dict),
    defaultdict: ("defaultdict", lambda value: [value.default_factory, list(value.items())], defaultdict),
    OrderedDict: ("OrderedDict", lambda value: [list(value.items())], OrderedDict),
    Counter: ("Counter", lambda value: [dict(value)], Counter),
    bytes: ("bytes", lambda value: [value.hex()], bytes.fromhex),
    bytearray: ("bytearray", lambda value: [value.hex()], bytearray.fromhex),
    complex: ("complex", lambda value: [value.real, value.imag], complex),
    range: ("range", lambda value: [value.start, value.stop, value.step], range),
    Decimal: ("Decimal", lambda value: [str(value)], Decimal),
    Fraction: ("Fraction", lambda value: [value.numerator, value.denominator], Fraction),
    datetime: ("datetime", lambda value: [value.isoformat()], datetime.fromisoformat),
    date: ("date", lambda value: [value.isoformat()], date.fromisoformat),
    timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds], timedelta),
}
#: The classes that cross, by name. None of them makes an object with methods of the code's own.
_CLASSES: dict[str, type] = {kind.__name__: kind for kind in (*_PLAIN, list, *_MADE)}
_MAKERS: dict[str, Callable[..., Any]] = {
    **{name: make for name, _, make in _MADE.values()},
    "class": _CLASSES.__getitem__,
    "namedtuple": lambda fields, values: namedtuple("namedtuple", fields, rename=True)(*values),
}


#: What can be done with an object of the code.
UNARY = (
    *("len", "iter", "next", "reversed", "getitem", "setitem", "delitem", "delattr", "str", "repr", "bytes", "format"),
    *("hash", "bool", "int", "float", "complex", "index", "round", "neg", "pos", "abs", "invert"),
)
ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul"),
    *("lshift", "rshift", "and_", "or_", "xor"),
)
#: What can be done with two objects of the code. With one and a plain value it cannot: the code would see the value
#: that a test expects, or decide its outcome.
BINARY = (
    *("lt", "le", "gt", "ge", "eq", "contains", *ARITHMETIC),
    *(f"i{name.rstrip('_')}" for name in ARITHMETIC if name != "divmod"),
)
OPERATIONS = (*UNARY, *BINARY, "getattr", "setattr", "isinstance")


class Gone(BaseException):
    """The other process has ended, or says what cannot be understood. No `except Exception` of a test catches it."""


class Channel:
    """A pair of pipes that carries JSON values."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self.is_open = True

    def send(self, value: Any) -> None:
        """Send a value; `Gone` if nobody reads."""
        data = json.dumps(value).encode()
        data = LENGTH.pack(len(data)) + data
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> Any:
        """Wait for a value; `Gone` if none comes."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > _LONGEST:
            raise self._gone()
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise self._gone() from error

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = os.read(self._read, min(size - len(parts), 2**20))
            if not part:
                raise self._gone()
            parts += part
        return bytes(parts)

    def _gone(self) -> Gone:
        self.is_open = False
        return Gone()


class Peer:
    """One end: it asks the other to do something and, while it waits, does what the other asks.

    refer:   gives what is no plain value a reference, [kind, number].
    resolve: finds what a reference stands for.
    do:      the operations that the other end may ask for, by name.
    """

    def __init__(
        self,
        channel: Channel,
        refer: Callable[[Any], list[Any]],
        resolve: Callable[[str, int], Any],
        do: dict[str, Callable[..., Any]],
    ) -> None:
        self._channel, self._refer, self._resolve, self._do = channel, refer, resolve, do

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the other end do something; what it changes in containers is changed in the arguments.

        An exception there is raised here, as the first of its classes that is built in.
        """
        self._channel.send(["ask", operation, self.encode(args), self.encode(kwargs)])
        while (said := self._channel.receive())[0] == "ask":
            self.answer(said)
        if said[0] == "raised":
            raise _exception(said[1], said[2])
        updated(args, self.decode(said[2]))
        updated(kwargs, self.decode(said[3]))
        return self.decode(said[1])

    def answer(self, said: list[Any]) -> None:
        """Do what the other end asks for and send the result."""
        _, operation, args, kwargs = said
        try:
            args, kwargs = self.decode(args), self.decode(kwargs)
            result = self.encode(self._do[operation](*args, **kwargs))
            reply = ["done", result, self.encode(args), self.encode(kwargs)]
        except Exception as error:
            reply = ["raised", [kind.__name__ for kind in type(error).__mro__], str(error)]
        self._channel.send(reply)

    def serve(self) -> None:
        """Answer until the other end is gone."""
        while True:
            self.answer(self._channel.receive())

    def encode(self, value: Any) -> Any:
        """A value as JSON: lists and plain values as they are, everything else as an object of one key."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list:
            return [self.encode(each) for each in value]
        if kind in _MADE:
            name, parts, _ = _MADE[kind]
            return {name: [self.encode(part) for part in parts(value)]}
        if kind is type and value in _CLASSES.values():
            return {"class": [value.__name__]}
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [list(kind._fields), self.encode(list(value))]}
        return {"reference": self._refer(value)}

    def decode(self, value: Any) -> Any:
        """Build the value again."""
        if isinstance(value, list):
            return [self.decode(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((name, content),) = value.items()
        return self._resolve(*content) if name == "reference" else _MAKERS[name](*self.decode(content))


def updated(mine: Any, theirs: Any) -> Any:
    """`mine` with the content of `theirs`; containers are changed in place, since the test may refer to them."""
    if type(mine) is not type(theirs):
        return theirs
    if isinstance(mine, list | deque | bytearray):
        content = [*map(updated, mine, theirs), *list(theirs)[len(mine) :]]
        mine.clear()
        mine.extend(content)
    elif isinstance(mine, tuple):
        _ = list(map(updated, mine, theirs))
    elif isinstance(mine, dict):
        items = {key: updated(mine[key], each) if key in mine else each for key, each in theirs.items()}
        mine.clear()
        mine.update(items)
    elif isinstance(mine, set):
        mine.clear()
        mine.update(theirs)
    else:
        return theirs
    return mine


def _exception(names: Iterable[str], message: str) -> Exception:
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(message)
            except TypeError:  # UnicodeDecodeError has more arguments; its base class follows
                continue
    return Exception(message)
