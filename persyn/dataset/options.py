"""Define and validate the options of an export: kind, formats, filters and splits."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct, structs

from persyn.dataset.formats import Format
from persyn.errors import UsageError, shorten

if TYPE_CHECKING:
    from persyn.dataset.kinds import Kind

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
_TYPES = {
    "kind": "a text, such as 'preference'",
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
    "pairs": "'best-worst', 'best-each' or 'all'",
    "min_margin": "a number",
    "higher_quality": "True or False",
    "best": "a whole number",
}
#: What the command calls each option.
_FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in _TYPES},
    "formats": "--format",
    "splits": "--split",
    "finish_reasons": "--finish-reason",
    "benchmarks": "--decontaminate",
}
#: All formats of the kind that are built in.
_ALL: Any = None


class ExportOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an export, given to the command and recorded in the manifest.

    Raises `UsageError` for invalid values.
    """

    #: A name from `kinds.KINDS`.
    kind: str = "sft"
    #: Names of the kind's formats; the default is all that are built in.
    formats: tuple[str, ...] = _ALL
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
    #: The pairs of a prompt's responses: best against worst, best against each other one, or all.
    pairs: Literal["best-worst", "best-each", "all"] = "best-worst"
    #: Only pairs whose rewards differ by at least this much.
    min_margin: float = 0.0
    #: Only pairs whose chosen response has the higher quality, too; so never two wrong ones.
    higher_quality: bool = False
    #: Maximum number of responses per prompt; the best ones are kept.
    best: int | None = None

    def __post_init__(self) -> None:
        for field in structs.fields(self):
            given = getattr(self, field.name)
            if field.name != "formats" or given is not _ALL:
                structs.force_setattr(self, field.name, _converted(field.name, given, field.type))
        if self.formats is _ALL:
            structs.force_setattr(self, "formats", tuple(self.of_kind.formats.builtin))
        self._require_of_kind()
        _require_splits(self.splits)
        if self.unscored is not None and self.min_quality is None:
            raise UsageError("unscored can only be given with a minimum quality")
        self._require_ranges()

    @property
    def of_kind(self) -> Kind:
        """The kind of dataset; raises `UsageError` if there is none of this name."""
        from persyn.dataset.kinds import KINDS  # whose kinds read the store with these options

        return KINDS.require(self.kind, "kind of dataset")

    @property
    def filters(self) -> bool:
        """Whether any filter is active, or prompts may be left out for other reasons."""
        not_filters = "kind", "formats", "reasoning", "splits", "pairs", "best"
        plain = ExportOptions(**{name: getattr(self, name) for name in not_filters})
        return self != plain or bool(self.of_kind.losses)

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

    def _require_ranges(self) -> None:
        quality, similarity, margin = self.min_quality, self.near_duplicates, self.min_margin
        if quality is not None and not math.isfinite(quality):
            raise UsageError(f"the minimum quality must be a number, got {quality}")
        if similarity is not None and not 0.5 <= similarity <= 1:
            raise UsageError(f"the similarity of near-duplicates must be 0.5 to 1, got {similarity}")
        if not 0 <= margin < math.inf:
            raise UsageError(f"the minimum margin must be 0 or more, got {margin}")
        for what, count in (("a teacher's cap", self.cap), ("the number of best responses", self.best)):
            if count is not None and count < 1:
                raise UsageError(f"{what} must be 1 or more, got {count}")

    def _require_of_kind(self) -> None:
        """Require formats of the kind, and no option that does not apply to it."""
        kind = self.of_kind
        if not self.formats:
            raise UsageError(f"no format was given; available: {', '.join(kind.formats)}")
        for name in self.formats:
            kind.formats.require(name, "format" if self.kind == "sft" else f"format of the kind {self.kind}")
        for field in structs.fields(self):
            is_given = getattr(self, field.name) != (None if field.name == "formats" else field.default)
            if is_given and field.name not in {"kind", "formats", "splits", *kind.options}:
                raise UsageError(
                    f"{field.name} ({_FLAGS[field.name]}) does not apply to the kind {self.kind}; leave it out"
                )

    def _arguments(self) -> Iterator[str]:
        given: dict[str, Iterable[object]] = {
            "kind": () if self.kind == "sft" else (self.kind,),
            "formats": () if self.formats == tuple(self.of_kind.formats.builtin) else self.formats,
            "reasoning": () if self.reasoning == "field" else (self.reasoning,),
            "splits": (f"{name}={share}" for name, share in self.splits.items()),
            "finish_reasons": self.finish_reasons,
            "min_quality": _if_given(self.min_quality),
            "unscored": _if_given(self.unscored),
            "drop_wrong": [""] if self.drop_wrong else [],
            "benchmarks": (Path(path).name for path in self.benchmarks),
            "near_duplicates": _if_given(self.near_duplicates),
            "cap": _if_given(self.cap),
            "pairs": () if self.pairs == "best-worst" else (self.pairs,),
            "min_margin": _if_given(self.min_margin or None),
            "higher_quality": [""] if self.higher_quality else [],
            "best": _if_given(self.best),
        }
        for name, values in given.items():
            for value in values:
                yield from (_FLAGS[name], str(value)) if value != "" else (_FLAGS[name],)


def _if_given(value: object) -> tuple[object, ...]:
    return () if value is None else (value,)


def _converted(name: str, given: Any, kind: Any) -> Any:
    """A value in the type of its option, such as a tuple for a list; raise `UsageError` where it has another one."""
    try:
        return msgspec.convert(msgspec.to_builtins(given, enc_hook=_plain), kind)
    except (TypeError, ValueError):  # msgspec's ValidationError is a ValueError
        raise UsageError(f"{name} must be {_TYPES[name]}, got {shorten(repr(given))}") from None


def _plain(value: Any) -> Any:
    """A NumPy number as Python's, and a path as text."""
    match value:
        case Integral():
            return int(value)
        case Real():
            return float(value)
    return os.fspath(value)


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
