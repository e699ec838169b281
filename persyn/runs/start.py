"""Create a run from a run file, and find an existing run by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec.structs import replace
from sqlalchemy import and_, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from persyn.config import IMPORTED, RouterTable, RunConfig, TeacherTable, fingerprint_of, load_config
from persyn.db import lookup
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Scorer, Student, Teacher
from persyn.db.results import NO_TEXT, Origin, Response, Score
from persyn.db.text import reason
from persyn.errors import UsageError
from persyn.ingest import prompt_table, versions
from persyn.ingest.versions import Identities
from persyn.llm import transport
from persyn.llm.engines import ENGINES
from persyn.method.strategies import STRATEGIES
from persyn.runs import fitted_router, prices, run_file, same_run


def find(session: Session, config: RunConfig) -> Run | None:
    """The run of this name, if it exists; raise `UsageError` when it was started from another configuration.

    Paths of prompts and models, and what only describes a teacher, may differ; see `same_run`.
    """
    run = session.scalars(select(Run).where(Run.name == config.run.name)).one_or_none()
    if run is None:
        return None
    lookup.require_whole(run)
    was = load_config(run.config)
    # A version, or a kind of router, that the file does not name is the one that the run was started with.
    config = _pinned(config, was.strategy.revision, was.router)
    same_run.require(session, run, _decided(config, was.strategy.when_unsure))
    return run


def identities(config: RunConfig) -> Identities:
    """The identities of a run's models; see `versions.identities`."""
    router = config.router if _reads_prompts(config) else None
    return versions.identities(config.teachers, config.student, config.quality, config.strategy, router)


def _reads_prompts(config: RunConfig) -> bool:
    """Whether the run loads a backbone to fit a router."""
    own = config.router
    return STRATEGIES[config.strategy.kind].decided_by == "router" and own.engine == "router" and own.fitted is None


def require_imported(session: Session, config: RunConfig) -> None:
    """Raise `UsageError` for an imported teacher without responses, and for an imported quality without scores."""
    for table in config.teachers:
        if table.engine != IMPORTED:
            continue
        imported = select(Response.id).join(Teacher).where(Teacher.engine == IMPORTED, Teacher.model == table.model)
        if session.scalars(imported.where(Response.origin == Origin.IMPORTED).limit(1)).one_or_none() is None:
            raise UsageError(
                f"no response of teacher {table.model!r} was imported; 'persyn teachers list' lists imported teachers, "
                "and an imported teacher's model is its name in the imported rows"
            )
    for scorer in config.scorers:
        if scorer.kind == IMPORTED:
            _require_scores(session, scorer.model)


def require_schemas(session: Session, run: Run) -> None:
    """Raise `UsageError` for a teacher that should hold to a JSON schema on an engine that cannot.

    The run's prompts must be there.
    """
    able = {name for name, kind in ENGINES.items() if kind.holds_to_schema} | {IMPORTED}
    unable = [teacher for teacher in lookup.teachers(session, run.id) if teacher.engine not in able]
    if not unable:
        return
    advice = f"engines that can: {', '.join(sorted(able - {IMPORTED}))}"
    for teacher in unable:
        if teacher.response_schema is not None:
            raise UsageError(
                f"teacher {teacher.name!r} has a response_schema, but engine {teacher.engine!r} cannot hold a response "
                f"to one; {advice}"
            )
    of_run = select(func.count()).select_from(Prompt).join(RunPrompt).where(RunPrompt.run_id == run.id)
    if count := session.scalars(of_run.where(Prompt.response_schema.is_not(None))).one():
        raise UsageError(
            f"{count:,} prompts have a response_schema, but teacher {unable[0].name!r} has engine "
            f"{unable[0].engine!r}, which cannot hold a response to one; {advice}"
        )


def require_texts(session: Session, run: Run) -> None:
    """Raise `UsageError` where learnability counts and the grid has responses of which only scores are known.

    The run's prompts must be there.
    """
    alpha = load_config(run.config).run.alpha
    if alpha == 0:
        return
    grid = (
        select(func.count())
        .select_from(RunPrompt)
        .join(Response, Response.prompt_id == RunPrompt.prompt_id)
        .join(RunTeacher, and_(RunTeacher.run_id == run.id, RunTeacher.teacher_id == Response.teacher_id))
        .where(RunPrompt.run_id == run.id, RunPrompt.role != Role.TARGET, reason(Response.failure) == NO_TEXT)
    )
    if count := session.scalars(grid).one():
        raise UsageError(
            f"{count:,} responses to calibration prompts were imported as scores only, and have no text to compute "
            f"learnability on; set alpha = 0 in [run] (it is {alpha:g}), or import their texts"
        )


def _require_scores(session: Session, field: str) -> None:
    """Raise `UsageError` when no score was imported from a field of this name."""
    has_values = select(Score.response_id).where(Score.scorer_id == Scorer.id, Score.value.is_not(None)).exists()
    imported = select(Scorer.model).where(Scorer.kind == IMPORTED, has_values).order_by(Scorer.model)
    if session.scalars(imported.where(Scorer.model == field)).first() is None:
        known = session.scalars(imported).all()
        raise UsageError(
            f"no score {field!r} was imported; available: {', '.join(known) or 'none'}. "
            "'persyn responses import --score NAME' imports it from that field, also for rows that are already stored"
        )


def create(session: Session, config: RunConfig, known: Identities, *, stage: str) -> Run:
    """Register a run and its models, without prompts."""
    prompt_table.lock(session)  # before any other lock, in the same order as every import
    student = None if config.student is None else versions.student(session, config.student, known)
    own = config.strategy
    function = known[own.model, own.revision].revision if own.model else None
    router = fitted_router.table(session, config.router)
    config = _pinned(config, function, _with_versions(replace(config, router=router), known))
    config = _decided(config, "static" if STRATEGIES[own.kind].decided_by == "router" else None)
    config = _watched(config)
    contents = [same_run.sha256(Path(file)) for file in config.prompts.files]
    config = replace(config, prompts=replace(config.prompts, sha256=contents))
    run = Run(
        name=config.run.name,
        stage=stage,
        config=config.frozen(),
        config_hash=config.digest(),
        seed=config.run.seed,
        student_id=None if student is None else student.id,
        quality_scorer_id=_quality(session, config, known),
        learnability_scorer_id=_learnability(session, config, student),
    )
    session.add(run)
    write_name(session, run)
    _require_distinct(config, known)
    teacher_ids = [versions.teacher(session, table, known) for table in config.teachers]
    for position, teacher_id in enumerate(teacher_ids):
        session.add(RunTeacher(run_id=run.id, position=position, teacher_id=teacher_id))
    session.flush()
    fitted_router.use(session, run)
    prices.note(session, run, config, teacher_ids)
    return run


def write_name(session: Session, run: Run) -> None:
    """Write a run with its name; raise `UsageError` if another process has just given the name to another run."""
    name = run.name
    try:
        session.flush()
    except IntegrityError as error:
        raise taken(name) from error


def taken(name: str) -> UsageError:
    """The error for a name that another run has."""
    return UsageError(f"there is a run named {name!r} already; 'persyn run list' lists the runs")


def _quality(session: Session, config: RunConfig, known: Identities) -> int:
    """The id of the scorer whose scores are the quality."""
    if isinstance(config.quality, list):
        return versions.combined(session, config.quality, known)
    return versions.quality(session, config.quality, known)


def _learnability(session: Session, config: RunConfig, student: Student | None) -> int | None:
    """The id of the student's scorer; None for a run that needs no learnability."""
    if student is None or config.student is None or not run_file.scores_learnability(config):
        return None
    return versions.learnability(session, student, config.student, config.run.learnability)


def _require_distinct(config: RunConfig, known: Identities) -> None:
    """Raise `UsageError` for two teachers that are identical except for their names and transport."""
    named: dict[str, TeacherTable] = {}
    for table in config.teachers:
        other = named.setdefault(fingerprint_of(versions.teacher_identity(table, known)), table)
        if other is not table:
            raise UsageError(
                f"teachers {other.name!r} and {table.name!r} are the same teacher: the same model "
                f"{table.model!r}, with the same options and prompts; {_way_out(other, table)}"
            )


def _way_out(one: TeacherTable, other: TeacherTable) -> str:
    """What to do about two equal teachers."""
    kind = ENGINES[one.engine]
    if kind.model == "server" and transport.of(one.engine, one.options) != transport.of(other.engine, other.options):
        return (
            "if their servers have different models under this name, give each teacher a revision (any text); if they "
            "have the same model, keep one teacher, with a list of both addresses as its base_url"
        )
    return "remove one of them, or change its system turn, sampling or options"


def _with_versions(config: RunConfig, known: Identities) -> RouterTable:
    """The table of the router with its kind, and the versions of the models that it reads."""
    router = replace(config.router, kind=config.router.chosen_kind)
    if not _reads_prompts(config):
        return router
    found = {model: known[model].revision for model in versions.models_of(router)}
    return replace(
        router,
        version=found.get((router.backbone, router.revision)),
        embedding_version=found.get((router.embedding or "", router.embedding_revision)),
    )


def _pinned(config: RunConfig, function: str | None, given: RouterTable) -> RunConfig:
    """Fill in the version of the strategy's function, and the router's kind and versions, where the file has none.

    given: the table of the router with these values.
    """
    own, router = config.strategy, config.router
    if router.fitted is not None and router.fitted == given.fitted:
        router = replace(given, gpus=router.gpus, options=router.options)
    return replace(
        config,
        strategy=replace(own, revision=own.revision or function),
        router=replace(
            router,
            kind=router.kind or given.kind,
            version=router.version or given.version,
            embedding_version=router.embedding_version or given.embedding_version,
        ),
    )


def _decided(config: RunConfig, when_unsure: Literal["static", "route"] | None) -> RunConfig:
    """Fill in what an unsure run does, where the file does not say it: a version without verdicts always routed."""
    own = config.strategy
    return replace(config, strategy=replace(own, when_unsure=own.when_unsure or when_unsure))


def _watched(config: RunConfig) -> RunConfig:
    """Fill in what a new run does about a teacher that becomes worse, where the file does not say it."""
    own = config.generation
    is_watched = own.check and not own.is_choice
    return replace(config, generation=replace(own, when_worse=own.when_worse or "stop")) if is_watched else config
