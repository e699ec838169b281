"""What a dataset is wanted to be: its formats, which rows it leaves out, and its splits."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from persyn.dataset.formats import FORMATS
from persyn.errors import UsageError

#: The split of every prompt that is in no other.
TRAIN = "train"
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,29}")
#: Names that `datasets` keeps for itself: what it means by them.
_RESERVED = {"all": "all splits together"}
#: What a response without a finish reason goes by.
UNKNOWN = "unknown"
#: Those that a response may have anywhere; a server may have words of its own.
FINISH_REASONS = {"stop", "length", UNKNOWN}


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an export, as the command has them and the manifest keeps them.

    Raises `UsageError` for one that makes no sense.
    """

    #: Names of `formats.FORMATS`.
    formats: tuple[str, ...] = tuple(FORMATS)
    #: Split -> its share of the prompts; all others are in `train`.
    splits: dict[str, float] = {}
    #: Only responses that finished so: stop, length, a server's own word, or unknown. Empty is any.
    finish_reasons: tuple[str, ...] = ()
    #: Only responses of at least so much quality, in the unit of the run's quality scorer.
    min_quality: float | None = None
    #: What becomes of responses without a score of it.
    unscored: Literal["keep", "drop"] | None = None
    #: Without responses that are known to be wrong, where the run's quality says right or wrong.
    drop_wrong: bool = False
    #: Files whose texts no row may overlap with.
    benchmarks: tuple[str, ...] = ()
    #: Of prompts at least so alike, 0.5 to 1, the first one stays.
    near_duplicates: float | None = None
    #: At most so many rows of each teacher.
    cap: int | None = None

    def __post_init__(self) -> None:
        _require_formats(self.formats)
        _require_splits(self.splits)
        if self.min_quality is not None and not math.isfinite(self.min_quality):
            raise UsageError(f"the minimum quality must be a number, got {self.min_quality}")
        if self.unscored is not None and self.min_quality is None:
            raise UsageError("what becomes of unscored responses is asked only with a minimum quality")
        if self.near_duplicates is not None and not 0.5 <= self.near_duplicates <= 1:
            raise UsageError(f"the similarity of near-duplicates must be 0.5 to 1, got {self.near_duplicates}")
        if self.cap is not None and self.cap < 1:
            raise UsageError(f"a teacher's cap must be 1 or more, got {self.cap}")

    @property
    def filters(self) -> bool:
        """Whether rows may be left out."""
        plain = Options(formats=self.formats, splits=self.splits)
        return self != plain

    def split_of(self, content_hash: str) -> str:
        """The split of a prompt: the same in every run, however large."""
        digest = hashlib.blake2b(content_hash.encode(), digest_size=8, person=b"persyn split").digest()
        place, end = int.from_bytes(digest, "big") / 2**64, 0.0
        for name, share in self.splits.items():
            end += share
            if place < end:
                return name
        return TRAIN

    def command(self, run: str) -> str:
        """The command that exports so, benchmarks by their files' names."""
        return shlex.join(["persyn", "export", run, *self._arguments()])

    def _arguments(self) -> Iterator[str]:
        given: dict[str, Iterable[object]] = {
            "--format": () if self.formats == tuple(FORMATS) else self.formats,
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


def _require_formats(formats: tuple[str, ...]) -> None:
    known = ", ".join(FORMATS)
    if not formats:
        raise UsageError(f"no format was given; known are: {known}")
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown format {name!r}; known are: {known}")


def _require_splits(splits: dict[str, float]) -> None:
    for name, share in splits.items():
        if not _SPLIT_NAME.fullmatch(name):
            raise UsageError(f"a split is named by lower-case letters, digits and _, like test, got {name!r}")
        if name in _RESERVED:
            raise UsageError(f"a split cannot be named {name}: readers of datasets mean {_RESERVED[name]} by it")
        if name == TRAIN:
            raise UsageError(f"the split {TRAIN} has what the others leave; give those alone, like test=0.05")
        if not 0 < share < 1:
            raise UsageError(f"the share of split {name} must be above 0 and below 1, got {share}")
    if sum(splits.values()) >= 1:
        raise UsageError(f"the splits' shares add up to {sum(splits.values()):g}: nothing is left for {TRAIN}")
