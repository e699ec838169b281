"""Define and validate the options of an export: formats, filters and splits."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct, structs

from persyn.dataset.formats import FORMATS, Format
from persyn.errors import UsageError, shorten

#: The split of every prompt that belongs to no other.
TRAIN = "train"
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,29}")
#: Names reserved by `datasets`, with their meaning there.
_RESERVED = {"all": "all splits together"}
#: The finish reason of a response that has none.
UNKNOWN = "unknown"
#: The standard finish reasons; a server may report others.
FINISH_REASONS = {"stop", "length", UNKNOWN}
#: What each option may be, for the error about another type.
_KINDS = {
    "formats": "a list of names, such as ['alpaca']",
    "reasoning": "'field', 'inline' or 'drop'",
    "splits": "a dict of names and shares, such as {'test': 0.05}",
    "finish_reasons": "a list of texts, such as ['stop']",
    "min_quality": "a number",
    "unscored": "'keep' or 'drop'",
    "drop_wrong": "True or False",
    "benchmarks": "a list of paths",
    "near_duplicates": "a number",
    "cap": "a whole number",
}


class ExportOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an export, given to the command and recorded in the manifest.

    Raises `UsageError` for invalid values.
    """

    #: Names from `formats.FORMATS`; the default is all that are built in.
    formats: tuple[str, ...] = tuple(FORMATS.builtin)
    #: Where the teachers' reasoning is: in a field of its own (inlined in formats that have none), before the answer
    #: in its text, or nowhere.
    reasoning: Literal["field", "inline", "drop"] = "field"
    #: Split -> its share of the prompts; the others are in `train`.
    splits: dict[str, float] = {}
    #: Keep only responses with these finish reasons: stop, length, a server's own, or unknown. Empty means any.
    finish_reasons: tuple[str, ...] = ()
    #: Keep only responses of at least this quality, in the unit of the run's quality scorer.
    min_quality: float | None = None
    #: How responses without a quality score are handled.
    unscored: Literal["keep", "drop"] | None = None
    #: Drop responses known to be wrong, where the run's quality is a verdict.
    drop_wrong: bool = False
    #: Benchmark files; rows that overlap with their texts are dropped.
    benchmarks: tuple[str, ...] = ()
    #: Similarity from which the later of two prompts is dropped, 0.5 to 1.
    near_duplicates: float | None = None
    #: Maximum number of rows per teacher.
    cap: int | None = None

    def __post_init__(self) -> None:
        for field in structs.fields(self):
            structs.force_setattr(self, field.name, _converted(field.name, getattr(self, field.name), field.type))
        _require_formats(self.formats)
        _require_splits(self.splits)
        if self.min_quality is not None and not math.isfinite(self.min_quality):
            raise UsageError(f"the minimum quality must be a number, got {self.min_quality}")
        if self.unscored is not None and self.min_quality is None:
            raise UsageError("unscored can only be given with a minimum quality")
        if self.near_duplicates is not None and not 0.5 <= self.near_duplicates <= 1:
            raise UsageError(f"the similarity of near-duplicates must be 0.5 to 1, got {self.near_duplicates}")
        if self.cap is not None and self.cap < 1:
            raise UsageError(f"a teacher's cap must be 1 or more, got {self.cap}")

    @property
    def filters(self) -> bool:
        """Whether any filter is active."""
        plain = ExportOptions(formats=self.formats, reasoning=self.reasoning, splits=self.splits)
        return self != plain

    def has_reasoning_field(self, form: Format) -> bool:
        """Whether reasoning is in a field of its own in a format, if the run has any."""
        return self.reasoning == "field" and form.reasoning_in is not None

    def inlines(self, form: Format) -> bool:
        """Whether reasoning is in the text of the response in a format, if the run has any."""
        return self.reasoning != "drop" and not self.has_reasoning_field(form)

    def split_of(self, content_hash: str) -> str:
        """The split of a prompt: the same in every run, regardless of the other prompts."""
        digest = hashlib.blake2b(content_hash.encode(), digest_size=8, person=b"persyn split").digest()
        place, end = int.from_bytes(digest, "big") / 2**64, 0.0
        for name, share in self.splits.items():
            end += share
            if place < end:
                return name
        return TRAIN

    def command(self, run: str) -> str:
        """The equivalent command, with benchmarks by their file names."""
        return shlex.join(["persyn", "export", run, *self._arguments()])

    def _arguments(self) -> Iterator[str]:
        given: dict[str, Iterable[object]] = {
            "--format": () if self.formats == tuple(FORMATS.builtin) else self.formats,
            "--reasoning": () if self.reasoning == "field" else (self.reasoning,),
            "--split": (f"{name}={share}" for name, share in self.splits.items()),
            "--finish-reason": self.finish_reasons,
            "--min-quality": _if_given(self.min_quality),
            "--unscored": _if_given(self.unscored),
            "--drop-wrong": [""] if self.drop_wrong else [],
            "--decontaminate": (Path(path).name for path in self.benchmarks),
            "--near-duplicates": _if_given(self.near_duplicates),
            "--cap": _if_given(self.cap),
        }
        for option, values in given.items():
            for value in values:
                yield from (option, str(value)) if value != "" else (option,)


def _if_given(value: object) -> tuple[object, ...]:
    return () if value is None else (value,)


def _converted(name: str, given: Any, kind: Any) -> Any:
    """A value in the type of its option, such as a tuple for a list; raise `UsageError` where it has another one."""
    try:
        return msgspec.convert(msgspec.to_builtins(given, enc_hook=_plain), kind)
    except (TypeError, ValueError):  # msgspec's ValidationError is a ValueError
        raise UsageError(f"{name} must be {_KINDS[name]}, got {shorten(repr(given))}") from None


def _plain(value: Any) -> Any:
    """A NumPy number as Python's, and a path as text."""
    match value:
        case Integral():
            return int(value)
        case Real():
            return float(value)
    return os.fspath(value)


def _require_formats(formats: tuple[str, ...]) -> None:
    if not formats:
        raise UsageError(f"no format was given; available: {', '.join(FORMATS)}")
    for name in formats:
        FORMATS.require(name, "format")


def _require_splits(splits: dict[str, float]) -> None:
    for name, share in splits.items():
        if not _SPLIT_NAME.fullmatch(name):
            raise UsageError(f"a split's name consists of lower-case letters, digits and _, such as test; got {name!r}")
        if name in _RESERVED:
            raise UsageError(f"a split cannot be named {name}: dataset libraries use this name for {_RESERVED[name]}")
        if name == TRAIN:
            raise UsageError(
                f"the split {TRAIN} contains the remaining rows; give only the other splits, such as test=0.05"
            )
        if not 0 < share < 1:
            raise UsageError(f"the share of split {name} must be above 0 and below 1, got {share}")
    if sum(splits.values()) >= 1:
        raise UsageError(f"the splits' shares add up to {sum(splits.values()):g}: nothing is left for {TRAIN}")
