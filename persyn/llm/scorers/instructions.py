"""Score quality by whether a response follows its prompt's programmatically verifiable instructions.

A prompt's row has `instruction_id_list` and `kwargs`, as in IFEval (arXiv 2311.07911). Responses are only read as
text, never executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import msgspec
from msgspec import Struct

from persyn.errors import shorten
from persyn.llm import options
from persyn.llm.batched import Batched
from persyn.llm.protocols import Engine, Failed, Judge, Judged, ModelSpec, Request, Result, Tick
from persyn.llm.scorers import instruction_checks as checks
from persyn.llm.scorers import text_only

#: Responses taken at once.
_CHUNK = 64
#: Prefix of the instruction ids of English rows in multilingual datasets.
_LANGUAGE_PREFIX = "en:"
#: Failure codes of scores for prompts whose instructions cannot be checked.
FLAWS = frozenset({"no_instructions", "malformed_instructions", "unknown_instruction", "missing_package"})


class InstructionFields(Struct, frozen=True):
    """The fields of a prompt's row that state its instructions."""

    instruction_id_list: list[str] = []
    kwargs: list[dict[str, Any] | None] = []


class Instruction(Struct, frozen=True):
    """One instruction that can be checked."""

    id: str
    check: checks.InstructionCheck
    arguments: dict[str, Any]

    def is_followed(self, texts: list[str]) -> bool:
        """Whether at least one of the texts follows it; an empty text follows nothing."""
        return any(text.strip() and self.check(text, **self.arguments) for text in texts)


class CannotCheck(Exception):
    """The instructions of a prompt cannot be checked; the message is the reason of a `Failed`."""


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Make an instruction checker that answers `Judge`; `detail` says which instructions were followed.

    A prompt whose instructions cannot be checked fails as `no_instructions`, `malformed_instructions`,
    `unknown_instruction` or `missing_package`. `ModelSpec.model` is not used.
    """
    chosen = options.decode(spec, options.InstructionsOptions)

    def compute(requests: list[Request]) -> Iterator[list[Result]]:
        for request in requests:
            assert isinstance(request, Judge)
            yield [_judge(request, chosen)]
            tick()

    return Batched(compute, version=_version(), chunk=_CHUNK)


def variants(response: str) -> list[str]:
    """A response and its loose variants: without its first line, its last line, both; each also without asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    texts = [response, *cut]
    return list(dict.fromkeys(texts + [text.replace("*", "") for text in texts]))


def _judge(request: Judge, chosen: options.InstructionsOptions) -> Result:
    if failure := text_only.refusal(request):
        return failure
    try:
        instructions = _instructions(request.meta)
    except CannotCheck as error:
        return Failed(request.id, str(error))
    texts = [request.response] if chosen.strict else variants(request.response)
    followed = [instruction.is_followed(texts) for instruction in instructions]
    value = float(all(followed)) if chosen.level == "prompt" else sum(followed) / len(followed)
    verdicts = [{"id": one.id, "followed": is_it} for one, is_it in zip(instructions, followed, strict=True)]
    return Judged(request.id, value, detail={"instructions": verdicts})


def flaw(meta: Mapping[str, Any]) -> str | None:
    """Why the instructions in a prompt's row cannot be checked; None if they can."""
    try:
        _instructions(meta)
    except CannotCheck as error:
        return str(error)
    return None


def _instructions(meta: Mapping[str, Any]) -> list[Instruction]:
    """The instructions of a prompt; `CannotCheck` if there are none, or one is invalid."""
    try:
        fields = msgspec.convert(meta, InstructionFields)
    except msgspec.ValidationError as error:
        raise CannotCheck(f"malformed_instructions: {error}") from error
    ids, kwargs = fields.instruction_id_list, fields.kwargs
    if not ids:
        raise CannotCheck("no_instructions: the prompt's row has no instruction_id_list, or an empty one")
    if len(ids) != len(kwargs):
        raise CannotCheck(f"malformed_instructions: {len(ids)} in instruction_id_list, {len(kwargs)} in kwargs")
    return [_instruction(id.removeprefix(_LANGUAGE_PREFIX), given or {}) for id, given in zip(ids, kwargs, strict=True)]


def _instruction(id: str, kwargs: dict[str, Any]) -> Instruction:
    check = checks.CHECKS.get(id)
    if check is None:
        raise CannotCheck(f"unknown_instruction: {shorten(id)!r}")
    if id in checks.NEED_LANGDETECT and not checks.can_detect_language():
        raise CannotCheck(f"missing_package: {id} needs langdetect: pip install 'persyn[instructions]'")
    try:
        return Instruction(id, check, checks.arguments(check, kwargs))
    except msgspec.ValidationError as error:
        raise CannotCheck(f"malformed_instructions: {id}: {error}") from error


def _version() -> str:
    detector = f", langdetect {version('langdetect')}" if checks.can_detect_language() else ""
    return f"persyn {version('persyn')}{detector}"
