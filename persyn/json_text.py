"""Hooks of `json.loads` that refuse what it would change without a word."""

from __future__ import annotations

import math
from typing import Any


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; `ValueError` if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.50} occurs twice in one object")
    return found


def finite(digits: str) -> float:
    """A number; `ValueError` if it is too large for a float."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"a number is out of range: {digits:.50}")
    return number
