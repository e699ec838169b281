"""Plan a pilot: the students to train on a run's calibration responses, and the definitions of the reward to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from persyn.config import UnitInterval, load_config
from persyn.dataset.verdicts import known_wrong
from persyn.db import grid, lookup
from persyn.db.catalog import Run
from persyn.errors import UsageError
from persyn.llm.engines import ENGINES
from persyn.llm.identity import hub_revision
from persyn.llm.options import FORM_OPTIONS
from persyn.llm.protocols import ModelSpec
from persyn.method import rewards
from persyn.method.combined_quality import WRONG
from persyn.method.learnability import LEARNABILITIES
from persyn.method.rewards import Indices, Matrix
from persyn.runs import scheduling
from persyn.stages import registry
from persyn.student.training_settings import TrainingSettings

_AtLeastOne = Annotated[int, Meta(ge=1)]
By: TypeAlias = Literal["quality", "likelihood"]

#: Prompts with an answer of every teacher that a pilot needs at least.
LEAST_PROMPTS = 12
#: At most this share of the prompts is asked, and not learned from.
_ASKED_SHARE = 1 / 3
#: A teacher or a definition that lacks more of the grid than this is left out, rather than the prompts that it lacks.
_LACKING = 0.1


class PilotSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What a pilot trains and asks."""

    training: TrainingSettings = TrainingSettings()
    #: Weights of learnability; the run's own is added.
    alphas: list[UnitInterval] = msgspec.field(default_factory=lambda: [0.0, 0.4, 1.0])
    #: Definitions of learnability; empty means all, and the run's own is added.
    learnabilities: list[str] = []
    #: Prompts to learn from, and prompts to ask, at most.
    prompts: _AtLeastOne = 500
    asked: _AtLeastOne = 200
    #: Students per choice of responses; each has another seed, and another choice among tied responses.
    seeds: _AtLeastOne = 1
    #: What a student is judged by: the run's quality of its responses, or its likelihood of the best responses. None is
    #: the quality, where a scorer can be had for it that is no judge.
    by: By | None = None
    #: Of a response.
    max_tokens: _AtLeastOne = 512
    gpus: Annotated[int, Meta(ge=0, le=1)] = 0


class Definition(Struct, frozen=True):
    """A definition of the reward."""

    learnability: str
    alpha: float

    def __str__(self) -> str:
        """Its name for people."""
        return "quality alone" if self.alpha == 0 else f"{self.learnability}, alpha {self.alpha:g}"


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The responses that a student is trained on.

    names:    who chooses them: a teacher, definitions, or several that choose the same.
    unit:     the source, see `prediction.Trained`.
    teachers: (S, P) column of the chosen teacher for each seed and prompt.
    """

    names: list[str]
    unit: int
    teachers: NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All of a pilot that is read of the grid: P prompts to learn from, A to ask, T teachers, D definitions.

    spec, revision: the student before training.
    definitions:    with the rewards (P, T) of the prompts to learn from; `own` is the index of the run's.
    best:           (A, T) whether a response to a prompt to ask is one of the best by quality, and right.
    left_out:       why teachers and definitions are left out, by name.
    is_judged:      whether a judge, which may cost money, scores the students' responses.
    """

    run_id: int
    run: str
    settings: PilotSettings
    by: By
    is_scored: bool
    spec: ModelSpec
    revision: str | None
    learn_ids: list[int]
    asked_ids: list[int]
    teacher_ids: list[int]
    definitions: Mapping[Definition, Matrix]
    own: int
    choices: list[Choice]
    best: NDArray[np.bool_]
    left_out: Mapping[str, str]
    is_judged: bool = False

    def predicted(self) -> Matrix:
        """(D, M) mean reward, under each definition, of the responses that each student is trained on."""
        return np.array(
            [
                [_mean_reward(rewarded, choice.teachers) for choice in self.choices]
                for rewarded in self.definitions.values()
            ]
        )


def read(session: Session, run: Run, settings: PilotSettings) -> Plan:
    """Plan the pilot of a run.

    Raises `UsageError` for a run that is not scored yet or has no grid, a student that cannot be trained, and too few
    prompts that every teacher answered.
    """
    if run.learnability_scorer_id is None:
        raise UsageError(f"run {run.name} has no learnability whose definitions to compare: {grid.NOT_SCORED}")
    student, table = lookup.student(session, run)
    _require_ready(run, table.engine)
    by, is_scored = _measure(run, settings.by)
    names = [teacher.name for teacher in lookup.teachers(session, run.id)]
    cells, left_out = _grids(session, run, settings)
    own_cells = cells[load_config(run.config).run.learnability]
    kept = _kept_teachers(own_cells, names, left_out)
    complete = _complete(run, cells, kept, left_out)
    learn, asked = _divided(run, own_cells.is_holdout, complete, settings)
    definitions = _definitions(run, cells, kept, learn, settings)
    spec_options = {name: value for name, value in table.options.items() if name in FORM_OPTIONS}
    return Plan(
        run_id=run.id,
        run=run.name,
        settings=settings,
        by=by,
        is_scored=is_scored,
        spec=ModelSpec("", student.model, hub_revision(student.revision), settings.gpus, spec_options),
        revision=student.revision,
        learn_ids=own_cells.prompt_ids[learn].tolist(),
        asked_ids=own_cells.prompt_ids[asked].tolist(),
        teacher_ids=own_cells.teacher_ids[kept].tolist(),
        definitions=definitions,
        own=list(definitions).index(_own(run)),
        choices=_choices([names[column] for column in kept], definitions, settings.seeds),
        best=_best(session, run, own_cells.quality[np.ix_(asked, kept)]),
        left_out=left_out,
        is_judged=is_scored and load_config(run.config).scorers[0].kind == "judge",
    )


def choose(rewarded: Matrix, seed: int) -> NDArray[np.intp]:
    """(P,) column of the highest of (P, T) rewards; of equal ones by lots, which are the same for every definition."""
    lots = np.random.default_rng(seed).random(rewarded.shape)
    is_best = rewarded == rewarded.max(axis=1, keepdims=True)
    return np.asarray(np.where(is_best, lots, -1.0).argmax(axis=1))


def _require_ready(run: Run, engine: str) -> None:
    if run.stage in registry.reached("score"):
        how = scheduling.how_to_continue(run)
        raise UsageError(f"run {run.name} has not scored its calibration grid yet; to continue it: {how}")
    if engine not in ENGINES or ENGINES[engine].model != "weights":
        raise UsageError(
            f"run {run.name} has a student on engine {engine}, which cannot be trained here; a pilot needs a student "
            "that is a folder or a hub id"
        )


def _measure(run: Run, by: By | None) -> tuple[By, bool]:
    """What students are judged by, and whether their responses are scored."""
    kinds = [scorer.kind for scorer in load_config(run.config).scorers]
    can_score = len(kinds) == 1 and ENGINES[kinds[0]].judges_students
    if by == "quality" and not can_score:
        why = "which cannot score a student's responses" if len(kinds) == 1 else "which a pilot does not combine"
        raise UsageError(f"run {run.name}'s quality is {' and '.join(kinds)}, {why}; use --by likelihood")
    chosen: By = by or ("quality" if can_score and "judge" not in kinds else "likelihood")
    return chosen, can_score and ("judge" not in kinds or chosen == "quality")


def _own(run: Run) -> Definition:
    config = load_config(run.config).run
    return Definition(config.learnability, config.alpha)


def _grids(session: Session, run: Run, settings: PilotSettings) -> tuple[dict[str, grid.Grid], dict[str, str]]:
    """The run's grid under each definition of learnability, and why others are left out."""
    own = load_config(run.config).run.learnability
    wanted = settings.learnabilities or list(LEARNABILITIES)
    for name in wanted:
        LEARNABILITIES.require(name, "learnability")
    found, left_out = {own: grid.read(session, run)}, {}
    for name in wanted:
        if name != own:
            try:
                found[name] = grid.read(session, run, learnability=name)
            except UsageError as error:
                left_out[name] = str(error)
    return found, left_out


def _kept_teachers(cells: grid.Grid, names: Sequence[str], left_out: dict[str, str]) -> Indices:
    """The columns of teachers that answered nearly all prompts."""
    answered = (cells.n_responses > 0) & ~np.isnan(cells.quality)
    share = answered.mean(axis=0) if len(answered) else np.zeros(len(names))
    for name, part in zip(names, share, strict=True):
        if part < 1 - _LACKING:
            left_out[name] = f"only {part:.0%} of its responses to calibration prompts are there and have a quality"
    return np.flatnonzero(share >= 1 - _LACKING)


def _complete(run: Run, cells: dict[str, grid.Grid], kept: Indices, left_out: dict[str, str]) -> NDArray[np.bool_]:
    """(P,) prompts with a response of every teacher that has all scores; drops definitions that lack too many."""
    own = load_config(run.config).run
    first = cells[own.learnability]
    answered = (first.n_responses > 0) & ~np.isnan(first.quality)
    found: NDArray[np.bool_] = np.asarray(answered[:, kept].all(axis=1))
    if len(kept) < 2:
        raise UsageError(
            f"run {run.name} has {len(kept)} teachers whose responses to its calibration prompts are there and scored, "
            "and a pilot needs two; scores without responses cannot be trained on"
        )
    for name in list(cells):
        is_known = np.asarray(~np.isnan(cells[name].learnability[:, kept]).any(axis=1))
        share = float(is_known[np.flatnonzero(found)].mean()) if found.any() else 1.0
        if share >= 1 - _LACKING:
            found = np.asarray(found & is_known)
        elif name != own.learnability:
            del cells[name]
            left_out[name] = f"undefined or missing for {1 - share:.0%} of the prompts"
        else:
            raise UsageError(
                f"run {run.name} has no learnability of {1 - share:.0%} of its calibration responses: a pilot compares "
                "definitions of it, so the student must have scored them"
            )
    return found


def _divided(
    run: Run, is_holdout: NDArray[np.bool_], complete: NDArray[np.bool_], settings: PilotSettings
) -> tuple[Indices, Indices]:
    """Prompts to learn from, and prompts to ask: of the hold-out first."""
    chance = np.random.default_rng(0)
    held, others = (chance.permutation(np.flatnonzero(complete & part)) for part in (is_holdout, ~is_holdout))
    pool = np.concatenate([held, others])
    if len(pool) < LEAST_PROMPTS:
        raise UsageError(
            f"run {run.name} has {len(pool)} calibration prompts with a scored response of every teacher; "
            f"a pilot needs {LEAST_PROMPTS}, and some hundreds to tell anything"
        )
    n_asked = min(settings.asked, int(len(pool) * _ASKED_SHARE))
    return np.sort(pool[n_asked : n_asked + settings.prompts]), np.sort(pool[:n_asked])


def _definitions(
    run: Run, cells: Mapping[str, grid.Grid], kept: Indices, learn: Indices, settings: PilotSettings
) -> dict[Definition, Matrix]:
    """Every definition with its rewards of the prompts to learn from; without learnability they are all the same."""
    own = _own(run)
    alphas = sorted({*settings.alphas, own.alpha})
    wanted = [Definition(own.learnability, 0.0)] if 0.0 in alphas else []
    wanted += [Definition(name, alpha) for name in cells for alpha in alphas if alpha]
    return {
        each: rewards.combine(
            cells[each.learnability].quality[np.ix_(learn, kept)],
            cells[each.learnability].learnability[np.ix_(learn, kept)],
            alpha=each.alpha,
            how=cells[each.learnability].how,
        )
        for each in wanted
    }


def _choices(teachers: Sequence[str], definitions: Mapping[Definition, Matrix], seeds: int) -> list[Choice]:
    """A student for each teacher and each definition; the same responses are one student."""
    n_prompts = len(next(iter(definitions.values())))
    units = {name: unit for unit, name in enumerate([*teachers, *dict.fromkeys(map(_source, definitions))])}
    made = [
        Choice([name], units[name], np.full((seeds, n_prompts), column, dtype=np.intp))
        for column, name in enumerate(teachers)
    ]
    for each, rewarded in definitions.items():
        chosen = np.stack([choose(rewarded, seed) for seed in range(seeds)])
        same = next((choice for choice in made if np.array_equal(choice.teachers, chosen)), None)
        if same is not None:
            same.names.append(str(each))
        else:
            made.append(Choice([str(each)], units[_source(each)], chosen))
    return made


def _source(definition: Definition) -> str:
    return f"learnability {definition.learnability}" if definition.alpha else str(definition)


def _best(session: Session, run: Run, quality: Matrix) -> NDArray[np.bool_]:
    is_best = quality == quality.max(axis=1, keepdims=True)
    is_verdict = known_wrong(session, run, lookup.of_grid) is not None
    return np.asarray(is_best & (quality != WRONG) if is_verdict else is_best)


def _mean_reward(rewarded: Matrix, teachers: NDArray[np.intp]) -> float:
    return float(np.mean([np.take_along_axis(rewarded, row[:, None], axis=1).mean() for row in teachers]))
