"""The process in which answers are compared: algebra on text that strangers wrote.

Some expressions never end, or take all memory, inside C code that no exception can stop; so this
process has a limit on its memory, an alarm that kills it, and a parent that replaces it.
Run as `python -m persyn.llm.math_child FD TIMEOUT_SECONDS MEMORY_MB`.
"""

from __future__ import annotations

import logging
import re
import resource
import signal
import sys
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import math_verify
import msgspec
import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify.grader import get_pct_val

from persyn.llm import math_answer
from persyn.llm.math import Case, Verdict

VERSION = f"math-verify {version('math-verify')}"

_LONGEST_DETAIL = 200
#: Larger than the difference of 1/3 and 0.333333, smaller than any two answers that somebody tells apart.
_FLOAT_TOLERANCE = 0.01
_EXACT_TOLERANCE = 1e-12

_NUMBER = re.compile(r"-?(?:\d{1,15}|\d{1,3}(?:,\d{3}){1,5})(?:\.\d{1,15})?|-?\.\d{1,15}")
_HUGE_NUMBER = re.compile(r"\d{300}")
#: A number, fraction or root and a unit after it: longer than a letter, or set apart by a space or \text{}.
_WITH_UNIT = re.compile(
    r"-?(?:\\(?:[dt]?frac|sqrt|pi)|[\d.,/{}\s\\^])+"
    r"(?:\\(?:text\w*|mathrm|mathbf|mbox)\s*\{[^{}]*\}|\s[A-Za-z]+|[A-Za-z]{2,})(?:\^\{?\d\}?)?"
)


def judge(case: Case) -> Verdict:
    """Compare the answer a response states with the one a reference states."""
    gold, stated = math_answer.find(case.gold) or case.gold.strip(), math_answer.find(case.response)
    if not stated:
        return Verdict(False, {"gold": _short(gold), "parsed": None, "version": VERSION})
    if _plain(gold) == _plain(stated):
        return Verdict(True, _detail(gold, stated, "text"))
    gold_parsed, parsed = _parse_gold(gold), _parse(stated)
    if gold_parsed is None or parsed is None:
        detail = _detail(gold, stated, "text")
        return Verdict(False, detail if gold_parsed is None else detail | {"parsed": None, "unparsed": _short(stated)})
    return Verdict(_verify(gold=gold_parsed, prediction=parsed), _detail(gold_parsed, parsed, "math"))


def _verify(*, gold: Any, prediction: Any) -> bool:
    """Whether the two are equal; not symmetric, so the reference has its own name."""
    agreed = math_verify.verify(gold=gold, target=prediction, timeout_seconds=None, raise_on_error=False)
    return bool(agreed) and _agrees_closely(gold, prediction)


def _agrees_closely(gold: Any, prediction: Any) -> bool:
    """Whether two numbers that were found equal are, measured by their own size.

    The comparison that was made is an absolute one, to which all small numbers are the same.
    """
    if not (_is_number(gold) and _is_number(prediction)):
        return True
    pairs = [(gold, prediction), (get_pct_val(gold, gold), get_pct_val(prediction, prediction))]
    return any(_is_close(a.doit(), b.doit()) for a, b in pairs)


def _is_number(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and bool(value.is_number)


def _is_close(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return bool(a == b)
    tolerance = _FLOAT_TOLERANCE if a.has(sympy.Float) or b.has(sympy.Float) else _EXACT_TOLERANCE
    difference, size = abs(sympy.N(a - b, 30)), max(abs(sympy.N(a, 30)), abs(sympy.N(b, 30)))
    return bool(difference <= tolerance * size) or not difference.is_comparable


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> Any:
    """A reference's expression; all teachers are compared with the same one."""
    return _parse(text)


def _parse(text: str) -> Any:
    """An expression that stands for the whole text, or None."""
    if len(text) > math_answer.LONGEST or _HUGE_NUMBER.search(text):
        return None
    if _NUMBER.fullmatch(text):
        text, config = text.replace(",", ""), math_verify.ExprExtractionConfig()
    else:
        text, config = f"$${text}$$", _latex_config(has_unit=_WITH_UNIT.fullmatch(text) is not None)
    found = math_verify.parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


@lru_cache(maxsize=2)
def _latex_config(*, has_unit: bool) -> Any:
    # Units are cut off only where a unit can stand: otherwise 3x - 4c would be 3x - 4.
    normal = NormalizationConfig(basic_latex=True, units=has_unit, malformed_operators=True, nits=True, boxed="none")
    return math_verify.LatexExtractionConfig(normalization_config=normal, boxed_match_priority=-1)


def _plain(text: str) -> str:
    """What two texts have in common that differ only in how they are set."""
    text = re.sub(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\(?:left|right|displaystyle|[!,;: ])", r"\1", text)
    return re.sub(r"[\s$]+", "", text.replace("dfrac", "frac").replace("tfrac", "frac")).casefold()


def _detail(gold: Any, parsed: Any, method: str) -> dict[str, Any]:
    return {"gold": _short(gold), "parsed": _short(parsed), "method": method, "version": VERSION}


def _short(value: Any) -> str:
    try:
        return str(value)[:_LONGEST_DETAIL]
    except ValueError:
        return "a number too long to print"


def main(fd: int, timeout_seconds: float, memory_mb: int) -> None:
    """Answer lists of cases, one verdict after the other, until the parent closes the pipe."""
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever interrupts the parent ends this process by it
    logging.disable(logging.WARNING)
    judge(Case(r"\frac{1}{2}", r"$\frac{2}{4} + 0 \cdot x$"))  # builds the parser's tables

    pipe = Connection(fd)
    decode = msgspec.msgpack.Decoder(list[Case]).decode
    pipe.send_bytes(msgspec.msgpack.encode(VERSION))
    while True:
        try:
            cases = decode(pipe.recv_bytes())
        except EOFError:
            return
        for case in cases:
            pipe.send_bytes(msgspec.msgpack.encode(_guarded(case, timeout_seconds, memory_mb)))


def _guarded(case: Case, timeout_seconds: float, memory_mb: int) -> Verdict:
    # Nobody handles this alarm, so it ends the process, also inside C code and when the parent is gone.
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_seconds)
    before = _peak_mb()
    try:
        verdict = judge(case)
    except (MemoryError, RecursionError) as error:
        verdict = Verdict(None, failure=f"crashed: {type(error).__name__}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    # A comparison that ran into the limit is swallowed on its way here and looks like "not equal".
    if not verdict.is_right and _peak_mb() - before > memory_mb / 4:
        return Verdict(None, failure=f"crashed: the comparison needs more than {memory_mb} MB")
    return verdict


def _peak_mb() -> float:
    """The most memory this process has held; getrusage would count what its parent held when it was made."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
