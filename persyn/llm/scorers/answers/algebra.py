"""Decide whether two expressions are equal, with math-verify; runs only in a process that can be killed."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify.grader import get_pct_val
from sympy.core.relational import Relational

from persyn.llm.scorers.answers.statements import LONGEST

#: Accepts 0.333333 for 1/3; smaller than the difference between any two answers that are meant to differ.
_FLOAT_TOLERANCE = 0.01
_EXACT_TOLERANCE = 1e-12

_NUMBER = re.compile(r"-?(?:\d{1,15}|\d{1,3}(?:,\d{3}){1,5})(?:\.\d{1,15})?|-?\.\d{1,15}")
_HUGE_NUMBER = re.compile(r"\d{300}")


def equal(*, gold: Any, stated: Any, with_relations: bool = False) -> bool:
    """Whether two expressions are equal; not symmetric, so the reference has its own parameter.

    with_relations: whether a stated inequality may equal the interval of its solutions.
    """
    if with_relations:
        stated = _solutions(stated)
    if isinstance(stated, sympy.Union):
        gold = _solutions(gold)
    if _is_infinite(gold) or _is_infinite(stated):
        return bool(gold == stated)
    agreed = math_verify.verify(
        gold=gold,
        target=stated,
        timeout_seconds=None,
        raise_on_error=False,
        allow_set_relation_comp=with_relations,
    )
    return bool(agreed) and _agrees_closely(gold, stated)


def _solutions(stated: Any) -> Any:
    """Convert alternative inequalities, `x < 1 or x > 2`, to the set of their solutions."""
    if isinstance(stated, sympy.FiniteSet) and all(isinstance(each, Relational) for each in stated):
        return sympy.Union(*(each.as_set() for each in stated))
    return stated


def times(value: Any, factor: Fraction) -> Any:
    """Multiply an expression by a unit factor; returns the same object if the factor is 1."""
    if factor == 1:
        return value
    if isinstance(value, sympy.FiniteSet):
        return sympy.FiniteSet(*(times(each, factor) for each in value))
    if not isinstance(value, sympy.Expr | sympy.MatrixBase):
        return value  # an interval or an equation cannot be a quantity
    return value * sympy.Rational(factor.numerator, factor.denominator)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.doit() in (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def _agrees_closely(gold: Any, stated: Any) -> bool:
    """Whether two numbers that compared equal are also close relative to their magnitude.

    The comparison used an absolute tolerance, under which all small numbers are equal.
    """
    if not (_is_number(gold) and _is_number(stated)):
        return True
    pairs = [(gold, stated), (get_pct_val(gold, gold), get_pct_val(stated, stated))]
    return any(_is_close(a.doit(), b.doit()) for a, b in pairs)


def _is_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and bool(value.is_number)


def _is_close(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return bool(a == b)
    tolerance = _FLOAT_TOLERANCE if a.has(sympy.Float) or b.has(sympy.Float) else _EXACT_TOLERANCE
    difference, size = abs(sympy.N(a - b, 30)), max(abs(sympy.N(a, 30)), abs(sympy.N(b, 30)))
    return bool(difference.is_comparable) and bool(difference <= tolerance * size)


@lru_cache(maxsize=4096)
def parse_reference(text: str) -> Any:
    """A reference's expression, cached because all teachers are compared with it."""
    return parse(text)


def parse(text: str) -> Any:
    """The expression that the whole text stands for, or None."""
    if len(text) > LONGEST or _HUGE_NUMBER.search(text):
        return None
    if _NUMBER.fullmatch(text):
        text, config = text.replace(",", ""), math_verify.ExprExtractionConfig()
    else:
        text, config = f"$${text}$$", _latex_config()
    found = math_verify.parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


@lru_cache(maxsize=1)
def _latex_config() -> Any:
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    return math_verify.LatexExtractionConfig(normalization_config=normal, boxed_match_priority=-1)
