"""What each quality scorer needs from a prompt's row, checked before responses are paid for.

Scorers are imported only where one is chosen: this module is imported with the registry, by every command and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Meta: TypeAlias = Mapping[str, Any]

#: Placeholders that exports write for a missing answer. They may also be answers, so they only cause a warning.
_PLACEHOLDERS = {"-", "--", "?", "??", "n/a", "na", "nan", "<na>", "nil", "none", "null", "tbd", "todo", "undefined"}


@dataclass(frozen=True, slots=True)
class Need:
    """A field without which no response to a prompt can be scored.

    quality:  the kind of scorer.
    what:     a readable name.
    use:      what the scorer does with it.
    fields:   of a row of the prompts' file.
    failures: the failure codes of scores for which the field was missing or unusable.
    flaw:     what is wrong with a prompt, given its answer and other fields: "" if the field is missing, else the
              failure that every score will have; None if nothing is wrong.
    """

    quality: str
    what: str
    use: str
    fields: tuple[str, ...]
    failures: frozenset[str]
    flaw: Callable[[str | None, Meta], str | None]

    def is_met(self, answer: str | None, meta: Meta) -> bool:
        """Whether responses to such a prompt can be scored."""
        return self.flaw(answer, meta) is None


def all_of(found: Sequence[Need]) -> Need:
    """What several scorers need together."""
    if len(found) == 1:
        return found[0]

    def flaw(answer: str | None, meta: Meta) -> str | None:
        flaws = [flaw for each in found if (flaw := each.flaw(answer, meta)) is not None]
        return next(filter(None, flaws), "") if flaws else None

    # Two scorers may need the same.
    whats = list(dict.fromkeys(each.what for each in found))
    return Need(
        quality=" and ".join(each.quality for each in found),
        what=" and ".join(whats),
        use=found[0].use if len(whats) == 1 else "needs both" if len(whats) == 2 else "needs all of these",
        fields=tuple(dict.fromkeys(field for each in found for field in each.fields)),
        failures=frozenset().union(*(each.failures for each in found)),
        flaw=flaw,
    )


def is_placeholder(answer: str | None) -> bool:
    """Whether an answer looks like an export's placeholder for a missing one."""
    return answer is not None and answer.strip().casefold() in _PLACEHOLDERS


def _answer_flaw(answer: str | None, meta: Meta) -> str | None:
    return None if answer and answer.strip() else ""


def _instructions_flaw(answer: str | None, meta: Meta) -> str | None:
    from persyn.llm.scorers import instructions

    return instructions.flaw(meta) if meta.get("instruction_id_list") else ""


def _tests_flaw(answer: str | None, meta: Meta) -> str | None:
    from persyn.llm.scorers import code_tests

    return code_tests.flaw(meta) if any(map(meta.get, code_tests.FIELDS)) else ""


def answer(quality: str) -> Need:
    """A reference answer, with which a scorer of this kind compares each response."""
    failures = frozenset({"no_reference_answer", "no_answer"})
    return Need(quality, "reference answer", "compares each response with it", ("answer",), failures, _answer_flaw)


def instruction_list() -> Need:
    """Instructions that can be checked."""
    from persyn.llm.scorers import instructions

    what, fields = "list of instructions that can be checked", ("instruction_id_list",)
    return Need("instructions", what, "checks each response by it", fields, instructions.FLAWS, _instructions_flaw)


def tests() -> Need:
    """Tests for the code in a response."""
    from persyn.llm.scorers import code_tests

    return Need(
        "code",
        "test that can be run",
        "runs each response's code against them",
        ("tests",),
        code_tests.FLAWS,
        _tests_flaw,
    )
