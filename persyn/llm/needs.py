"""What a quality scorer needs of a prompt's row, so that it is missed before responses are paid for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Meta: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Need:
    """A field without which no response to a prompt can be scored.

    quality:  the kind of scorer.
    what:     as a person calls it.
    use:      what the scorer does with it.
    field:    of a row of the prompts' file.
    failures: what a score says before its colon where the field was missing.
    is_met:   whether a prompt of this answer and these other fields has it.
    """

    quality: str
    what: str
    use: str
    field: str
    failures: frozenset[str]
    is_met: Callable[[str | None, Meta], bool]


def _has_answer(answer: str | None, meta: Meta) -> bool:
    return bool(answer and answer.strip())


def _has_instructions(answer: str | None, meta: Meta) -> bool:
    return bool(meta.get("instruction_id_list"))


def of(kind: str, options: Mapping[str, Any]) -> Need | None:
    """What a scorer of this kind needs; None where any prompt will do, or only its author knows."""
    if kind == "math" or (kind == "judge" and options.get("against") == "answer"):
        failures = frozenset({"no_reference_answer", "no_answer"})
        return Need(kind, "reference answer", "compares each response with it", "answer", failures, _has_answer)
    if kind == "instructions":
        what, field = "list of instructions", "instruction_id_list"
        return Need(kind, what, "checks each response by it", field, frozenset({"no_instructions"}), _has_instructions)
    return None
