"""Export a run's dataset: each prompt with its assigned teacher's response, in a folder with a manifest."""

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
from sqlalchemy import Result, and_, func, select
from sqlalchemy.orm import Session

from persyn.atomic import replaced
from persyn.config import load_config
from persyn.dataset import card, contamination, tool_use
from persyn.dataset.contamination import Benchmark
from persyn.dataset.filters import AssignedRow, Caps, Drop, Filters
from persyn.dataset.formats import FORMATS, PARQUET, Example, Format, Write, domain_of, inlined, jsonl
from persyn.dataset.manifest import (
    CARD,
    DATASET_INFO,
    DROPPED,
    MANIFEST,
    BenchmarkCount,
    ExportCounts,
    File,
    Manifest,
    RouterVersion,
    StudentVersion,
    TeacherCount,
    files_of,
)
from persyn.dataset.options import FINISH_REASONS, TRAIN, ExportOptions
from persyn.dataset.verdicts import known_wrong
from persyn.db import lookup
from persyn.db.catalog import Prompt, Run, RunState, Student, Teacher
from persyn.db.connect import Database
from persyn.db.results import Assignment, Response, Router, Score
from persyn.errors import PersynError, UsageError
from persyn.stages import verdict
from persyn.stages.batch import TURNS, conversation, response_turn

#: Rows between two progress reports.
_REPORT_ROWS = 1_000


def write(
    database: Database,
    run_id: int,
    folder: Path,
    options: ExportOptions | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a run's dataset, ordered by prompt, and return its manifest.

    progress: called from time to time with the number of assignments processed.
    The folder appears atomically; an earlier dataset in its place is replaced. Raises `UsageError` for an unknown run,
    a run without responses, a dataset without rows, unscored responses that the options do not cover, an unreadable
    benchmark, and a folder that contains anything other than an earlier dataset; `PersynError` when the files cannot be
    written.
    """
    options = options or ExportOptions()
    folder = folder.resolve()
    _require_replaceable(folder)
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

    Raises `UsageError` like `write`.
    """
    whole = _Export(session, run_id, options, _benchmarks(options), lambda n: None)
    with closing(whole.rows(lambda drop, row: None)) as rows:
        yield from (row for row in rows if options.split_of(row.content_hash) == TRAIN)


def examples(session: Session, run_id: int, options: ExportOptions) -> Generator[tuple[str, Example]]:
    """The rows that `write` would write into a Parquet file, in its order, each with its split; may be empty.

    Raises `UsageError` as it does.
    """
    whole = _Export(session, run_id, options, _benchmarks(options), lambda n: None)
    with closing(whole.rows(lambda drop, row: None)) as rows:
        for row in rows:
            inline = options.inlines(FORMATS[PARQUET])
            yield options.split_of(row.content_hash), whole.example(row, inline=inline)


def _require_replaceable(folder: Path) -> None:
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
        progress: Callable[[int], None],
    ) -> None:
        run = session.get(Run, run_id)
        if run is None:
            raise UsageError(f"there is no run {run_id}")
        self._session, self._run, self._options, self._benchmarks = session, run, options, found
        self._progress = progress
        self._teachers = _teachers(session, run_id)
        self._known_wrong = known_wrong(session, run)
        self._generation = load_config(run.config).generation
        self._tools = tool_use.of_run(session, run, has_reasoning=options.reasoning != "drop")
        self._has_reasoning = _has_reasoning(session, run)
        inlines = self._has_reasoning and any(map(options.inlines, self._formats.values()))
        self._tally = ExportCounts(inlines=inlines)

    def count(self) -> Manifest:
        """Count rows without writing files."""
        with closing(self.rows(lambda drop, row: None)) as rows:
            for row in rows:
                self._tally.export(row, self._options.split_of(row.content_hash))
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
            dropped = stack.enter_context(jsonl(folder / DROPPED, _dropped)) if self._options.filters else _ignore
            # Entered last, so that a writer's error closes the database cursor first.
            rows = stack.enter_context(closing(self.rows(lambda drop, row: dropped((drop, row)))))
            for row in rows:
                split = self._options.split_of(row.content_hash)
                self._tally.export(row, split)
                examples = {inline: self.example(row, inline=inline) for inline in {each for each, _ in writers[split]}}
                for inline, add in writers[split]:
                    add(examples[inline])
        return self._finish(folder)

    def example(self, row: AssignedRow, *, inline: bool) -> Example:
        """A row as formats write it; inline: with the reasoning in the text of the response."""
        is_dropped = self._options.reasoning == "drop"
        response = response_turn(inlined(row.response, row.reasoning) if inline else row.response, row.tool_calls)
        if self._has_reasoning and not inline and not is_dropped:
            response["reasoning_content"] = row.reasoning or ""
        prompt = row.source_id or row.content_hash
        return Example(
            id=f"{prompt}#{row.sample}" if self._generation.rows > 1 else prompt,
            prompt_id=row.prompt_id,
            sample=row.sample,
            messages=[*conversation(row), response],
            reasoning=None if is_dropped else row.reasoning,
            answer=row.answer,
            source=row.source,
            source_id=row.source_id,
            domain=domain_of(row.meta),
            meta=row.meta,
            teacher=self._teachers[row.teacher_id].name,
            teacher_fingerprint=self._teachers[row.teacher_id].fingerprint,
            finish_reason=row.finish_reason,
            reason=row.reason,
            margin=row.margin,
            response_tokens=row.response_tokens,
            reasoning_tokens=row.reasoning_tokens,
            quality=row.quality,
            tools=(row.tools or []) if self._tools.found else None,
        )

    def rows(self, dropped: Callable[[Drop, AssignedRow], object]) -> Generator[AssignedRow]:
        """Yield the dataset's rows in prompt order; count the others by reason."""
        _require_known(self._session, self._run, self._options)
        _require_decided(self._session, self._run, self._options)
        if self._options.drop_wrong and self._known_wrong is None:
            raise UsageError(
                f"quality {load_config(self._run.config).quality.kind!r} of run {self._run.name} does not say which "
                "responses are wrong; set a minimum quality instead"
            )
        caps = self._caps()
        filters = Filters(self._options, self._benchmarks)
        with assigned(self._session, self._run) as rows:
            for number, row in enumerate(rows):
                if number % _REPORT_ROWS == 0:
                    self._progress(number)
                if not self._tally.has_text(row):
                    continue
                if drop := filters.drop(row) or (caps.drop(row) if caps else None):
                    self._tally.dropped[drop.filter] += 1
                    if drop.filter == "contaminated":
                        self._tally.contaminated[drop.found] += 1
                    dropped(drop, row)
                else:
                    yield row

    def _caps(self) -> Caps | None:
        """Read all rows once, through the same filters that the export applies afterwards."""
        if self._options.cap is None:
            return None
        filters = Filters(self._options, self._benchmarks)
        with assigned(self._session, self._run) as rows:
            left = (row for row in rows if row.response is not None and filters.drop(row) is None)
            return Caps(left, cap=self._options.cap, seed=self._run.seed)

    @property
    def _formats(self) -> dict[str, Format]:
        return {name: FORMATS[name] for name in self._tools.formats(self._options.formats)}

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
                if rows := self._tally.splits[split]:
                    files.append(_file(path, name, split, rows))
                else:  # JSON readers reject files without rows
                    path.unlink()
        entries = {
            _entry_name(self._run.name, file): {"file_name": file.name, **entry}
            for file in files
            if (entry := self._llama_factory(FORMATS[file.format]))
        }
        others = [CARD, *([DATASET_INFO] if entries else []), *([DROPPED] if self._options.filters else [])]
        manifest = self._manifest(files, others)
        if entries:
            _write_json(folder / DATASET_INFO, entries)
        _write_bytes(folder / CARD, card.render(manifest).encode())
        _write_json(folder / MANIFEST, manifest)
        return manifest

    def _llama_factory(self, form: Format) -> dict[str, Any] | None:
        """A format's entry for LLaMA-Factory, which reads no field of reasoning and would silently leave it out."""
        if self._has_reasoning and self._options.has_reasoning_field(form):
            return None
        return form.described(has_tools=self._tools.found).llama_factory

    def _manifest(self, files: list[File], others: list[str]) -> Manifest:
        tally, run = self._tally, self._run
        manifest = Manifest(
            run=run.name,
            finished_at=run.finished_at if run.state is RunState.DONE else None,
            config_hash=run.config_hash,
            config=run.config,
            export=self._options,
            assigned=tally.assigned,
            exported=tally.exported.total(),
            truncated=tally.truncated.total(),
            wrong=None if self._known_wrong is None else tally.wrong,
            reasoning=tally.reasoning if self._has_reasoning else None,
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
                for each in self._teachers.values()
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
            tools=self._tools.found,
        )
        self._require_whole(manifest)
        return manifest

    def _require_whole(self, manifest: Manifest) -> None:
        """Require that rows are left, and that every assignment is accounted for, compared with a separate count."""
        counted = select(func.count()).select_from(Assignment).where(Assignment.run_id == self._run.id)
        given = self._session.scalars(counted).one() * self._generation.rows
        if given != manifest.assigned:
            raise PersynError(
                f"expected {given:,} assignments, found {manifest.assigned:,}; 'persyn audit' may explain it"
            )
        if not manifest.exported:
            dropped = ", ".join(f"{name} {count:,}" for name, count in manifest.dropped.items() if count)
            raise UsageError(
                f"run {manifest.run} has no responses to export: {manifest.assigned:,} assignments, "
                + (f"{manifest.rejected:,} of them without a correct response, " if manifest.rejected else "")
                + (f"and the filters dropped all answered ones: {dropped}" if dropped else "none answered")
            )


def _require_decided(session: Session, run: Run, options: ExportOptions) -> None:
    """Require an option for unscored responses, if there are any."""
    if options.min_quality is None or options.unscored is not None:
        return
    n_rows, n_scored = session.execute(
        select(func.count(), func.count(Score.value))
        .select_from(Assignment)
        .join(Response, lookup.in_dataset(run))
        .outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id))
        .where(Assignment.run_id == run.id, Response.text.is_not(None))
    ).one()
    if n_scored < n_rows:
        raise UsageError(
            f"{n_rows - n_scored:,} of the {n_rows:,} responses have no quality: a run scores its calibration prompts, "
            "the others have scores only if these were imported with the responses; with a minimum quality, set "
            "unscored to 'keep' or 'drop'"
        )


def _require_known(session: Session, run: Run, options: ExportOptions) -> None:
    """Raise `UsageError` for a finish reason that no response has, since a misspelt one would drop every row."""
    if set(options.finish_reasons) <= FINISH_REASONS:
        return
    found = session.scalars(
        select(Response.finish_reason)
        .join(Assignment, lookup.in_dataset(run))
        .where(Assignment.run_id == run.id, Response.finish_reason.is_not(None))
        .distinct()
    )
    known = FINISH_REASONS | {reason for reason in found if reason}
    if unknown := set(options.finish_reasons) - known:
        raise UsageError(f"unknown finish reason {min(unknown)!r}; known: {', '.join(sorted(known))}")


def _has_reasoning(session: Session, run: Run) -> bool:
    """Whether any response in the dataset has reasoning; it decides the keys of all rows, whatever is filtered out."""
    has_reasoning = Response.text.is_not(None), Response.reasoning.is_not(None)
    found = select(Response.id).join(Assignment, lookup.in_dataset(run))
    return session.execute(found.where(Assignment.run_id == run.id, *has_reasoning).limit(1)).first() is not None


def _teachers(session: Session, run_id: int) -> dict[int, Teacher]:
    """A run's teachers by id, in head order."""
    return {teacher.id: teacher for teacher in lookup.teachers(session, run_id)}


def _student(session: Session, run: Run) -> StudentVersion:
    student = session.get_one(Student, run.student_id)
    return StudentVersion(student.name, student.model, student.revision)


def _router(session: Session, run: Run) -> RouterVersion | None:
    """The router that chose the teachers; None if there is none, and if the verdict was not to use it."""
    decided = verdict.decision(session, run)
    if run.router_id is None or (decided is not None and not decided.routes):
        return None
    router = session.get_one(Router, run.router_id)
    return RouterVersion(router.backbone, router.revision, router.fingerprint, router.sha256, router.kind)


def assigned(session: Session, run: Run) -> Result[Any]:
    """Select a run's assignments in prompt order, with prompts and responses where they exist.

    A row for each response that the dataset should have: one per assignment, or every sample.

    The result is streamed from the server; use it as a context manager.
    """
    query = lookup.with_rows(
        select(
            Assignment.prompt_id,
            Assignment.teacher_id,
            Assignment.rejected,
            Assignment.reason,
            Assignment.margin,
            Prompt.content_hash,
            *TURNS,
            Prompt.tools,
            Prompt.answer,
            Prompt.source,
            Prompt.source_id,
            Prompt.meta,
            Response.id.label("response_id"),
            Response.text.label("response"),
            Response.reasoning,
            Response.tool_calls,
            Response.failure,
            Response.finish_reason,
            Response.response_tokens,
            Response.reasoning_tokens,
            Response.engine,
            Score.value.label("quality"),
        )
        .select_from(Assignment)
        .join(Prompt, Prompt.id == Assignment.prompt_id),
        run,
    )
    return session.execute(
        query.outerjoin(Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id))
        .where(Assignment.run_id == run.id)
        .order_by(Assignment.prompt_id, Response.sample),
        execution_options={"yield_per": 1_000},
    )


def _dropped(drop_and_row: tuple[Drop, AssignedRow]) -> dict[str, Any]:
    drop, row = drop_and_row
    return {
        "prompt_id": row.prompt_id,
        "source": row.source,
        "source_id": row.source_id or "",
        "filter": drop.filter,
        "found": drop.found,
    }


def _ignore(drop_and_row: tuple[Drop, AssignedRow]) -> None:
    """Discard nothing: without filters no row is dropped."""


def _file(path: Path, name: str, split: str, rows: int) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(path.name, name, split, rows, os.fstat(file.fileno()).st_size, digest)


def _entry_name(run: str, file: File) -> str:
    """The name of a file's entry in LLaMA-Factory: run and format, and the split unless it is train."""
    return "_".join([run, file.format, *([file.split] if file.split != TRAIN else [])])


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
