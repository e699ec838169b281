"""Export a run's dataset of any kind: files, a card and a manifest in a folder."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from persyn.atomic import replaced
from persyn.dataset import card, contamination
from persyn.dataset.contamination import Benchmark
from persyn.dataset.filters import AssignedRow, Drop
from persyn.dataset.formats import Format, Write, jsonl
from persyn.dataset.manifest import (
    CARD,
    DATASET_INFO,
    DROPPED,
    MANIFEST,
    BenchmarkCount,
    File,
    Manifest,
    RouterVersion,
    StudentVersion,
    TeacherCount,
    files_of,
    options_of,
)
from persyn.dataset.options import TRAIN, ExportOptions
from persyn.dataset.source import Dropped, Snapshot
from persyn.dataset.usage import entry_name
from persyn.db import lookup
from persyn.db.catalog import Run, RunState, Student
from persyn.db.connect import Database
from persyn.db.results import NO_TEXT, Router
from persyn.errors import PersynError, UsageError
from persyn.runs import extension
from persyn.stages import outcomes, recalibrations, verdict


def write(
    database: Database,
    run_id: int,
    folder: Path,
    options: ExportOptions | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a run's dataset, ordered by prompt, and return its manifest.

    progress: called from time to time with the number of units (assignments, or prompts) processed.
    The folder appears atomically; an earlier dataset in its place is replaced. Raises `UsageError` for an unknown run,
    a run without responses, a dataset without rows, unscored responses that the options do not cover, an unreadable
    benchmark, and a folder that contains anything other than an earlier dataset of the kind; `PersynError` when the
    files cannot be written.
    """
    options = options or ExportOptions()
    folder = folder.resolve()
    _require_replaceable(folder, options.kind)
    found = _benchmarks(options)
    try:
        with database.read() as session, replaced(folder) as new:
            return _Export(session, run_id, options, found, progress or (lambda n: None)).write(new)
    except OSError as error:
        raise PersynError(
            f"cannot write the dataset {folder}: {error.strerror or error}; nothing was changed"
        ) from error


def preview(
    database: Database, run_id: int, options: ExportOptions, *, progress: Callable[[int], None] | None = None
) -> Manifest:
    """The manifest of the dataset that `write` would write, without its files; raises `UsageError` like `write`."""
    found = _benchmarks(options)
    with database.read() as session:
        return _Export(session, run_id, options, found, progress or (lambda n: None)).count()


def training_rows(session: Session, run_id: int, options: ExportOptions) -> Generator[AssignedRow]:
    """Yield the rows that `write` would put into the split `train`, in the same order.

    Raises `UsageError` like `write`, and for a dataset of another kind than `sft`.
    """
    if options.kind != "sft":
        raise UsageError(f"a dataset of the kind {options.kind} has no responses to train on; export the kind sft")
    whole = _Export(session, run_id, options, _benchmarks(options))
    with closing(whole.rows()) as rows:
        yield from (row for row in rows if options.split_of(row.content_hash) == TRAIN)


def examples(session: Session, run_id: int, options: ExportOptions) -> Generator[tuple[str, Any]]:
    """The rows that `write` would write into a Parquet file, in its order, each with its split; may be empty.

    Raises `UsageError` as it does.
    """
    whole = _Export(session, run_id, options, _benchmarks(options))
    with closing(whole.rows()) as rows:
        for row in rows:
            yield options.split_of(row.content_hash), whole.source.example(row, inline=options.reasoning == "inline")


def default_folder(home: Path, run: str, kind: str) -> Path:
    """Where a run's dataset of a kind is; no name of a run makes two of them the same."""
    return home / ("datasets" if kind == "sft" else f"datasets-{kind}") / run


def _require_replaceable(folder: Path, kind: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the name of a folder")
    there = folder / MANIFEST
    strangers = {path.name for path in folder.iterdir()} - (files_of(there.read_bytes()) if there.is_file() else set())
    if strangers:
        raise UsageError(
            f"{folder} contains {min(strangers)!r}, which is not part of an earlier dataset; give another folder"
        )
    if there.is_file() and (earlier := options_of(folder)) is not None and earlier.kind != kind:
        raise UsageError(f"{folder} contains a dataset of the kind {earlier.kind}, not {kind}; give another folder")


def _benchmarks(options: ExportOptions) -> list[Benchmark]:
    names = [Path(path).name for path in options.benchmarks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two benchmarks are named {twice[0]}, but the dataset lists them by file name; rename one")
    return [contamination.read(Path(path)) for path in options.benchmarks]


class _Export:
    """One export within one snapshot of the store."""

    def __init__(
        self,
        session: Session,
        run_id: int,
        options: ExportOptions,
        found: Sequence[Benchmark],
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        run = session.get(Run, run_id)
        if run is None:
            raise UsageError(f"there is no run {run_id}")
        self._session, self._run, self._options, self._benchmarks = session, run, options, found
        self.source = options.of_kind.source(Snapshot(session, run, options, found, progress))
        self._names = {teacher.id: teacher.name for teacher in lookup.teachers(session, run.id)}
        self._formats = self.source.tools.formats(options.formats, options.of_kind.formats)
        inlines = any(map(options.inlines, self._formats.values()))
        self.source.counts.inlines = self.source.has_reasoning and inlines

    def count(self) -> Manifest:
        """Count rows without writing files."""
        with closing(self.rows()) as rows:
            for row in rows:
                self.source.count(row, self._options.split_of(row.content_hash))
        return self._manifest([], [])

    def write(self, folder: Path) -> Manifest:
        """Write the files into an empty folder."""
        with ExitStack() as stack:
            writers: dict[str, list[tuple[bool, Write]]] = {
                split: [
                    (
                        self._options.inlines(form),
                        stack.enter_context(form.open(folder / self._file_name(form, split))),
                    )
                    for form in self._formats.values()
                ]
                for split in self._splits
            }
            dropped = stack.enter_context(jsonl(folder / DROPPED, self._dropped)) if self._options.filters else _ignore
            # Entered last, so that a writer's error closes the database cursor first.
            rows = stack.enter_context(closing(self.rows(lambda drop, row: dropped((drop, row)))))
            for row in rows:
                split = self._options.split_of(row.content_hash)
                self.source.count(row, split)
                inlined = {each for each, _ in writers[split]}
                examples = {inline: self.source.example(row, inline=inline) for inline in inlined}
                for inline, add in writers[split]:
                    add(examples[inline])
        return self._finish(folder)

    def rows(self, dropped: Dropped = lambda drop, row: None) -> Generator[Any]:
        """Yield the dataset's rows in prompt order."""
        return self.source.rows(dropped)

    @property
    def _splits(self) -> list[str]:
        return [TRAIN, *self._options.splits]

    def _file_name(self, form: Format, split: str) -> str:
        return form.file_of(split if self._options.splits else None)

    def _finish(self, folder: Path) -> Manifest:
        files = []
        for split in self._splits:
            for name, form in self._formats.items():
                path = folder / self._file_name(form, split)
                if rows := self.source.counts.splits[split]:
                    files.append(_file(path, name, split, rows))
                else:  # JSON readers reject files without rows
                    path.unlink()
        entries = {file.format: entry for file in files if (entry := self._llama_factory(self._formats[file.format]))}
        others = [CARD, *([DATASET_INFO] if entries else []), *([DROPPED] if self._options.filters else [])]
        manifest = self._manifest(files, others)
        if entries:
            entries = {
                entry_name(manifest, file): {"file_name": file.name, **entries[file.format]}
                for file in files
                if file.format in entries
            }
            _write_json(folder / DATASET_INFO, entries)
        _write_bytes(folder / CARD, card.render(manifest).encode())
        _write_json(folder / MANIFEST, manifest)
        return manifest

    def _llama_factory(self, form: Format) -> dict[str, Any] | None:
        """A format's entry for LLaMA-Factory, which reads no field of reasoning and would silently leave it out."""
        if self.source.has_reasoning and self._options.has_reasoning_field(form):
            return None
        return form.described(has_tools=self.source.tools.found).llama_factory

    def _manifest(self, files: list[File], others: list[str]) -> Manifest:
        tally, run = self.source.counts, self._run
        manifest = Manifest(
            run=run.name,
            finished_at=run.finished_at if run.state is RunState.DONE else None,
            config_hash=run.config_hash,
            config=run.config,
            export=self._options,
            assigned=tally.assigned,
            exported=tally.splits.total(),
            truncated=tally.truncated.total(),
            wrong=tally.wrong if self.source.is_verdict else None,
            reasoning=tally.reasoning if self.source.has_reasoning else None,
            ambiguous=tally.ambiguous,
            domains=dict(sorted(tally.domains.items())),
            dropped=tally.dropped_by(self._options),
            failed=dict(sorted(tally.failed.items())),
            missing=tally.missing,
            rejected=tally.rejected,
            splits={split: tally.splits[split] for split in self._splits},
            benchmarks=[
                BenchmarkCount(each.name, each.sha256, each.rows, tally.contaminated[each.name])
                for each in self._benchmarks
            ],
            teachers=[
                TeacherCount(
                    each.name,
                    each.fingerprint,
                    each.model,
                    each.revision,
                    each.license,
                    tally.exported[each.id],
                    tally.truncated[each.id],
                )
                for each in lookup.teachers(self._session, run.id)
            ],
            student=_student(self._session, run),
            router=_router(self._session, run),
            engines=dict(sorted(tally.engines.items())),
            files=files,
            others=others,
            versions={
                "python": platform.python_version(),
                **{package: version(package) for package in ("persyn", "msgspec", "pyarrow", "sqlalchemy", "rensa")},
            },
            tools=self.source.tools.found,
            used=tally.used,
            holdout=tally.holdout,
            extensions=extension.of_run(self._session, run),
            recalibrations=recalibrations.of_run(self._session, run),
        )
        self._require_whole(manifest)
        return manifest

    def _require_whole(self, manifest: Manifest) -> None:
        """Require that rows are left, and that every unit is accounted for, compared with a separate count."""
        given, unit = self.source.expected(), self._options.of_kind.unit
        if given != manifest.assigned:
            what = "assignments" if self._options.kind == "sft" else unit
            raise PersynError(f"expected {given:,} {what}, found {manifest.assigned:,}; 'persyn audit' may explain it")
        if manifest.exported:
            return
        dropped = ", ".join(f"{name} {count:,}" for name, count in manifest.dropped.items() if count)
        if self._options.kind != "sft":
            why = f": {dropped}" if dropped else ""
            raise UsageError(f"run {manifest.run} has nothing to export as {self._options.kind}: {given:,} {unit}{why}")
        raise UsageError(
            f"run {manifest.run} has no responses to export: {manifest.assigned:,} assignments, "
            + (f"{manifest.rejected:,} of them without a correct response, " if manifest.rejected else "")
            + (f"and the filters dropped all answered ones: {dropped}" if dropped else "none answered")
            + (f"; {manifest.failed[NO_TEXT]:,} were imported as scores only" if NO_TEXT in manifest.failed else "")
        )

    def _dropped(self, drop_and_row: tuple[Drop, AssignedRow]) -> dict[str, Any]:
        """A line of what was left out: a response, or, with an empty teacher, a prompt of the grid."""
        drop, row = drop_and_row
        teacher_id = getattr(row, "teacher_id", None)
        return {
            "prompt_id": row.prompt_id,
            "source": row.source,
            "source_id": row.source_id or "",
            **(
                {}
                if self._options.kind == "sft"
                else {"teacher": "" if teacher_id is None else self._names[teacher_id]}
            ),
            "filter": drop.filter,
            "found": drop.found,
        }


def _student(session: Session, run: Run) -> StudentVersion | None:
    if run.student_id is None:
        return None
    student = session.get_one(Student, run.student_id)
    return StudentVersion(student.name, student.model, student.revision)


def _router(session: Session, run: Run) -> RouterVersion | None:
    """The router that chose the teachers; None if there is none, and if it was not used."""
    decided, within = verdict.decision(session, run), outcomes.of_run(session, run)
    is_used = any(each.slope for each in within) if within else decided is None or decided.routes
    if run.router_id is None or not is_used:
        return None
    router = session.get_one(Router, run.router_id)
    return RouterVersion(router.backbone, router.revision, router.fingerprint, router.sha256, router.kind)


def _ignore(drop_and_row: tuple[Drop, AssignedRow]) -> None:
    """Discard nothing: without filters no row is dropped."""


def _file(path: Path, name: str, split: str, rows: int) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(path.name, name, split, rows, os.fstat(file.fileno()).st_size, digest)


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
