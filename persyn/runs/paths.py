"""Resolve the paths in a run file against its folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from persyn.config import QualityTable, RouterTable, RunConfig, TeacherTable
from persyn.errors import UsageError, shorten
from persyn.llm import engines
from persyn.llm.engines import ENGINES
from persyn.runs import validation


def absolute(config: RunConfig, file: Path) -> RunConfig:
    """A configuration whose paths of existing files are absolute; `file` names it, and is what they are relative to.

    Raises `UsageError` for a path that cannot be looked up.
    """
    prompts = [str(_resolved(each, file, "`prompts.file`")) for each in config.prompts.files]
    scorers = [_absolute_scorer(place, scorer, file) for place, scorer in validation.scorers(config)]
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=prompts),
        student=config.student and replace(config.student, model=_local(config.student.model, file, "`student.model`")),
        quality=scorers if isinstance(config.quality, list) else scorers[0],
        router=_absolute_router(config.router, file),
        teachers=[absolute_teacher(teacher, file) for teacher in config.teachers],
    )


def _absolute_scorer(place: str, scorer: QualityTable, file: Path) -> QualityTable:
    if not engines.loads_weights(scorer.kind, scorer.options):
        return scorer
    key = validation.key({}, f"{place}.model")
    return msgspec.structs.replace(scorer, model=_local(scorer.model, file, key))


def _absolute_router(router: RouterTable, file: Path) -> RouterTable:
    embedding = router.embedding and _local(router.embedding, file, "`router.embedding`")
    backbone = _local(router.backbone, file, "`router.backbone`")
    return msgspec.structs.replace(router, backbone=backbone, embedding=embedding)


def absolute_teacher(teacher: TeacherTable, file: Path) -> TeacherTable:
    """The same for one teacher."""
    if ENGINES[teacher.engine].model in ("server", "field"):  # the model is not a local path
        return teacher
    model = _local(teacher.model, file, f"teacher {teacher.name}: `teachers.model`")
    adapter = teacher.adapter and _local(teacher.adapter, file, f"teacher {teacher.name}: `teachers.adapter`")
    return msgspec.structs.replace(teacher, model=model, adapter=adapter)


def _local(model: str, file: Path, key: str) -> str:
    """Return an existing path as absolute; anything else is a hub id and is returned unchanged."""
    looks_local = model.startswith((".", "/", "~"))
    path = _resolved(model, file, key)
    return str(path) if model and (looks_local or path.is_dir()) else model


def _resolved(name: str, file: Path, key: str) -> Path:
    """The absolute path that a key names, existing or not; raise `UsageError` for an invalid path."""
    try:
        path = (file.absolute().parent / Path(name).expanduser()).resolve()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # too long, or the home of a user who does not exist
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file}: {key} is {shorten(repr(name))}, which cannot be looked up: {why}") from error
    return path
