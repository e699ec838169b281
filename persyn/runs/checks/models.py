"""List the models of a run file with the engine that loads each."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from persyn.config import QualityTable, RouterTable, RunConfig, TeacherTable
from persyn.ingest import versions
from persyn.llm import adapters, engines
from persyn.llm.engines import ENGINES
from persyn.llm.protocols import ModelSpec
from persyn.method.strategies import STRATEGIES
from persyn.runs import run_file


class UsedModel(Struct, frozen=True):
    """A model that a run loads or requests from a server."""

    #: "teacher ada", "the student", "the judge", ...
    whose: str
    #: The model's table in the run file.
    table: str
    spec: ModelSpec


def of(config: RunConfig) -> Iterator[UsedModel]:
    """Every model of a run file that is loaded or requested; fake and imported ones are left out."""
    return (model for model in _all(config) if ENGINES[model.spec.engine].model in ("weights", "server"))


def of_teacher(teacher: TeacherTable) -> ModelSpec:
    """The model of one teacher, as its table names it, with its adapter."""
    spec = ModelSpec(teacher.engine, teacher.model, teacher.revision, teacher.gpus, teacher.options)
    name = adapters.name_of(teacher.adapter, teacher.adapter_revision)
    return msgspec.structs.replace(spec, adapters=[name] if name else [])


def loaded(config: RunConfig) -> list[UsedModel]:
    """The models that are loaded by workers."""
    return [model for model in _all(config) if ENGINES[model.spec.engine].model == "weights"]


def served(config: RunConfig) -> list[UsedModel]:
    """The models that are requested from a server."""
    return [model for model in _all(config) if ENGINES[model.spec.engine].model == "server"]


def count_light(config: RunConfig) -> int:
    """How many models of a run file need neither GPUs nor the CPU for themselves."""
    return sum(engines.is_light(model.spec.engine, model.spec.options) for model in _all(config))


def _all(config: RunConfig) -> Iterator[UsedModel]:
    student = config.student
    if run_file.n_calibration(config) != 0:  # without a grid nothing is scored and no router is fitted
        if student is not None and run_file.scores_learnability(config):
            spec = ModelSpec(student.engine, student.model, student.revision, student.gpus, student.options)
            yield UsedModel("the student", "student", spec)
        table = "quality" if isinstance(config.quality, QualityTable) else "[quality]"
        for scorer in config.scorers:
            yield _quality(scorer, table)
    if STRATEGIES[config.strategy.kind].decided_by == "router" and config.router.fitted is None:
        yield from _router(config.router)
    for teacher in config.teachers:
        yield UsedModel(f"teacher {teacher.name}", "teachers", of_teacher(teacher))


def _router(router: RouterTable) -> Iterator[UsedModel]:
    if router.engine != "router":
        spec = ModelSpec(router.engine, router.backbone, router.revision, router.gpus, router.options)
        yield UsedModel("the router", "router", spec)
        return
    for model, revision in versions.models_of(router):
        spec = ModelSpec("router_fit", model, revision, router.gpus, router.options)
        is_embedding = (model, revision) == (router.embedding, router.embedding_revision)
        yield UsedModel("the router's embedding" if is_embedding else "the router", "router", spec)


def _quality(scorer: QualityTable, table: str) -> UsedModel:
    if ENGINES[scorer.kind].is_nested:
        options = scorer.options.get("options", {})
        spec = ModelSpec(scorer.options["engine"], scorer.model, scorer.revision, scorer.gpus, options)
        return UsedModel("the judge", table, spec)
    spec = ModelSpec(scorer.kind, scorer.model, scorer.revision, scorer.gpus, scorer.options)
    return UsedModel("the quality", table, spec)
