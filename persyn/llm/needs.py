"""What a quality scorer needs of a prompt's row, so that it is missed before responses are paid for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from persyn.llm.scorers import instructions

Meta: TypeAlias = Mapping[str, Any]

#: What exports write where there is no answer. Such a word may also be an answer: it is only warned of.
_PLACEHOLDERS = {"-", "--", "?", "??", "n/a", "na", "nan", "<na>", "nil", "none", "null", "tbd", "todo", "undefined"}


@dataclass(frozen=True, slots=True)
class Need:
    """A field without which no response to a prompt can be scored.

    quality:  the kind of scorer.
    what:     as a person calls it.
    use:      what the scorer does with it.
    field:    of a row of the prompts' file.
    failures: what a score says before its colon where the field was missing or unusable.
    flaw:     what a prompt of this answer and these other fields lacks: "" where the field is missing, else the
              failure of every score; None where nothing is wrong.
    """

    quality: str
    what: str
    use: str
    field: str
    failures: frozenset[str]
    flaw: Callable[[str | None, Meta], str | None]

    def is_met(self, answer: str | None, meta: Meta) -> bool:
        """Whether responses to such a prompt can be scored."""
        return self.flaw(answer, meta) is None


def is_placeholder(answer: str | None) -> bool:
    """Whether an answer reads like what an export writes for a missing one."""
    return answer is not None and answer.strip().casefold() in _PLACEHOLDERS


def _answer_flaw(answer: str | None, meta: Meta) -> str | None:
    return None if answer and answer.strip() else ""


def _instructions_flaw(answer: str | None, meta: Meta) -> str | None:
    return instructions.flaw(meta) if meta.get("instruction_id_list") else ""


def of(kind: str, options: Mapping[str, Any]) -> Need | None:
    """What a scorer of this kind needs; None where any prompt will do, or only its author knows."""
    if kind == "math" or (kind == "judge" and options.get("against") == "answer"):
        failures = frozenset({"no_reference_answer", "no_answer"})
        return Need(kind, "reference answer", "compares each response with it", "answer", failures, _answer_flaw)
    if kind == "instructions":
        what, field = "list of instructions that can be checked", "instruction_id_list"
        return Need(kind, what, "checks each response by it", field, instructions.FLAWS, _instructions_flaw)
    return None
